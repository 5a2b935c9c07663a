"""Small Hunyuan and Motif transformers with inputs for one forward pass of each: text follows the image, unturned."""

from __future__ import annotations

from typing import Any

import torch

from .example import Example, Noise

_DIFFUSERS = "diffusers.models.transformers"
_BATCH, _TEXT = 2, 7
_GRID = (3, 2, 5)  # frames, height, width of the token grid: no two alike


def _latents(noise: Noise, channels: int, *patch: int, grid: tuple[int, ...] = _GRID) -> torch.Tensor:
    """``[B, C, *sizes]`` that patches of ``patch`` turn into ``grid`` tokens."""
    return noise(_BATCH, channels, *(size * side for size, side in zip(grid, patch, strict=True)))


def _mask(tokens: int = _TEXT) -> torch.Tensor:
    """Ones ``[B, tokens]``, but for the last two tokens of the second prompt."""
    mask = torch.ones(_BATCH, tokens, dtype=torch.long)
    mask[-1, -2:] = 0
    return mask


def _timestep(dtype: torch.dtype = torch.long) -> torch.Tensor:
    return torch.tensor([981, 317]).to(dtype)


def _guidance(model: Any, dtype: torch.dtype) -> torch.Tensor | None:
    return torch.tensor([6000.0, 1000.0]).to(dtype) if model.config.guidance_embeds else None


def _hunyuan_video_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": _latents(noise, config.in_channels, config.patch_size_t, config.patch_size, config.patch_size),
        "timestep": _timestep(),
        "encoder_hidden_states": noise(_BATCH, _TEXT, config.text_embed_dim),
        "encoder_attention_mask": _mask(),
        "pooled_projections": noise(_BATCH, config.pooled_projection_dim),
        "guidance": _guidance(model, noise.dtype),
    }


_HUNYUAN_VIDEO = f"{_DIFFUSERS}.transformer_hunyuan_video.HunyuanVideoTransformer3DModel"
_HUNYUAN_VIDEO_CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": 12,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 6, 8),
}
# A narrow MLP and no text refiner: they meet no rotation, and are most of the weights.
_HUNYUAN_VIDEO_RELEASED = {
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 0,
    "mlp_ratio": 0.5,
    "rope_axes_dim": (16, 56, 56),
}


def _framepack_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """A video of three frames, and a history at three resolutions, none of which is a multiple of what it is pooled by.

    Frame indices are those of a section in the middle: histories first, then a gap, and the clean frames at both ends.
    """
    channels, patch, (frames, height, width) = model.config.in_channels, model.config.patch_size, (3, 3, 5)
    height, width = height * patch, width * patch
    return {
        **_hunyuan_video_inputs(model, noise),
        "hidden_states": noise(_BATCH, channels, frames, height, width),
        "image_embeds": noise(_BATCH, 4, model.config.image_proj_dim),
        "indices_latents": torch.arange(10, 10 + frames),
        "latents_clean": noise(_BATCH, channels, 2, height, width),
        "indices_latents_clean": torch.tensor([0, 13]),
        "latents_history_2x": noise(_BATCH, channels, 3, height, width),
        "indices_latents_history_2x": torch.arange(14, 17),
        "latents_history_4x": noise(_BATCH, channels, 5, height, width),
        "indices_latents_history_4x": torch.arange(17, 22),
    }


def _hunyuan_video_15_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    config, text_2, image = model.config, 5, 3
    embeds = noise(_BATCH, image, config.image_embed_dim)
    return {
        "hidden_states": _latents(noise, config.in_channels, config.patch_size_t, config.patch_size, config.patch_size),
        "timestep": _timestep(noise.dtype),
        "timestep_r": _timestep(noise.dtype) / 2 if config.use_meanflow else None,
        "encoder_hidden_states": noise(_BATCH, _TEXT, config.text_embed_dim),
        "encoder_attention_mask": _mask(),
        "encoder_hidden_states_2": noise(_BATCH, text_2, config.text_embed_2_dim),
        "encoder_attention_mask_2": _mask(text_2),
        # The model takes zeros for the absence of an image.
        "image_embeds": embeds if config.task_type == "i2v" else torch.zeros_like(embeds),
    }


_HUNYUAN_VIDEO_15 = f"{_DIFFUSERS}.transformer_hunyuan_video15.HunyuanVideo15Transformer3DModel"
_HUNYUAN_VIDEO_15_CONFIG = {
    "in_channels": 9,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": 12,
    "text_embed_2_dim": 10,
    "image_embed_dim": 6,
    "rope_axes_dim": (2, 6, 8),
}
_HUNYUAN_VIDEO_15_RELEASED = {
    "num_attention_heads": 16,
    "attention_head_dim": 128,
    "num_layers": 1,
    "num_refiner_layers": 0,
    "mlp_ratio": 0.5,
    "rope_axes_dim": (16, 56, 56),
}


def _hunyuan_image_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    config, text_2 = model.config, 5
    grid = _GRID[-len(config.patch_size) :]
    inputs = {
        "hidden_states": _latents(noise, config.in_channels, *config.patch_size, grid=grid),
        "timestep": _timestep(noise.dtype),
        "timestep_r": _timestep(noise.dtype) / 2 if config.use_meanflow else None,
        "encoder_hidden_states": noise(_BATCH, _TEXT, config.text_embed_dim),
        "encoder_attention_mask": _mask(),
        "guidance": _guidance(model, noise.dtype),
    }
    if config.text_embed_2_dim is not None:
        inputs["encoder_hidden_states_2"] = noise(_BATCH, text_2, config.text_embed_2_dim)
        inputs["encoder_attention_mask_2"] = _mask(text_2)
    return inputs


