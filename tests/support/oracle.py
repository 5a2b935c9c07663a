"""Independent float64 references. Nothing here imports dit_rope: an error there cannot hide itself here."""

from __future__ import annotations

import torch


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool, inverse: bool = False
) -> torch.Tensor:
    """Rotates the first ``2 * cos.shape[-1]`` channels of ``x`` ``[B, S, H, D]`` in float64, pair by pair.

    ``cos`` and ``sin`` are ``[S, pairs]``, ``[B, S, pairs]`` or ``[B, S, H, pairs]``, identity rows being (1, 0).
    """
    x = x.double()
    cos, sin = cos.double(), sin.double()
    if cos.ndim == 2:
        cos, sin = cos[None], sin[None]
    if cos.ndim == 3:
        cos, sin = cos[:, :, None], sin[:, :, None]
    if inverse:
        sin = -sin
    out = x.clone()
    pairs = cos.shape[-1]
    for p in range(pairs):
        i, j = (2 * p, 2 * p + 1) if interleaved else (p, p + pairs)
        c, s = cos[..., p], sin[..., p]
        out[..., i] = x[..., i] * c - x[..., j] * s
        out[..., j] = x[..., i] * s + x[..., j] * c
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, *, across_heads: bool) -> torch.Tensor:
    """RMSNorm of ``x`` ``[B, S, H, D]`` in float64 over D, or over H and D together; weight ``[D]`` or ``[H * D]``."""
    x = x.double()
    dims = (-2, -1) if across_heads else (-1,)
    out = x / torch.sqrt((x * x).mean(dim=dims, keepdim=True) + eps)
    if weight is not None:
        out = out * (weight.double().reshape(x.shape[-2:]) if across_heads else weight.double())
    return out


def norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    across_heads: bool,
    centred: bool,
) -> torch.Tensor:
    """RMSNorm, or LayerNorm where ``centred``, as :func:`rms_norm`; the bias is as the weight."""
    values = x.double()
    if centred:
        values = values - values.mean(dim=(-2, -1) if across_heads else -1, keepdim=True)
    out = rms_norm(values, weight, eps, across_heads=across_heads)
    if bias is not None:
        out = out + (bias.double().reshape(x.shape[-2:]) if across_heads else bias.double())
    return out


def full_grid_table(
    sizes: tuple[int, ...],
    dims: tuple[int, ...],
    theta: float,
    *,
    dtype: torch.dtype = torch.float32,
    start_frame: int = 0,
    rescale: float | list[float] = 1.0,
    interpolation: float | list[float] = 1.0,
    shard_axis: int = 0,
    rank: int = 0,
    world: int = 1,
    repeat: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin ``[tokens, channels]`` built the long way, every token of the grid on its own.

    The arithmetic of FastVideo's builder (fastvideo/layers/rotary_embedding.py at 2f3d4074): a float32 grid of
    positions, frequencies in ``dtype``, angles in the wider of the two, neighbours sharing one value when ``repeat``.
    """
    rescales = rescale if isinstance(rescale, list) and len(rescale) > 1 else [_only(rescale)] * len(dims)
    factors = (
        interpolation
        if isinstance(interpolation, list) and len(interpolation) > 1
        else [_only(interpolation)] * len(dims)
    )
    lines = [torch.linspace(0, size, size + 1, dtype=torch.float32)[:size] for size in sizes]
    lines[0] = lines[0] + start_frame
    lines[shard_axis] = lines[shard_axis].chunk(world)[rank]
    cosines, sines = [], []
    for position, dim, stretch, factor in zip(
        torch.meshgrid(*lines, indexing="ij"), dims, rescales, factors, strict=True
    ):
        base = theta if stretch == 1.0 else theta * stretch ** (dim / (dim - 2))
        frequency = 1.0 / base ** (torch.arange(0, dim, 2)[: dim // 2].to(dtype) / dim)
        angle = torch.outer(position.flatten() * factor, frequency)
        for parts, table in ((cosines, angle.cos()), (sines, angle.sin())):
            parts.append(table.repeat_interleave(2, dim=-1) if repeat else table)
    return torch.cat(cosines, dim=1), torch.cat(sines, dim=1)


def _only(value: float | list[float]) -> float:
    return value[0] if isinstance(value, list) else value
