"""Small image transformers with inputs for one forward pass of each: Lumina, HunyuanDiT, CogView4, GLM-Image, OmniGen.

Of two samples in a batch the second is the one with the shorter text, so that rows which differ per sample show.
"""

from __future__ import annotations

from typing import Any

import torch

from .example import Example, Noise

_MODELS = "diffusers.models.transformers"
_BATCH, _TEXT = 2, 7
_HEIGHT, _WIDTH = 3, 5  # of the grid after patching
_TOKENS = _HEIGHT * _WIDTH
_STEPS = (700, 300)


def _text_mask(tokens: int = _TEXT, lengths: tuple[int, int] = (6, 4)) -> torch.Tensor:
    """``[2, tokens]`` of ones and zeros: no sample fills the text, so that padding is met in each."""
    return (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()


def _latent(model: Any, noise: Noise, height: int = _HEIGHT, width: int = _WIDTH, batch: int = _BATCH) -> torch.Tensor:
    patch = model.config.patch_size
    return noise(batch, model.config.in_channels, height * patch, width * patch)


def _lumina2_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": _latent(model, noise),
        "timestep": torch.tensor([0.7, 0.3]).to(noise.dtype),
        "encoder_hidden_states": noise(_BATCH, _TEXT, model.config.cap_feat_dim),
        "encoder_attention_mask": _text_mask(),
    }


def _lumina2_unpadded_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Texts of one length, the only case in which the joint blocks have no mask."""
    return {**_lumina2_inputs(model, noise), "encoder_attention_mask": torch.ones(_BATCH, _TEXT, dtype=torch.bool)}


_LUMINA2 = f"{_MODELS}.transformer_lumina2.Lumina2Transformer2DModel"
_LUMINA2_CONFIG = {
    "in_channels": 4,
    "hidden_size": 96,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "multiple_of": 8,
    "ffn_dim_multiplier": 0.25,
    "axes_dim_rope": (4, 12, 8),
    "axes_lens": (40, 24, 32),
    "cap_feat_dim": 12,
}
_LUMINA2_RELEASED = {
    "hidden_size": 2304,
    "num_layers": 1,
    "num_attention_heads": 24,
    "num_kv_heads": 8,
    "axes_dim_rope": (32, 32, 32),
    "axes_lens": (300, 512, 512),
}


def _lumina_next_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Early in the denoising, where the pipeline scales positions; it makes a table of 384 x 384, larger than here."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return {
        "hidden_states": _latent(model, noise),
        "timestep": torch.tensor([0.2, 0.1]).to(noise.dtype),
        "encoder_hidden_states": noise(_BATCH, _TEXT, model.config.cross_attention_dim),
        "encoder_mask": _text_mask(),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(model.head_dim, 12, 10, linear_factor=1.5),
        "cross_attention_kwargs": {},
    }


def _lumina_next_proportional_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Scores scaled by the length of the sequence, as the pipeline asks for unless told not to, and late steps."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return {
        **_lumina_next_inputs(model, noise),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(model.head_dim, 12, 10, ntk_factor=1.5),
        "cross_attention_kwargs": {"base_sequence_length": 4},
    }


_LUMINA_NEXT = f"{_MODELS}.lumina_nextdit2d.LuminaNextDiT2DModel"
_LUMINA_NEXT_CONFIG = {
    "hidden_size": 80,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "multiple_of": 8,
    "ffn_dim_multiplier": 0.5,
    "cross_attention_dim": 12,
}
_LUMINA_NEXT_RELEASED = {"hidden_size": 2304, "num_layers": 1, "num_attention_heads": 32, "num_kv_heads": 8}


def _hunyuan_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """The table as the pipeline makes it for an image that is not square, with positions between whole numbers."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    config = model.config
    return {
        "hidden_states": _latent(model, noise),
        "timestep": torch.tensor(_STEPS).to(noise.dtype),
        "encoder_hidden_states": noise(_BATCH, config.text_len, config.cross_attention_dim),
        "text_embedding_mask": _text_mask(config.text_len, (config.text_len, 2)),
        "encoder_hidden_states_t5": noise(_BATCH, config.text_len_t5, config.cross_attention_dim_t5),
        "text_embedding_mask_t5": _text_mask(config.text_len_t5, (config.text_len_t5 - 1, 3)),
        "image_rotary_emb": get_2d_rotary_pos_embed(
            config.attention_head_dim, ((6, 0), (26, 32)), (_HEIGHT, _WIDTH), device=torch.device("cpu")
        ),
    }


def _hunyuan_controlnet_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    return {**_hunyuan_inputs(model, noise), "controlnet_cond": _latent(model, noise), "conditioning_scale": 0.8}


