"""Small Cosmos, CogVideoX, ConsisID, Mochi, EasyAnimate and Allegro transformers with inputs for one forward pass."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from .example import Example, Noise

_DIFFUSERS = "diffusers.models"
_BATCH, _TEXT = 2, 7
_GRID = (3, 2, 5)  # frames, height, width of the token grid: no two alike


def _mask(tokens: int = _TEXT) -> torch.Tensor:
    """True ``[B, tokens]``, but for the last two tokens of the second prompt."""
    mask = torch.ones(_BATCH, tokens, dtype=torch.bool)
    mask[-1, -2:] = False
    return mask


def _timestep() -> torch.Tensor:
    return torch.tensor([981, 317])


def _embeddings(name: str, *args: Any, **options: Any) -> Any:
    """What diffusers' own function builds of the tables that a pipeline passes to the model."""
    return getattr(importlib.import_module(f"{_DIFFUSERS}.embeddings"), name)(*args, **options)


def _cosmos_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    config = model.config
    frames, height, width = (size * side for size, side in zip(_GRID, config.patch_size, strict=True))
    return {
        "hidden_states": noise(_BATCH, config.in_channels, frames, height, width),
        "timestep": _timestep(),
        "encoder_hidden_states": noise(_BATCH, _TEXT, config.text_embed_dim),
        "attention_mask": _mask(),
        "fps": 30,
        "padding_mask": torch.zeros(1, 1, height, width, dtype=noise.dtype),
    }


def _cosmos_transfer_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """A timestep per frame, a condition mask, an image besides the text, and residuals of a controlnet; no fps."""
    config = model.config
    inputs = _cosmos_inputs(model, noise)
    del inputs["attention_mask"], inputs["fps"]
    latents = inputs["hidden_states"][:, :-1]
    width = config.num_attention_heads * config.attention_head_dim
    return {
        **inputs,
        "hidden_states": latents,
        "condition_mask": (noise(*latents[:, :1].shape) > 0).to(noise.dtype),
        "timestep": noise(_BATCH, 1, _GRID[0], 1, 1).float().abs(),
        "encoder_hidden_states": (
            noise(_BATCH, _TEXT, config.crossattn_proj_in_channels),
            noise(_BATCH, config.img_context_num_tokens, config.img_context_dim_in),
        ),
        "block_controlnet_hidden_states": [noise(_BATCH, 30, width)],
    }


def _cosmos_control_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    config = model.config
    frames, height, width = (size * side for size, side in zip(_GRID, config.patch_size, strict=True))
    latents = (_BATCH, config.in_channels - 2, frames, height, width)
    return {
        "controls_latents": noise(*latents),
        "latents": noise(*latents),
        "timestep": _timestep().to(noise.dtype) / 1000,
        "encoder_hidden_states": (
            noise(_BATCH, _TEXT, config.text_embed_dim),
            noise(_BATCH, 4, config.img_context_dim_in),
        ),
        "condition_mask": (noise(_BATCH, 1, frames, height, width) > 0).to(noise.dtype),
        "padding_mask": torch.zeros(1, 1, height, width, dtype=noise.dtype),
    }


_COSMOS = f"{_DIFFUSERS}.transformers.transformer_cosmos.CosmosTransformer3DModel"
# Without a padding mask, for which diffusers needs torchvision. 14 channels: axes of 6, 4 and 4.
_COSMOS_CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 14,
    "num_layers": 2,
    "mlp_ratio": 2.0,
    "text_embed_dim": 12,
    "adaln_lora_dim": 4,
    "max_size": (4, 8, 12),
    "concat_padding_mask": False,
}
_COSMOS_TRANSFER = {
    "attention_head_dim": 16,
    "rope_scale": (1.0, 3.0, 3.0),
    "extra_pos_embed_type": None,
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 10,
    "encoder_hidden_states_channels": 12,
    "controlnet_block_every_n": 2,
    "img_context_dim_in": 6,
    "img_context_num_tokens": 4,
    # Image keys and values are projected from this width, which has to be the model's.
    "img_context_dim_out": 32,
}
_COSMOS_RELEASED = {"num_attention_heads": 32, "attention_head_dim": 128, "num_layers": 1, "mlp_ratio": 0.5}
_COSMOS_TRANSFER_RELEASED = {**_COSMOS_RELEASED, "num_attention_heads": 16, "img_context_dim_out": 2048}
_COSMOS_CONTROL_CONFIG = {
    "n_controlnet_blocks": 2,
    "in_channels": 6,
    "latent_channels": 6,
    "model_channels": 32,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "mlp_ratio": 2.0,
    "text_embed_dim": 12,
    "adaln_lora_dim": 4,
    "max_size": (4, 8, 12),
    "rope_scale": (1.0, 3.0, 3.0),
    "img_context_dim_in": 6,
    "img_context_dim_out": 32,
}
_COSMOS_CONTROL_RELEASED = {
    "n_controlnet_blocks": 1,
    "model_channels": 2048,
    "num_attention_heads": 16,
    "attention_head_dim": 128,
    "mlp_ratio": 0.5,
    "img_context_dim_out": 2048,
}


