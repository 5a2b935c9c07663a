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
    "SymInt token_offset, SymInt prefix, SymInt count, bool half, bool inverse, bool exact, SymInt head_rows, "
    "str backend"
)
_ARGS_COUNT = 14
_PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})
_NORM = "Tensor[] weights, Tensor[] biases, float eps, str norm"

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
    biases: Sequence[torch.Tensor | None] = (),
) -> list[torch.Tensor]:
    """Norm, then rotation, of ``xs`` ``[B, S, H, D]`` into new tensors."""
    given, added = _for_all(xs, weights, norm, 1.0), _for_all(xs, biases, norm, 0.0) if biases else []
    if _needs_dispatcher([*xs, *given, *added]):
        norm_args = (given, added, eps, norm.value)
        result: list[torch.Tensor] = torch.ops.dit_rope.norm_rotate(list(xs), *norm_args, *_flatten(args), backend)
        return result
    outs = [torch.empty_like(x) for x in xs]
    MODULES[backend].norm_rotate(xs, given or weights, eps, norm, args, outs, added)
    return outs


def norm_rotate_(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    eps: float,
    norm: NormKind,
    args: RotationArgs,
    backend: str,
    biases: Sequence[torch.Tensor | None] = (),
) -> None:
    """Norm, then rotation, of ``xs`` ``[B, S, H, D]`` in place."""
    given, added = _for_all(xs, weights, norm, 1.0), _for_all(xs, biases, norm, 0.0) if biases else []
    if _needs_dispatcher([*xs, *given, *added]):
        norm_args = (given, added, eps, norm.value)
        torch.ops.dit_rope.norm_rotate_(list(xs), *norm_args, *_flatten(args), backend)
        return
    MODULES[backend].norm_rotate(xs, given or weights, eps, norm, args, xs, added)
    _count_write(xs)


