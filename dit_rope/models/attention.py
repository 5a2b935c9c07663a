"""How queries and keys rotate as the norms of an attention module return them.

The attention processor, or an attention module without one, gets a subclass of its own class, whose call does this:
where all the code it is about to run is known, it runs that code on a stand-in of the attention module, whose norms (or
projections, where there is no norm) rotate what they return, and without the rotary tensors, so that the code does not
rotate. The stand-in lives for one call and shares everything with the module but those names. So nothing is left for
anybody to find or to miss: whatever wraps, hooks, compiles or replaces the module, its norms or its processor sees what
it would see without a patch, and a call that does not get this far is the model's own.

Wherever something is not known, or the tables are not those of these tokens, the model's own code rotates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import rotation
from ..cache import in_transform
from ..rotation_args import RotationArgs
from .adapter import Layout, Rotated, Rotations, Rounds
from .class_override import INSTALLED, Installed, Override, copy_of, unpatched_class, unpatched_method
from .fused_norms import fused_norm, makes_fresh_results
from .known_code import Guard, guard_of
from .packed_tables import Align, PackedTable, UnfitTable

_PROJECTIONS = frozenset({"to_q", "to_k"})
_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


@dataclass(frozen=True, eq=False)
class AttentionSettings:
    """How one attention module is patched, as :func:`dit_rope.patch` was asked: kept on the module itself."""

    rotations: Rotations
    exact: bool | None
    backend: str
    fuses_norm: bool

    def is_exact(self, device: torch.device) -> bool:
        """Whether this module rotates with the roundings of the model's own code on ``device``."""
        return device.type == "cpu" if self.exact is None else self.exact