def _cogvideox_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """The tables are the pipeline's: positions of CogVideoX 1.0 cover a crop of the trained size, in broken steps."""
    config, (frames, height, width) = model.config, _GRID
    patch_t = getattr(config, "patch_size_t", None)
    if patch_t is None:
        options: dict[str, Any] = {"crops_coords": ((1, 0), (3, 4))}
    else:
        size = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
        options = {"crops_coords": None, "grid_type": "slice", "max_size": size}
    tables = _embeddings(
        "get_3d_rotary_pos_embed",
        config.attention_head_dim,
        grid_size=(height, width),
        temporal_size=frames,
        **options,
    )
    pixels = (height * config.patch_size, width * config.patch_size)
    return {
        "hidden_states": noise(_BATCH, frames * (patch_t or 1), config.in_channels, *pixels),
        "encoder_hidden_states": noise(_BATCH, _TEXT, config.text_embed_dim),
        "timestep": _timestep(),
        "image_rotary_emb": tables,
    }


def _cogvideox_15_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    return {**_cogvideox_inputs(model, noise), "ofs": torch.tensor([2.0]).to(noise.dtype)}


def _consisid_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    config = model.config
    return {
        **_cogvideox_inputs(model, noise),
        "id_cond": noise(_BATCH, config.LFE_id_dim),
        "id_vit_hidden": [noise(_BATCH, 3, config.LFE_vit_dim) for _ in range(config.LFE_num_scale)],
    }


_COGVIDEOX = f"{_DIFFUSERS}.transformers.cogvideox_transformer_3d.CogVideoXTransformer3DModel"
_COGVIDEOX_CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 12,
    "num_layers": 2,
    "sample_height": 6,
    "sample_width": 12,
    "sample_frames": 9,
    "max_text_seq_length": _TEXT,
    "use_rotary_positional_embeddings": True,
}
_COGVIDEOX_15 = {"patch_size_t": 2, "ofs_embed_dim": 8, "patch_bias": False}
_COGVIDEOX_RELEASED = {"num_attention_heads": 48, "attention_head_dim": 64, "num_layers": 1, "time_embed_dim": 512}
_CONSISID_FACE = {
    "is_train_face": True,
    "cross_attn_interval": 1,
    "cross_attn_dim_head": 4,
    "cross_attn_num_heads": 2,
    "LFE_id_dim": 6,
    "LFE_vit_dim": 10,
    "LFE_depth": 2,
    "LFE_dim_head": 4,
    "LFE_num_heads": 2,
    "LFE_num_id_token": 2,
    "LFE_num_querie": 3,
    # Two thirds of the model's width, which the model's cross-attention takes for granted.
    "LFE_output_dim": 21,
    "LFE_ff_mult": 1,
    "LFE_num_scale": 2,
}


def _mochi_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    config, (frames, height, width) = model.config, _GRID
    return {
        "hidden_states": noise(
            _BATCH, config.in_channels, frames, height * config.patch_size, width * config.patch_size
        ),
        "encoder_hidden_states": noise(_BATCH, _TEXT, config.text_embed_dim),
        "timestep": _timestep(),
        "encoder_attention_mask": _mask(),
    }


_MOCHI_CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "pooled_projection_dim": 12,
    "in_channels": 4,
    "text_embed_dim": 16,
    "time_embed_dim": 8,
    "max_sequence_length": _TEXT,
}


def _easyanimate_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    config = model.config
    inputs = _mochi_inputs(model, noise)
    del inputs["encoder_attention_mask"]
    inputs["hidden_states"] = inputs["hidden_states"][:, : config.out_channels]
    if config.in_channels > config.out_channels:
        shape = list(inputs["hidden_states"].shape)
        shape[1] = config.in_channels - config.out_channels
        inputs["inpaint_latents"] = noise(*shape)
    return inputs


