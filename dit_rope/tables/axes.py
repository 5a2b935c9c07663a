"""The cos and sin of single axes, cached in host memory and shared by tables of many grids, shards and streams."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from ..spec import Grid, RopeSpec
from ..torch_state import in_mode
from .caches import AXES
from .scaling import axis_frequencies
from .scaling_types import AxisFrequencies

ROW_BLOCK = 32

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class AxisKey:
    """Everything that the array of one axis depends on: numbers, not names of scalings. Rows are first <= i < stop."""

    numbers: tuple[object, ...]
    first: int
    stop: int
    dtype: torch.dtype


def build_axis(frequencies: AxisFrequencies, first: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """Cos and sin ``[2, rows, dim / 2]`` of one axis, contiguous, on CPU.

    Angles are formed as FastVideo's ``get_1d_rotary_pos_embed`` forms them (fastvideo/layers/rotary_embedding.py at
    2f3d4074): scaled float32 positions, frequencies in their own dtype, a product in the wider of both.
    """
    angles = frequencies.angles(torch.arange(first, stop, dtype=torch.float32, device=_CPU))
    # MKL computes cos and sin, and wakes its threads from about 2,000 values on. On a busy machine the wait for them
    # takes 8 ms, a thousand times as long as the computation. So the angles are split into pieces below that size.
    pieces = (angles,) if torch.compiler.is_compiling() else torch.split(angles, max(1, 1000 // angles.shape[1]))
    table = torch.stack((torch.cat([p.cos() for p in pieces]), torch.cat([p.sin() for p in pieces])))
    if frequencies.magnitude != 1.0:
        table = table * frequencies.magnitude
    # torch rounds float64 to 16 bits by way of float32. Models do the same in two steps, so the bits agree.
    table = table.to(dtype)
    if not in_mode() and not table.isfinite().all():
        raise ValueError(
            f"spec must have finite cos and sin up to position {stop - 1} in {dtype}, got NaN or infinity from its "
            "theta or scaling"
        )
    return table


def axis_block(start: int, size: int) -> tuple[int, int]:
    """First and last + 1 position of the array that holds positions ``start <= i < start + size``, in whole blocks."""
    return start // ROW_BLOCK * ROW_BLOCK, -(-(start + size) // ROW_BLOCK) * ROW_BLOCK


def axis_arrays(spec: RopeSpec, grid: Grid, dtype: torch.dtype) -> list[tuple[int, torch.Tensor]]:
    """Per axis, the position of the array's first row, and the array: cos and sin ``[2, rows, dim / 2]`` on CPU.

    Arrays are whole blocks of rows, so that a stream whose start frame moves asks for the same array many times.
    """
    arrays = []
    for axis, size in enumerate(grid.sizes):
        first, stop = axis_block(grid.start_frame if axis == 0 else 0, size)
        arrays.append((first, _axis_array(axis_frequencies(spec, axis), first, stop, dtype)))
    return arrays


def _axis_array(frequencies: AxisFrequencies, first: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    build = functools.partial(build_axis, frequencies, first, stop, dtype)
    # In a mode, frequencies may be fake or traced. Then they have no numbers for a key, and the cache keeps nothing.
    return build() if in_mode() else AXES.get(AxisKey(frequencies.numbers, first, stop, dtype), _CPU, build)
