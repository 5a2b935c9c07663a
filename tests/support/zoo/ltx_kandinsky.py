"""Small LTX, Helios and Kandinsky transformers with inputs for one forward pass of each."""

from __future__ import annotations

from typing import Any

import torch

from .example import Example, Noise

_DIFFUSERS = "diffusers.models.transformers"
_BATCH, _TEXT = 2, 7
_GRID = (2, 3, 5)  # frames, height, width of the token grid: no two alike
_TOKENS = 30


def _text_mask(batch: int = _BATCH, text: int = _TEXT) -> torch.Tensor:
    """Ones ``[B, L]``, but for the last two tokens of the last prompt."""
    mask = torch.ones(batch, text)
    mask[-1, -2:] = 0
    return mask


def _timestep(batch: int = _BATCH) -> torch.Tensor:
    return torch.tensor([981.0, 317.0])[:batch]


def _ltx_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    frames, height, width = _GRID
    return {
        "hidden_states": noise(_BATCH, _TOKENS, model.config.in_channels),
        "encoder_hidden_states": noise(_BATCH, _TEXT, model.config.caption_channels),
        "timestep": _timestep(),
        "encoder_attention_mask": _text_mask(),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


def _ltx_scaled_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    return {**_ltx_inputs(model, noise), "rope_interpolation_scale": (8 / 25, 32, 32)}


def _ltx_coords_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """The tokens of a grid and two conditioning tokens in front, the second video at another frame rate."""
    axes = [torch.arange(size, dtype=torch.float32) for size in _GRID]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
    grid = torch.cat([grid[:, 4:6], grid], dim=1) * torch.tensor([8 / 25, 32.0, 32.0])[:, None]
    coords = torch.stack([grid, grid * torch.tensor([1.5, 1.0, 1.0])[:, None]])
    inputs = {**_ltx_inputs(model, noise), "num_frames": None, "height": None, "width": None}
    inputs["hidden_states"] = noise(_BATCH, coords.shape[-1], model.config.in_channels)
    return {**inputs, "timestep": noise(_BATCH, coords.shape[-1]).float().abs() * 500, "video_coords": coords}


_LTX = f"{_DIFFUSERS}.transformer_ltx.LTXVideoTransformer3DModel"
# 40 channels: two pairs that stay unturned in front, and frequencies that straddle the two heads.
_LTX_CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 20,
    "cross_attention_dim": 40,
    "num_layers": 2,
    "caption_channels": 16,
}
_LTX_RELEASED = {"num_attention_heads": 32, "attention_head_dim": 64, "cross_attention_dim": 2048, "num_layers": 1}


def _ltx2_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    frames, height, width = _GRID
    config = model.config
    text = (config.caption_channels,) * 2
    if not config.use_prompt_embeddings:
        text = (config.cross_attention_dim, config.audio_cross_attention_dim)
    return {
        "hidden_states": noise(_BATCH, _TOKENS, config.in_channels),
        "audio_hidden_states": noise(_BATCH, 9, config.audio_in_channels),
        "encoder_hidden_states": noise(_BATCH, _TEXT, text[0]),
        "audio_encoder_hidden_states": noise(_BATCH, _TEXT, text[1]),
        "timestep": _timestep(),
        "sigma": _timestep() / 2,
        "encoder_attention_mask": _text_mask(),
        "audio_encoder_attention_mask": _text_mask(),
        "num_frames": frames,
        "height": height,
        "width": width,
        "fps": 25.0,
        "audio_num_frames": 9,
    }


def _ltx2_coords_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Coordinates as the pipelines pass them, two tokens of a keyframe appended, the second video at another rate."""
    frames, height, width = _GRID
    cpu = torch.device("cpu")
    coords = model.rope.prepare_video_coords(_BATCH, frames, height, width, cpu, fps=25.0)
    coords = torch.cat([coords, coords[:, :, 3:5] + 0.5], dim=2)
    coords[1, 0] *= 1.5
    return {
        **_ltx2_inputs(model, noise),
        "hidden_states": noise(_BATCH, _TOKENS + 2, model.config.in_channels),
        "video_coords": coords,
        "audio_coords": model.audio_rope.prepare_audio_coords(_BATCH, 9, cpu, shift=2),
    }


def _ltx2_guided_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Spatio-temporal guidance in the first block, of the second video only: the first one attends there."""
    guided = {"spatio_temporal_guidance_blocks": [0], "perturbation_mask": torch.tensor([1.0, 0.0]).to(noise.dtype)}
    return {**_ltx2_inputs(model, noise), **guided, "use_cross_timestep": True}


