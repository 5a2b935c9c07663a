"""Queries and keys as heads ``[B, S, H, D]``, and their rotation."""

from __future__ import annotations

from typing import Any

import torch

from ..rotation import ops
from ..rotation_args import RotationArgs
from .adapter import AttentionRotation, Layout
from .packed_tables import PackedTable


def fits(heads: torch.Tensor, table: PackedTable, rotation: AttentionRotation) -> bool:
    """Whether ``table`` fits ``heads`` ``[B, S, H, D]``: its batch, heads and width, not its number of rows."""
    batch, _, count, width = heads.shape
    samples = (batch,) if rotation.format.every_sample else (1, batch)
    if table.batch not in samples or table.heads not in ((count,) if rotation.format.every_head else (1, count)):
        return False
    return table.head_dim <= width if rotation.partial else table.head_dim == width


def rotate_heads(heads: list[torch.Tensor], args: RotationArgs, backend: str, inplace: bool) -> list[torch.Tensor]:
    """Rotates ``heads`` ``[B, S, H, D]``; overwrites them if ``inplace`` and no gradient is wanted.

    Each rank rotates its own heads of a distributed tensor.
    """
    if any(map(is_distributed, heads)):
        distributed: list[Any] = list(heads)
        local = rotate_heads([x.to_local() for x in distributed], args, backend, inplace)
        return [type(x).from_local(y, x.device_mesh, x.placements) for x, y in zip(distributed, local, strict=True)]
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in heads)
    return ops.rotate(heads, args, inplace=inplace and not grad, backend=backend)


def is_distributed(x: torch.Tensor) -> bool:
    """Whether ``x`` is a DTensor. Asks for its method, because importing its module takes time."""
    return type(x) is not torch.Tensor and hasattr(x, "to_local")


def as_heads(x: torch.Tensor, layout: Layout, head_dim: int) -> torch.Tensor:
    """A view ``[B, S, H, D]`` of ``x``."""
    if layout is Layout.BSC:
        return x.view(*x.shape[:-1], -1, head_dim)
    if layout is Layout.BHSD:
        return x.transpose(1, 2)
    if layout is Layout.BHDS:
        return x.permute(0, 3, 1, 2)
    return x.unsqueeze(0) if layout is Layout.SHD else x


def from_heads(heads: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The inverse of :func:`as_heads`."""
    if layout is Layout.BSC:
        return heads.flatten(2)
    if layout is Layout.BHSD:
        return heads.transpose(1, 2)
    if layout is Layout.BHDS:
        return heads.permute(0, 2, 3, 1)
    return heads.squeeze(0) if layout is Layout.SHD else heads
