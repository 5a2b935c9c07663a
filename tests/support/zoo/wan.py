"""Small transformers of the Wan family, of about the sizes in diffusers' own tests."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .example import Example, Noise

_DIFFUSERS = "diffusers.models.transformers"
_CONFIG: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}
_RELEASED = {"num_attention_heads": 24, "attention_head_dim": 128}  # Wan 2.2 5B


def inputs(model: Any, noise: Noise, frames: int = 3, height: int = 8, width: int = 12) -> dict[str, Any]:
    """Arguments of one forward pass on latents ``[1, C, frames, height, width]``."""
    config, name = model.config, type(model).__name__
    image_dim = config.get("image_dim")
    arguments: dict[str, Any] = {
        "hidden_states": noise(1, config.in_channels, frames, height, width),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": noise(1, 12 if image_dim is None else 512, config.text_dim),
    }
    if image_dim is not None:
        arguments["encoder_hidden_states_image"] = noise(1, 4, image_dim)
    if name == "WanVACETransformer3DModel":
        arguments["control_hidden_states"] = noise(1, config.vace_in_channels, frames, height, width)
        arguments["control_hidden_states_scale"] = torch.ones(2, dtype=noise.dtype)
    if name == "WanAnimateTransformer3DModel":
        arguments["pose_hidden_states"] = noise(1, config.latent_channels, frames - 1, height, width)
        arguments["face_pixel_values"] = noise(1, 3, 4 * (frames - 1) - 3, 16, 16)
    return arguments


_WAN = f"{_DIFFUSERS}.transformer_wan.WanTransformer3DModel"
_ANIMATE = {
    "in_channels": 12,
    "latent_channels": 4,
    "image_dim": 16,
    "motion_encoder_size": 16,
    "motion_style_dim": 8,
    "motion_dim": 4,
    "motion_encoder_dim": 16,
    "face_encoder_hidden_dim": 16,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 2,
    "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
}

EXAMPLES: tuple[Example, ...] = (
    Example("wan", _WAN, _CONFIG, inputs, _RELEASED),
    # 12 of 28 channels rotate with the frame, 8 with height and with width.
    Example("wan-uneven-axes", _WAN, {**_CONFIG, "attention_head_dim": 28}, inputs, _RELEASED),
    Example(
        "wan-i2v",
        _WAN,
        {**_CONFIG, "image_dim": 16, "added_kv_proj_dim": 48},
        inputs,
        {**_RELEASED, "added_kv_proj_dim": 24 * 128},
    ),
    Example(
        "vace",
        f"{_DIFFUSERS}.transformer_wan_vace.WanVACETransformer3DModel",
        {**_CONFIG, "vace_layers": [0, 1], "vace_in_channels": 8},
        inputs,
        _RELEASED,
    ),
    Example(
        "animate",
        f"{_DIFFUSERS}.transformer_wan_animate.WanAnimateTransformer3DModel",
        {**_CONFIG, **_ANIMATE},
        inputs,
        _RELEASED,
    ),
    # With two frames it takes the last one for a distant one.
    Example(
        "chronoedit",
        f"{_DIFFUSERS}.transformer_chronoedit.ChronoEditTransformer3DModel",
        {**_CONFIG, "image_dim": 16},
        functools.partial(inputs, frames=2),
        _RELEASED,
    ),
    Example(
        "skyreels-v2",
        f"{_DIFFUSERS}.transformer_skyreels_v2.SkyReelsV2Transformer3DModel",
        _CONFIG,
        inputs,
        _RELEASED,
    ),
)
NAMES = tuple(example.name for example in EXAMPLES)


def build(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The seeded random model of one example."""
    return next(example for example in EXAMPLES if example.name == name).build(dtype)


def forward(model: Any, dtype: torch.dtype = torch.float32, **sizes: int) -> torch.Tensor:
    """One seeded forward pass on ``sizes`` as :func:`inputs` takes them; gives the prediction."""
    return model(**inputs(getattr(model, "_orig_mod", model), Noise(dtype), **sizes), return_dict=False)[0]
