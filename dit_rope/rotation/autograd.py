"""Autograd, batching and dual numbers for the operators of :mod:`dit_rope.rotation.ops`.

Plain backward passes call the operators again. Where torch transforms its own operations (torch.func, dual numbers), or
the table itself wants a gradient, the operators are those operations: :mod:`dit_rope.rotation.derivatives`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..rotation_args import RotationArgs
from ..spec import NormKind
from ..torch_state import in_level
from . import derivatives
from .choice import choose_backend
from .ops import library, rotate, unflatten, write_all

_ARGS_TENSORS = 3  # rows, positions and entries, the first of a RotationArgs' fields in a schema
_ROTATE, _ROTATE_INPLACE = torch.ops.dit_rope.rotate.default, torch.ops.dit_rope.rotate_.default
_NORM_ROTATE, _NORM_ROTATE_INPLACE = torch.ops.dit_rope.norm_rotate.default, torch.ops.dit_rope.norm_rotate_.default


def _rotated(xs: Sequence[torch.Tensor], flat: Sequence[Any]) -> list[torch.Tensor]:
    """In torch's own operations, of which torch knows every derivative."""
    args, _ = unflatten(flat)
    return [derivatives.rotated(x, args) for x in xs]


def _norm_rotated(xs: Sequence[torch.Tensor], flat: Sequence[Any]) -> list[torch.Tensor]:
    weights, biases, eps, name, *rest = flat
    args, _ = unflatten(rest)
    given, added = (part or [None] * len(xs) for part in (weights, biases))
    return [
        derivatives.norm_rotated(x, weight, bias, eps, NormKind(name), args)
        for x, weight, bias in zip(xs, given, added, strict=True)
    ]


