"""The rotation as PyTorch operators: schemas, implementations and fake implementations.

Each operator takes a list of one or two tensors, so that queries and keys are one launch, and the fields of
:class:`~dit_rope.rotation_args.RotationArgs` one by one, because a schema knows no structs. Operators trust their
input, which :mod:`dit_rope.rotation.api` checks; a backend that was chosen while a compiler traced is chosen again when
the operator runs, on the tensors that come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..rotation_args import Memo, RotationArgs
from ..spec import NormKind, Pairing
from ..torch_state import in_level, in_transform
from .choice import MODULES, remembered_choice

_ARGS = (
    "Tensor rows, Tensor? positions, Tensor? entries, int[] pairs, SymInt[] sizes, SymInt[] first_rows, "
    "SymInt token_offset, SymInt prefix, SymInt count, bool half, bool inverse, bool exact, SymInt head_rows, "
    "str backend"
)
_PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})
_NORM = "Tensor[] weights, Tensor[] biases, float eps, str norm"

# Looked up once: they run in every call.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack

library = torch.library.Library("dit_rope", "DEF")
library.define(f"rotate(Tensor[] xs, {_ARGS}) -> Tensor[]")
library.define(f"rotate_(Tensor(a!)[] xs, {_ARGS}) -> ()")
library.define(f"norm_rotate(Tensor[] xs, {_NORM}, {_ARGS}) -> Tensor[]")
library.define(f"norm_rotate_(Tensor(a!)[] xs, {_NORM}, {_ARGS}) -> ()")


def rotate(
    xs: Sequence[torch.Tensor], args: RotationArgs, backend: str, memo: Memo | None = None
) -> list[torch.Tensor]:
    """Rotates ``xs`` ``[B, S, H, D]`` into new tensors."""
    if _needs_dispatcher(args.rows, *xs):
        result: list[torch.Tensor] = torch.ops.dit_rope.rotate(list(xs), *_flatten(args), backend)
        return result
    outs = list(map(torch.empty_like, xs))
    MODULES[backend].rotate(xs, args, outs, memo)
    return outs


def rotate_(xs: Sequence[torch.Tensor], args: RotationArgs, backend: str, memo: Memo | None = None) -> None:
    """Rotates ``xs`` ``[B, S, H, D]`` in place."""
    if _needs_dispatcher(args.rows, *xs):
        if _recorded(args):
            write_all(xs, rotate(xs, args, backend))
            return
        torch.ops.dit_rope.rotate_(list(xs), *_flatten(args), backend)
        return
    MODULES[backend].rotate(xs, args, xs, memo)
    _count_write(xs)


def rotate_into(
    xs: Sequence[torch.Tensor],
    args: RotationArgs,
    outs: Sequence[torch.Tensor],
    backend: str,
    memo: Memo | None = None,
) -> None:
    """Rotates ``xs`` ``[B, S, H, D]`` into ``outs``, which backward passes and tracers do not see."""
    if in_level():
        write_all(outs, rotate(xs, args, backend))
        return
    MODULES[backend].rotate(xs, args, outs, memo)
    _count_write(outs)


def norm_rotate(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    eps: float,
    norm: NormKind,
    args: RotationArgs,
    backend: str,
    biases: Sequence[torch.Tensor | None] = (),
    memo: Memo | None = None,
) -> list[torch.Tensor]:
    """Norm, then rotation, of ``xs`` ``[B, S, H, D]`` into new tensors."""
    given, added = _for_all(xs, weights, norm, 1.0), _for_all(xs, biases, norm, 0.0) if biases else []
    if _needs_dispatcher(args.rows, *xs, *given, *added):
        norm_args = (given, added, eps, norm.value)
        result: list[torch.Tensor] = torch.ops.dit_rope.norm_rotate(list(xs), *norm_args, *_flatten(args), backend)
        return result
    outs = list(map(torch.empty_like, xs))
    MODULES[backend].norm_rotate(xs, given or weights, eps, norm, args, outs, added, memo)
    return outs


def norm_rotate_(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    eps: float,
    norm: NormKind,
    args: RotationArgs,
    backend: str,
    biases: Sequence[torch.Tensor | None] = (),
    memo: Memo | None = None,
) -> None:
    """Norm, then rotation, of ``xs`` ``[B, S, H, D]`` in place."""
    given, added = _for_all(xs, weights, norm, 1.0), _for_all(xs, biases, norm, 0.0) if biases else []
    if _needs_dispatcher(args.rows, *xs, *given, *added):
        if _recorded(args):
            write_all(xs, norm_rotate(xs, weights, eps, norm, args, backend, biases))
            return
        norm_args = (given, added, eps, norm.value)
        torch.ops.dit_rope.norm_rotate_(list(xs), *norm_args, *_flatten(args), backend)
        return
    MODULES[backend].norm_rotate(xs, given or weights, eps, norm, args, xs, added, memo)
    _count_write(xs)


def _needs_dispatcher(*tensors: torch.Tensor) -> bool:
    """Whether anybody but the backend has to see the call: autograd, a tracer, a mode or a tensor subclass.

    The dispatcher takes longer to hand a list of tensors to Python and back than a small rotation takes.
    """
    if torch.compiler.is_compiling() or _dispatch_modes() > 0 or _function_modes() > 0 or in_transform():
        return True  # modes that only watch count too
    if not _PLAIN_TYPES.issuperset(map(type, tensors)):
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _recorded(args: RotationArgs) -> bool:
    """Whether torch.jit records the call, which leaves out an operator without a result."""
    return torch._C._get_tracing_state() is not None and args.entries is None


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


def unflatten(flat: Sequence[Any]) -> tuple[RotationArgs, str]:
    """The arguments of a rotation and its backend, from those of an operator after the tensors and the norm."""
    rows, positions, entries, pairs, sizes, first_rows, token_offset, prefix, count, half, *rest = flat
    inverse, exact, head_rows, backend = rest
    pairing = Pairing.HALF if half else Pairing.INTERLEAVED
    where = (tuple(pairs), tuple(sizes), tuple(first_rows), token_offset, prefix, count)
    return RotationArgs(rows, positions, *where, pairing, inverse, exact, entries, head_rows), backend


def _for_all(
    xs: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor | None], norm: NormKind, stand_in: float
) -> list[torch.Tensor]:
    """One weight or bias per tensor, or none at all; ``stand_in`` fills one where only the other tensor has it."""
    there = [parameter for parameter in parameters if parameter is not None]
    if not there or len(there) == len(parameters):
        return there
    return [
        parameter
        if parameter is not None
        else x.new_full((x.shape[2] * x.shape[3] if norm.across_heads else x.shape[3],), stand_in)
        for x, parameter in zip(xs, parameters, strict=True)
    ]


def _rotate_into(xs: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], flat: Sequence[Any]) -> None:
    args, backend = unflatten(flat)
    choice = remembered_choice(xs, args, backend)
    MODULES[choice.backend].rotate(xs, args, outs, choice.memo)


def _norm_rotate_into(xs: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], flat: Sequence[Any]) -> None:
    weights, biases, eps, name, *rest = flat
    args, backend = unflatten(rest)
    norm = NormKind(name)
    given: Sequence[torch.Tensor | None] = weights or [None] * len(xs)
    choice = remembered_choice(xs, args, backend, norm, eps, (*given, *biases))
    MODULES[choice.backend].norm_rotate(xs, given, eps, norm, args, outs, biases, choice.memo)


@torch.library.impl(library, "rotate", "CompositeExplicitAutograd")
def _rotate(xs: list[torch.Tensor], *flat: Any) -> list[torch.Tensor]:
    outs = [torch.empty_like(x) for x in xs]
    _rotate_into(xs, outs, flat)
    return outs


@torch.library.impl(library, "rotate_", "CompositeExplicitAutograd")
def _rotate_inplace(xs: list[torch.Tensor], *flat: Any) -> None:
    _rotate_into(xs, xs, flat)
    _count_write(xs)


@torch.library.impl(library, "norm_rotate", "CompositeExplicitAutograd")
def _norm_rotate(xs: list[torch.Tensor], *flat: Any) -> list[torch.Tensor]:
    outs = [torch.empty_like(x) for x in xs]
    _norm_rotate_into(xs, outs, flat)
    return outs


@torch.library.impl(library, "norm_rotate_", "CompositeExplicitAutograd")
def _norm_rotate_inplace(xs: list[torch.Tensor], *flat: Any) -> None:
    _norm_rotate_into(xs, xs, flat)
    _count_write(xs)


@torch.library.register_fake("dit_rope::rotate", lib=library)
@torch.library.register_fake("dit_rope::norm_rotate", lib=library)
def _fake(xs: list[torch.Tensor], *_: Any) -> list[torch.Tensor]:
    return [torch.empty_like(x) for x in xs]


@torch.library.register_fake("dit_rope::rotate_", lib=library)
@torch.library.register_fake("dit_rope::norm_rotate_", lib=library)
def _fake_inplace(xs: list[torch.Tensor], *_: Any) -> None:
    return None


def write_all(xs: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Copies each value over its tensor, as torch sees it."""
    for x, value in zip(xs, values, strict=True):
        x.copy_(value)
