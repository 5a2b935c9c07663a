"""Norms, or projections, that rotate what they return, in one call of an attention module."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..rotation import ops
from ..rotation_args import Norm
from .adapter import AttentionRotation, CastTo, Layout, NormRotation, ResultRotation
from .fused_norms import fused_norm, makes_fresh_results
from .heads import as_given, as_heads, fits, is_distributed, rotate_heads
from .packed_tables import PackedTable, UnfitTable

DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
"""Of queries and keys that are rotated here; models in others rotate by themselves."""


@dataclass(frozen=True, eq=False)
class AttentionSettings:
    """How one attention module is patched, by the arguments of :func:`dit_rope.patch`: kept on the module itself.

    ``name`` is its path for the log, ``logged`` holds the reasons that were logged.
    """

    rotations: AttentionRotation
    exact: bool | None
    backend: str
    fuses_norm: bool
    name: str = ""
    logged: set[str] = field(default_factory=set, repr=False)

    def is_exact(self, device: torch.device) -> bool:
        """Whether this module rotates with the roundings of the model's own code on ``device``."""
        return device.type == "cpu" if self.exact is None else self.exact


def rotating_modules(attn: Any, declared: AttentionRotation) -> list[tuple[str, NormRotation]]:
    """Names of the norms of ``attn`` that rotate, and of projections for those it lacks."""
    modules = vars(attn)["_modules"]
    found = []
    for name, rotated in declared.norms.items():
        if modules.get(name) is not None:
            found.append((name, rotated))
        elif rotated.projection is not None and modules.get(rotated.projection) is not None:
            found.append((rotated.projection, rotated))
    return found


def why_incomplete(attn: Any, declared: AttentionRotation) -> str | None:
    """Why the norms that ``attn`` has cannot rotate all its queries and keys; None where they can."""
    modules = vars(attn)["_modules"]
    for name, rotated in declared.norms.items():
        if modules.get(name) is not None or (rotated.projection and modules.get(rotated.projection) is not None):
            continue
        if rotated.only_with is None or modules.get(rotated.only_with) is not None:
            return f"it has no {name}"
    return None


class RotatedCall:
    """One call of an attention module: its tables, and which of its norms have not been called yet."""

    def __init__(
        self,
        settings: AttentionSettings,
        tables: list[PackedTable],
        exact: bool,
        dtypes: Mapping[CastTo, torch.dtype],
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
        """Raises RuntimeError where norms were left out, unless the declaration allows it."""
        self.declared.check_called(attn, self.rotating, self.pending)

    def stand_in(self, attn: Any) -> Any:
        """An object of the class and with the attributes of ``attn``, whose norms rotate what they return."""
        self.attn = attn
        other = object.__new__(type(attn))
        state = vars(other)
        state.update(vars(attn))
        modules = state["_modules"]
        self.heads = state.get("heads") or state.get("num_heads") or 0
        for name, rotated in rotating_modules(attn, self.declared):
            state[name] = _RotatingModule(modules[name], name, rotated, self)
            if not rotated.repeats:
                self.pending.add(name)
                self.rotating.add(name)
        return other


class _RotatingModule:
    """Stands for a norm, or a projection, in one call: what it returns has been rotated."""

    __slots__ = ("_call", "_module", "_name", "_rotated")

    def __init__(self, module: Any, name: str, rotated: NormRotation, call: RotatedCall) -> None:
        self._module, self._name, self._rotated, self._call = module, name, rotated, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the module returns, rotated; what it was given is not written to."""
        call, rotated, declared = self._call, self._rotated, self._call.declared
        call.pending.discard(self._name)
        table = call.tables[min(rotated.table, len(call.tables) - 1)]
        layout = declared.layout if self._name in declared.norms else Layout.BSC
        if not call.exact and len(args) == 1 and not kwargs:
            fused = self._fused(args[0], table, layout)
            if fused is not None:
                return as_given(fused, layout)
        fresh = makes_fresh_results(self._module)
        y = self._module(*args, **kwargs)
        if call.exact and declared.cast_to is not None:
            y, before = y.to(call.dtypes[declared.cast_to]), y
            fresh = fresh or y is not before
        rotate_heads = functools.partial(self._rotate, table, inplace=fresh)

        def rotate(y: torch.Tensor) -> torch.Tensor:
            return as_given(rotate_heads(self._heads(y, table, layout)), layout)

        return declared.rotate_result(y, ResultRotation(table, call.exact, rotate, rotate_heads))

    def _fused(self, x: torch.Tensor, table: PackedTable, layout: Layout) -> torch.Tensor | None:
        """Norm and rotation of ``x`` in one pass; None where the kernels do not compute what the module does."""
        call, declared = self._call, self._call.declared
        # A subclass of PackedTable maps tokens to rows by its own rule, which heads of this layout do not follow.
        if not call.settings.fuses_norm or type(table) is not PackedTable or is_distributed(x):
            return None
        if not makes_fresh_results(self._module):
            return None
        if declared.cast_to is CastTo.PROJECTION:
            x = x.to(call.dtypes[declared.cast_to])  # it is an upcast of that dtype, and loses nothing
        norm = fused_norm(self._module, x.dtype) if x.dtype in DTYPES else None
        if norm is None:
            return None
        heads = self._heads(x, table, layout)
        args = table.args(heads.shape[1], self._rotated.align, False)
        applied = Norm.of([heads], norm.kind(layout is Layout.BSC), norm.eps, [norm.weight], [norm.bias])
        return ops.rotate([heads], args, applied, backend=call.settings.backend)[0]

    def _heads(self, y: torch.Tensor, table: PackedTable, layout: Layout) -> torch.Tensor:
        """``y`` as heads ``[B, S, H, D]``, if the table is made for them."""
        call, declared = self._call, self._call.declared
        head_dim = declared.head_dim(call.attn) if declared.head_dim else table.head_dim
        if layout is Layout.BSC and (y.ndim != 3 or y.shape[-1] % head_dim):
            raise UnfitTable
        heads = as_heads(y, layout, head_dim)
        if heads.ndim != 4 or heads.dtype not in DTYPES or not fits(heads, table, declared):
            raise UnfitTable
        counted = layout is Layout.BSC and call.heads and not (declared.format.every_head or is_distributed(y))
        if counted and call.heads % heads.shape[2]:
            raise UnfitTable
        if not self._rotated.fits(table, heads.shape[1]):
            raise UnfitTable
        return heads

    def _rotate(self, table: PackedTable, heads: torch.Tensor, inplace: bool) -> torch.Tensor:
        call = self._call
        args = table.args(heads.shape[1], self._rotated.align, call.exact)
        return rotate_heads([heads], args, call.settings.backend, inplace)[0]
