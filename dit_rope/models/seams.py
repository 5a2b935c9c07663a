"""The places where a rotation is taken out of a model's own code, and put back.

A rope module and the norms of queries and keys (or their projections, where there is no norm) get a subclass of their
own class, with one method of ours; the module, its parameters, buffers, hooks and path stay what they are, so that
state dicts, LoRA, offloading, copies and pickles know no difference, and undoing is giving the class back. The
attention module between them gets two forward hooks: one takes the rotary tensors out of the call, so that the
processor does not rotate, and hands them to the norms; the other checks that all of the norms took them.

While torch.compile traces, the model's own code is left in place: what the compiler fuses, an operator it cannot look
into would only split.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import rotation
from ..rotation_args import RotationArgs
from .adapter import Layout, Rounds
from .context_parallel import split_of
from .formats import Align, AxisRows, Format, PackedTable
from .fused_norms import fused_norm
from .swapping import SETTINGS, Seam, unpatched_method

_PROJECTIONS = frozenset({"to_q", "to_k"})


@dataclass
class Flight:
    """The rotation that an attention module hands to its norms.

    ``dtypes`` are those to which models round what the norms return; ``short`` are the sequences that had fewer tokens
    than their tables. ``fuses_norm`` says whether a norm that the kernels know is computed with the rotation.
    """

    tables: list[PackedTable]
    exact: bool
    backend: str
    pending: set[str]
    dtypes: Mapping[Rounds, torch.dtype]
    upcasts: bool
    fuses_norm: bool = False
    short: list[tuple[PackedTable, Align, int]] = field(default_factory=list)

    def args(self, table: PackedTable, length: int, align: Align, still: bool = False) -> RotationArgs:
        """The rotation of ``length`` tokens, as :meth:`PackedTable.args`."""
        if length < table.tokens and not still:
            self.short.append((table, align, length))
        return table.args(length, align, self.exact)

    def check(self, module: torch.nn.Module) -> None:
        """Raises RuntimeError where a row of a table was for no token: the model's own code would not have run."""
        for table, align, length in self.short:
            others = [count for of, end, count in self.short if of is table and end is not align]
            if length + min(others, default=0) < table.tokens:
                raise RuntimeError(
                    f"{type(module).__name__} must be given as many tokens as its table has rows, got {length} for "
                    f"{table.tokens}; was the sequence split over ranks, and the table not?"
                )


class _InFlight(threading.local):
    """What the attention module now running in this thread has handed over."""

    flight: Flight | None = None


_in_flight = _InFlight()


@dataclass(frozen=True)
class TurnSettings:
    """How one norm or projection turns what it returns, as :class:`Rotations` and :class:`Turned` declare it."""

    name: str
    table: int
    align: Align
    layout: Layout
    head_dim: int | None
    repeats: bool
    still: bool
    rounds: Rounds | None
    result: torch.dtype | None

    def heads(self, x: torch.Tensor, table: PackedTable) -> torch.Tensor:
        """``x`` as ``[B, S, H, D]``."""
        return as_heads(x, self.layout, self.head_dim or table.head_dim)