_HUNYUAN = f"{_MODELS}.hunyuan_transformer_2d.HunyuanDiT2DModel"
_HUNYUAN_CONTROLNET = "diffusers.models.controlnets.controlnet_hunyuan.HunyuanDiT2DControlNetModel"
_HUNYUAN_COMMON = {
    "num_attention_heads": 3,
    "attention_head_dim": 12,
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": 8,
    "hidden_size": 36,
    "mlp_ratio": 1.5,
    "cross_attention_dim": 10,
    "cross_attention_dim_t5": 16,  # eight heads pool it
    "pooled_projection_dim": 8,
    "text_len": 3,
    "text_len_t5": 6,
    "use_style_cond_and_image_meta_size": False,
}
_HUNYUAN_RELEASED = {"num_attention_heads": 16, "attention_head_dim": 88, "hidden_size": 1408}


def _cogview4_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": _latent(model, noise),
        "encoder_hidden_states": noise(_BATCH, _TEXT, model.config.text_embed_dim),
        "timestep": torch.tensor(_STEPS),
        "original_size": torch.tensor([[48.0, 80.0]] * _BATCH).to(noise.dtype),
        "target_size": torch.tensor([[48.0, 80.0], [96.0, 80.0]]).to(noise.dtype),
        "crop_coords": torch.tensor([[0.0, 8.0]] * _BATCH).to(noise.dtype),
    }


def _cogview4_table_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """A table of the caller's, as a trainer of many resolutions passes, and a mask of the text."""
    angles = torch.arange(1, _TOKENS + 1)[:, None] * torch.linspace(0.1, 1.3, model.config.attention_head_dim // 2)
    table = torch.cat([angles, angles], dim=-1)
    mask = _text_mask(lengths=(_TEXT, 4))
    return {**_cogview4_inputs(model, noise), "image_rotary_emb": (table.cos(), table.sin()), "attention_mask": mask}


_COGVIEW4 = f"{_MODELS}.transformer_cogview4.CogView4Transformer2DModel"
_COGVIEW4_CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 20,
    "num_attention_heads": 3,
    "text_embed_dim": 12,
    "time_embed_dim": 16,
    "condition_dim": 8,
    # Neither a multiple of the grid, whose rows and columns it stretches to these lengths and rounds down.
    "rope_axes_dim": (16, 12),
}
_COGVIEW4_RELEASED = {
    "num_layers": 1,
    "attention_head_dim": 128,
    "num_attention_heads": 32,
    "rope_axes_dim": (256, 256),
}


def _glm_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    tokens = torch.arange(_BATCH * _TOKENS).view(_BATCH, _TOKENS)
    return {
        "hidden_states": _latent(model, noise),
        "encoder_hidden_states": noise(_BATCH, _TEXT, model.config.text_embed_dim),
        "prior_token_id": tokens % model.config.prior_vq_quantizer_codebook_size,
        "prior_token_drop": torch.zeros_like(tokens, dtype=torch.bool),
        "timestep": torch.tensor(_STEPS),
        "target_size": torch.tensor([[48.0, 80.0]] * _BATCH).to(noise.dtype),
        "crop_coords": torch.tensor([[0.0, 8.0]] * _BATCH).to(noise.dtype),
    }


