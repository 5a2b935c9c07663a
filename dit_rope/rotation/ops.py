"""The rotation without checks of its arguments, and as PyTorch operators: schemas, implementations and fakes.

Each operator takes a list of one or two tensors, so that queries and keys are one launch, and the fields of
:class:`~dit_rope.rotation_args.RotationArgs` one by one, because a schema knows no structs. Functions and operators
trust their input, which :mod:`dit_rope.rotation.api` checks. A compiler traces the backend as the caller named it: the
operator chooses when it runs, on real tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..rotation_args import Norm, NormRounding, RotationArgs
from ..spec import NormKind, Pairing
from ..torch_state import in_level, in_transform
from .choice import MODULES, Choice, remembered_choice

_ARGS = (
    "Tensor rows, Tensor? positions, Tensor? entries, int[] pairs, SymInt[] sizes, SymInt[] first_rows, "
    "SymInt token_offset, SymInt prefix, SymInt count, bool half, bool inverse, bool exact, SymInt head_rows, "
    "str backend"
)
_PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})
_NORM = "Tensor[] weights, Tensor[] biases, float eps, str norm, str rounding"

# Looked up once: they run in every call.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack

library = torch.library.Library("dit_rope", "DEF")
library.define(f"rotate(Tensor[] xs, {_ARGS}) -> Tensor[]")
library.define(f"rotate_(Tensor(a!)[] xs, {_ARGS}) -> ()")
library.define(f"norm_rotate(Tensor[] xs, {_NORM}, {_ARGS}) -> Tensor[]")
library.define(f"norm_rotate_(Tensor(a!)[] xs, {_NORM}, {_ARGS}) -> ()")


def rotate(
    xs: Sequence[torch.Tensor],
    args: RotationArgs,
    norm: Norm | None = None,
    *,
    inplace: bool = False,
    backend: str = "auto",
    choice: Choice | None = None,
) -> list[torch.Tensor]:
    """Rotates ``xs`` ``[B, S, H, D]``, after ``norm`` where there is one; the arguments are not checked.

    Args:
        xs: one or two tensors.
        args, norm: the rotation, and the norm before it.
        inplace: overwrite ``xs``, which are then returned; else new tensors.
        backend: as in :func:`~dit_rope.rotate_qk`.
        choice: the result of :func:`.choice.remembered_choice`, where the caller has it.
    """
    if choice is None:
        choice = Choice(backend) if torch.compiler.is_compiling() else remembered_choice(xs, args, norm, backend)
    parameters = () if norm is None else (*norm.weights, *norm.biases)
    if _needs_dispatcher(args.rows, *xs, *parameters):
        return _dispatched(xs, args, norm, inplace, choice.backend)
    outs = list(xs) if inplace else list(map(torch.empty_like, xs))
    MODULES[choice.backend].rotate(xs, args, outs, norm, choice.memo)
    if inplace:
        _count_write(xs)
    return outs


def rotate_into(
    xs: Sequence[torch.Tensor], args: RotationArgs, outs: Sequence[torch.Tensor], *, backend: str = "auto"
) -> None:
    """Rotates ``xs`` ``[B, S, H, D]`` into ``outs``, such as a cache, without gradients; arguments are not checked."""
    if torch.compiler.is_compiling() or in_level():
        write_all(outs, rotate(xs, args, backend=backend))
        return
    choice = remembered_choice(xs, args, backend=backend, outs=outs)
    MODULES[choice.backend].rotate(xs, args, outs, None, choice.memo)
    _count_write(outs)


def _dispatched(
    xs: Sequence[torch.Tensor], args: RotationArgs, norm: Norm | None, inplace: bool, backend: str
) -> list[torch.Tensor]:
    """The rotation through torch's dispatcher, so that autograd, tracers, modes and subclasses see it."""
    if inplace and _recorded(args):
        write_all(xs, _dispatched(xs, args, norm, False, backend))
        return list(xs)
    flat = (*_flatten(args, norm), backend)
    if inplace:
        in_place = torch.ops.dit_rope.rotate_ if norm is None else torch.ops.dit_rope.norm_rotate_
        in_place(list(xs), *flat)
        return list(xs)
    operator = torch.ops.dit_rope.rotate if norm is None else torch.ops.dit_rope.norm_rotate
    outs: list[torch.Tensor] = operator(list(xs), *flat)
    return outs


def _needs_dispatcher(*tensors: torch.Tensor) -> bool:
    """Whether autograd, a tracer, a mode or a tensor subclass has to see the call.

    Other calls go to the backend at once: the dispatcher needs longer to pass a list of tensors to Python and back than
    a small rotation takes.
    """
    if torch.compiler.is_compiling() or _dispatch_modes() > 0 or _function_modes() > 0 or in_transform():
        return True  # modes that only watch count too
    if not _PLAIN_TYPES.issuperset(map(type, tensors)):
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _recorded(args: RotationArgs) -> bool:
    """Whether torch.jit records the call: it drops operators without a result, such as those in place."""
    return torch._C._get_tracing_state() is not None and args.entries is None


def _count_write(xs: Sequence[torch.Tensor]) -> None:
    """Tells autograd, which cannot see what a kernel writes, that ``xs`` have changed."""
    torch.autograd.graph.increment_version([x for x in xs if not x.is_inference()])


def _flatten(args: RotationArgs, norm: Norm | None = None) -> tuple[Any, ...]:
    """The arguments of an operator between its tensors and its backend."""
    of_norm: tuple[Any, ...] = ()
    if norm is not None:
        of_norm = (list(norm.weights), list(norm.biases), norm.eps, norm.kind.value, norm.rounding.value)
    return (
        *of_norm,
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


def unflatten(flat: Sequence[Any]) -> tuple[RotationArgs, Norm | None, str]:
    """The rotation, the norm before it and the backend, from the arguments of an operator after its tensors."""
    *of_norm, rows, positions, entries, pairs, sizes, first_rows, token_offset, prefix, count, half, inverse, exact = (
        flat[:-2]
    )
    head_rows, backend = flat[-2:]
    norm = None
    if of_norm:
        weights, biases, eps, kind, rounding = of_norm
        norm = Norm(NormKind(kind), eps, weights, biases, NormRounding(rounding))
    pairing = Pairing.HALF if half else Pairing.INTERLEAVED
    where = (tuple(pairs), tuple(sizes), tuple(first_rows), token_offset, prefix, count)
    return RotationArgs(rows, positions, *where, pairing, inverse, exact, entries, head_rows), norm, backend


def _run(xs: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], flat: Sequence[Any]) -> None:
    args, norm, backend = unflatten(flat)
    choice = remembered_choice(xs, args, norm, backend)
    MODULES[choice.backend].rotate(xs, args, outs, norm, choice.memo)


@torch.library.impl(library, "rotate", "CompositeExplicitAutograd")
@torch.library.impl(library, "norm_rotate", "CompositeExplicitAutograd")
def _rotate(xs: list[torch.Tensor], *flat: Any) -> list[torch.Tensor]:
    outs = [torch.empty_like(x) for x in xs]
    _run(xs, outs, flat)
    return outs


@torch.library.impl(library, "rotate_", "CompositeExplicitAutograd")
@torch.library.impl(library, "norm_rotate_", "CompositeExplicitAutograd")
def _rotate_inplace(xs: list[torch.Tensor], *flat: Any) -> None:
    _run(xs, xs, flat)
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
