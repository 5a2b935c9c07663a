"""Wan-Animate 2: a video, and a reference video at other positions, whose keys are cached before they rotate.

Pairs are neighbours, norms are across heads. Normed keys are cached unrotated, so norms must not rotate: the function
that rotates is replaced. The processor gets complex numbers of 512 positions per axis and the sizes of the grid, and
expands them in every call. Text and image are used in attention modules that do not rotate. Source:
``transformer_wan_animate_2.py`` of diffusers 0.42.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..hooks.adapter import AttentionRotation, Layout, ModelAdapter, ReplacedFunction
from ..hooks.formats import Format, Pair
from ..spec import Pairing


@dataclass(frozen=True, eq=False)
class _GridFormat(Format):
    """Grid sizes ``[B, 3]``, complex numbers ``[R, D / 2]`` of R positions on each axis, and the stride of frames."""

    def accepts(self, rotary: Any) -> bool:
        """Whether every grid has the same number of tokens, and a row for each of its positions."""
        sizes, numbers, stride = rotary
        if not (isinstance(stride, int) and isinstance(sizes, torch.Tensor) and numbers.is_complex()):
            return False
        grids = sizes.tolist()
        longest = max(max((frames - 1) * stride + 1, height, width) for frames, height, width in grids)
        return longest <= len(numbers) and len({math.prod(grid) for grid in grids}) == 1


def _axis_pairs(pairs: int) -> tuple[int, int, int]:
    """Pairs of frame, height and width."""
    side = pairs // 3
    return pairs - 2 * side, side, side


def _positions(grid: list[int], stride: int, device: torch.device) -> torch.Tensor:
    """``[S, 3]`` frame, row and column of every token, frames ``stride`` apart."""
    axes = [torch.arange(size, dtype=torch.int32, device=device) for size in grid]
    axes[0] = axes[0] * stride
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


def _join(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A grid of frames of one token each."""
    numbers = torch.complex(cos[0, :, 0], sin[0, :, 0])
    return torch.tensor([[len(numbers), 1, 1]]), numbers, 1


def _split(rotary: Any) -> list[Pair]:
    sizes, numbers, stride = rotary
    grids = sizes.tolist()
    if all(grid == grids[0] for grid in grids):
        grids = grids[:1]
    indices = torch.stack([_positions(grid, stride, numbers.device) for grid in grids]).unbind(-1)
    axes = numbers.split(_axis_pairs(numbers.shape[-1]), dim=-1)
    by_token = torch.cat([axis[index] for axis, index in zip(axes, indices, strict=True)], dim=-1).unsqueeze(2)
    return [(by_token.real.float(), by_token.imag.float())]


class _RopeApply(ReplacedFunction):
    """``rope_apply(x, grid_sizes, freqs, time_stride)``."""

    def rotary(self, args: tuple[Any, ...]) -> Any:
        """Grid sizes, complex numbers and the stride of frames."""
        return args[1:] if len(args) == 4 else None


WAN_ANIMATE_2 = ModelAdapter(
    "diffusers.models.transformers.transformer_wan_animate_2.WanAnimate2Transformer3DModel",
    rotations=(
        AttentionRotation(
            attention=r"blocks\.\d+\.self_attn",
            attention_class="WanAnimate2Attention",
            format=_GridFormat("complex numbers of a grid's axes", Pairing.INTERLEAVED, _split, _join, exact=False),
            layout=Layout.BSHD,
            norms={},
            rotary=(),
            processors=("WanAnimate2AttnProcessor",),
            replaced_function=_RopeApply("rope_apply"),
        ),
    ),
    not_patched=(
        "norm_q and norm_k, because keys are cached before they rotate",
        "tables, because the model keeps them itself",
    ),
)

ADAPTERS = (WAN_ANIMATE_2,)
