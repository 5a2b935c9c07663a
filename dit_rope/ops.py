"""The rotation as PyTorch operators: schemas, implementations, fake implementations and autograd.

Each operator takes a list of one or two tensors, so that queries and keys are one launch, and the fields of
:class:`~dit_rope.rotation_args.RotationArgs` one by one, because a schema knows no structs. Operators trust their
input, which :mod:`dit_rope.rotation` checks; a backend that was chosen while a compiler traced is chosen again when
the operator runs, on the tensors that come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .backend_choice import MODULES, choose_backend
from .backends import eager
from .cache import in_mode
from .rotation_args import RotationArgs
from .spec import NormKind, Pairing

_ARGS = (
    "Tensor rows, Tensor? positions, Tensor? entries, int[] pairs, SymInt[] sizes, SymInt[] first_rows, "
    "SymInt token_offset, SymInt prefix, SymInt count, bool half, bool inverse, bool exact, str backend"
)
_PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})
_NORM = "Tensor[] weights, float eps, bool across_heads"

_library = torch.library.Library("dit_rope", "DEF")
_library.define(f"rotate(Tensor[] xs, {_ARGS}) -> Tensor[]")
_library.define(f"rotate_(Tensor(a!)[] xs, {_ARGS}) -> ()")
_library.define(f"norm_rotate(Tensor[] xs, {_NORM}, {_ARGS}) -> Tensor[]")
_library.define(f"norm_rotate_(Tensor(a!)[] xs, {_NORM}, {_ARGS}) -> ()")


def rotate(xs: Sequence[torch.Tensor], args: RotationArgs, backend: str) -> list[torch.Tensor]:
    """Rotates ``xs`` ``[B, S, H, D]`` into new tensors."""
    if _needs_dispatcher(xs):
        result: list[torch.Tensor] = torch.ops.dit_rope.rotate(list(xs), *_flatten(args), backend)
        return result
    outs = [torch.empty_like(x) for x in xs]
    MODULES[backend].rotate(xs, args, outs)
    return outs


def rotate_(xs: Sequence[torch.Tensor], args: RotationArgs, backend: str) -> None:
    """Rotates ``xs`` ``[B, S, H, D]`` in place."""
    if _needs_dispatcher(xs):
        torch.ops.dit_rope.rotate_(list(xs), *_flatten(args), backend)
        return
    MODULES[backend].rotate(xs, args, xs)
    _count_write(xs)


def rotate_into(xs: Sequence[torch.Tensor], args: RotationArgs, outs: Sequence[torch.Tensor], backend: str) -> None:
    """Rotates ``xs`` ``[B, S, H, D]`` into ``outs``, which autograd and tracers do not see."""
    MODULES[backend].rotate(xs, args, outs)
    _count_write(outs)


def norm_rotate(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    eps: float,
    norm: NormKind,
    args: RotationArgs,
    backend: str,
) -> list[torch.Tensor]:
    """RMSNorm, then rotation, of ``xs`` ``[B, S, H, D]`` into new tensors."""
    given = _weight_list(xs, weights, norm)
    if _needs_dispatcher([*xs, *given]):
        norm_args = (given, eps, norm is NormKind.ACROSS_HEADS)
        result: list[torch.Tensor] = torch.ops.dit_rope.norm_rotate(list(xs), *norm_args, *_flatten(args), backend)
        return result
    outs = [torch.empty_like(x) for x in xs]
    MODULES[backend].norm_rotate(xs, given or weights, eps, norm, args, outs)
    return outs


def norm_rotate_(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    eps: float,
    norm: NormKind,
    args: RotationArgs,
    backend: str,
) -> None:
    """RMSNorm, then rotation, of ``xs`` ``[B, S, H, D]`` in place."""
    given = _weight_list(xs, weights, norm)
    if _needs_dispatcher([*xs, *given]):
        norm_args = (given, eps, norm is NormKind.ACROSS_HEADS)
        torch.ops.dit_rope.norm_rotate_(list(xs), *norm_args, *_flatten(args), backend)
        return
    MODULES[backend].norm_rotate(xs, given or weights, eps, norm, args, xs)
    _count_write(xs)


def _needs_dispatcher(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether anybody but the backend has to see the call: autograd, a tracer, a mode or a tensor subclass.

    The dispatcher takes longer to hand a list of tensors to Python and back than a small rotation takes.
    """
    if in_mode() or torch._C._len_torch_function_stack() > 0 or torch._C._get_tracing_state() is not None:
        return True
    if not {type(x) for x in tensors} <= _PLAIN_TYPES:
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _count_write(xs: Sequence[torch.Tensor]) -> None:
    """Tells autograd, which cannot see what a kernel writes, that ``xs`` have changed."""
    torch.autograd.graph.increment_version([x for x in xs if not x.is_inference()])


