"""Transformers of released width with random weights, and what a denoising step passes to each of them."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .random_models import EmptyOptions, Noise, random_model


class Guidance(enum.Enum):
    """How a pipeline runs its transformer for classifier-free guidance."""

    PASSES = "two forward passes"
    BATCH = "one forward pass of twice the batch"
    DISTILLED = "one forward pass, guided by a number"

    __hash__ = object.__hash__


Inputs = Callable[[Any, tuple[int, int, int], int, int, Noise], dict[str, Any]]
"""From the configuration, the token grid (frames, height, width), text tokens, the batch and noise to the arguments of
a forward pass."""


@dataclass(frozen=True)
class Architecture:
    """One transformer in its released configuration, with random weights.

    Attributes:
        model: class name in diffusers.
        depths: names of the numbers of layers in its configuration.
        inputs: arguments of a forward pass; all tensors but positions are random.
        guidance: of its pipeline.
        grid: tokens of a forward pass, frames, height and width, few enough that two cores compute a layer of each
            kind in about a second.
        text: tokens of text.
        config: what differs from the defaults of the class.
    """

    model: str
    depths: tuple[str, ...]
    inputs: Inputs
    guidance: Guidance
    grid: tuple[int, int, int]
    text: int
    config: Mapping[str, Any] = field(default_factory=dict)

    def guided(self, with_guidance: bool) -> tuple[int, int]:
        """Forward passes of a step, and the batch of each, with guidance or without."""
        twice = 2 if with_guidance else 1
        return twice if self.guidance is Guidance.PASSES else 1, twice if self.guidance is Guidance.BATCH else 1

    def build(self, layers: int | None, device: str, dtype: torch.dtype, **config: Any) -> torch.nn.Module:
        """The seeded random model with ``layers`` of each kind, all where None; ``config`` replaces values."""
        import diffusers

        depths = {} if layers is None else dict.fromkeys(self.depths, layers)
        with torch.device(device), EmptyOptions(dtype=dtype):
            model = random_model(getattr(diffusers, self.model), {**self.config, **depths, **config}, dtype)
        return model.requires_grad_(False)


def _timestep(batch: int, noise: Noise, value: float = 500.0) -> torch.Tensor:
    return torch.full((batch,), value, device=noise.device)


def _wan(config: Any, grid: tuple[int, int, int], text: int, batch: int, noise: Noise) -> dict[str, Any]:
    sizes = [size * patch for size, patch in zip(grid, config.patch_size, strict=True)]
    return {
        "hidden_states": noise(batch, config.in_channels, *sizes),
        "timestep": _timestep(batch, noise),
        "encoder_hidden_states": noise(batch, text, config.text_dim),
    }


def _hunyuan_video(config: Any, grid: tuple[int, int, int], text: int, batch: int, noise: Noise) -> dict[str, Any]:
    patch = (config.patch_size_t, config.patch_size, config.patch_size)
    sizes = [size * side for size, side in zip(grid, patch, strict=True)]
    return {
        "hidden_states": noise(batch, config.in_channels, *sizes),
        "timestep": _timestep(batch, noise).long(),
        "encoder_hidden_states": noise(batch, text, config.text_embed_dim),
        "encoder_attention_mask": torch.ones(batch, text, dtype=torch.long, device=noise.device),
        "pooled_projections": noise(batch, config.pooled_projection_dim),
        "guidance": _timestep(batch, noise, 6000.0).to(noise.dtype),
    }


def _flux(config: Any, grid: tuple[int, int, int], text: int, batch: int, noise: Noise) -> dict[str, Any]:
    ids = torch.cartesian_prod(*(torch.arange(size) for size in grid)).to(noise.device, noise.dtype)
    return {
        "hidden_states": noise(batch, len(ids), config.in_channels),
        "encoder_hidden_states": noise(batch, text, config.joint_attention_dim),
        "pooled_projections": noise(batch, config.pooled_projection_dim),
        "timestep": _timestep(batch, noise, 0.5).to(noise.dtype),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, len(grid), device=noise.device, dtype=noise.dtype),
        "guidance": _timestep(batch, noise, 3.5),
    }


def _ltx(config: Any, grid: tuple[int, int, int], text: int, batch: int, noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, math.prod(grid), config.in_channels),
        "encoder_hidden_states": noise(batch, text, config.caption_channels),
        "timestep": _timestep(batch, noise),
        "encoder_attention_mask": torch.ones(batch, text, dtype=torch.bool, device=noise.device),
        **dict(zip(("num_frames", "height", "width"), grid, strict=True)),
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def _qwen_image(config: Any, grid: tuple[int, int, int], text: int, batch: int, noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, math.prod(grid), config.in_channels),
        "encoder_hidden_states": noise(batch, text, config.joint_attention_dim),
        "encoder_hidden_states_mask": None,
        "timestep": _timestep(batch, noise, 0.5).to(noise.dtype),
        "img_shapes": [[grid]] * batch,
    }


ARCHITECTURES: dict[str, Architecture] = {
    "wan-1.3b": Architecture(
        "WanTransformer3DModel",
        ("num_layers",),
        _wan,
        Guidance.PASSES,
        (2, 15, 26),
        512,
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    ),
    "hunyuan-video": Architecture(
        "HunyuanVideoTransformer3DModel",
        ("num_layers", "num_single_layers"),
        _hunyuan_video,
        Guidance.DISTILLED,
        (2, 8, 10),
        32,
    ),
    "flux": Architecture(
        "FluxTransformer2DModel",
        ("num_layers", "num_single_layers"),
        _flux,
        Guidance.DISTILLED,
        (1, 12, 16),
        64,
        {"guidance_embeds": True},
    ),
    "ltx": Architecture("LTXVideoTransformer3DModel", ("num_layers",), _ltx, Guidance.BATCH, (2, 12, 16), 128),
    "qwen-image": Architecture(
        "QwenImageTransformer2DModel", ("num_layers",), _qwen_image, Guidance.PASSES, (1, 12, 16), 32
    ),
}
"""By the name that programs take."""
