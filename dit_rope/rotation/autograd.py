"""Autograd, batching and dual numbers for the operators of :mod:`dit_rope.rotation.ops`.

Plain backward passes call the operators again. Where torch transforms its own operations (torch.func, dual numbers), or
the table itself wants a gradient, the operators are those operations: :mod:`dit_rope.rotation.derivatives`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..rotation_args import Norm, RotationArgs
from ..spec import NormKind
from ..torch_state import in_level
from . import derivatives
from .ops import library, rotate, unflatten, write_all

_ARGS_TENSORS = 3  # rows, positions and entries, the first fields of RotationArgs in a schema
_ROTATE, _ROTATE_INPLACE = torch.ops.dit_rope.rotate.default, torch.ops.dit_rope.rotate_.default
_NORM_ROTATE, _NORM_ROTATE_INPLACE = torch.ops.dit_rope.norm_rotate.default, torch.ops.dit_rope.norm_rotate_.default


def _differentiable(xs: Sequence[torch.Tensor], flat: Sequence[Any]) -> list[torch.Tensor]:
    """The operator in torch's own operations, of which torch knows every derivative."""
    args, norm, _ = unflatten(flat)
    return [derivatives.rotated(x, args, norm and norm.of_tensor(i)) for i, x in enumerate(xs)]


def _differentiable_inplace(xs: Sequence[torch.Tensor], flat: Sequence[Any]) -> None:
    # Of copies: a gradient of the table or of a weight needs the values from before the write.
    write_all(xs, _differentiable([x.clone() for x in xs], flat))