def _glm_edit_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Keys of an image to edit, which the pipeline has the model itself write without any text, before the steps."""
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    inputs = _glm_inputs(model, noise)
    tokens = torch.arange(4 * 2)[None]
    reference = {
        "hidden_states": _latent(model, noise, height=4, width=2, batch=1),
        "encoder_hidden_states": inputs["encoder_hidden_states"][:1, :0],
        "prior_token_id": tokens,
        "prior_token_drop": torch.zeros_like(tokens, dtype=torch.bool),
        "timestep": torch.zeros(1),
        "target_size": inputs["target_size"][:1],
        "crop_coords": inputs["crop_coords"][:1],
    }
    caches = GlmImageKVCache(len(model.transformer_blocks))
    caches.set_mode("write")
    with torch.no_grad():
        model(**reference, kv_caches=caches)
    caches.set_mode("read")
    return {**inputs, "kv_caches": caches}


_GLM = f"{_MODELS}.transformer_glm_image.GlmImageTransformer2DModel"
_GLM_CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 20,
    "num_attention_heads": 3,
    "text_embed_dim": 12,
    "time_embed_dim": 16,
    "condition_dim": 8,
    "prior_vq_quantizer_codebook_size": 16,
}
_GLM_RELEASED = {"num_layers": 1, "attention_head_dim": 128, "num_attention_heads": 32}


def _omnigen_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """A prompt around an image of 2 x 3 tokens; the second sample is shorter and padded on the left.

    Its positions are its own, but the model's rotation takes those of the first for both.
    """
    text, start, image = 11, 3, 6
    length, pad = text + 1 + _TOKENS, 2
    positions = torch.arange(length).repeat(_BATCH, 1)
    positions[1] = (positions[1] - pad).clamp(min=0)
    mask = torch.ones(length, length).tril().repeat(_BATCH, 1, 1)
    mask[:, start : start + image, start : start + image] = 1
    mask[:, text + 1 :] = 1
    mask[1, pad:, :pad] = 0
    return {
        "hidden_states": _latent(model, noise),
        "timestep": torch.tensor([0.7, 0.3]).to(noise.dtype),
        "input_ids": torch.arange(1, _BATCH * text + 1).view(_BATCH, text) % model.config.vocab_size,
        "input_img_latents": [_latent(model, noise, height=2, width=3, batch=1) for _ in range(_BATCH)],
        "input_image_sizes": {sample: [[start, start + image]] for sample in range(_BATCH)},
        "attention_mask": mask.to(noise.dtype),
        "position_ids": positions,
    }


def _omnigen_text_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    return {**_omnigen_inputs(model, noise), "input_img_latents": [], "input_image_sizes": {}}


_OMNIGEN = f"{_MODELS}.transformer_omnigen.OmniGenTransformer2DModel"
_OMNIGEN_CONFIG = {
    "hidden_size": 40,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "num_layers": 2,
    "pad_token_id": 0,
    "vocab_size": 32,
    "time_step_dim": 8,
    "pos_embed_max_size": 8,
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 32,
    "rope_scaling": {
        "short_factor": [1 + 0.1 * pair for pair in range(10)],
        "long_factor": [1 + 0.5 * pair for pair in range(10)],
    },
}
_OMNIGEN_RELEASED = {
    "hidden_size": 3072,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_layers": 1,
    "rope_scaling": {
        "short_factor": [1 + 0.01 * pair for pair in range(48)],
        "long_factor": [1 + 0.5 * pair for pair in range(48)],
    },
}

EXAMPLES: tuple[Example, ...] = (
    Example("lumina2", _LUMINA2, _LUMINA2_CONFIG, _lumina2_inputs, _LUMINA2_RELEASED),
    Example("lumina2-unpadded", _LUMINA2, {**_LUMINA2_CONFIG, "num_kv_heads": 4}, _lumina2_unpadded_inputs),
    Example("lumina-next", _LUMINA_NEXT, _LUMINA_NEXT_CONFIG, _lumina_next_inputs, _LUMINA_NEXT_RELEASED),
    Example(
        "lumina-next-proportional",
        _LUMINA_NEXT,
        _LUMINA_NEXT_CONFIG,
        _lumina_next_proportional_inputs,
        _LUMINA_NEXT_RELEASED,
    ),
    Example("lumina-next-no-norm", _LUMINA_NEXT, {**_LUMINA_NEXT_CONFIG, "qk_norm": False}, _lumina_next_inputs),
    Example(
        "hunyuan-dit",
        _HUNYUAN,
        {**_HUNYUAN_COMMON, "num_layers": 2},
        _hunyuan_inputs,
        {**_HUNYUAN_RELEASED, "num_layers": 1},
    ),
    Example(
        "hunyuan-dit-controlnet",
        _HUNYUAN_CONTROLNET,
        {**_HUNYUAN_COMMON, "transformer_num_layers": 6},  # half of them, less one, are in the control network
        _hunyuan_controlnet_inputs,
        {**_HUNYUAN_RELEASED, "transformer_num_layers": 4},
    ),
    Example("cogview4", _COGVIEW4, _COGVIEW4_CONFIG, _cogview4_inputs, _COGVIEW4_RELEASED),
    Example("cogview4-table", _COGVIEW4, _COGVIEW4_CONFIG, _cogview4_table_inputs, _COGVIEW4_RELEASED),
    Example("glm-image", _GLM, _GLM_CONFIG, _glm_inputs, _GLM_RELEASED),
    Example("glm-image-edit", _GLM, _GLM_CONFIG, _glm_edit_inputs, _GLM_RELEASED),
    Example("omnigen", _OMNIGEN, _OMNIGEN_CONFIG, _omnigen_inputs, _OMNIGEN_RELEASED),
    Example(
        "omnigen-long",  # more positions than the short factors are for
        _OMNIGEN,
        {**_OMNIGEN_CONFIG, "original_max_position_embeddings": 16},
        _omnigen_text_inputs,
        {**_OMNIGEN_RELEASED, "original_max_position_embeddings": 16},
    ),
)
