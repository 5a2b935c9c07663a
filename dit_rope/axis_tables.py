"""The cos and sin of single axes, cached in host memory: what tables of many grids, shards and streams share."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .cache import FifoCache
from .scaling import inverse_frequencies
from .spec import Grid, RopeSpec, Scaling

ROW_BLOCK = 32

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class AxisKey:
    """Everything the array of one axis depends on; ``theta`` has its rescale in it, rows are first <= i < stop."""

    dim: int
    theta: float
    interpolation: float
    scaling: Scaling | None
    frequency_dtype: torch.dtype
    first: int
    stop: int
    dtype: torch.dtype


def _build_axis(key: AxisKey) -> torch.Tensor:
    """Cos and sin ``[2, rows, dim / 2]`` of one axis, contiguous, on CPU.

    Angles are formed as FastVideo's ``get_1d_rotary_pos_embed`` forms them (fastvideo/layers/rotary_embedding.py at
    2f3d4074): float32 positions times interpolation, frequencies in their own dtype, a product in the wider of both.
    """
    frequencies, magnitude = inverse_frequencies(key.scaling, key.dim, key.theta, key.frequency_dtype)
    positions = torch.arange(key.first, key.stop, dtype=torch.float32, device=_CPU)
    angles = torch.outer(positions * key.interpolation, frequencies)
    # MKL, which computes cos and sin, wakes its threads from about 2,000 values on (unless threads were set by hand);
    # on a busy machine waiting for them takes 8 ms, a thousand times as long as the values. Pieces stay below that.
    pieces = (angles,) if torch.compiler.is_compiling() else torch.split(angles, max(1, 1000 // angles.shape[1]))
    table = torch.stack((torch.cat([p.cos() for p in pieces]), torch.cat([p.sin() for p in pieces])))
    if magnitude != 1.0:
        table = table * magnitude
    # torch rounds float64 to 16 bits by way of float32, which is what models do to their tables in two steps.
    return table.to(key.dtype)


AXES: FifoCache[AxisKey, torch.Tensor] = FifoCache("axis", 256, 64 * 2**20, lambda array: (array,))


def axis_arrays(spec: RopeSpec, grid: Grid, dtype: torch.dtype) -> list[tuple[int, torch.Tensor]]:
    """Per axis, the position of the array's first row and the array; whole blocks of rows, so that streams share."""
    arrays = []
    for axis, dim in enumerate(spec.dims):
        start = grid.start_frame if axis == 0 else 0
        first = start // ROW_BLOCK * ROW_BLOCK
        stop = -(-(start + grid.sizes[axis]) // ROW_BLOCK) * ROW_BLOCK
        rescale = spec.theta_rescale[axis]
        theta = spec.theta if rescale == 1.0 else spec.theta * rescale ** (dim / (dim - 2))
        key = AxisKey(dim, theta, spec.interpolation[axis], spec.scaling, spec.frequency_dtype, first, stop, dtype)
        arrays.append((first, AXES.get(key, _CPU, functools.partial(_build_axis, key))))
    return arrays
