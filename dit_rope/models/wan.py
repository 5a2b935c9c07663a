"""The Wan family: across-heads RMSNorm, interleaved pairs, axes (frame, height, width), theta 10,000.

Sources, all in diffusers 0.42.1: ``transformer_wan.py``, ``transformer_wan_vace.py``, ``transformer_wan_animate.py``,
``transformer_chronoedit.py``, ``transformer_skyreels_v2.py``.
"""

from __future__ import annotations

from typing import Any

import torch

from ..hooks.adapter import EVERY, AttentionRotation, AxisTables, ForwardGrid, Layout, ModelAdapter, ModelTables
from ..hooks.formats import AXES
from ..spec import RopeSpec


def _spec(rope: Any) -> RopeSpec:
    head_dim: int = rope.attention_head_dim
    side = 2 * (head_dim // 6)
    return RopeSpec(dims=(head_dim - 2 * side, side, side), theta=10_000.0)


def _grid(rope: Any, latent: torch.Tensor) -> ForwardGrid:
    """``latent`` is ``[B, C, T, H, W]`` before patching."""
    patched = [size // patch for size, patch in zip(latent.shape[2:], rope.patch_size, strict=True)]
    return ForwardGrid((patched[0], patched[1], patched[2]))


def _chronoedit_grid(rope: Any, latent: torch.Tensor) -> ForwardGrid:
    """ChronoEdit sets its two edit frames ``temporal_skip_len`` apart: positions 0 and ``temporal_skip_len - 1``."""
    grid = _grid(rope, latent)
    if latent.shape[2] != 2:
        return grid
    skip: int = rope.temporal_skip_len
    return ForwardGrid((skip, *grid.sizes[1:]), frames=(0, skip - 1))


def _adapter(model: str, module: str, rope: str, attention: str, processor: str = "WanAttnProcessor") -> ModelAdapter:
    grid = _chronoedit_grid if rope.startswith("ChronoEdit") else _grid
    return ModelAdapter(
        model=f"diffusers.models.transformers.{module}.{model}",
        tables=(ModelTables("rope", rope, keyed_by_shape=EVERY, axes=AxisTables(_spec, grid)),),
        rotations=(
            AttentionRotation(
                attention=r"(blocks|vace_blocks)\.\d+\.attn1",
                attention_class=attention,
                format=AXES,
                layout=Layout.BSC,
                rotary=("rotary_emb",),
                processors=(processor,),
            ),
        ),
    )


WAN = _adapter("WanTransformer3DModel", "transformer_wan", "WanRotaryPosEmbed", "WanAttention")
WAN_VACE = _adapter("WanVACETransformer3DModel", "transformer_wan_vace", "WanRotaryPosEmbed", "WanAttention")
WAN_ANIMATE = _adapter("WanAnimateTransformer3DModel", "transformer_wan_animate", "WanRotaryPosEmbed", "WanAttention")
CHRONOEDIT = _adapter(
    "ChronoEditTransformer3DModel", "transformer_chronoedit", "ChronoEditRotaryPosEmbed", "WanAttention"
)
SKYREELS_V2 = _adapter(
    "SkyReelsV2Transformer3DModel",
    "transformer_skyreels_v2",
    "SkyReelsV2RotaryPosEmbed",
    "SkyReelsV2Attention",
    "SkyReelsV2AttnProcessor",
)

ADAPTERS = (WAN, WAN_VACE, WAN_ANIMATE, CHRONOEDIT, SKYREELS_V2)
