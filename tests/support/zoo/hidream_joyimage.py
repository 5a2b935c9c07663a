"""Small image transformers with inputs for one forward pass of each: HiDream, PRX, Ernie, Ideogram 4, JoyImage.

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


def _text_mask(lengths: tuple[int, int] = (_TEXT, 4)) -> torch.Tensor:
    """``[2, text]``: whether a token is text rather than padding behind it."""
    return torch.arange(_TEXT) < torch.tensor(lengths)[:, None]


def _hidream_inputs(model: Any, noise: Noise, height: int = _HEIGHT, width: int = _WIDTH) -> dict[str, Any]:
    """An image that is not square is padded by the model to as many tokens as its largest has."""
    config = model.config
    t5_channels, llama_channels = config.caption_channels
    return {
        "hidden_states": noise(_BATCH, config.in_channels, 2 * height, 2 * width),
        "timesteps": torch.tensor(_STEPS),
        "encoder_hidden_states_t5": noise(_BATCH, 3, t5_channels),
        "encoder_hidden_states_llama3": noise(len(config.llama_layers), _BATCH, 5, llama_channels),
        "pooled_embeds": noise(_BATCH, config.text_emb_dim),
    }


def _hidream_square_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    return _hidream_inputs(model, noise, height=4, width=4)


def _hidream_packed_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Samples of different sizes and positions, packed by the caller; the second image starts further in."""
    config = model.config
    sizes, length = ((_HEIGHT, _WIDTH), (4, 2)), _TOKENS
    ids = torch.zeros(_BATCH, length, 3)
    masks = torch.zeros(_BATCH, length)
    for sample, (height, width) in enumerate(sizes):
        grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)) + 3 * sample
        ids[sample, : len(grid), 1:] = grid.float()
        masks[sample, : len(grid)] = 1
    packed = noise(_BATCH, length, config.in_channels * config.patch_size**2)
    return {
        **_hidream_inputs(model, noise),
        "hidden_states": packed * masks[..., None].to(noise.dtype),
        "img_ids": ids,
        "img_sizes": [(_HEIGHT, _WIDTH)] * _BATCH,  # the model stacks its outputs, so that it cuts all to one size
        "hidden_states_masks": masks.to(noise.dtype),
    }


_HIDREAM = f"{_MODELS}.transformer_hidream_image.HiDreamImageTransformer2DModel"
_HIDREAM_CONFIG = {
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 24,
    "num_attention_heads": 3,
    "caption_channels": [12, 10],
    "text_emb_dim": 8,
    # No mixture of experts: a last bit decides between experts, which would hide what rotation does to the outputs.
    "num_routed_experts": 0,
    "axes_dims_rope": (4, 12, 8),
    "max_resolution": (8, 8),
    "llama_layers": [0, 1, 2, 3],
}
_HIDREAM_RELEASED = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 128,
    "num_attention_heads": 20,
    "axes_dims_rope": (64, 32, 32),
    "llama_layers": [0, 1],
}


def _prx_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": noise(_BATCH, config.in_channels, _HEIGHT * config.patch_size, _WIDTH * config.patch_size),
        "timestep": torch.tensor([0.7, 0.3]).to(noise.dtype),
        "encoder_hidden_states": noise(_BATCH, _TEXT, config.context_in_dim),
        "attention_mask": _text_mask(),
    }


_PRX = f"{_MODELS}.transformer_prx.PRXTransformer2DModel"
_PRX_CONFIG = {
    "in_channels": 4,
    "context_in_dim": 12,
    "hidden_size": 60,
    "mlp_ratio": 1.5,
    "num_heads": 3,
    "depth": 2,
    "axes_dim": [8, 12],
}
_PRX_RELEASED = {"hidden_size": 1792, "num_heads": 28, "depth": 1, "axes_dim": [32, 32]}


def _ernie_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """An image's position on the first axis is the length of its text."""
    config = model.config
    return {
        "hidden_states": noise(_BATCH, config.in_channels, _HEIGHT, _WIDTH),
        "timestep": torch.tensor(_STEPS),
        "text_bth": noise(_BATCH, _TEXT, config.text_in_dim),
        "text_lens": torch.tensor([_TEXT, 4]),
    }


_ERNIE = f"{_MODELS}.transformer_ernie_image.ErnieImageTransformer2DModel"
_ERNIE_CONFIG = {
    "hidden_size": 72,
    "num_attention_heads": 3,
    "num_layers": 2,
    "ffn_hidden_size": 40,
    "in_channels": 4,
    "out_channels": 4,
    "text_in_dim": 12,
    "rope_axes_dim": (4, 12, 8),
}
_ERNIE_RELEASED = {
    "hidden_size": 3072,
    "num_attention_heads": 24,
    "num_layers": 1,
    "rope_axes_dim": (32, 48, 48),
}