def _ltx2_perturbed_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Spatio-temporal guidance of all videos in the first block: no queries or keys there."""
    return {**_ltx2_inputs(model, noise), "spatio_temporal_guidance_blocks": [0], "use_cross_timestep": True}


_LTX2 = f"{_DIFFUSERS}.transformer_ltx2.LTX2VideoTransformer3DModel"
_LTX2_CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 20,
    "cross_attention_dim": 40,
    "audio_in_channels": 6,
    "audio_out_channels": 6,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 14,
    "audio_cross_attention_dim": 28,
    "num_layers": 2,
    "caption_channels": 16,
}
_LTX2_SPLIT = {**_LTX2_CONFIG, "rope_type": "split"}
_LTX2_3 = {
    **_LTX2_SPLIT,
    "gated_attn": True,
    "cross_attn_mod": True,
    "audio_gated_attn": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
}
_LTX2_RELEASED = {
    "num_attention_heads": 32,
    "attention_head_dim": 128,
    "cross_attention_dim": 4096,
    "audio_num_attention_heads": 32,
    "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 2048,
    "num_layers": 1,
}


def _helios_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": noise(_BATCH, config.in_channels, 2, 6, 10),
        "timestep": _timestep().long(),
        "encoder_hidden_states": noise(_BATCH, _TEXT, config.text_dim),
    }


def _helios_history_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Histories of 5, 3 and 2 frames before the video's 2; the coarser two do not fill their last patches.

    One list of frames serves the batch, as in the pipelines.
    """
    long, mid, short, current = torch.arange(12).unsqueeze(0).split([5, 3, 2, 2], dim=1)
    return {
        **_helios_inputs(model, noise),
        "indices_hidden_states": current,
        "indices_latents_history_short": short,
        "indices_latents_history_mid": mid,
        "indices_latents_history_long": long,
        "latents_history_short": noise(_BATCH, model.config.in_channels, 2, 6, 10),
        "latents_history_mid": noise(_BATCH, model.config.in_channels, 3, 6, 10),
        "latents_history_long": noise(_BATCH, model.config.in_channels, 5, 6, 10),
    }


def _helios_batch_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """The frames of each video of the batch are its own."""
    inputs = _helios_history_inputs(model, noise)
    rates = torch.tensor([[1], [3]])
    return {name: value * rates if name.startswith("indices") else value for name, value in inputs.items()}


_HELIOS = f"{_DIFFUSERS}.transformer_helios.HeliosTransformer3DModel"
_HELIOS_CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 20,
    "rope_dim": (8, 6, 6),
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
_HELIOS_RELEASED = {"num_attention_heads": 40, "attention_head_dim": 128, "rope_dim": (44, 42, 42), "num_layers": 1}


def _kandinsky5_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    config = model.config
    channels = config.in_visual_dim * (2 if config.visual_cond else 1) + config.visual_cond
    return {
        "hidden_states": noise(_BATCH, 2, 6, 10, channels),
        "encoder_hidden_states": noise(_BATCH, _TEXT, config.in_text_dim),
        "timestep": _timestep(),
        "pooled_projections": noise(_BATCH, config.in_text_dim2),
        "visual_rope_pos": [torch.arange(size) for size in _GRID],
        "text_rope_pos": torch.arange(_TEXT),
        "scale_factor": (1, 2, 3.16),
    }


