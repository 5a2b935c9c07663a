"""Norms, or projections, that rotate what they return, in one call of an attention module."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..rotation import Rounding, ops
from ..rotation_args import Norm, NormRounding, RotationArgs
from ..torch_state import is_autocast
from .adapter import AttentionRotation, CastTo, Layout, NormRotation, ResultRotation
from .exact_bits import exact_arithmetic, one_pass_is_exact
from .fused_norms import fused_norm, makes_fresh_results
from .heads import as_heads, fits, from_heads, is_distributed, rotate_heads
from .packed_tables import Align, PackedTable, UnfitTable

PROJECTIONS = frozenset({"to_q", "to_k"})
_MOST_KINDS = 1024

DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
"""Dtypes of queries and keys that dit_rope rotates; a model in another dtype runs its own code."""


@dataclass(frozen=True, eq=False)
class AttentionSettings:
    """The settings of one patched attention module, from the arguments of :func:`dit_rope.patch`; stored on the module.

    ``name`` is its path for the log, ``logged`` holds the reasons that were logged, and ``without_bits`` the inputs
    that no kernel rotates with the bits of the model in exact mode.
    """

    rotation: AttentionRotation
    rounding: Rounding | None
    backend: str
    fuses_norm: bool
    name: str = ""
    logged: set[str] = field(default_factory=set, repr=False)
    traced: Any = field(default=None, repr=False)
    without_bits: set[tuple[object, ...]] = field(default_factory=set, repr=False)

    def rounding_on(self, device: torch.device) -> Rounding:
        """Where this module rounds on ``device``."""
        if self.rounding is not None:
            return self.rounding
        return Rounding.EXACT if device.type == "cpu" else Rounding.MODEL

    def rotation_of(
        self, heads: torch.Tensor, table: PackedTable, align: Align, rounding: Rounding
    ) -> RotationArgs | None:
        """The rotation of ``heads`` ``[B, S, H, D]`` by ``table``; None if no arithmetic has the bits of the model."""
        form, length = self.rotation.format, heads.shape[1]
        args = table.args(length, align, form.exact and rounding is not Rounding.FAST)
        if form.exact or rounding is not Rounding.EXACT:
            return args
        local = heads.to_local() if is_distributed(heads) else heads  # type: ignore[attr-defined]
        exact = exact_arithmetic(form, local, args, self.backend)
        return None if exact is None else table.args(length, align, exact)


def rotating_modules(attn: Any, rotation: AttentionRotation) -> list[tuple[str, NormRotation]]:
    """Names of the norms of ``attn`` that rotate, and of projections in place of absent norms."""
    modules = vars(attn)["_modules"]
    names = []
    for name, norm in rotation.norms.items():
        if modules.get(name) is not None:
            names.append((name, norm))
        elif norm.projection is not None and modules.get(norm.projection) is not None:
            names.append((norm.projection, norm))
    return names


def why_incomplete(attn: Any, rotation: AttentionRotation) -> str | None:
    """Why the norms of ``attn`` cannot rotate all its queries and keys; None if they can."""
    modules = vars(attn)["_modules"]
    for name, norm in rotation.norms.items():
        if modules.get(name) is not None or (norm.projection and modules.get(norm.projection) is not None):
            continue
        if norm.only_with is None or modules.get(norm.only_with) is not None:
            return f"it has no {name}"
    return None


def wants_gradients(attn: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether a backward pass may follow.

    Its bits depend on the memory layout of every intermediate tensor, so in exact mode the model's own code runs.
    """
    if not torch.is_grad_enabled():
        return False
    inputs = (x.requires_grad for x in arguments.values() if isinstance(x, torch.Tensor))
    return any(inputs) or any(parameter.requires_grad for parameter in attn.parameters())


