"""The tables that a model builds itself, built once and found again.

A key holds whatever decides the result (see ``table_keys``). What depends on something that cannot be a key, such as
the values of a tensor on a GPU, is built in every forward pass, as without a patch.

Only code that is known (see ``known_code``) is memoized, and what it returns is what the model's own code returned.
Of the tables of a grid kernels read one small array for each axis, whose values are the model's own too.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..spec import Grid, RopeSpec, Scalings
from ..tables.caches import MODEL_TABLES
from ..tables.table import RopeTable, rope_table
from ..torch_state import capturing, in_mode, in_transform, stream_of
from .adapter import AxisTables, ForwardGrid, ModelTables
from .class_override import INSTALLED, Installed, Override, unpatched_class, unpatched_method
from .formats import AXES
from .known_code import guard_of
from .log import log_not_patched
from .packed_tables import PackedTable, axis_rows, know, know_axis_form
from .table_keys import Unkeyed, parts_of


class _Token:
    """Stands for one patched object in keys; the entries go when it does, with the object that holds it.

    ``by_axis``: whether kernels read axis rows of the tables that were built last; None before any were.
    """

    def __init__(self) -> None:
        self.number = next(_token_numbers)
        self.by_axis: bool | None = None
        weakref.finalize(self, _forget, self.number).atexit = False

    def __reduce__(self) -> tuple[type[_Token], tuple[()]]:
        return _Token, ()  # a copy is another object


_token_numbers = itertools.count()


@dataclass(frozen=True, eq=False)
class TableSettings:
    """How the tables of one object are built: as declared, scaled if asked, and keyed under ``token``.

    ``scaled`` and ``choose`` are the rotation that is asked for, once or by a function in every forward pass.
    """

    tables: ModelTables
    parameters: tuple[str, ...]
    spec: RopeSpec | None = None
    scaled: RopeSpec | None = None
    choose: Callable[[], Scalings] | None = None
    token: _Token = field(default_factory=_Token)
    name: str = ""
    logged: set[str] = field(default_factory=set, repr=False)

    @property
    def scales(self) -> bool:
        """Whether the tables are others than the model's own."""
        return self.scaled is not None or self.choose is not None


@dataclass(frozen=True)
class _Key:
    token: int
    parts: tuple[Hashable, ...]


@dataclass(frozen=True, eq=False)
class _Built:
    """Tables as leaves and structure, so that each caller gets containers of its own, and what else has to be kept."""

    leaves: Sequence[Any]
    structure: pytree.TreeSpec
    held: Sequence[torch.Tensor]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Everything the entry keeps in memory."""
        return [*(leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)), *self.held]


class RopeOverride(Override):
    """The method of a rope module that builds tables."""

    def replacement(self, *args: Any, **kwargs: Any) -> Any:
        """What the replaced method returns, in containers of the caller's own; its tensors are shared."""
        own = unpatched_method(self, type(self).method if isinstance(self, Override) else "forward")
        record: Installed | None = vars(self).get(INSTALLED)
        if record is None or not record.active:
            return own(*args, **kwargs)
        settings: TableSettings = record.settings
        if settings.scales:
            return _scaled(self, settings, args, kwargs)
        if torch.compiler.is_compiling():
            return own(*args, **kwargs)
        return _memoized(self, settings, own, args, kwargs)


class MemoizedMethod:
    """A method of a model, memoized, which hangs on that model under the method's name, before its class's own.

    The model keeps its class, whose name its configuration stores. The model owns this object, and not the other way
    round; a copy or a pickle of the model has one of its own.
    """

    def __init__(self, model: torch.nn.Module, method: str, record: Installed) -> None:
        self.method = method
        self.record = record
        self._model = weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the method returns, in containers of the caller's own; its tensors are shared."""
        model = self._model()
        if model is None:
            raise ReferenceError(f"{self.method} must be called while its model lives, got a call after its end")
        own = functools.partial(getattr(type(model), self.method), model)
        if torch.compiler.is_compiling() or not self.record.active:
            return own(*args, **kwargs)
        return _memoized(model, self.record.settings, own, args, kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _model=weakref.ref(state["_model"]))


def why_not_memoized(target: Any, tables: ModelTables) -> str | None:
    """Why the tables of ``target`` are left to its own code; None where they are memoized."""
    cls = unpatched_class(target)
    guard = guard_of(cls, tables.method)
    if guard.unknown is not None:
        return guard.unknown
    if tables.path and guard.owner not in tables.builders:
        return f"{guard.owner} is not the module that it knows there"
    names = guard.methods - {tables.method}
    held = next((name for name in names if name in vars(target)), None)
    return None if held is None else f"{cls.__name__} holds a {held} of its own"


def reads_axes(target: Any) -> bool | None:
    """Whether kernels read axis rows of the tables that ``target`` built last; None where it has built none."""
    record: Installed | None = vars(target).get(INSTALLED)
    settings = None if record is None else record.settings
    return settings.token.by_axis if isinstance(settings, TableSettings) else None