def _kandinsky5_offset_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Positions that do not start at 0, in frames and text."""
    inputs = {**_kandinsky5_inputs(model, noise), "text_rope_pos": torch.arange(_TEXT) * 3}
    return {**inputs, "visual_rope_pos": [torch.arange(size) + 4 for size in _GRID]}


def _kandinsky5_sparse_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Sparse attention between tiles of 8 x 8 tokens, which reorders tokens and table."""
    for attention in model.modules():
        if hasattr(attention, "processor"):
            # The one backend that has it. model.set_attention_backend would set it for all other models, too.
            attention.processor._attention_backend = "flex"
    near = torch.eye(4, dtype=torch.bool)
    return {
        **_kandinsky5_inputs(model, noise),
        "hidden_states": noise(_BATCH, 2, 16, 32, model.visual_embeddings.in_layer.in_features // 4),
        "visual_rope_pos": [torch.arange(size) for size in (2, 8, 16)],
        "sparse_params": {"sta_mask": near[None, None], "attention_type": "nabla", "to_fractal": True, "P": 0.5},
    }


_KANDINSKY5 = f"{_DIFFUSERS}.transformer_kandinsky.Kandinsky5Transformer3DModel"
_KANDINSKY5_CONFIG = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 12,
    "time_dim": 16,
    "model_dim": 40,
    "ff_dim": 48,
    "num_text_blocks": 2,
    "num_visual_blocks": 2,
    "axes_dims": (4, 6, 10),
}
_KANDINSKY5_RELEASED = {"model_dim": 2048, "axes_dims": (16, 24, 24), "num_text_blocks": 1, "num_visual_blocks": 1}


def _kandinsky6_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """A last frame that repeats the position of the first, as in image-to-video."""
    config = model.config
    mask = torch.ones(_BATCH, _TEXT, dtype=torch.bool)
    mask[-1, -2:] = False
    return {
        "hidden_states": noise(_BATCH, 3, 6, 10, 2 * config.in_visual_dim + 1),
        "encoder_hidden_states": noise(_BATCH, _TEXT, config.in_text_dim),
        "pooled_projections": noise(_BATCH, config.in_text_dim2),
        "timestep": _timestep(),
        "audio_hidden_states": noise(_BATCH, 11, config.in_audio_dim),
        "visual_rope_pos": (torch.tensor([0, 1, 0]), torch.arange(3), torch.arange(5)),
        "encoder_attention_mask": mask,
    }


