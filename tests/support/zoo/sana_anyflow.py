"""Small MiniMax H3, Sana, AnyFlow and Wan-Animate-2 transformers with inputs for one forward pass of each."""

from __future__ import annotations

from typing import Any

import torch

from .example import Example, Noise

_DIFFUSERS = "diffusers.models.transformers"
_BATCH, _TEXT = 2, 7
_CPU = torch.device("cpu")


def _text_mask() -> torch.Tensor:
    """Ones ``[B, L]``, but for the last two tokens of the last prompt."""
    mask = torch.ones(_BATCH, _TEXT)
    mask[-1, -2:] = 0
    return mask


def _timestep() -> torch.Tensor:
    return torch.tensor([981.0, 317.0])


def _minimax_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """One packed sequence: text, a conditioning frame, sound of two channels, and the video at fractional times."""
    config = model.config
    frames, height, width, sound = 2, 3, 5, 4
    grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double() * 0.75
    rows = height * width
    text, condition, audio, video = torch.arange(_TEXT + rows * (frames + 1) + 2 * sound).split(
        [_TEXT, rows, 2 * sound, rows * frames]
    )
    positions = torch.zeros(len(text) + len(condition) + len(audio) + len(video), 3, dtype=torch.float64)
    positions[text, 0] = text.double()
    positions[condition, 0] = _TEXT
    positions[condition, 1:] = grid
    positions[audio, 0] = _TEXT + torch.arange(sound).repeat(2).double()
    positions[audio, 2] = grid[-1, 1] * torch.tensor([0, 1]).repeat_interleave(sound)
    positions[video, 0] = _TEXT + torch.tensor([0.0, 5 / 3]).repeat_interleave(rows).double()
    positions[video, 1:] = grid.repeat(frames, 1)
    tags = torch.zeros(len(positions), dtype=torch.long)
    tags[text], tags[audio] = 1, 2
    times = torch.zeros(len(positions), dtype=torch.long)
    times[audio], times[condition] = 1, 2
    patch = config.in_channels * config.patch_size[1] * config.patch_size[2]
    return {
        "hidden_states": noise(_BATCH, len(condition) + len(video), patch),
        "audio_hidden_states": noise(_BATCH, len(audio), config.audio_in_channels),
        "encoder_hidden_states": noise(_BATCH, _TEXT, config.text_dim),
        "timestep": torch.tensor([0.7, 0.3, 1.0]),
        "timestep_indices": times,
        "token_tags": tags,
        "position_ids": positions,
        "video_indices": torch.cat([condition, video]),
        "audio_indices": audio,
        "text_indices": text,
    }


_MINIMAX = f"{_DIFFUSERS}.transformer_minimax_h3.MiniMaxH3Transformer3DModel"
# 18 of 24 channels rotate; heads are wider together than the residual stream, as released.
_MINIMAX_CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "hidden_size": 40,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "ffn_dim": 32,
    "in_channels": 4,
    "audio_in_channels": 6,
    "text_dim": 16,
    "freq_dim": 16,
    "time_embed_hidden_dim": 24,
    "time_embed_dim": 16,
    "rope_freq_dim": 3,
}
_MINIMAX_RELEASED = {
    "num_attention_heads": 56,
    "attention_head_dim": 128,
    "hidden_size": 5376,
    "rope_freq_dim": 16,
    "num_layers": 1,
}


def _sana_video_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(_BATCH, model.config.in_channels, 2, 6, 10),
        "encoder_hidden_states": noise(_BATCH, _TEXT, model.config.caption_channels),
        "timestep": _timestep(),
        "encoder_attention_mask": _text_mask(),
    }


_SANA_VIDEO = f"{_DIFFUSERS}.transformer_sana_video.SanaVideoTransformer3DModel"
_SANA_VIDEO_CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 20,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 20,
    "cross_attention_dim": 40,
    "caption_channels": 16,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