# The last layer has no projections of its own for text: it norms the joint sequence, text first.
_EASYANIMATE_CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 9,
    "out_channels": 4,
    "patch_size": 2,
    "num_layers": 2,
    "mmdit_layers": 1,
    "time_embed_dim": 8,
    "text_embed_dim": 12,
}


def _allegro_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """The tables are the pipeline's: three of one axis each, and which row of each a token takes."""
    config, (frames, height, width) = model.config, _GRID
    *tables, _, _, _ = _embeddings(
        "get_3d_rotary_pos_embed_allegro",
        config.attention_head_dim,
        crops_coords=((0, 0), (height, width)),
        grid_size=(height, width),
        temporal_size=frames,
        interpolation_scale=(
            config.interpolation_scale_t,
            config.interpolation_scale_h,
            config.interpolation_scale_w,
        ),
    )
    rows = torch.cartesian_prod(*(torch.arange(size) for size in _GRID)).T.reshape(3, 1, -1).contiguous()
    return {
        "hidden_states": noise(
            _BATCH, config.in_channels, frames, height * config.patch_size, width * config.patch_size
        ),
        "encoder_hidden_states": noise(_BATCH, _TEXT, config.caption_channels),
        "timestep": _timestep(),
        "encoder_attention_mask": _mask(),
        "image_rotary_emb": (tuple(tables), tuple(rows)),
    }


_ALLEGRO_CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 18,
    "num_layers": 2,
    "cross_attention_dim": 36,
    "sample_height": 4,
    "sample_width": 10,
    "sample_frames": 3,
    "caption_channels": 12,
}

_COSMOS_CONTROL = Example(
    "cosmos-control",
    f"{_DIFFUSERS}.controlnets.controlnet_cosmos.CosmosControlNetModel",
    _COSMOS_CONTROL_CONFIG,
    _cosmos_control_inputs,
    _COSMOS_CONTROL_RELEASED,
)

EXAMPLES: tuple[Example, ...] = (
    Example("cosmos-1.0", _COSMOS, _COSMOS_CONFIG, _cosmos_inputs, _COSMOS_RELEASED),
    Example(
        "cosmos-2.5-transfer",
        _COSMOS,
        {**_COSMOS_CONFIG, **_COSMOS_TRANSFER},
        _cosmos_transfer_inputs,
        _COSMOS_TRANSFER_RELEASED,
    ),
    # Its forward resizes a padding mask with torchvision, whatever its configuration.
    *((_COSMOS_CONTROL,) if importlib.util.find_spec("torchvision") else ()),
    Example("cogvideox-1.0", _COGVIDEOX, _COGVIDEOX_CONFIG, _cogvideox_inputs, _COGVIDEOX_RELEASED),
    Example(
        "cogvideox-1.5",
        _COGVIDEOX,
        {**_COGVIDEOX_CONFIG, **_COGVIDEOX_15},
        _cogvideox_15_inputs,
        {**_COGVIDEOX_RELEASED, "ofs_embed_dim": 512},
    ),
    Example(
        "consisid",
        f"{_DIFFUSERS}.transformers.consisid_transformer_3d.ConsisIDTransformer3DModel",
        {**_COGVIDEOX_CONFIG, **_CONSISID_FACE},
        _consisid_inputs,
        {**_COGVIDEOX_RELEASED, "LFE_output_dim": 2048},
    ),
    Example(
        "mochi",
        f"{_DIFFUSERS}.transformers.transformer_mochi.MochiTransformer3DModel",
        _MOCHI_CONFIG,
        _mochi_inputs,
        # Two layers, the last of which is of another kind.
        {"num_attention_heads": 24, "attention_head_dim": 128},
    ),
    Example(
        "easyanimate",
        f"{_DIFFUSERS}.transformers.transformer_easyanimate.EasyAnimateTransformer3DModel",
        _EASYANIMATE_CONFIG,
        _easyanimate_inputs,
        {"num_attention_heads": 48, "attention_head_dim": 64},
    ),
    Example(
        "allegro",
        f"{_DIFFUSERS}.transformers.transformer_allegro.AllegroTransformer3DModel",
        _ALLEGRO_CONFIG,
        _allegro_inputs,
        {"num_attention_heads": 24, "attention_head_dim": 96, "num_layers": 1, "cross_attention_dim": 2304},
    ),
)