class ProcessorOverride(Override):
    """The call of an attention processor."""

    def replacement(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """What the processor returns; ``attn`` is given to its code as a stand-in where its norms rotate."""
        own = unpatched_method(self, "__call__")
        if torch.compiler.is_compiling() or in_transform():
            return own(attn, *args, **kwargs)
        record: Installed | None = getattr(attn, "__dict__", {}).get(INSTALLED)
        if record is None or not record.active or not isinstance(record.settings, AttentionSettings):
            return own(attn, *args, **kwargs)
        guard = guard_of(unpatched_class(self), "__call__")
        rotated = _rotated_call(self, attn, guard, record.settings, args, kwargs)
        return own(attn, *args, **kwargs) if rotated is None else rotated.result


class AttentionOverride(Override):
    """The forward of an attention module that attends by itself, without a processor."""

    def replacement(self, *args: Any, **kwargs: Any) -> Any:
        """What the forward returns; it runs on a stand-in of the module where the norms of that rotate."""
        own = unpatched_method(self)
        if torch.compiler.is_compiling() or in_transform():
            return own(*args, **kwargs)
        record: Installed | None = vars(self).get(INSTALLED)
        if record is None or not record.active:
            return own(*args, **kwargs)
        guard = guard_of(unpatched_class(self), "forward")
        rotated = _rotated_call(None, self, guard, record.settings, args, kwargs)
        return own(*args, **kwargs) if rotated is None else rotated.result


@dataclass(frozen=True)
class _Result:
    result: Any


def _rotated_call(
    processor: Any, attn: Any, guard: Guard, settings: AttentionSettings, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> _Result | None:
    """The call with rotating norms, or with a rotating function; None where the model's own code has to run."""
    holder = attn if processor is None else processor
    if why_unknown(holder, guard, settings.rotations) is not None:
        return None
    run = _with_rotating_norms if settings.rotations.rotated else _with_rotating_function
    try:
        return _Result(run(processor, attn, guard, settings, args, kwargs))
    except UnfitTable:
        return None


def why_unknown(holder: Any, guard: Guard, declared: Rotations) -> str | None:
    """Why the code of a processor, or of an attention module, is not what ``declared`` was written for."""
    if guard.unknown is not None:
        return guard.unknown
    owner = guard.slot.rpartition(".")[0].rpartition(".")[2]
    if owner not in (declared.processors or (declared.attention_class,)):
        return f"{owner} is not a processor that it knows there"
    name = guard.overridden_in(holder)
    if name is not None and (name != "forward" or "forward" not in guard.slot):
        return f"{owner} holds a {name} of its own"
    return None


def _with_rotating_function(
    processor: Any, attn: Any, guard: Guard, settings: AttentionSettings, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Runs code that rotates through a function of its module, with ours under that function's name."""
    rebound = settings.rotations.rebound
    assert rebound is not None
    scope = guard.function.__globals__
    stand_in = functools.partial(_rotate_instead, settings, scope[rebound.function])
    given = (attn,) if processor is None else (processor, attn)
    return copy_of(guard.function, {**scope, rebound.function: stand_in})(*given, *args, **kwargs)


def _rotate_instead(settings: AttentionSettings, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stands in for ``own``, a function of tensors and then of what they rotate by."""
    declared, rebound = settings.rotations, settings.rotations.rebound
    assert rebound is not None
    xs = list(args[: rebound.returns])
    form, rotary = declared.format, args[rebound.returns] if rebound.tables == 1 else args[rebound.returns :]
    exact = settings.is_exact(xs[0].device)
    known = len(args) == rebound.returns + rebound.tables and not kwargs and form.accepts(rotary)
    if not known or (exact and not form.is_exact(rotary)) or any(x.dtype not in _DTYPES or x.numel() == 0 for x in xs):
        return own(*args, **kwargs)
    try:
        (table,) = form.pack(rotary, xs[0].device)
    except UnfitTable:
        return own(*args, **kwargs)
    if exact and form.narrows:
        table = table.narrowed(xs[0].dtype)
    heads = [as_heads(x, declared.layout, table.head_dim) for x in xs]
    if not all(_fits(x, table, declared.partial) and x.shape[1] == table.tokens for x in heads):
        return own(*args, **kwargs)
    args_of = table.args(table.tokens, Align.START, exact)
    rotated = [
        as_given(x, declared.layout) for x in rotate_heads(heads, args_of, settings.backend, form.upcasts, False)
    ]
    return rotated[0] if rebound.returns == 1 else tuple(rotated)


def _fits(heads: torch.Tensor, table: PackedTable, partial: bool) -> bool:
    """Whether ``heads`` ``[B, S, H, D]`` are what the rows of ``table`` were made for, in all but their number."""
    batch, _, count, width = heads.shape
    if table.batch not in (1, batch) or table.heads not in (1, count):
        return False
    return table.head_dim <= width if partial else table.head_dim == width


def _with_rotating_norms(
    processor: Any, attn: Any, guard: Guard, settings: AttentionSettings, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Runs the known code of a processor, or of a module, on a stand-in whose norms rotate what they return."""
    declared = settings.rotations
    names = guard.parameters[1 if processor is None else 2 :]
    arguments = dict(zip(names, args, strict=False))
    arguments.update(kwargs)
    call = _prepared(attn, settings, arguments)
    stand_in = call.stand_in(attn)
    given = (stand_in,) if processor is None else (processor, stand_in)
    if declared.unrotated is not None:
        result = declared.unrotated(*given, guard.function, **arguments)
    elif declared.rebound is not None:
        scope = {**guard.function.__globals__, declared.rebound.function: functools.partial(_pass_on, declared)}
        result = copy_of(guard.function, scope)(*given, *args, **kwargs)
    else:
        for name in declared.rotary:
            if name in kwargs:
                kwargs = {**kwargs, name: None}
            elif name in names[: len(args)]:
                index = names.index(name)
                args = (*args[:index], None, *args[index + 1 :])
        result = guard.function(*given, *args, **kwargs)
    call.check(attn)
    return result


def _pass_on(declared: Rotations, *args: Any, **kwargs: Any) -> Any:
    """Stands in for a function that rotates, where the norms have done so."""
    assert declared.rebound is not None
    xs = args[: declared.rebound.returns]
    return xs[0] if len(xs) == 1 else xs


def _prepared(attn: Any, settings: AttentionSettings, arguments: Mapping[str, Any]) -> _Call:
    """The rotation of one call, whose ``arguments`` are by name.

    Raises:
        UnfitTable: there is nothing to rotate by, or the tables are not those of these tokens.
    """
    declared = settings.rotations
    form = declared.format
    rotary = [arguments.get(name) for name in declared.rotary]
    given = [each for each in rotary if each is not None]
    if rotary[0] is None or not (len(given) == len(rotary) or (declared.later_default_to_first and len(given) == 1)):
        raise UnfitTable
    if not all(map(form.accepts, given)):
        raise UnfitTable
    hidden = arguments.get(declared.covers[0].names[-1])
    if not isinstance(hidden, torch.Tensor) or hidden.dtype not in _DTYPES or hidden.numel() == 0:
        raise UnfitTable
    exact = settings.is_exact(hidden.device)
    if exact and not (form.exact_backward or not torch.is_grad_enabled()):
        raise UnfitTable
    if exact and not all(map(form.is_exact, given)):
        raise UnfitTable
    if getattr(attn, "fused_projections", False) and any(
        name in _PROJECTIONS for name, _ in rotating_modules(attn, declared)
    ):
        raise UnfitTable
    tables = [table for each in given for table in form.pack(each, hidden.device)]
    dim = 0 if declared.layout is Layout.SHD else 1
    for index, table in enumerate(tables):
        if not declared.covers[min(index, len(declared.covers) - 1)].fit(arguments, dim, table.tokens):
            raise UnfitTable
    dtypes = {Rounds.INPUT: hidden.dtype, Rounds.PROJECTION: _computed_dtype(hidden)}
    if exact and form.narrows:
        tables = [table.narrowed(dtypes[Rounds.PROJECTION]) for table in tables]
    return _Call(settings, tables, exact, dtypes)


def rotating_modules(attn: Any, declared: Rotations) -> list[tuple[str, Rotated]]:
    """Names of the norms of ``attn`` that rotate, and of projections for those it lacks."""
    modules = vars(attn)["_modules"]
    found = []
    for name, rotated in declared.rotated.items():
        if modules.get(name) is not None:
            found.append((name, rotated))
        elif rotated.projection is not None and modules.get(rotated.projection) is not None:
            found.append((rotated.projection, rotated))
    return found


def _computed_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype of queries and keys that are projected from ``hidden``."""
    kind = hidden.device.type
    # There is no autocast on the meta device, not even to ask about.
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else hidden.dtype


class _Call:
    """One call of an attention module: its tables, and which of its norms have not been called yet."""

    def __init__(
        self,
        settings: AttentionSettings,
        tables: list[PackedTable],
        exact: bool,
        dtypes: Mapping[Rounds, torch.dtype],
    ) -> None:
        self.settings = settings
        self.declared = settings.rotations
        self.tables = tables
        self.exact = exact
        self.dtypes = dtypes
        self.attn: Any = None
        self.heads: int = 0
        self.rotating: set[str] = set()
        self.pending: set[str] = set()

    def check(self, attn: Any) -> None:
        """Raises RuntimeError where some of the norms were called, and some were not."""
        if self.pending and self.pending != self.rotating:
            raise RuntimeError(
                f"{type(attn).__name__} must call {' and '.join(sorted(self.pending))} once each where dit_rope has "
                "patched it, but left them out, so that queries or keys were not rotated; undo the patch before this "
                "call"
            )

    def stand_in(self, attn: Any) -> Any:
        """An object of the class and with the attributes of ``attn``, whose norms rotate what they return."""
        self.attn = attn
        other = object.__new__(type(attn))
        state = vars(other)
        state.update(vars(attn))
        modules = state["_modules"]
        self.heads = getattr(attn, "heads", None) or getattr(attn, "num_heads", None) or 0
        for name, rotated in rotating_modules(attn, self.declared):
            state[name] = _RotatingModule(modules[name], name, rotated, self)
            if not rotated.repeats:
                self.pending.add(name)
                self.rotating.add(name)
        return other


class _RotatingModule:
    """Stands for a norm, or a projection, in one call: what it returns has been rotated."""

    __slots__ = ("_call", "_module", "_name", "_rotated")

    def __init__(self, module: Any, name: str, rotated: Rotated, call: _Call) -> None:
        self._module, self._name, self._rotated, self._call = module, name, rotated, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the module returns, rotated; what it was given is not written to."""
        call, rotated, declared = self._call, self._rotated, self._call.declared
        call.pending.discard(self._name)
        table = call.tables[min(rotated.table, len(call.tables) - 1)]
        layout = declared.layout if self._name in declared.rotated else Layout.BSC
        if not call.exact and len(args) == 1 and not kwargs:
            fused = self._fused(args[0], table, layout)
            if fused is not None:
                return as_given(fused, layout)
        fresh = makes_fresh_results(self._module)
        y = self._module(*args, **kwargs)
        fresh = fresh and not any(y is x for x in (*args, *kwargs.values()))
        if call.exact and declared.rounds is not None:
            y, before = y.to(call.dtypes[declared.rounds]), y
            fresh = fresh or y is not before
        if call.exact and declared.result is not None and y.dtype is not torch.float32:
            y, fresh = y.float(), True  # so that the result is rounded once
        if declared.rotate is not None:
            return declared.rotate(y, table, functools.partial(self._rotate, table, inplace=fresh))
        result = self._rotate(table, self._heads(y, table, layout), inplace=fresh)
        if call.exact and declared.result is not None:
            result = result.to(declared.result)
        return as_given(result, layout)

    def _fused(self, x: torch.Tensor, table: PackedTable, layout: Layout) -> torch.Tensor | None:
        """Norm and rotation of ``x`` in one pass; None where the kernels do not compute what the module does."""
        call, declared = self._call, self._call.declared
        if not call.settings.fuses_norm or declared.rotate is not None or is_distributed(x):
            return None
        if not makes_fresh_results(self._module):
            return None
        if declared.rounds is Rounds.PROJECTION:
            x = x.to(call.dtypes[declared.rounds])  # it is an upcast of that dtype, and loses nothing
        norm = fused_norm(self._module, x.dtype) if x.dtype in _DTYPES else None
        if norm is None:
            return None
        heads = self._heads(x, table, layout)
        return rotation.apply_norm(
            [heads],
            [norm.weight],
            norm.eps,
            norm.kind(layout is Layout.BSC),
            table.args(heads.shape[1], self._rotated.align, False),
            biases=[norm.bias],
            backend=call.settings.backend,
        )[0]

    def _heads(self, y: torch.Tensor, table: PackedTable, layout: Layout) -> torch.Tensor:
        """``y`` as heads ``[B, S, H, D]``, if the table is made for them."""
        call, declared = self._call, self._call.declared
        head_dim = declared.head_dim(call.attn) if declared.head_dim else table.head_dim
        if layout is Layout.BSC and (y.ndim != 3 or y.shape[-1] % head_dim):
            raise UnfitTable
        heads = as_heads(y, layout, head_dim)
        if heads.ndim != 4 or heads.dtype not in _DTYPES or not _fits(heads, table, declared.partial):
            raise UnfitTable
        if layout is Layout.BSC and call.heads and call.heads % heads.shape[2] and not is_distributed(y):
            raise UnfitTable
        if self._rotated.rest_is_identity and not table.rest_is_identity(heads.shape[1]):
            raise UnfitTable
        return heads

    def _rotate(self, table: PackedTable, heads: torch.Tensor, inplace: bool) -> torch.Tensor:
        call = self._call
        args = table.args(heads.shape[1], self._rotated.align, call.exact)
        return rotate_heads([heads], args, call.settings.backend, call.declared.format.upcasts, inplace)[0]


def rotate_heads(
    heads: list[torch.Tensor], args: RotationArgs, backend: str, upcasts: bool, inplace: bool
) -> list[torch.Tensor]:
    """``heads`` ``[B, S, H, D]`` rotated, overwritten where ``inplace`` and no gradient is wanted.

    Of distributed tensors each rank rotates the heads that it holds. ``upcasts``: as a :class:`Format` says.
    """
    if any(map(is_distributed, heads)):
        given: list[Any] = list(heads)
        local = rotate_heads([x.to_local() for x in given], args, backend, upcasts, inplace)
        return [type(x).from_local(y, x.device_mesh, x.placements) for x, y in zip(given, local, strict=True)]
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in heads)
    if grad and args.exact and upcasts and heads[0].dtype.itemsize == 2:
        rotated = rotation.apply([x.float() for x in heads], args, backend=backend)
        return [y.to(x.dtype) for x, y in zip(heads, rotated, strict=True)]
    return rotation.apply(heads, args, inplace=inplace and not grad, backend=backend)


def is_distributed(x: torch.Tensor) -> bool:
    """Whether ``x`` is a DTensor, whose module need not be imported for that."""
    return type(x) is not torch.Tensor and hasattr(x, "to_local")


def as_heads(x: torch.Tensor, layout: Layout, head_dim: int) -> torch.Tensor:
    """A view ``[B, S, H, D]`` of ``x``."""
    if layout is Layout.BSC:
        return x.view(*x.shape[:-1], -1, head_dim)
    if layout is Layout.BHSD:
        return x.transpose(1, 2)
    if layout is Layout.BHDS:
        return x.permute(0, 3, 1, 2)
    return x.unsqueeze(0) if layout is Layout.SHD else x


def as_given(heads: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The inverse of :func:`as_heads`."""
    if layout is Layout.BSC:
        return heads.flatten(2)
    if layout is Layout.BHSD:
        return heads.transpose(1, 2)
    if layout is Layout.BHDS:
        return heads.permute(0, 2, 3, 1)
    return heads.squeeze(0) if layout is Layout.SHD else heads