_SANA_VIDEO_RELEASED = {
    "num_attention_heads": 20,
    "attention_head_dim": 112,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "num_layers": 1,
}


def _sana_wm_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Without cameras."""
    config = model.config
    return {
        "hidden_states": noise(_BATCH, config.in_channels, 2, 3, 5),
        "timestep": _timestep()[:, None, None] * torch.tensor([0.0, 1.0]),
        "encoder_hidden_states": noise(_BATCH, 1, _TEXT, config.caption_channels),
        "mask": _text_mask(),
        "chunk_plucker": noise(_BATCH, config.chunk_plucker_channels, 2, 3, 5),
    }


def _sana_wm_camera_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Rays of cameras that turn and move, computed before, because the model computes them in float32 at least."""
    rotation = noise(_BATCH, 30).float() / 4
    rays = torch.eye(4).repeat(_BATCH, 30, 1, 1)
    rays[..., 0, 0] = rays[..., 2, 2] = rotation.cos()
    rays[..., 0, 2], rays[..., 2, 0] = rotation.sin(), -rotation.sin()
    rays[..., 2, 3] = rotation.abs()
    cameras = {
        "absmap": noise(_BATCH, 3, 2, 3, 5),
        "P": rays.to(noise.dtype),
        "P_inv": torch.linalg.inv(rays).to(noise.dtype),
    }
    inputs = {**_sana_wm_inputs(model, noise), "camera_conditions": noise(_BATCH, 2, 20)}
    return {**inputs, "cam_pos_embeds": cameras}


_SANA_WM = f"{_DIFFUSERS}.transformer_sana_wm.SanaWMTransformer3DModel"
# One block of linear and one of softmax attention.
_SANA_WM_CONFIG = {
    "in_channels": 8,
    "num_layers": 2,
    "softmax_every_n": 2,
    "hidden_size": 80,
    "num_attention_heads": 2,
    "linear_head_dim": 40,
    "chunk_plucker_channels": 6,
    "caption_channels": 16,
}
_SANA_WM_RELEASED = {"hidden_size": 2240, "num_attention_heads": 20, "linear_head_dim": 112}


def _refiner_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(_BATCH, 30, model.config.in_channels),
        "encoder_hidden_states": noise(_BATCH, _TEXT, model.config.caption_channels),
        "timestep": noise(_BATCH, 30).float().abs() * 500,
        "video_rotary_emb": model.build_rotary_emb_for_absolute_positions(_BATCH, [5, 6], 3, 5, _CPU, 16.0),
        "encoder_attention_mask": _text_mask(),
    }