_HUNYUAN_IMAGE = f"{_DIFFUSERS}.transformer_hunyuanimage.HunyuanImageTransformer2DModel"
_HUNYUAN_IMAGE_CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "patch_size": (2, 1),
    "text_embed_dim": 12,
    "text_embed_2_dim": 10,
    "rope_axes_dim": (6, 10),
}
_HUNYUAN_IMAGE_RELEASED = {
    "num_attention_heads": 28,
    "attention_head_dim": 128,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 0,
    "mlp_ratio": 0.5,
    "rope_axes_dim": (64, 64),
}


def _motif_video_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    config = model.config
    with_image = config.image_embed_dim is not None
    return {
        "hidden_states": _latents(noise, config.in_channels, config.patch_size_t, config.patch_size, config.patch_size),
        "timestep": _timestep(),
        "encoder_hidden_states": noise(_BATCH, _TEXT, config.text_embed_dim),
        "encoder_attention_mask": _mask() if with_image else None,
        "image_embeds": noise(_BATCH, 4, config.image_embed_dim) if with_image else None,
    }


_MOTIF_VIDEO = f"{_DIFFUSERS}.transformer_motif_video.MotifVideoTransformer3DModel"
_MOTIF_VIDEO_CONFIG = {
    "in_channels": 9,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "mlp_ratio": 2.0,
    "text_embed_dim": 12,
    "rope_axes_dim": (2, 6, 8),
}
# Text cross-attention, of which queries rotate and keys do not, and a last block that reads image tokens as its text.
_MOTIF_VIDEO_CROSS = {
    "image_embed_dim": 6,
    "num_decoder_layers": 1,
    "enable_text_cross_attention_dual": True,
    "enable_text_cross_attention_single": True,
}
_MOTIF_VIDEO_RELEASED = {
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 1,
    "num_single_layers": 1,
    "mlp_ratio": 0.5,
    "rope_axes_dim": (16, 56, 56),
}

EXAMPLES: tuple[Example, ...] = (
    Example("hunyuan-video", _HUNYUAN_VIDEO, _HUNYUAN_VIDEO_CONFIG, _hunyuan_video_inputs, _HUNYUAN_VIDEO_RELEASED),
    Example(
        "hunyuan-video-token-replace",
        _HUNYUAN_VIDEO,
        {**_HUNYUAN_VIDEO_CONFIG, "image_condition_type": "token_replace", "guidance_embeds": False},
        _hunyuan_video_inputs,
        _HUNYUAN_VIDEO_RELEASED,
    ),
    Example(
        "hunyuan-video-no-norm",
        _HUNYUAN_VIDEO,
        {**_HUNYUAN_VIDEO_CONFIG, "qk_norm": None, "patch_size_t": 2},
        _hunyuan_video_inputs,
        _HUNYUAN_VIDEO_RELEASED,
    ),
    Example(
        "hunyuan-video-framepack",
        f"{_DIFFUSERS}.transformer_hunyuan_video_framepack.HunyuanVideoFramepackTransformer3DModel",
        # Without any of the three histories or their embedders its forward fails.
        {**_HUNYUAN_VIDEO_CONFIG, "has_image_proj": True, "image_proj_dim": 6, "has_clean_x_embedder": True},
        _framepack_inputs,
        _HUNYUAN_VIDEO_RELEASED,
    ),
    Example(
        "hunyuan-video-1.5-t2v",
        _HUNYUAN_VIDEO_15,
        {**_HUNYUAN_VIDEO_15_CONFIG, "task_type": "t2v"},
        _hunyuan_video_15_inputs,
        _HUNYUAN_VIDEO_15_RELEASED,
    ),
    Example(
        "hunyuan-video-1.5-i2v-meanflow",
        _HUNYUAN_VIDEO_15,
        {**_HUNYUAN_VIDEO_15_CONFIG, "use_meanflow": True, "patch_size": 2},
        _hunyuan_video_15_inputs,
        _HUNYUAN_VIDEO_15_RELEASED,
    ),
    Example("hunyuan-image", _HUNYUAN_IMAGE, _HUNYUAN_IMAGE_CONFIG, _hunyuan_image_inputs, _HUNYUAN_IMAGE_RELEASED),
    Example(
        "hunyuan-image-refiner",
        _HUNYUAN_IMAGE,
        {
            **_HUNYUAN_IMAGE_CONFIG,
            "patch_size": (1, 2, 1),
            "rope_axes_dim": (2, 6, 8),
            "text_embed_2_dim": None,
            "guidance_embeds": True,
            "use_meanflow": True,
        },
        _hunyuan_image_inputs,
        {**_HUNYUAN_IMAGE_RELEASED, "rope_axes_dim": (16, 56, 56)},
    ),
    Example("motif-video", _MOTIF_VIDEO, _MOTIF_VIDEO_CONFIG, _motif_video_inputs, _MOTIF_VIDEO_RELEASED),
    Example(
        "motif-video-cross-attention",
        _MOTIF_VIDEO,
        {**_MOTIF_VIDEO_CONFIG, **_MOTIF_VIDEO_CROSS},
        _motif_video_inputs,
        # One block of either kind: the first single block has cross-attention, the last reads image tokens.
        {**_MOTIF_VIDEO_RELEASED, "num_single_layers": 2},
    ),
)
