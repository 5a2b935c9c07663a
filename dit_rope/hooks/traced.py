"""What a compiler traces of the call of a patched attention module, so that the rotation is an operator of the graph.

A trace must not ask what belongs to the process: caches, weak references, the version of a tensor. So what is known of
a module is written down when it is patched (:class:`TracedCode`). The trace compares it with the module that it meets,
runs the known code on a plain object in place of the module, and packs the tables by operations of the graph. Whatever
differs runs the model's own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..rotation import Rounding, ops
from ..rotation_args import Norm, NormRounding, RotationArgs
from ..torch_state import is_autocast
from .adapter import AttentionRotation, CastTo, Layout, NormRotation, ResultRotation
from .class_override import Installed, Override, override_class, unpatched_class
from .formats import Format
from .fused_norms import FusedNorm, fused_norm, makes_fresh_results
from .heads import from_heads
from .known_code import guard_of
from .packed_tables import PackedTable, UnfitTable, pack
from .rotating_norms import (
    DTYPES,
    PROJECTIONS,
    AttentionSettings,
    computed_dtype,
    fitting_heads,
    rotating_modules,
    wants_gradients,
    why_incomplete,
)

_codes: dict[str, tuple[type, str]] = {}


@dataclass(frozen=True, eq=False)
class TracedNorm:
    """A norm or projection that rotates, as it was when its module was patched."""

    name: str
    rotation: NormRotation
    module_class: type


@dataclass(frozen=True, eq=False)
class TracedCode:
    """What is known of one attention module when it is patched, of which a trace takes the constants.

    Attributes:
        key: names the code in messages between the trace and the process.
        holder_class: class that a patch gives what holds the code, the processor or the module itself.
        function: the known code.
        parameters: names of its parameters after the objects that it belongs to.
        methods: names of methods that it calls; one on an instance replaces it.
        norms: what rotates.
        absent: names of norms that the module does not have.
    """

    key: str
    holder_class: type
    function: Any
    parameters: tuple[str, ...]
    methods: tuple[str, ...]
    norms: tuple[TracedNorm, ...]
    absent: tuple[str, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedCode:
        return self


def traced_code(holder: Any, override: type[Override], attn: Any, rotation: AttentionRotation) -> TracedCode | None:
    """What a trace has to know of ``attn``, whose code ``holder`` holds; None if it runs the model's own code.

    ``override`` replaces that code in a patched model. The model's own code runs if it rotates in any case, if its
    tables or norms have rules of their own, and if it is unknown.
    """
    method = "__call__" if rotation.processors else "forward"
    cls = unpatched_class(holder)
    guard = guard_of(cls, method)
    own_rules = type(rotation.format) is not Format or any(
        type(norm) is not NormRotation for norm in rotation.norms.values()
    )
    rotates_anyway = rotation.replaced_function is not None or rotation.unrotated is not None
    if own_rules or rotates_anyway or guard.unknown is not None or why_incomplete(attn, rotation) is not None:
        return None
    key = f"{cls.__module__}.{cls.__qualname__}.{method}"
    _codes[key] = (cls, method)
    norms = tuple(TracedNorm(name, norm, type(getattr(attn, name))) for name, norm in rotating_modules(attn, rotation))
    names = tuple(guard.parameters[2 if rotation.processors else 1 :])
    present = {norm.name for norm in norms}
    absent = tuple(name for name in rotation.norms if name not in present)
    holder_class = override_class(cls, override, method)
    return TracedCode(key, holder_class, guard.function, names, tuple(sorted(guard.methods)), norms, absent)


def code_is_known(key: str) -> bool:
    """Whether the code of this key is known now; a trace takes the answer as a constant."""
    guard = guard_of(*_codes[key])
    return guard.unknown is None


code_is_known._dynamo_marked_constant = True  # type: ignore[attr-defined]


def traced_call(
    processor: Any, attn: Any, record: Installed | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The result of the attention with the rotation as operators; None if the model's own code must run."""
    if record is None or not record.active or not isinstance(record.settings, AttentionSettings):
        return None
    settings = record.settings
    code: TracedCode | None = settings.traced
    holder = attn if processor is None else processor
    if code is None or type(holder) is not code.holder_class or not code_is_known(code.key):
        return None
    for name in code.methods:
        if name in holder.__dict__:
            return None
    for name in code.absent:
        if getattr(attn, name, None) is not None:
            return None
    fused_projections = getattr(attn, "fused_projections", False)
    for norm in code.norms:
        if type(getattr(attn, norm.name, None)) is not norm.module_class:
            return None
        if fused_projections and norm.name in PROJECTIONS:
            return None
    rotation = settings.rotation
    arguments: dict[str, Any] = {}
    for name, value in zip(code.parameters, args):  # noqa: B905 - fewer arguments than parameters
        arguments[name] = value
    for name in kwargs:
        arguments[name] = kwargs[name]
    hidden = arguments.get(rotation.covers[0].names[-1])
    if not isinstance(hidden, torch.Tensor) or hidden.dtype not in DTYPES or 0 in hidden.shape:
        return None
    rounding = settings.rounding_on(hidden.device)
    tables = _tables(rotation, arguments, hidden, rounding)
    if tables is None:
        return None
    if rounding is Rounding.EXACT and (not rotation.format.exact or wants_gradients(attn, arguments)):
        return None
    stand_in = _TracedAttention(attn, settings, tables, hidden, rounding)
    for name in rotation.rotary:
        if name in kwargs:
            kwargs = {**kwargs, name: None}
        elif name in code.parameters[: len(args)]:
            index = code.parameters.index(name)
            args = (*args[:index], None, *args[index + 1 :])
    objects = (stand_in,) if processor is None else (processor, stand_in)
    try:
        result = code.function(*objects, *args, **kwargs)
    except UnfitTable:
        return None
    rotation.check_called(attn, stand_in._once, stand_in._pending)
    return result


