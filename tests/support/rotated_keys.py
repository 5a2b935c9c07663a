"""Keys rotated along one axis, from scratch: in float64, and the way float32 does it."""

from __future__ import annotations

from typing import Any

import torch

import oracle
from dit_rope import Pairing, RopeSpec
from dit_rope.rotation import reference

F32, F64 = torch.float32, torch.float64
BLOCK = 4
"""Tokens of a cache block."""
TEXT = RopeSpec((16,), pairing=Pairing.HALF)


def angles(spec: RopeSpec, positions: torch.Tensor, axis: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin ``[..., pairs]`` in float64 of positions on one axis; the pairs of the other axes stay unrotated."""
    dim = spec.dims[axis]
    frequencies = spec.theta ** (-torch.arange(0, dim, 2, dtype=F64) / dim)
    rotated = positions.double()[..., None] * frequencies
    unrotated = [torch.zeros(*positions.shape, pairs, dtype=F64) for pairs in spec.pairs]
    angle = torch.cat([rotated if number == axis else zero for number, zero in enumerate(unrotated)], dim=-1)
    return angle.cos(), angle.sin()


def rotated(keys: torch.Tensor, spec: RopeSpec, positions: torch.Tensor, axis: int = 0) -> torch.Tensor:
    """Keys ``[B, S, H, D]`` rotated by ``positions`` ``[B, S]``, in float64."""
    return oracle.rotate(keys, *angles(spec, positions, axis), interleaved=spec.pairing is Pairing.INTERLEAVED)


def naively_rotated(keys: torch.Tensor, spec: RopeSpec, positions: torch.Tensor, axis: int = 0) -> torch.Tensor:
    """The same with float32 angles, products and sums."""
    cos, sin = (table.float()[:, :, None] for table in angles(spec, positions, axis))
    return reference.rotated(keys.float(), cos, sin, spec.pairing)


def pool(blocks: int, *, heads: int = 2, dim: int = 16, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(blocks, BLOCK, heads, dim, dtype=dtype)


def int32(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)
