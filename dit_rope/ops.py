"""The rotation as PyTorch operators: schemas, implementations, fake implementations and autograd.

Each operator takes a list of one or two tensors, so that queries and keys are one launch, and the fields of
:class:`~dit_rope.rotation_args.RotationArgs` one by one, because a schema knows no structs. Operators trust their
input; :mod:`dit_rope.rotation` checks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .backends import eager
from .rotation_args import RotationArgs
from .spec import NormKind, Pairing

_ARGS = (
    "Tensor rows, Tensor? positions, int[] pairs, SymInt[] sizes, SymInt[] first_rows, SymInt token_offset, "
    "SymInt prefix, SymInt count, bool half, bool inverse, bool exact, str backend"
)
_NORM = "Tensor[] weights, float eps, bool across_heads"

_library = torch.library.Library("dit_rope", "DEF")
_library.define(f"rotate(Tensor[] xs, {_ARGS}) -> Tensor[]")
_library.define(f"rotate_(Tensor(a!)[] xs, {_ARGS}) -> ()")
_library.define(f"norm_rotate(Tensor[] xs, {_NORM}, {_ARGS}) -> Tensor[]")
_library.define(f"norm_rotate_(Tensor(a!)[] xs, {_NORM}, {_ARGS}) -> ()")


def rotate(xs: Sequence[torch.Tensor], args: RotationArgs, backend: str) -> list[torch.Tensor]:
    """Rotates ``xs`` ``[B, S, H, D]`` into new tensors."""
    result: list[torch.Tensor] = torch.ops.dit_rope.rotate(list(xs), *_flatten(args), backend)
    return result


def rotate_(xs: Sequence[torch.Tensor], args: RotationArgs, backend: str) -> None:
    """Rotates ``xs`` ``[B, S, H, D]`` in place."""
    torch.ops.dit_rope.rotate_(list(xs), *_flatten(args), backend)


def norm_rotate(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    eps: float,
    norm: NormKind,
    args: RotationArgs,
    backend: str,
) -> list[torch.Tensor]:
    """RMSNorm, then rotation, of ``xs`` ``[B, S, H, D]`` into new tensors."""
    norm_args = (_weight_list(xs, weights, norm), eps, norm is NormKind.ACROSS_HEADS)
    result: list[torch.Tensor] = torch.ops.dit_rope.norm_rotate(list(xs), *norm_args, *_flatten(args), backend)
    return result


def norm_rotate_(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    eps: float,
    norm: NormKind,
    args: RotationArgs,
    backend: str,
) -> None:
    """RMSNorm, then rotation, of ``xs`` ``[B, S, H, D]`` in place."""
    norm_args = (_weight_list(xs, weights, norm), eps, norm is NormKind.ACROSS_HEADS)
    torch.ops.dit_rope.norm_rotate_(list(xs), *norm_args, *_flatten(args), backend)


def _flatten(args: RotationArgs) -> tuple[Any, ...]:
    return (
        args.rows,
        args.positions,
        args.pairs,
        args.sizes,
        args.first_rows,
        args.token_offset,
        args.prefix,
        args.count,
        args.pairing is Pairing.HALF,
        args.inverse,
        args.exact,
    )


def _unflatten(flat: Sequence[Any]) -> tuple[RotationArgs, str]:
    rows, positions, pairs, sizes, first_rows, token_offset, prefix, count, half, inverse, exact, backend = flat
    pairing = Pairing.HALF if half else Pairing.INTERLEAVED
    where = (tuple(pairs), tuple(sizes), tuple(first_rows), token_offset, prefix, count)
    return RotationArgs(rows, positions, *where, pairing, inverse, exact), backend


def _weight_list(
    xs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor | None], norm: NormKind
) -> list[torch.Tensor]:
    """One weight per tensor, or none at all; ones stand in where only the other tensor has a weight."""
    if all(weight is None for weight in weights):
        return []
    return [
        weight
        if weight is not None
        else x.new_ones(x.shape[2] * x.shape[3] if norm is NormKind.ACROSS_HEADS else x.shape[3])
        for x, weight in zip(xs, weights, strict=True)
    ]


def _backend(name: str) -> Any:
    if name == "triton":
        from .backends import triton_kernels

        return triton_kernels
    return eager


def _rotate_into(xs: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], flat: Sequence[Any]) -> None:
    args, backend = _unflatten(flat)
    _backend(backend).rotate(xs, args, outs)


def _norm_rotate_into(
    xs: Sequence[torch.Tensor],
    outs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    eps: float,
    across_heads: bool,
    flat: Sequence[Any],
) -> None:
    args, backend = _unflatten(flat)
    norm = NormKind.ACROSS_HEADS if across_heads else NormKind.PER_HEAD
    given: Sequence[torch.Tensor | None] = weights or [None] * len(xs)
    _backend(backend).norm_rotate(xs, given, eps, norm, args, outs)


@torch.library.impl(_library, "rotate", "CompositeExplicitAutograd")
def _rotate(xs: list[torch.Tensor], *flat: Any) -> list[torch.Tensor]:
    outs = [torch.empty_like(x) for x in xs]
    _rotate_into(xs, outs, flat)
    return outs


@torch.library.impl(_library, "rotate_", "CompositeExplicitAutograd")
def _rotate_inplace(xs: list[torch.Tensor], *flat: Any) -> None:
    _rotate_into(xs, xs, flat)


@torch.library.impl(_library, "norm_rotate", "CompositeExplicitAutograd")
def _norm_rotate(
    xs: list[torch.Tensor], weights: list[torch.Tensor], eps: float, across_heads: bool, *flat: Any
) -> list[torch.Tensor]:
    outs = [torch.empty_like(x) for x in xs]
    _norm_rotate_into(xs, outs, weights, eps, across_heads, flat)
    return outs


@torch.library.impl(_library, "norm_rotate_", "CompositeExplicitAutograd")
def _norm_rotate_inplace(
    xs: list[torch.Tensor], weights: list[torch.Tensor], eps: float, across_heads: bool, *flat: Any
) -> None:
    _norm_rotate_into(xs, xs, weights, eps, across_heads, flat)


@torch.library.register_fake("dit_rope::rotate", lib=_library)
@torch.library.register_fake("dit_rope::norm_rotate", lib=_library)
def _fake(xs: list[torch.Tensor], *_: Any) -> list[torch.Tensor]:
    return [torch.empty_like(x) for x in xs]


@torch.library.register_fake("dit_rope::rotate_", lib=_library)
@torch.library.register_fake("dit_rope::norm_rotate_", lib=_library)
def _fake_inplace(xs: list[torch.Tensor], *_: Any) -> None:
    return None


def _rotate_setup(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    _, *flat = inputs
    ctx.args, ctx.backend = _unflatten(flat)


def _rotate_backward(ctx: Any, grads: list[torch.Tensor | None]) -> tuple[Any, ...]:
    """Fast: the inverse rotation. Exact: the reference is run again under autograd, for its roundings.

    The rotation is linear, so that its gradient needs no saved input.
    """
    args: RotationArgs = ctx.args
    given = [grad for grad in grads if grad is not None]
    if not args.exact:
        turned = iter(rotate(_rows_contiguous(given), replace(args, inverse=not args.inverse), ctx.backend))
    else:
        turned = iter([_reference_gradient(grad, args) for grad in given])
    back = [None if grad is None else next(turned) for grad in grads]
    return (back, *[None] * 12)


def _rows_contiguous(xs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients may come expanded or strided in their last dim, which the backends do not take."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in xs]


def _reference_gradient(grad: torch.Tensor, args: RotationArgs) -> torch.Tensor:
    cos, sin = eager.dense_angles(args, grad.shape[1])
    with torch.enable_grad():
        x = torch.zeros_like(grad).requires_grad_()
        out = eager.reference(x, cos, sin, args.pairing)
    (result,) = torch.autograd.grad(out, x, grad)
    return result


def _norm_rotate_setup(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    xs, weights, ctx.eps, ctx.across_heads, *flat = inputs
    ctx.args, ctx.backend = _unflatten(flat)
    ctx.tensors = len(xs)
    ctx.save_for_backward(*xs, *weights)


def _norm_rotate_backward(ctx: Any, grads: list[torch.Tensor | None]) -> tuple[Any, ...]:
    """Gradient of RMSNorm and rotation, in float32 (float64 for float64 data), rounded once."""
    saved = ctx.saved_tensors
    xs, weights = saved[: ctx.tensors], saved[ctx.tensors :]
    x_grads: list[torch.Tensor | None] = []
    weight_grads: list[torch.Tensor | None] = []
    for index, (x, grad) in enumerate(zip(xs, grads, strict=True)):
        weight = weights[index] if weights else None
        x_grad, weight_grad = (None, None) if grad is None else _norm_gradient(ctx, x, weight, grad)
        x_grads.append(x_grad)
        weight_grads.append(weight_grad)
    return (x_grads, weight_grads if weights else [], None, None, *[None] * 12)


def _norm_gradient(
    ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """With n = x / rms(x): dx = (dn - n mean(dn n)) / rms(x), where dn is the gradient turned back, times weight."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    dims = (-2, -1) if ctx.across_heads else (-1,)
    (turned,) = rotate(_rows_contiguous([grad.to(wide)]), replace(ctx.args, inverse=not ctx.args.inverse), ctx.backend)
    values = x.to(wide)
    scale = torch.rsqrt(values.square().mean(dims, keepdim=True) + ctx.eps)
    normed = values * scale
    weight_grad = None
    if weight is not None:
        kept = (2, 3) if ctx.across_heads else (3,)
        summed = tuple(dim for dim in range(4) if dim not in kept)
        weight_grad = (turned * normed).sum(summed).reshape(weight.shape).to(weight.dtype)
        turned = turned * weight.to(wide).view(x.shape[2:] if ctx.across_heads else weight.shape)
    x_grad = scale * (turned - normed * (turned * normed).mean(dims, keepdim=True))
    return x_grad.to(x.dtype), weight_grad


torch.library.register_autograd("dit_rope::rotate", _rotate_backward, setup_context=_rotate_setup, lib=_library)
torch.library.register_autograd(
    "dit_rope::norm_rotate", _norm_rotate_backward, setup_context=_norm_rotate_setup, lib=_library
)