def _kandinsky6_video_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Without audio, at the positions of the grid."""
    inputs = {**_kandinsky6_inputs(model, noise), "audio_hidden_states": None, "visual_rope_pos": None}
    return {**inputs, "encoder_attention_mask": None}


_KANDINSKY6 = f"{_DIFFUSERS}.transformer_kandinsky6.Kandinsky6Transformer3DModel"
_KANDINSKY6_CONFIG = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 12,
    "time_dim": 16,
    "model_dim": 40,
    "ff_dim": 48,
    "num_text_blocks": 2,
    "num_visual_blocks": 2,
    "axes_dims": (4, 6, 10),
    "in_audio_dim": 6,
    "out_audio_dim": 6,
    "model_dim_a": 60,
    "audio_freqs_scaling": 0.5,
    "ca_rope": True,
    "cross_gates": True,
    "fix_modulation": True,
}
_KANDINSKY6_RELEASED = {
    "model_dim": 4096,
    "model_dim_a": None,
    "axes_dims": (32, 48, 48),
    "axes_dims_a": None,
    "num_text_blocks": 1,
    "num_visual_blocks": 1,
}


def _kandinsky6_sr_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    channels = 2 * model.config.in_visual_dim + 1
    return {"hidden_states": noise(_BATCH, 3, 8, 16, channels), "timestep": _timestep()}


_KANDINSKY6_SR = f"{_DIFFUSERS}.transformer_kandinsky6_sr.Kandinsky6SRTransformer3DModel"
_KANDINSKY6_SR_CONFIG = {
    "in_visual_dim": 4,
    "out_visual_dim": 8,
    "time_dim": 16,
    "model_dim": 40,
    "ff_dim": 48,
    "num_visual_blocks": 2,
    "axes_dims": (4, 6, 10),
    "nabla_window": (1, 1, 1),
}
_KANDINSKY6_SR_RELEASED = {"model_dim": 1792, "axes_dims": (16, 24, 24), "num_visual_blocks": 1}

EXAMPLES: tuple[Example, ...] = (
    Example("ltx-padded", _LTX, _LTX_CONFIG, _ltx_scaled_inputs, _LTX_RELEASED),
    Example(
        "ltx-unscaled",
        _LTX,
        {**_LTX_CONFIG, "num_attention_heads": 3, "attention_head_dim": 16, "cross_attention_dim": 48},
        _ltx_inputs,
        _LTX_RELEASED,
    ),
    Example("ltx-coords", _LTX, _LTX_CONFIG, _ltx_coords_inputs, _LTX_RELEASED),
    Example("ltx2-split", _LTX2, _LTX2_SPLIT, _ltx2_inputs, _LTX2_RELEASED),
    Example("ltx2-split-coords", _LTX2, _LTX2_SPLIT, _ltx2_coords_inputs, _LTX2_RELEASED),
    Example(
        # Cross-modal tables follow the video's head count on one side, which need not be the audio's.
        "ltx2-split-uneven-heads",
        _LTX2,
        {**_LTX2_SPLIT, "audio_num_attention_heads": 4, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 32},
        _ltx2_inputs,
        _LTX2_RELEASED,
    ),
    Example(
        "ltx2-interleaved",
        _LTX2,
        {**_LTX2_CONFIG, "rope_double_precision": False},
        _ltx2_inputs,
        _LTX2_RELEASED,
    ),
    Example("ltx2-interleaved-coords", _LTX2, _LTX2_CONFIG, _ltx2_coords_inputs, _LTX2_RELEASED),
    Example("ltx2.3-guided", _LTX2, _LTX2_3, _ltx2_guided_inputs, _LTX2_RELEASED),
    Example("ltx2.3-perturbed", _LTX2, _LTX2_3, _ltx2_perturbed_inputs, _LTX2_RELEASED),
    Example("helios-history", _HELIOS, _HELIOS_CONFIG, _helios_history_inputs, _HELIOS_RELEASED),
    Example("helios-history-batch", _HELIOS, _HELIOS_CONFIG, _helios_batch_inputs, _HELIOS_RELEASED),
    Example("helios-plain", _HELIOS, _HELIOS_CONFIG, _helios_inputs, _HELIOS_RELEASED),
    Example("kandinsky5", _KANDINSKY5, _KANDINSKY5_CONFIG, _kandinsky5_inputs, _KANDINSKY5_RELEASED),
    Example(
        "kandinsky5-offset",
        _KANDINSKY5,
        {**_KANDINSKY5_CONFIG, "visual_cond": True},
        _kandinsky5_offset_inputs,
        _KANDINSKY5_RELEASED,
    ),
    Example(
        "kandinsky5-sparse",
        _KANDINSKY5,
        _KANDINSKY5_CONFIG,
        _kandinsky5_sparse_inputs,
        _KANDINSKY5_RELEASED,
        trains=False,  # flex attention has no backward pass on CPU
    ),
    Example("kandinsky6", _KANDINSKY6, _KANDINSKY6_CONFIG, _kandinsky6_inputs, _KANDINSKY6_RELEASED),
    Example(
        # Without cross-modal rotation, audio heads may be of another width than the video's.
        "kandinsky6-plain-cross",
        _KANDINSKY6,
        {**_KANDINSKY6_CONFIG, "ca_rope": False, "axes_dims_a": (2, 4, 6)},
        _kandinsky6_inputs,
        _KANDINSKY6_RELEASED,
    ),
    Example("kandinsky6-video", _KANDINSKY6, _KANDINSKY6_CONFIG, _kandinsky6_video_inputs, _KANDINSKY6_RELEASED),
    Example(
        "kandinsky6-sr",
        _KANDINSKY6_SR,
        _KANDINSKY6_SR_CONFIG,
        _kandinsky6_sr_inputs,
        _KANDINSKY6_SR_RELEASED,
        trains=False,  # it attends by flex attention
    ),
)
