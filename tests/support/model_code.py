"""The rotations that models do, restated: what exact mode must equal to the bit. Nothing here imports dit_rope."""

from __future__ import annotations

import torch


def wan(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Adjacent pairs, from ``[..., D]`` tables that hold each value twice (diffusers 0.42.1, transformer_wan.py)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out.type_as(x)


def rotate_half(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Pairs a half apart, from ``[..., D]`` tables (diffusers 0.42.1, embeddings.py, use_real_unbind_dim=-2)."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x.float() * cos + rotated.float() * sin).to(x.dtype)
