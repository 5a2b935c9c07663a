"""Shared by the GPU backends: a call, the constraints it must satisfy, and which of its tokens rotate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ...rotation_args import Norm, RotationArgs
from ...spec import MAX_AXES, NormKind

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_TENSORS = 2
MAX_HEAD_DIM = 512
# The widest memory access of one thread.
ACCESS_BYTES = 16
# Token numbers are int32 in the kernels, and a program may count one block past the last token.
MAX_TOKENS = 2**31 - 4096


@dataclass(frozen=True)
class Call:
    """One rotation of ``xs`` ``[B, S, H_i, D]``, after a norm of kind ``norm`` unless it is None."""

    xs: Sequence[torch.Tensor]
    args: RotationArgs
    norm: NormKind | None


@dataclass(frozen=True)
class Constraint:
    """One condition that a backend has for a call, and the reason to give where it does not hold."""

    holds: Callable[[Call], bool]
    reason: Callable[[Call], str]


def first_reason(constraints: Sequence[Constraint], call: Call) -> str | None:
    """The reason of the first constraint that does not hold, in order, since a later one may need an earlier."""
    for constraint in constraints:
        if not constraint.holds(call):
            return constraint.reason(call)
    return None


def batch_entries(xs: Sequence[torch.Tensor], args: RotationArgs) -> int:
    """How many batch entries rotate."""
    return int(xs[0].shape[0] if args.entries is None else args.entries.shape[0])


def skips_unrotated(xs: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], norm: Norm | None) -> bool:
    """Whether unrotated tokens and channels are neither read nor written: in place and without a norm."""
    return norm is None and all(x.data_ptr() == out.data_ptr() for x, out in zip(xs, outs, strict=True))


def shared_strides(x: torch.Tensor, dims: int) -> tuple[int, ...]:
    """Strides of the first ``dims`` dims; 0 where the size is 1: unused, so that they do not reduce the alignment."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(x.shape[:dims], x.stride()[:dims], strict=True))


def power_of_two(n: int) -> int:
    """The least power of two that is at least ``n``, for ``n`` at least 1."""
    return 1 << (n - 1).bit_length()


def dense_last(x: torch.Tensor) -> bool:
    """Whether channels are contiguous in memory."""
    return x.shape[-1] == 1 or x.stride(-1) == 1


def rotated_tokens(args: RotationArgs, tokens: int) -> int:
    """How many tokens after the prefix rotate, of a sequence of ``tokens``: no padding, nothing past the grid."""
    rotated = min(args.count, tokens - args.prefix)
    if args.positions is None:
        rotated = min(rotated, math.prod(args.sizes) - args.token_offset)
    return max(rotated, 0)


def _last_token(args: RotationArgs) -> int:
    return max(args.token_offset + args.count, math.prod(args.sizes))


COMMON = (
    Constraint(
        lambda call: 1 <= len(call.xs) <= MAX_TENSORS,
        lambda call: f"it takes 1 to {MAX_TENSORS} tensors, got {len(call.xs)}",
    ),
    Constraint(
        lambda call: call.xs[0].dtype in DTYPES,
        lambda call: f"dtype must be float16, bfloat16 or float32, got {call.xs[0].dtype}",
    ),
    Constraint(
        lambda call: call.xs[-1].dtype == call.xs[0].dtype,
        lambda call: f"tensors must share a dtype, got {[x.dtype for x in call.xs]}",
    ),
    Constraint(
        lambda call: call.args.rows.dtype in (torch.float32, call.xs[0].dtype),
        lambda call: f"tables must be float32 or of the data's dtype {call.xs[0].dtype}, got {call.args.rows.dtype}",
    ),
    Constraint(
        lambda call: all(map(dense_last, call.xs)),
        lambda call: f"the last dim must be contiguous, got strides {[x.stride() for x in call.xs]}",
    ),
    Constraint(
        lambda call: dense_last(call.args.rows),
        lambda call: f"the last dim of the tables must be contiguous, got strides {call.args.rows.stride()}",
    ),
    Constraint(
        lambda call: call.args.positions is None or call.args.positions.dtype == torch.int32,
        lambda call: f"positions must be int32, got {_dtype_of(call.args.positions)}",
    ),
    Constraint(
        lambda call: call.args.entries is None or call.args.entries.dtype == torch.int32,
        lambda call: f"entries must be int32, got {_dtype_of(call.args.entries)}",
    ),
    Constraint(
        lambda call: call.args.entries is None or call.args.head_rows == 0,
        lambda call: f"entries need cos and sin that all heads share, got head_rows {call.args.head_rows}",
    ),
    Constraint(
        lambda call: min(call.xs[0].shape[2], call.xs[-1].shape[2]) > 0,
        lambda call: "tensors must have at least one head",
    ),
    Constraint(
        lambda call: 1 <= len(call.args.pairs) <= MAX_AXES,
        lambda call: f"it takes 1 to {MAX_AXES} axes, got {len(call.args.pairs)}",
    ),
    Constraint(
        lambda call: call.xs[0].shape[3] <= MAX_HEAD_DIM,
        lambda call: f"head dim must be at most {MAX_HEAD_DIM}, got {call.xs[0].shape[3]}",
    ),
    Constraint(
        lambda call: 2 <= 2 * sum(call.args.pairs) <= call.xs[0].shape[3],
        lambda call: f"rotary_dim must be 2 to the head dim {call.xs[0].shape[3]}, got {2 * sum(call.args.pairs)}",
    ),
    Constraint(
        lambda call: call.xs[0].shape[1] <= MAX_TOKENS,
        lambda call: f"tokens must be at most {MAX_TOKENS}, got {call.xs[0].shape[1]}",
    ),
    Constraint(
        lambda call: call.args.positions is not None or _last_token(call.args) <= MAX_TOKENS,
        lambda call: f"grid tokens must be at most {MAX_TOKENS}, got {_last_token(call.args)}",
    ),
)


def _dtype_of(x: torch.Tensor | None) -> torch.dtype | None:
    return None if x is None else x.dtype