def _tables(
    rotation: AttentionRotation, arguments: Mapping[str, Any], hidden: torch.Tensor, rounding: Rounding
) -> list[PackedTable] | None:
    """The tables of a call, packed in the graph; None if the rotary tensors are missing or do not fit the tokens."""
    try:
        rotary_tensors = rotation.rotary_tensors(arguments)
    except UnfitTable:
        return None
    tables: list[PackedTable] = []
    for rotary in rotary_tensors:
        if not rotation.format.accepts(rotary):
            return None
        for cos, sin in rotation.format.split(rotary):
            narrows = rotation.format.narrows and rounding is not Rounding.FAST
            dtype = computed_dtype(hidden) if narrows else cos.dtype
            tables.append(pack(cos.to(dtype), sin.to(dtype), rotation.format.pairing, hidden.device))
    dim = 0 if rotation.layout is Layout.SHD else 1
    for index, table in enumerate(tables):
        if not rotation.covers[min(index, len(rotation.covers) - 1)].fit(arguments, dim, table.tokens):
            return None
    return tables


class _TracedAttention:
    """Stands in for an attention module while its code is traced: its norms rotate what they return."""

    def __init__(
        self,
        attn: Any,
        settings: AttentionSettings,
        tables: list[PackedTable],
        hidden: torch.Tensor,
        rounding: Rounding,
    ) -> None:
        self._attn = attn
        self._once: set[str] = set()
        self._pending: set[str] = set()
        self._norms: dict[str, _TracedRotation] = {}
        for norm in settings.traced.norms:
            self._norms[norm.name] = _TracedRotation(norm, self, settings, tables, hidden, rounding)
            if not norm.rotation.repeats:
                self._once.add(norm.name)
                self._pending.add(norm.name)

    def __getattr__(self, name: str) -> Any:
        if name in self._norms:
            return self._norms[name]
        return getattr(self._attn, name)


class _TracedRotation:
    """Stands in for a norm or projection: the rotation of what it returns."""

    def __init__(
        self,
        norm: TracedNorm,
        stand_in: _TracedAttention,
        settings: AttentionSettings,
        tables: list[PackedTable],
        hidden: torch.Tensor,
        rounding: Rounding,
    ) -> None:
        self._norm = norm
        self._stand_in = stand_in
        self._module = getattr(stand_in._attn, norm.name)
        self._settings = settings
        self._table = tables[min(norm.rotation.table, len(tables) - 1)]
        self._rounding = rounding
        rotation = settings.rotation
        self._layout = rotation.layout if norm.name in rotation.norms else Layout.BSC
        self._cast_to = None
        if rotation.cast_to is CastTo.INPUT:
            self._cast_to = hidden.dtype
        elif rotation.cast_to is CastTo.PROJECTION:
            self._cast_to = computed_dtype(hidden)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The rotated result of the module."""
        self._stand_in._pending.discard(self._norm.name)
        rotation = self._settings.rotation
        if len(args) == 1 and not kwargs:
            x = args[0]
            if rotation.cast_to is CastTo.PROJECTION:
                x = x.to(self._cast_to)
            numbers = self._one_pass(x)
            if numbers is not None:
                heads = self._heads(x)
                args_of = self._args(heads)
                rounding = NormRounding.NONE if self._rounding is Rounding.FAST else numbers.rounding
                kind = numbers.kind(self._layout is Layout.BSC)
                applied = Norm.of([heads], kind, numbers.eps, [numbers.weight], [numbers.bias], rounding)
                return from_heads(
                    ops.rotate([heads], args_of, applied, backend=self._settings.backend)[0], self._layout
                )
        y = self._module(*args, **kwargs)
        as_model = self._rounding is not Rounding.FAST
        if as_model and self._cast_to is not None:
            y = y.to(self._cast_to)
        if as_model and not rotation.keeps_dtype(y.dtype):
            return rotation.rotate_result(y, ResultRotation(self._table, True, self._rotate, self._rotate))
        return self._rotate(y)

    def _rotate(self, y: torch.Tensor) -> torch.Tensor:
        heads = self._heads(y)
        return from_heads(ops.rotate([heads], self._args(heads), backend=self._settings.backend)[0], self._layout)

    def _one_pass(self, x: torch.Tensor) -> FusedNorm | None:
        """The numbers of the norm if one kernel may norm and rotate ``x``."""
        module, settings = self._module, self._settings
        if not settings.fuses_norm or self._rounding is Rounding.EXACT or x.dtype not in DTYPES:
            return None
        if not makes_fresh_results(module):
            return None
        if self._rounding is not Rounding.FAST and (
            (self._cast_to is not None and self._cast_to != x.dtype)
            or not settings.rotation.keeps_dtype(x.dtype)
            or is_autocast(x.device)
        ):
            return None
        return fused_norm(module, x.dtype)

    def _args(self, heads: torch.Tensor) -> RotationArgs:
        rotation = self._settings.rotation
        exact = rotation.format.exact and self._rounding is not Rounding.FAST
        return self._table.make_args(heads.shape[1], self._norm.rotation.align, exact)

    def _heads(self, y: torch.Tensor) -> torch.Tensor:
        """``y`` as heads ``[B, S, H, D]``.

        Raises:
            UnfitTable: the table was not made for these heads.
        """
        attn = self._stand_in._attn
        count = getattr(attn, "heads", None) or getattr(attn, "num_heads", None) or 0
        return fitting_heads(y, self._layout, self._table, self._settings.rotation, attn, count)