def computed_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype of queries and keys projected from ``hidden``, which autocast may change."""
    return torch.get_autocast_dtype(hidden.device.type) if is_autocast(hidden.device) else hidden.dtype


def fitting_heads(
    y: torch.Tensor, layout: Layout, table: PackedTable, rotation: AttentionRotation, attn: Any, count: int
) -> torch.Tensor:
    """``y``, which a norm or projection of ``attn`` returned in ``layout``, as heads ``[B, S, H, D]``.

    ``count`` is the number of heads of ``attn``, 0 if it does not say.

    Raises:
        UnfitTable: the table was not made for these heads.
    """
    head_dim = rotation.head_dim(attn) if rotation.head_dim else table.head_dim
    if layout is Layout.BSC and (y.ndim != 3 or y.shape[-1] % head_dim):
        raise UnfitTable
    heads = as_heads(y, layout, head_dim)
    if heads.ndim != 4 or heads.dtype not in DTYPES or not fits(heads, table, rotation):
        raise UnfitTable
    counted = layout is Layout.BSC and count and not (rotation.format.every_head or is_distributed(y))
    if counted and count % heads.shape[2]:
        raise UnfitTable
    return heads


class RotatedCall:
    """One call of an attention module: its tables, and the norms that were not called so far."""

    def __init__(
        self,
        settings: AttentionSettings,
        tables: list[PackedTable],
        rounding: Rounding,
        dtypes: Mapping[CastTo, torch.dtype],
        kind: tuple[object, ...],
    ) -> None:
        self.settings = settings
        self.rotation = settings.rotation
        self.tables = tables
        self.rounding = rounding
        self.kind = kind
        self.dtypes = dtypes
        self.attn: Any = None
        self.heads: int = 0
        self.rotating: set[str] = set()
        self.pending: set[str] = set()

    def rotation_of(self, heads: torch.Tensor, table: PackedTable, align: Align) -> RotationArgs:
        """The rotation of ``heads`` ``[B, S, H, D]`` by ``table``.

        Raises:
            UnfitTable: no arithmetic has the bits of the model; further calls with such an input do not start.
        """
        args = self.settings.rotation_of(heads, table, align, self.rounding)
        if args is None:
            if len(self.settings.without_bits) >= _MOST_KINDS:
                self.settings.without_bits.clear()
            self.settings.without_bits.add(self.kind)
            raise UnfitTable
        return args

    def check(self, attn: Any) -> None:
        """Raises RuntimeError if the code did not call all norms, unless the adapter allows it."""
        self.rotation.check_called(attn, self.rotating, self.pending)

    def proxy(self, attn: Any) -> Any:
        """An object with the class and the attributes of ``attn``, whose norms rotate what they return."""
        self.attn = attn
        proxy = object.__new__(type(attn))
        state = vars(proxy)
        state.update(vars(attn))
        modules = state["_modules"]
        self.heads = state.get("heads") or state.get("num_heads") or 0
        for name, norm in rotating_modules(attn, self.rotation):
            state[name] = _RotatingModule(modules[name], name, norm, self)
            if not norm.repeats:
                self.pending.add(name)
                self.rotating.add(name)
        return proxy


class _RotatingModule:
    """Proxy of a norm or projection in one call: its result is rotated."""

    __slots__ = ("_call", "_module", "_name", "_norm")

    def __init__(self, module: Any, name: str, norm: NormRotation, call: RotatedCall) -> None:
        self._module, self._name, self._norm, self._call = module, name, norm, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The rotated result of the module; arguments are not written to."""
        call, norm, rotation = self._call, self._norm, self._call.rotation
        call.pending.discard(self._name)
        table = call.tables[min(norm.table, len(call.tables) - 1)]
        layout = rotation.layout if self._name in rotation.norms else Layout.BSC
        if len(args) == 1 and not kwargs:
            fused = self._fused(args[0], table, layout)
            if fused is not None:
                return from_heads(fused, layout)
        fresh = makes_fresh_results(self._module)
        y = self._module(*args, **kwargs)
        if call.rounding is not Rounding.FAST and rotation.cast_to is not None:
            y, before = y.to(call.dtypes[rotation.cast_to]), y
            fresh = fresh or y is not before
        rotate_heads = functools.partial(self._rotate, table, inplace=fresh)

        def rotate(y: torch.Tensor) -> torch.Tensor:
            return from_heads(rotate_heads(self._heads(y, table, layout)), layout)

        return rotation.rotate_result(
            y, ResultRotation(table, call.rounding is not Rounding.FAST, rotate, rotate_heads)
        )

    def _fused(self, x: torch.Tensor, table: PackedTable, layout: Layout) -> torch.Tensor | None:
        """Norm and rotation of ``x`` in one pass; None if the kernels do not compute what the module does."""
        call, rotation = self._call, self._call.rotation
        # A subclass of PackedTable has its own rule for tokens and rows, which only its rotate_result follows.
        if not call.settings.fuses_norm or type(table) is not PackedTable or is_distributed(x):
            return None
        if not makes_fresh_results(self._module):
            return None
        if rotation.cast_to is CastTo.PROJECTION:
            x = x.to(call.dtypes[rotation.cast_to])  # lossless: the model upcast x from that dtype
        norm = fused_norm(self._module, x.dtype) if x.dtype in DTYPES else None
        if norm is None:
            return None
        if call.rounding is not Rounding.FAST and not self._rounds_in_one_dtype(x):
            return None
        heads = self._heads(x, table, layout)
        backend = call.settings.backend
        if call.rounding is Rounding.EXACT and not (
            rotation.format.exact and one_pass_is_exact(self._module, norm, heads, layout, backend)
        ):
            return None
        args = call.rotation_of(heads, table, self._norm.align)
        rounding = NormRounding.NONE if call.rounding is Rounding.FAST else norm.rounding
        kind = norm.kind(layout is Layout.BSC)
        applied = Norm.of([heads], kind, norm.eps, [norm.weight], [norm.bias], rounding)
        return ops.rotate([heads], args, applied, backend=backend)[0]

    def _rounds_in_one_dtype(self, x: torch.Tensor) -> bool:
        """Whether the model rounds to the dtype of ``x`` alone, from the norm to the rotated result.

        Autocast lets some norms return float32.
        """
        call, rotation = self._call, self._call.rotation
        cast_to = x.dtype if rotation.cast_to is None else call.dtypes[rotation.cast_to]
        return cast_to == x.dtype and rotation.keeps_dtype(x.dtype) and not is_autocast(x.device)

    def _heads(self, y: torch.Tensor, table: PackedTable, layout: Layout) -> torch.Tensor:
        """``y`` as heads ``[B, S, H, D]``.

        Raises:
            UnfitTable: the table was not made for these heads.
        """
        call = self._call
        heads = fitting_heads(y, layout, table, call.rotation, call.attn, call.heads)
        if not self._norm.fits(table, heads.shape[1]):
            raise UnfitTable
        return heads

    def _rotate(self, table: PackedTable, heads: torch.Tensor, inplace: bool) -> torch.Tensor:
        call = self._call
        args = call.rotation_of(heads, table, self._norm.align)
        return rotate_heads([heads], args, call.settings.backend, inplace)[0]
