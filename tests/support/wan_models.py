"""Small random models of the Wan family, of about the sizes in diffusers' own tests, and one forward pass of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_COMMON: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "text_dim": 16,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}


def _wan(**kwargs: Any) -> torch.nn.Module:
    import diffusers

    return diffusers.WanTransformer3DModel(**{**_COMMON, **kwargs}, in_channels=4, out_channels=4)


def _wan_i2v() -> torch.nn.Module:
    return _wan(image_dim=16, added_kv_proj_dim=48)


def _wan_uneven() -> torch.nn.Module:
    """Heads of 28 channels: 12 turn with the frame, 8 with height and with width."""
    return _wan(attention_head_dim=28)


def _vace() -> torch.nn.Module:
    import diffusers

    return diffusers.WanVACETransformer3DModel(
        **_COMMON, in_channels=4, out_channels=4, vace_layers=[0, 1], vace_in_channels=8
    )


def _animate() -> torch.nn.Module:
    import diffusers

    return diffusers.WanAnimateTransformer3DModel(
        **_COMMON, in_channels=12, latent_channels=4, out_channels=4, image_dim=16, motion_encoder_size=16,
        motion_style_dim=8, motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=16,
        face_encoder_num_heads=2, inject_face_latents_blocks=2,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
    )  # fmt: skip


def _chronoedit() -> torch.nn.Module:
    import diffusers

    return diffusers.ChronoEditTransformer3DModel(**_COMMON, in_channels=4, out_channels=4, image_dim=16)


def _skyreels() -> torch.nn.Module:
    import diffusers

    return diffusers.SkyReelsV2Transformer3DModel(**_COMMON, in_channels=4, out_channels=4)


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "wan": _wan,
    "wan-uneven-axes": _wan_uneven,
    "wan-i2v": _wan_i2v,
    "vace": _vace,
    "animate": _animate,
    "chronoedit": _chronoedit,
    "skyreels-v2": _skyreels,
}


def build(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A seeded random model; its modules that diffusers keeps in float32 stay so."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    kept = tuple(type(model)._keep_in_fp32_modules or ())
    if dtype != torch.float32:
        for path, module in model.named_modules():
            if not any(part in kept for part in path.split(".")):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)
        model.scale_shift_table.data = model.scale_shift_table.data.float()
    return model


def forward(
    model: torch.nn.Module, dtype: torch.dtype = torch.float32, frames: int = 3, height: int = 8, width: int = 12
) -> torch.Tensor:
    """One seeded denoising forward on ``[1, 4, frames, height, width]`` latents."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    kwargs: dict[str, Any] = {"encoder_hidden_states": noise(1, 12, 16), "timestep": torch.tensor([500])}
    latents = noise(1, 4, frames, height, width)
    name = type(getattr(model, "_orig_mod", model)).__name__
    image_dim = model.config.get("image_dim")
    if image_dim is not None:
        kwargs["encoder_hidden_states_image"] = noise(1, 4, image_dim)
        kwargs["encoder_hidden_states"] = noise(1, 512, 16)
    if name == "WanVACETransformer3DModel":
        kwargs["control_hidden_states"] = noise(1, 8, frames, height, width)
        kwargs["control_hidden_states_scale"] = torch.ones(2, dtype=dtype)
    if name == "WanAnimateTransformer3DModel":
        latents = noise(1, 12, frames, height, width)
        kwargs["pose_hidden_states"] = noise(1, 4, frames - 1, height, width)
        kwargs["face_pixel_values"] = noise(1, 3, 4 * (frames - 1) - 3, 16, 16)
    return model(latents, return_dict=False, **kwargs)[0]