def _ideogram_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Text before image, the second sample padded before its text; image positions are large, as in the pipeline."""
    from diffusers.models.transformers import transformer_ideogram4 as upstream

    length, pads = _TEXT + _TOKENS, (0, 3)
    positions = torch.zeros(_BATCH, length, 3, dtype=torch.long)
    segments = torch.ones(_BATCH, length, dtype=torch.long)
    indicator = torch.full((_BATCH, length), upstream.OUTPUT_IMAGE_INDICATOR)
    rows = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), torch.arange(_HEIGHT), torch.arange(_WIDTH))
    positions[:, _TEXT:] = rows + upstream.IMAGE_POSITION_OFFSET
    for sample, pad in enumerate(pads):
        positions[sample, pad:_TEXT] = torch.arange(_TEXT - pad)[:, None]
        segments[sample, :pad] = upstream.SEQUENCE_PADDING_INDICATOR
        indicator[sample, :pad] = 0
        indicator[sample, pad:_TEXT] = upstream.LLM_TOKEN_INDICATOR
    return {
        "hidden_states": noise(_BATCH, length, model.config.in_channels),
        "timestep": torch.tensor([0.7, 0.3]).to(noise.dtype),
        "encoder_hidden_states": noise(_BATCH, length, model.config.llm_features_dim),
        "position_ids": positions,
        "segment_ids": segments,
        "indicator": indicator,
    }


_IDEOGRAM = f"{_MODELS}.transformer_ideogram4.Ideogram4Transformer2DModel"
_IDEOGRAM_CONFIG = {
    "in_channels": 8,
    "num_layers": 2,
    "attention_head_dim": 24,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "adaln_dim": 16,
    "llm_features_dim": 12,
    "rope_theta": 5_000,
    "mrope_section": (5, 4, 3),
}
_IDEOGRAM_RELEASED = {
    "num_layers": 1,
    "attention_head_dim": 256,
    "num_attention_heads": 18,
    "rope_theta": 5_000_000,
    "mrope_section": (24, 20, 20),
}


def _joy_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": noise(_BATCH, config.in_channels, 2, 2 * _HEIGHT, 2 * _WIDTH),
        "timestep": torch.tensor(_STEPS),
        "encoder_hidden_states": noise(_BATCH, _TEXT, config.text_dim),
    }


def _joy_edit_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """An image and two to edit it by, which the model lays out along the first axis."""
    hidden_states = noise(_BATCH, 3, model.config.in_channels, 1, 2 * _HEIGHT, 2 * _WIDTH)
    return {**_joy_inputs(model, noise), "hidden_states": hidden_states}


def _joy_plus_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Images of different sizes in each sample; the second sample has fewer tokens and is padded behind them."""
    config = model.config
    shapes = [[(1, _HEIGHT, _WIDTH), (1, 2, 3), (2, 1, 2)], [(1, 2, 4), (1, 3, 2)]]
    tokens = max(sum(frames * height * width for frames, height, width in sample) for sample in shapes)
    return {
        **_joy_inputs(model, noise),
        "hidden_states": noise(_BATCH, tokens, config.in_channels, *config.patch_size),
        "encoder_hidden_states_mask": _text_mask().to(noise.dtype),
        "shape_list": shapes,
    }


_JOY = f"{_MODELS}.transformer_joyimage.JoyImageEditTransformer3DModel"
_JOY_PLUS = f"{_MODELS}.transformer_joyimage_edit_plus.JoyImageEditPlusTransformer3DModel"
_JOY_CONFIG = {
    "in_channels": 4,
    "hidden_size": 72,
    "num_attention_heads": 3,
    "text_dim": 12,
    "mlp_width_ratio": 1.5,
    "num_layers": 2,
    "rope_dim_list": [4, 12, 8],
}
_JOY_RELEASED = {
    "hidden_size": 3072,
    "num_attention_heads": 24,
    "num_layers": 1,
    "rope_dim_list": [16, 56, 56],
}

EXAMPLES: tuple[Example, ...] = (
    Example("hidream", _HIDREAM, _HIDREAM_CONFIG, _hidream_inputs, _HIDREAM_RELEASED),
    Example("hidream-square", _HIDREAM, _HIDREAM_CONFIG, _hidream_square_inputs, _HIDREAM_RELEASED),
    Example("hidream-packed", _HIDREAM, _HIDREAM_CONFIG, _hidream_packed_inputs, _HIDREAM_RELEASED),
    # As many channels of a head rotate as the axes have, or the first half of them.
    Example("hidream-half", _HIDREAM, {**_HIDREAM_CONFIG, "axes_dims_rope": (2, 6, 4)}, _hidream_inputs),
    Example("prx", _PRX, _PRX_CONFIG, _prx_inputs, _PRX_RELEASED),
    Example("ernie-image", _ERNIE, _ERNIE_CONFIG, _ernie_inputs, _ERNIE_RELEASED),
    Example("ernie-image-partial", _ERNIE, {**_ERNIE_CONFIG, "rope_axes_dim": (4, 8, 6)}, _ernie_inputs),
    Example("ideogram4", _IDEOGRAM, _IDEOGRAM_CONFIG, _ideogram_inputs, _IDEOGRAM_RELEASED),
    Example("joyimage", _JOY, _JOY_CONFIG, _joy_inputs, _JOY_RELEASED),
    Example("joyimage-edit", _JOY, _JOY_CONFIG, _joy_edit_inputs, _JOY_RELEASED),
    Example("joyimage-mrope", _JOY, {**_JOY_CONFIG, "rope_type": "mrope"}, _joy_inputs, _JOY_RELEASED),
    Example("joyimage-edit-plus", _JOY_PLUS, _JOY_CONFIG, _joy_plus_inputs, _JOY_RELEASED),
)