def _refiner_cached_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Keys of one frame that are rotated in this pass, and of one that were rotated when they were cached."""
    from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache

    cache = SanaWMRefinerKVCache(len(model.transformer_blocks))
    width = model.config.num_attention_heads * model.config.attention_head_dim
    cache.sink_pe = model.build_rotary_emb_for_absolute_positions(_BATCH, [3], 3, 5, _CPU, 16.0)
    for layer in cache.layer_caches:
        layer.store_sink(noise(_BATCH, 15, width), noise(_BATCH, 15, width))
        layer.store_history(noise(_BATCH, 15, width), noise(_BATCH, 15, width))
    return {**_refiner_inputs(model, noise), "kv_cache": cache, "kv_cache_mode": "inject"}


_REFINER = f"{_DIFFUSERS}.transformer_sana_wm_refiner.SanaWMLTX2RefinerTransformer3DModel"
_REFINER_CONFIG = {
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
_REFINER_RELEASED = {
    "num_attention_heads": 32,
    "attention_head_dim": 128,
    "cross_attention_dim": 4096,
    "num_layers": 1,
}


def _anyflow_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": noise(_BATCH, 2, config.in_channels, 6, 10),
        "timestep": _timestep()[:, None].expand(_BATCH, 2),
        "r_timestep": _timestep()[:, None].expand(_BATCH, 2) / 2,
        "encoder_hidden_states": noise(_BATCH, _TEXT, config.text_dim),
    }


_ANYFLOW = f"{_DIFFUSERS}.transformer_anyflow.AnyFlowTransformer3DModel"
_ANYFLOW_CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 20,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
_ANYFLOW_RELEASED = {"num_attention_heads": 40, "attention_head_dim": 128, "num_layers": 1}

# Chunks of frames. Those before the last two are kept at half the height and width.
_CHUNKS = [1, 2, 1, 2]
_FULL, _COMPRESSED = 4 * 10, 2 * 5  # tokens of a frame


def _far_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """All chunks at once, as in training."""
    frames = sum(_CHUNKS)
    return {
        "hidden_states": noise(_BATCH, frames, model.config.in_channels, 8, 20),
        "timestep": _timestep()[:, None].expand(_BATCH, frames),
        "r_timestep": _timestep()[:, None].expand(_BATCH, frames) / 2,
        "encoder_hidden_states": noise(_BATCH, _TEXT, model.config.text_dim),
        "chunk_partition": _CHUNKS,
    }


def _far_clean_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """The last two chunks twice, noisy and clean, at the same positions."""
    clean = {
        "clean_hidden_states": noise(_BATCH, 3, model.config.in_channels, 8, 20),
        "clean_timestep": torch.zeros(_BATCH, 3),
    }
    return {**_far_inputs(model, noise), **clean}


def _far_cache(model: Any, noise: Noise) -> list[dict[str, torch.Tensor]]:
    """Keys and values ``[2, B, H, S, D]`` of each layer, keys unrotated."""
    config = model.config
    outer = (2, _BATCH, config.num_attention_heads)
    return [
        {
            "full_cache": noise(*outer, 4 * _FULL, config.attention_head_dim),
            "compressed_cache": noise(*outer, 6 * _COMPRESSED, config.attention_head_dim),
        }
        for _ in range(config.num_layers)
    ]


def _far_cached_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """The last chunk, which attends to three cached ones: keys of 90 tokens more than queries."""
    inputs = _far_inputs(model, noise)
    last = {name: inputs[name][:, -2:] for name in ("hidden_states", "timestep", "r_timestep")}
    flags = {"num_cached_chunks": 3, "is_cache_step": False}
    return {**inputs, **last, "kv_cache": _far_cache(model, noise), "kv_cache_flag": flags}


def _far_filling_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """All chunks, written to the cache, which is the output."""
    flags = {"num_cached_chunks": 3, "is_cache_step": True}
    return {**_far_inputs(model, noise), "kv_cache": _far_cache(model, noise), "kv_cache_flag": flags}


_FAR = f"{_DIFFUSERS}.transformer_anyflow_far.AnyFlowFARTransformer3DModel"
_FAR_CONFIG = {**_ANYFLOW_CONFIG, "full_chunk_limit": 2}


def _animate2_inputs(model: Any, noise: Noise, frames: int) -> dict[str, Any]:
    """Lists of one tensor for each video; prompts of 7 and 6 tokens."""
    config = model.config
    return {
        "hidden_states": [noise(config.out_dim, frames, 6, 10) for _ in range(_BATCH)],
        "timestep": _timestep().to(noise.dtype),
        "encoder_hidden_states": [noise(_TEXT - video, config.text_dim) for video in range(_BATCH)],
        "condition_latents": [noise(config.in_dim - config.out_dim, frames, 6, 10) for _ in range(_BATCH)],
        "seq_len": frames * 15,
    }


def _animate2_reference_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Two reference videos, whose keys and values go to the cache."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        **_animate2_inputs(model, noise, frames=2),
        "kv_cache": WanAnimate2KVCache(model.config.num_layers),
        "kv_cache_mode": "extract",
        "offset_grid_sizes": torch.tensor([[2, 3, 5]] * _BATCH),
    }


def _animate2_cached_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """A step of a segment of longer videos, with cached keys of two reference frames each that are not rotated yet."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
    from torch.nn.attention.flex_attention import create_block_mask

    config = model.config
    # The model would compile this. All tokens attend to one another here: the mask does not change the rotation.
    mask = create_block_mask(lambda b, h, q, k: (q < 60) & (k >= 0), None, None, 128, 256, device="cpu")
    model.block_masks[3, 15] = mask
    cache = WanAnimate2KVCache(config.num_layers)
    for layer in cache.layer_caches:
        layer.store(*(noise(_BATCH, 30, config.num_heads, config.dim // config.num_heads) for _ in range(2)))
    return {
        **_animate2_inputs(model, noise, frames=3),
        "kv_cache": cache,
        "kv_cache_mode": "cached",
        "reference_grid_sizes": torch.tensor([[2, 3, 5]] * _BATCH),
        "origin_len": 9,
        "origin_area": [48, 80],
    }


_ANIMATE2 = f"{_DIFFUSERS}.transformer_wan_animate_2.WanAnimate2Transformer3DModel"
_ANIMATE2_CONFIG = {
    "text_len": 9,
    "in_dim": 9,
    "dim": 40,
    "ffn_dim": 32,
    "text_dim": 16,
    "out_dim": 4,
    "num_heads": 2,
    "num_layers": 2,
    "use_img_emb": False,
}
_ANIMATE2_RELEASED = {"dim": 5120, "num_heads": 40, "num_layers": 1}

EXAMPLES: tuple[Example, ...] = (
    Example("minimax-h3", _MINIMAX, _MINIMAX_CONFIG, _minimax_inputs, _MINIMAX_RELEASED),
    Example("sana-video", _SANA_VIDEO, _SANA_VIDEO_CONFIG, _sana_video_inputs, _SANA_VIDEO_RELEASED),
    Example(
        "sana-video-unnormed",
        _SANA_VIDEO,
        {**_SANA_VIDEO_CONFIG, "qk_norm": None},
        _sana_video_inputs,
        _SANA_VIDEO_RELEASED,
    ),
    Example("sana-wm", _SANA_WM, _SANA_WM_CONFIG, _sana_wm_inputs, _SANA_WM_RELEASED),
    Example("sana-wm-cameras", _SANA_WM, _SANA_WM_CONFIG, _sana_wm_camera_inputs, _SANA_WM_RELEASED),
    Example("sana-wm-refiner", _REFINER, _REFINER_CONFIG, _refiner_inputs, _REFINER_RELEASED),
    Example(
        "sana-wm-refiner-cached",
        _REFINER,
        {**_REFINER_CONFIG, "rope_type": "split"},
        _refiner_cached_inputs,
        _REFINER_RELEASED,
    ),
    Example("anyflow", _ANYFLOW, _ANYFLOW_CONFIG, _anyflow_inputs, _ANYFLOW_RELEASED),
    # Flex attention, which these attend by, has no backward pass on CPU.
    Example("anyflow-far", _FAR, _FAR_CONFIG, _far_inputs, _ANYFLOW_RELEASED, trains=False),
    Example("anyflow-far-clean", _FAR, _FAR_CONFIG, _far_clean_inputs, _ANYFLOW_RELEASED, trains=False),
    Example("anyflow-far-cached", _FAR, _FAR_CONFIG, _far_cached_inputs, _ANYFLOW_RELEASED, trains=False),
    Example("anyflow-far-filling", _FAR, _FAR_CONFIG, _far_filling_inputs, _ANYFLOW_RELEASED, trains=False),
    Example("wan-animate-2-reference", _ANIMATE2, _ANIMATE2_CONFIG, _animate2_reference_inputs, _ANIMATE2_RELEASED),
    Example(
        "wan-animate-2-cached",
        _ANIMATE2,
        {**_ANIMATE2_CONFIG, "refer_stride": 2, "refer_offset_h": 4},
        _animate2_cached_inputs,
        _ANIMATE2_RELEASED,
        trains=False,  # attends by flex attention
    ),
)