class TurnSeam(Seam):
    """A norm, or a projection, that turns what it returns when its attention module hands over a rotation."""

    def replacement(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` normed or projected, and turned when a rotation is in flight; x itself is not written."""
        settings: TurnSettings | None = vars(self).get(SETTINGS)
        if settings is None or torch.compiler.is_compiling() or _in_flight.flight is None:
            own: torch.Tensor = unpatched_method(self)(x)
            return own
        flight = _in_flight.flight
        if not settings.repeats and settings.name not in flight.pending:
            raise RuntimeError(
                f"{settings.name} must be called once in each call of its attention module where dit_rope has patched "
                "it, but it was called again; undo the patch before using this processor"
            )
        flight.pending.discard(settings.name)
        return self.turned(x, settings, flight)

    def turned(self, x: torch.Tensor, settings: TurnSettings, flight: Flight) -> torch.Tensor:
        """``x`` normed or projected, and turned by the rotation in flight."""
        table = flight.tables[min(settings.table, len(flight.tables) - 1)]
        turned = self._exact(x, settings, flight, table) if flight.exact else self._fast(x, settings, flight, table)
        return as_given(turned, settings.layout)

    def _exact(self, x: torch.Tensor, settings: TurnSettings, flight: Flight, table: PackedTable) -> torch.Tensor:
        y = unpatched_method(self)(x)
        if settings.rounds is not None:
            y = y.to(flight.dtypes[settings.rounds])
        turned = turn([settings.heads(y, table)], flight, table, settings.align, y is not x, settings.still)[0]
        return turned if settings.result is None else turned.to(settings.result)

    def _fast(self, x: torch.Tensor, settings: TurnSettings, flight: Flight, table: PackedTable) -> torch.Tensor:
        if settings.rounds is Rounds.PROJECTION:
            x = x.to(flight.dtypes[settings.rounds])  # it is an upcast of that dtype, and loses nothing
        norm = fused_norm(self, x.dtype) if flight.fuses_norm and not _is_distributed(x) else None
        if norm is None:
            y = unpatched_method(self)(x)
            return turn([settings.heads(y, table)], flight, table, settings.align, y is not x, settings.still)[0]
        heads = settings.heads(x, table)
        return rotation.apply_norm(
            [heads],
            [norm.weight],
            norm.eps,
            norm.kind(settings.layout is Layout.BSC),
            flight.args(table, heads.shape[1], settings.align, settings.still),
            biases=[norm.bias],
            backend=flight.backend,
        )[0]


def end_flight() -> None:
    """Forgets what was handed over, where no hook of an attention module does."""
    _in_flight.flight = None


def in_flight() -> bool:
    """Whether the norms of the attention module now running in this thread turn, so that nobody else must."""
    return not torch.compiler.is_compiling() and _in_flight.flight is not None


def turn(
    heads: list[torch.Tensor], flight: Flight, table: PackedTable, align: Align, inplace: bool, still: bool = False
) -> list[torch.Tensor]:
    """``heads`` ``[B, S, H, D]`` turned, overwritten where ``inplace`` and no gradient is wanted.

    Of distributed tensors each rank turns the heads that it holds.
    """
    if any(map(_is_distributed, heads)):
        given: list[Any] = list(heads)
        local = turn([x.to_local() for x in given], flight, table, align, inplace, still)
        return [type(x).from_local(y, x.device_mesh, x.placements) for x, y in zip(given, local, strict=True)]
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in heads)
    args = flight.args(table, heads[0].shape[1], align, still)
    if grad and flight.exact and flight.upcasts and heads[0].dtype.itemsize == 2:
        turned = rotation.apply([x.float() for x in heads], args, backend=flight.backend)
        return [y.to(x.dtype) for x, y in zip(heads, turned, strict=True)]
    return rotation.apply(heads, args, inplace=inplace and not grad, backend=flight.backend)


def _is_distributed(x: torch.Tensor) -> bool:
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


@dataclass(frozen=True)
class TakeRotation:
    """Forward pre-hook of an attention module: hands its rotary tensors to its norms.

    Attributes:
        format: of the rotary tensors.
        rotary: name and place of each rotary argument of the attention's forward; None without a place.
        turned: attribute names of the seams.
        once: those of them that the processor calls exactly once.
        processors: class names of the processors known to skip a rotation of None; empty where there are none.
        rebound: the processor is one that rotates in any case, but for a seam of its own.
        exact, backend: as :func:`dit_rope.patch` takes them.
        fuses_norm: whether fast mode norms and rotates in one pass.
    """

    format: Format | AxisRows
    rotary: tuple[tuple[str, int | None], ...]
    turned: frozenset[str]
    once: frozenset[str]
    processors: frozenset[str]
    rebound: bool
    exact: bool | None
    backend: str
    fuses_norm: bool

    def __call__(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The call without its rotary tensors; unchanged when they are absent or the processor is not known."""
        compiling = torch.compiler.is_compiling()
        if not compiling:
            # Whatever a KeyboardInterrupt left in flight, which hooks do not see, goes here.
            _in_flight.flight = None
        given = [self._argument(name, index, args, kwargs) for name, index in self.rotary]
        there = [rotary for rotary in given if rotary is not None]
        if not there or not all(map(self.format.accepts, there)):
            return None
        if compiling or not self._knows(module):
            if isinstance(self.format, Format):
                return None
            return self._replaced([self.format.traceable(rotary) for rotary in there], args, kwargs)
        hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        exact = hidden.device.type == "cpu" if self.exact is None else self.exact
        if exact and not (self.format.exact and (self.format.exact_backward or not torch.is_grad_enabled())):
            return None
        splits = [
            split_of(module, name) for (name, _), rotary in zip(self.rotary, given, strict=True) if rotary is not None
        ]
        tables = [
            table
            for rotary, split in zip(there, splits, strict=True)
            for table in self.format.pack(rotary, hidden.device, split)
        ]
        dtypes = {Rounds.INPUT: hidden.dtype, Rounds.PROJECTION: _computed_dtype(hidden)}
        if exact and self.format.narrows:
            tables = [table.narrowed(dtypes[Rounds.PROJECTION]) for table in tables]
        _in_flight.flight = Flight(
            tables, exact, self.backend, set(self.once), dtypes, self.format.upcasts, self.fuses_norm
        )
        return None if self.rebound else self._replaced([None] * len(given), args, kwargs)

    def _argument(self, name: str, index: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in kwargs:
            return kwargs[name]
        return args[index] if index is not None and index < len(args) else None

    def _replaced(
        self, instead: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for (name, index), new in zip(self.rotary, instead, strict=True):
            if name in kwargs:
                kwargs = {**kwargs, name: new}
            elif index is not None and index < len(args):
                args = (*args[:index], new, *args[index + 1 :])
        return args, kwargs

    def _knows(self, module: torch.nn.Module) -> bool:
        """Whether the processor and the seams are those that were patched: others may replace them at any time."""
        processor = getattr(module, "processor", None)
        cls = getattr(type(processor), "unpatched", type(processor))
        if self.processors and (cls.__name__ not in self.processors or isinstance(processor, Seam) is not self.rebound):
            return False
        if getattr(module, "fused_projections", False) and not self.turned.isdisjoint(_PROJECTIONS):
            return False
        return all(isinstance(getattr(module, name, None), TurnSeam) for name in self.turned)


def _computed_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype of queries and keys that are projected from ``hidden``."""
    kind = hidden.device.type
    # There is no autocast on the meta device, not even to ask about.
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else hidden.dtype


@dataclass(frozen=True)
class CheckRotation:
    """Forward hook of an attention module, run after errors too: every seam must have taken the rotation, or none.

    None takes it where another library's hook returns an output of an earlier step instead of running the module.
    """

    seams: int

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Clears what is in flight; raises RuntimeError when a seam did not take it, or not all of it."""
        if torch.compiler.is_compiling():
            return
        flight, _in_flight.flight = _in_flight.flight, None
        pending = flight.pending if flight is not None else ()
        if 0 < len(pending) < self.seams and output is not None:
            raise RuntimeError(
                f"{type(module).__name__} must call {' and '.join(sorted(pending))} once each where dit_rope has "
                f"patched it, but its processor {type(getattr(module, 'processor', None)).__name__} left them out, so "
                "that queries or keys were not rotated; undo the patch before using this processor"
            )
        if flight is not None and flight.short and output is not None:
            flight.check(module)