def _wants_grad(tensors: Sequence[torch.Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


@torch.library.impl(library, "rotate", "FuncTorchBatched")
@torch.library.impl(library, "norm_rotate", "FuncTorchBatched")
def _batched(xs: list[torch.Tensor], *flat: Any) -> list[torch.Tensor]:
    return _differentiable(xs, flat)


@torch.library.impl(library, "rotate_", "FuncTorchBatched")
@torch.library.impl(library, "norm_rotate_", "FuncTorchBatched")
def _inplace_batched(xs: list[torch.Tensor], *flat: Any) -> None:
    _differentiable_inplace(xs, flat)


@torch.library.impl(library, "rotate", "Autograd")
def _rotate_autograd(xs: list[torch.Tensor], *flat: Any) -> list[torch.Tensor]:
    if in_level() or _wants_grad(flat[:1]):
        return _differentiable(xs, flat)
    if _wants_grad(xs):
        return list(_Rotate.apply(flat, *xs))
    return list(_below_autograd(_ROTATE, xs, *flat))


@torch.library.impl(library, "rotate_", "Autograd")
def _rotate_inplace_autograd(xs: list[torch.Tensor], *flat: Any) -> None:
    if in_level() or _wants_grad([*xs, flat[0]]):
        _differentiable_inplace(xs, flat)
        return
    _below_autograd(_ROTATE_INPLACE, xs, *flat)


@torch.library.impl(library, "norm_rotate", "Autograd")
def _norm_rotate_autograd(xs: list[torch.Tensor], *flat: Any) -> list[torch.Tensor]:
    weights, biases, eps, name, rounding, *rest = flat
    if in_level() or _wants_grad(rest[:1]):
        return _differentiable(xs, flat)
    if _wants_grad([*xs, *weights, *biases]):
        numbers = (len(xs), len(weights), eps, name, rounding)
        return list(_NormRotate.apply(numbers, rest, *xs, *weights, *biases))
    return list(_below_autograd(_NORM_ROTATE, xs, *flat))


@torch.library.impl(library, "norm_rotate_", "Autograd")
def _norm_rotate_inplace_autograd(xs: list[torch.Tensor], *flat: Any) -> None:
    weights, biases, _, _, _, rows, *_ = flat
    if in_level() or _wants_grad([*xs, *weights, *biases, rows]):
        _differentiable_inplace(xs, flat)
        return
    _below_autograd(_NORM_ROTATE_INPLACE, xs, *flat)


def _below_autograd(operator: Any, xs: Sequence[torch.Tensor], *flat: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator(list(xs), *flat)


class _Rotate(torch.autograd.Function):
    """Backward in fast mode: the inverse rotation. In exact mode: a formula with the roundings of upstream's autograd.

    The rotation is linear, so that its gradient needs no saved input, and either backward is differentiable itself.
    """

    @staticmethod
    def forward(ctx: Any, flat: Sequence[Any], *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outs = _below_autograd(_ROTATE, xs, *flat)
        _save(ctx, flat, ())
        ctx.mark_non_differentiable(*[out for out, x in zip(outs, xs, strict=True) if not x.requires_grad])
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        args, backend, _ = _saved(ctx)
        rotated = iter(_rotate_back([grad for grad in grads if grad is not None], args, backend))
        return (None, *[None if grad is None else next(rotated) for grad in grads])


class _NormRotate(torch.autograd.Function):
    """Gradient of norm and rotation, in float32 (float64 for float64 data), rounded once, whatever forward rounds."""

    @staticmethod
    def forward(
        ctx: Any, numbers: tuple[int, int, float, str, str], flat: Sequence[Any], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        count, weighted, eps, name, rounding = numbers
        xs, weights, biases = tensors[:count], tensors[count : count + weighted], tensors[count + weighted :]
        outs = _below_autograd(_NORM_ROTATE, xs, weights, biases, eps, name, rounding, *flat)
        _save(ctx, flat, (*xs, *weights))
        ctx.count, ctx.eps, ctx.kind = count, eps, NormKind(name)
        ctx.bias_dtypes = [bias.dtype for bias in biases]
        wanted = [any(t.requires_grad for t in tensors[index::count]) for index in range(count)]
        ctx.mark_non_differentiable(*[out for out, wants in zip(outs, wanted, strict=True) if not wants])
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        args, backend, saved = _saved(ctx)
        fast = replace(args, exact=False)
        count = ctx.count
        norm = Norm(ctx.kind, ctx.eps, saved[count:])
        dtypes = ctx.bias_dtypes or [None] * count
        gradients = [
            (None, None, None)
            if grad is None
            else derivatives.norm_gradient(
                x, norm.of_tensor(i), dtype, grad, lambda wide: _rotate_back([wide], fast, backend)[0]
            )
            for i, (x, dtype, grad) in enumerate(zip(saved[:count], dtypes, grads, strict=True))
        ]
        x_grads, weight_grads, bias_grads = zip(*gradients, strict=True)
        return (
            None,
            None,
            *x_grads,
            *(weight_grads if norm.weights else ()),
            *(bias_grads if ctx.bias_dtypes else ()),
        )


def _save(ctx: Any, flat: Sequence[Any], further: Sequence[torch.Tensor]) -> None:
    """Saves what backward needs; torch then refuses a backward pass after a write to one of these tensors."""
    ctx.set_materialize_grads(False)
    ctx.rest = flat[_ARGS_TENSORS:]
    tensors = (*flat[:_ARGS_TENSORS], *further)
    # Tensors of inference mode have no version counter, and autograd does not save them.
    ctx.save_for_backward(*[t.clone() if t is not None and t.is_inference() else t for t in tensors])


def _saved(ctx: Any) -> tuple[RotationArgs, str, Sequence[torch.Tensor]]:
    tensors = ctx.saved_tensors
    args, _, backend = unflatten((*tensors[:_ARGS_TENSORS], *ctx.rest))
    return args, backend, tensors[_ARGS_TENSORS:]


def _rotate_back(grads: Sequence[torch.Tensor], args: RotationArgs, backend: str) -> list[torch.Tensor]:
    """Gradients rotated back; they may be lazily negated, expanded, or strided in their last dim."""
    if args.exact or any(map(derivatives.is_batched_gradient, grads)):
        return [derivatives.gradient(grad, args) for grad in grads]
    if not grads:
        return []
    dense = [grad.resolve_neg() for grad in grads]
    dense = [grad if grad.stride(-1) == 1 else grad.contiguous() for grad in dense]
    inverse = replace(args, inverse=not args.inverse)
    return rotate(dense, inverse, backend="auto" if in_level() else backend)