def _flatten(args: RotationArgs) -> tuple[Any, ...]:
    return (
        args.rows,
        args.positions,
        args.entries,
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
    rows, positions, entries, pairs, sizes, first_rows, token_offset, prefix, count, half, *rest = flat
    inverse, exact, backend = rest
    pairing = Pairing.HALF if half else Pairing.INTERLEAVED
    where = (tuple(pairs), tuple(sizes), tuple(first_rows), token_offset, prefix, count)
    return RotationArgs(rows, positions, *where, pairing, inverse, exact, entries), backend


def _weight_list(
    xs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor | None], norm: NormKind
) -> list[torch.Tensor]:
    """One weight per tensor, or none at all; ones stand in where only the other tensor has a weight."""
    missing = [weight is None for weight in weights]
    if not any(missing):
        return list(weights)  # type: ignore[arg-type]
    if all(missing):
        return []
    return [
        weight
        if weight is not None
        else x.new_ones(x.shape[2] * x.shape[3] if norm is NormKind.ACROSS_HEADS else x.shape[3])
        for x, weight in zip(xs, weights, strict=True)
    ]


def _rotate_into(xs: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], flat: Sequence[Any]) -> None:
    args, backend = _unflatten(flat)
    MODULES[choose_backend(xs, args, backend)].rotate(xs, args, outs)


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
    MODULES[choose_backend(xs, args, backend, norm)].norm_rotate(xs, given, eps, norm, args, outs)


@torch.library.impl(_library, "rotate", "CompositeExplicitAutograd")
def _rotate(xs: list[torch.Tensor], *flat: Any) -> list[torch.Tensor]:
    outs = [torch.empty_like(x) for x in xs]
    _rotate_into(xs, outs, flat)
    return outs


@torch.library.impl(_library, "rotate_", "CompositeExplicitAutograd")
def _rotate_inplace(xs: list[torch.Tensor], *flat: Any) -> None:
    _rotate_into(xs, xs, flat)
    _count_write(xs)


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
    _count_write(xs)


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
        turned = iter(_turn_back(given, args, ctx.backend))
    else:
        turned = iter([_reference_gradient(grad, args) for grad in given])
    back = [None if grad is None else next(turned) for grad in grads]
    return (back, *[None] * 13)


def _turn_back(grads: Sequence[torch.Tensor], args: RotationArgs, backend: str) -> list[torch.Tensor]:
    """Gradients turned by the inverse rotation; they may come expanded or strided in their last dim."""
    rows = [grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads]
    back = replace(args, inverse=not args.inverse)
    return rotate(rows, back, choose_backend(rows, back, backend))


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
    return (x_grads, weight_grads if weights else [], None, None, *[None] * 13)


def _norm_gradient(
    ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """With n = x / rms(x): dx = (dn - n mean(dn n)) / rms(x), where dn is the gradient turned back, times weight."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    dims = (-2, -1) if ctx.across_heads else (-1,)
    (turned,) = _turn_back([grad.to(wide)], ctx.args, ctx.backend)
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