def _needs_dispatcher(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether anybody but the backend has to see the call: autograd, a tracer, a mode or a tensor subclass.

    The dispatcher takes longer to hand a list of tensors to Python and back than a small rotation takes.
    """
    if in_mode() or torch._C._len_torch_dispatch_stack() > 0:
        return True  # the second also for modes that only watch
    if torch._C._len_torch_function_stack() > 0 or torch._C._get_tracing_state() is not None:
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
        args.head_rows,
    )


def _unflatten(flat: Sequence[Any]) -> tuple[RotationArgs, str]:
    rows, positions, entries, pairs, sizes, first_rows, token_offset, prefix, count, half, *rest = flat
    inverse, exact, head_rows, backend = rest
    pairing = Pairing.HALF if half else Pairing.INTERLEAVED
    where = (tuple(pairs), tuple(sizes), tuple(first_rows), token_offset, prefix, count)
    return RotationArgs(rows, positions, *where, pairing, inverse, exact, entries, head_rows), backend


def _for_all(
    xs: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor | None], norm: NormKind, stand_in: float
) -> list[torch.Tensor]:
    """One weight or bias per tensor, or none at all; ``stand_in`` fills one where only the other tensor has it."""
    missing = [parameter is None for parameter in parameters]
    if not any(missing):
        return list(parameters)  # type: ignore[arg-type]
    if all(missing):
        return []
    return [
        parameter
        if parameter is not None
        else x.new_full((x.shape[2] * x.shape[3] if norm.across_heads else x.shape[3],), stand_in)
        for x, parameter in zip(xs, parameters, strict=True)
    ]


def _rotate_into(xs: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], flat: Sequence[Any]) -> None:
    args, backend = _unflatten(flat)
    MODULES[choose_backend(xs, args, backend)].rotate(xs, args, outs)


def _norm_rotate_into(xs: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], flat: Sequence[Any]) -> None:
    weights, biases, eps, name, *rest = flat
    args, backend = _unflatten(rest)
    norm = NormKind(name)
    given: Sequence[torch.Tensor | None] = weights or [None] * len(xs)
    MODULES[choose_backend(xs, args, backend, norm)].norm_rotate(xs, given, eps, norm, args, outs, biases)


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
def _norm_rotate(xs: list[torch.Tensor], *flat: Any) -> list[torch.Tensor]:
    outs = [torch.empty_like(x) for x in xs]
    _norm_rotate_into(xs, outs, flat)
    return outs


@torch.library.impl(_library, "norm_rotate_", "CompositeExplicitAutograd")
def _norm_rotate_inplace(xs: list[torch.Tensor], *flat: Any) -> None:
    _norm_rotate_into(xs, xs, flat)
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
    return (back, *[None] * _ARGS_COUNT)


def _turn_back(grads: Sequence[torch.Tensor], args: RotationArgs, backend: str) -> list[torch.Tensor]:
    """Gradients turned by the inverse rotation; they may come expanded or strided in their last dim."""
    rows = [grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads]
    back = replace(args, inverse=not args.inverse)
    return rotate(rows, back, choose_backend(rows, back, backend))


def _reference_gradient(grad: torch.Tensor, args: RotationArgs) -> torch.Tensor:
    cos, sin = eager.dense_angles(args, *grad.shape[1:3])
    with torch.enable_grad():
        x = torch.zeros_like(grad).requires_grad_()
        out = eager.reference(x, cos, sin, args.pairing)
    (result,) = torch.autograd.grad(out, x, grad)
    return result


def _norm_rotate_setup(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    xs, weights, biases, ctx.eps, name, *flat = inputs
    ctx.args, ctx.backend = _unflatten(flat)
    ctx.norm = NormKind(name)
    ctx.tensors = len(xs)
    ctx.bias_dtypes = [bias.dtype for bias in biases]
    ctx.save_for_backward(*xs, *weights)


def _norm_rotate_backward(ctx: Any, grads: list[torch.Tensor | None]) -> tuple[Any, ...]:
    """Gradient of norm and rotation, in float32 (float64 for float64 data), rounded once."""
    saved, count = ctx.saved_tensors, ctx.tensors
    weights = saved[count:] or [None] * count
    dtypes = ctx.bias_dtypes or [None] * count
    found = [
        (None, None, None) if grad is None else _norm_gradient(ctx, x, weight, bias_dtype, grad)
        for x, weight, bias_dtype, grad in zip(saved[:count], weights, dtypes, grads, strict=True)
    ]
    x_grads, weight_grads, bias_grads = ([each[part] for each in found] for part in range(3))
    of_parameters = (weight_grads if saved[count:] else [], bias_grads if ctx.bias_dtypes else [])
    return (x_grads, *of_parameters, None, None, *[None] * _ARGS_COUNT)


def _norm_gradient(
    ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias_dtype: torch.dtype | None, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x, weight and bias.

    With n = x / rms(x): dx = (dn - n mean(dn n)) / rms(x), where dn is the gradient turned back, times weight. In a
    LayerNorm x is first less its mean, and so is the result: dx = (dn - mean(dn) - n mean(dn n)) / rms(x - mean(x)).
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    across = ctx.norm.across_heads
    dims = (-2, -1) if across else (-1,)
    (turned,) = _turn_back([grad.to(wide)], ctx.args, ctx.backend)
    values = x.to(wide)
    if ctx.norm.centred:
        values = values - values.mean(dims, keepdim=True)
    scale = torch.rsqrt(values.square().mean(dims, keepdim=True) + ctx.eps)
    normed = values * scale
    summed = (0, 1) if across else (0, 1, 2)
    weight_grad = bias_grad = None
    if bias_dtype is not None:
        bias_grad = turned.sum(summed).flatten().to(bias_dtype)
    if weight is not None:
        weight_grad = (turned * normed).sum(summed).flatten().to(weight.dtype)
        turned = turned * weight.to(wide).view(x.shape[2:] if across else weight.shape)
    x_grad = turned - normed * (turned * normed).mean(dims, keepdim=True)
    if ctx.norm.centred:
        x_grad = x_grad - turned.mean(dims, keepdim=True)
    return (scale * x_grad).to(x.dtype), weight_grad, bias_grad


torch.library.register_autograd("dit_rope::rotate", _rotate_backward, setup_context=_rotate_setup, lib=_library)
torch.library.register_autograd(
    "dit_rope::norm_rotate", _norm_rotate_backward, setup_context=_norm_rotate_setup, lib=_library
)
