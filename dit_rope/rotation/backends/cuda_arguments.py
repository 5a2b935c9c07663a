"""The launch of a CUDA kernel: its grid, and the struct of its arguments as bytes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ...rotation_args import Norm, RotationArgs
from ...spec import MAX_AXES
from .cuda_plan import Plan
from .gpu_calls import rotated_tokens, shared_strides, skips_unrotated

# struct RotationArgs of kernels/rope.cuh: 11 pointers, 18 other members of 8 bytes, 22 of 4.
POINTERS, _NUMBERS = struct.Struct("=11q"), struct.Struct("=18q21if")
ARGUMENTS_SIZE = POINTERS.size + _NUMBERS.size


@dataclass(frozen=True)
class Launch:
    """The launch that calls of one layout share.

    Attributes:
        plan: the constants of the kernel.
        grid: thread blocks along x, y and z; none of y and z is past the driver's 65,535.
        numbers: ``struct RotationArgs`` of ``kernels/rope.cuh`` after the pointers.
        shape: the grid, threads of a block along x, y and z, and bytes of its dynamic shared memory, as the driver
            takes them; empty where there is nothing to launch.
        functions: handles of the loaded kernel by device index, filled by ``cuda_launch``.
    """

    plan: Plan
    grid: tuple[int, int, int]
    numbers: bytes
    shape: tuple[int, ...] = field(init=False)
    functions: dict[int, int] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        shape = (*self.grid, self.plan.threads, 1, 1, self.plan.stage_bytes)
        object.__setattr__(self, "shape", shape if all(self.grid) else ())


def pack_numbers(
    xs: Sequence[torch.Tensor], args: RotationArgs, outs: Sequence[torch.Tensor], norm: Norm | None, batch: int
) -> bytes:
    """``struct RotationArgs`` of ``kernels/rope.cuh`` after the pointers, for ``batch`` entries; not validated."""
    x, positions = xs[0], args.positions
    strides = [(*a.stride()[:3], *out.stride()[:3]) for a, out in zip(xs, outs, strict=True)]
    spare = MAX_AXES - len(args.sizes)
    sizes: tuple[int, ...] = (*args.sizes, *(1,) * spare)
    spans: tuple[int, ...] = (1,) * MAX_AXES
    by_position: tuple[int, ...] = (0, 0, 0)
    token_offset = 0  # with positions it may be too large for the kernel, which ignores it
    if positions is None:
        token_offset = args.token_offset
        spans = (sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3], 1)
    else:
        by_position = shared_strides(positions, 3)
    return _NUMBERS.pack(
        *strides[0],
        *strides[-1],
        *args.rows.stride()[:2],
        args.head_rows,
        *by_position,
        batch,
        x.shape[0],
        args.rows.shape[1],
        x.shape[1],
        args.prefix,
        rotated_tokens(args, x.shape[1]),
        token_offset,
        args.inverse,
        skips_unrotated(xs, outs, norm),
        *sizes,
        *spans,
        *args.first_rows,
        *(0,) * spare,
        norm.eps if norm else 0.0,
    )