def _memoized(
    target: Any, settings: TableSettings, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What ``own``, a method of ``target``, returns, in containers of the caller's own."""
    tables = settings.tables
    if in_mode() or in_transform() or _capturing():
        return own(*args, **kwargs)
    reason = why_not_memoized(target, tables)
    if reason is not None:
        log_not_patched(settings.name, reason, settings.logged)
        return own(*args, **kwargs)
    held: list[torch.Tensor] = []
    try:
        parts = parts_of(target, tables, settings.parameters, args, kwargs, held)
    except Unkeyed:
        log_not_patched(settings.name, "its tables depend on values that cannot be a cache key", settings.logged)
        with torch.inference_mode(False):
            result = own(*args, **kwargs)
        know([leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)])
        return result
    not_cached = tables.not_cached(target, *args, **kwargs)
    device = _device(args, kwargs)

    def build() -> _Built:
        # Put back, so that a miss leaves no more behind than a hit.
        written = {name: getattr(target, name) for name in tables.sets if hasattr(target, name)}
        result = own(*args, **kwargs)
        for name, value in written.items():
            setattr(target, name, value)
        leaves, structure = pytree.tree_flatten(result[len(not_cached) :] if not_cached else result)
        leaves = [_kept(leaf, device if tables.to_device else None) for leaf in leaves]
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        know(tensors)
        if tables.axes is not None and settings.spec is not None:
            rows = _find_axis_form(target, tables.axes, settings.spec, tensors, args, kwargs)
            settings.token.by_axis = bool(rows)
            held.extend(rows)
        return _Built(leaves, structure, held)

    built = MODEL_TABLES.get(_Key(settings.token.number, (parts, stream_of(device))), device, build)
    assert isinstance(built, _Built)
    result = pytree.tree_unflatten(list(built.leaves), built.structure)
    return (*not_cached, *result) if not_cached else result


def _kept(leaf: Any, device: torch.device | None) -> Any:
    """A leaf as the cache keeps it: on ``device`` if one is named, and with a counter of its writes."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    leaf = leaf if device is None else leaf.to(device)
    return leaf.clone() if leaf.is_inference() else leaf


def _find_axis_form(
    target: Any,
    axes: AxisTables,
    spec: RopeSpec,
    tensors: list[torch.Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> list[torch.Tensor]:
    """Notes the axis form of the dense tables just built, and returns its rows, if they are tables of a grid."""
    place = axes.grid(target, *args, **kwargs)
    frames = place.grid[0] if place.frames is None else len(place.frames)
    sizes = (frames, *place.grid[1:])
    if 0 in sizes or tensors[0].device.type == "meta":
        return []
    ((cos, sin),) = AXES.split(tensors)
    rows = axis_rows((cos, sin), sizes, spec.pairs)
    if rows is None:
        return []
    first_rows = tuple(itertools.accumulate(sizes[:-1], initial=0))
    table = PackedTable(rows, None, cos.shape[1], spec.pairs, spec.pairing, sizes=sizes, first_rows=first_rows)
    know_axis_form(tensors, table)
    return [rows]


def _scaled(target: Any, settings: TableSettings, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Cos and sin ``[1, S, 1, rotary_dim]`` of the scaling that is asked for, instead of the model's own."""
    if settings.choose is not None and torch.compiler.is_compiling():
        # What it returns is new at any call, and would be compiled in.
        return torch.compiler.disable(_scaled_tables)(target, settings, args, kwargs)
    return _scaled_tables(target, settings, args, kwargs)


def _scaled_tables(
    target: Any, settings: TableSettings, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    axes = settings.tables.axes
    assert axes is not None
    assert settings.spec is not None
    spec = settings.scaled if settings.choose is None else settings.spec.with_scaling(settings.choose())
    assert spec is not None
    place = axes.grid(target, *args, **kwargs)
    latent = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    dtype = next(buffer.dtype for buffer in target.buffers())
    table = rope_table(spec, Grid(*place.grid), device=latent.device, dtype=dtype)
    cos, sin = table.cos_sin(broadcast=True)
    if place.frames is not None:
        cos, sin = _of_frames(cos, place), _of_frames(sin, place)
    if not (in_mode() or in_transform() or capturing(latent.device)):
        know_axis_form((cos, sin), _packed(table, place))
    return cos, sin


def _packed(table: RopeTable, place: ForwardGrid) -> PackedTable:
    """The table as kernels read it, at the frames of one forward pass."""
    positions = None if place.frames is None else _of_frames(table.positions(), place)
    count = table.count if positions is None else positions.shape[1]
    spec = table.spec
    return PackedTable(
        table.rows, positions, count, spec.pairs, spec.pairing, sizes=table.sizes, first_rows=table.first_rows
    )


def _of_frames(x: torch.Tensor, place: ForwardGrid) -> torch.Tensor:
    """``[1, frames H W, ...]`` from ``[1, T H W, ...]`` of the whole grid, without a device sync."""
    if place.frames is None:
        return x
    by_frame = x.unflatten(1, (place.grid[0], -1)).unbind(1)
    return torch.cat([by_frame[frame] for frame in place.frames], dim=1)


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Where the tables are wanted: the device this call names, or that of a tensor in it."""
    leaves = pytree.tree_leaves((args, kwargs))
    # Frame indices may lie on the host beside the name of the device.
    named = (leaf for leaf in leaves if isinstance(leaf, torch.device))
    tensors = (leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor))
    return next(itertools.chain(named, tensors), torch.device("cpu"))


def _forget(token: int) -> None:
    """Drops the entries of one patched object."""
    MODEL_TABLES.discard(lambda key: isinstance(key, _Key) and key.token == token)


def _capturing() -> bool:
    """Whether a CUDA graph is being captured, which must own the tables that it reads."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