def _copies(xs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Of what will be overwritten: a gradient of the table or of a weight needs the values of before."""
    return [x.clone() for x in xs]


def _wants_grad(tensors: Sequence[torch.Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


@torch.library.impl(library, "rotate", "FuncTorchBatched")
def _rotate_batched(xs: list[torch.Tensor], *flat: Any) -> list[torch.Tensor]:
    return _rotated(xs, flat)


@torch.library.impl(library, "norm_rotate", "FuncTorchBatched")
def _norm_rotate_batched(xs: list[torch.Tensor], *flat: Any) -> list[torch.Tensor]:
    return _norm_rotated(xs, flat)


@torch.library.impl(library, "rotate_", "FuncTorchBatched")
def _rotate_inplace_batched(xs: list[torch.Tensor], *flat: Any) -> None:
    write_all(xs, _rotated(_copies(xs), flat))


@torch.library.impl(library, "norm_rotate_", "FuncTorchBatched")
def _norm_rotate_inplace_batched(xs: list[torch.Tensor], *flat: Any) -> None:
    write_all(xs, _norm_rotated(_copies(xs), flat))


@torch.library.impl(library, "rotate", "Autograd")
def _rotate_autograd(xs: list[torch.Tensor], *flat: Any) -> list[torch.Tensor]:
    if in_level() or _wants_grad(flat[:1]):
        return _rotated(xs, flat)
    if _wants_grad(xs):
        return list(_Rotate.apply(flat, *xs))
    return _rotate_below(xs, *flat)


@torch.library.impl(library, "rotate_", "Autograd")
def _rotate_inplace_autograd(xs: list[torch.Tensor], *flat: Any) -> None:
    if in_level() or _wants_grad([*xs, flat[0]]):
        write_all(xs, _rotated(_copies(xs), flat))
        return
    with torch._C._AutoDispatchBelowAutograd():
        _ROTATE_INPLACE(xs, *flat)


@torch.library.impl(library, "norm_rotate", "Autograd")
def _norm_rotate_autograd(xs: list[torch.Tensor], *flat: Any) -> list[torch.Tensor]:
    weights, biases, eps, name, *rest = flat
    if in_level() or _wants_grad(rest[:1]):
        return _norm_rotated(xs, flat)
    if _wants_grad([*xs, *weights, *biases]):
        numbers = (len(xs), len(weights), eps, name)
        return list(_NormRotate.apply(numbers, rest, *xs, *weights, *biases))
    return _norm_rotate_below(xs, *flat)


@torch.library.impl(library, "norm_rotate_", "Autograd")
def _norm_rotate_inplace_autograd(xs: list[torch.Tensor], *flat: Any) -> None:
    weights, biases, _, _, rows, *_ = flat
    if in_level() or _wants_grad([*xs, *weights, *biases, rows]):
        write_all(xs, _norm_rotated(_copies(xs), flat))
        return
    with torch._C._AutoDispatchBelowAutograd():
        _NORM_ROTATE_INPLACE(xs, *flat)


def _rotate_below(xs: Sequence[torch.Tensor], *flat: Any) -> list[torch.Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        result: list[torch.Tensor] = _ROTATE(list(xs), *flat)
        return result


def _norm_rotate_below(xs: Sequence[torch.Tensor], *flat: Any) -> list[torch.Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        result: list[torch.Tensor] = _NORM_ROTATE(list(xs), *flat)
        return result


class _Rotate(torch.autograd.Function):
    """Backward in fast mode: the inverse rotation. In exact mode: a formula with the roundings of upstream's autograd.

    The rotation is linear, so that its gradient needs no saved input, and either backward is differentiable itself.
    """

    @staticmethod
    def forward(ctx: Any, flat: Sequence[Any], *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outs = _rotate_below(xs, *flat)
        _save(ctx, flat, ())
        ctx.mark_non_differentiable(*[out for out, x in zip(outs, xs, strict=True) if not x.requires_grad])
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        args, backend, _ = _saved(ctx)
        given = [grad for grad in grads if grad is not None]
        turned = iter(_turn_back(given, args, backend))
        return (None, *[None if grad is None else next(turned) for grad in grads])


class _NormRotate(torch.autograd.Function):
    """Gradient of norm and rotation, in float32 (float64 for float64 data), rounded once."""

    @staticmethod
    def forward(
        ctx: Any, numbers: tuple[int, int, float, str], flat: Sequence[Any], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        count, weighted, eps, name = numbers
        xs, weights, biases = tensors[:count], tensors[count : count + weighted], tensors[count + weighted :]
        outs = _norm_rotate_below(xs, weights, biases, eps, name, *flat)
        _save(ctx, flat, (*xs, *weights))
        ctx.count, ctx.eps, ctx.norm = count, eps, NormKind(name)
        ctx.bias_dtypes = [bias.dtype for bias in biases]
        wanted = [any(t.requires_grad for t in tensors[index::count]) for index in range(count)]
        ctx.mark_non_differentiable(*[out for out, wants in zip(outs, wanted, strict=True) if not wants])
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        args, backend, saved = _saved(ctx)
        fast = replace(args, exact=False)
        count = ctx.count
        weights: Sequence[torch.Tensor | None] = saved[count:] or [None] * count
        dtypes = ctx.bias_dtypes or [None] * count
        found = [
            (None, None, None)
            if grad is None
            else derivatives.norm_gradient(
                x, weight, dtype, grad, ctx.eps, ctx.norm, lambda wide: _turn_back([wide], fast, backend)[0]
            )
            for x, weight, dtype, grad in zip(saved[:count], weights, dtypes, grads, strict=True)
        ]
        x_grads, weight_grads, bias_grads = ([each[part] for each in found] for part in range(3))
        return (
            None,
            None,
            *x_grads,
            *(weight_grads if saved[count:] else []),
            *(bias_grads if ctx.bias_dtypes else []),
        )


def _save(ctx: Any, flat: Sequence[Any], further: Sequence[torch.Tensor]) -> None:
    """Keeps what backward needs: torch then refuses a backward pass after one of these tensors was written to."""
    ctx.set_materialize_grads(False)
    ctx.rest = flat[_ARGS_TENSORS:]
    tensors = (*flat[:_ARGS_TENSORS], *further)
    # Those of inference mode count no writes, and autograd takes none of them.
    ctx.save_for_backward(*[t.clone() if t is not None and t.is_inference() else t for t in tensors])


def _saved(ctx: Any) -> tuple[RotationArgs, str, Sequence[torch.Tensor]]:
    tensors = ctx.saved_tensors
    args, backend = unflatten((*tensors[:_ARGS_TENSORS], *ctx.rest))
    return args, backend, tensors[_ARGS_TENSORS:]


def _turn_back(grads: Sequence[torch.Tensor], args: RotationArgs, backend: str) -> list[torch.Tensor]:
    """Gradients turned back; they may come lazily negated, expanded or strided in their last dim."""
    if args.exact or any(map(derivatives.is_batched_gradient, grads)):
        return [derivatives.gradient(grad, args) for grad in grads]
    if not grads:
        return []
    rows = [grad.resolve_neg() for grad in grads]
    rows = [row if row.stride(-1) == 1 else row.contiguous() for row in rows]
    back = replace(args, inverse=not args.inverse)
    return rotate(rows, back, choose_backend(rows, back, "auto" if in_level() else backend))
