"""The tables that a model builds, built once and kept in a cache.

The cache key holds whatever decides the result (see ``table_keys``). Tables that depend on something that cannot be a
key, such as the values of a tensor on a GPU, are built in every forward pass, as without a patch.

Only known code (see ``known_code``) is memoized. The tables are those that the model's own code returned. If they are
the dense form of axis tables, kernels read the axis tables, with the same values.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
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
from .packed_tables import PackedTable, axis_rows, mark_axis_tables, mark_known
from .table_keys import Unkeyed, parts_of, state_of


class _Token:
    """Identifies one patched object in cache keys. Its entries are dropped when the object dies.

    ``by_axis`` tells whether kernels read axis tables instead of the last dense tables; None if none were built.
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
    """How the tables of one object are built.

    Attributes:
        tables: the object, as its adapter describes it.
        parameters: names of the positional parameters of its method.
        spec: the rotation that the model builds; None without axis tables.
        scaled: the scaled rotation to build instead; None without a scaling, or if a function chooses it.
        choose: a function that returns the scaling, called in every forward pass.
        token: identifies the object in cache keys.
        name: its path, for the log.
        logged: the reasons that were logged.
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
        """Whether the tables differ from the model's own."""
        return self.scaled is not None or self.choose is not None


@dataclass(frozen=True)
class _Key:
    token: int
    parts: tuple[Hashable, ...]


@dataclass(frozen=True, eq=False)
class _Built:
    """Tables as leaves and structure, so that each caller gets new containers.

    ``held`` keeps the tensors alive that a cache key identifies. ``sets`` holds the attributes that the method set,
    ``state`` their part of a cache key.
    """

    leaves: Sequence[Any]
    structure: pytree.TreeSpec
    held: Sequence[torch.Tensor]
    sets: Mapping[str, Any]
    state: tuple[Hashable, ...]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors that the entry keeps in memory."""
        return [*(leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)), *self.held]


class RopeOverride(Override):
    """The method of a rope module that builds tables."""

    def replacement(self, *args: Any, **kwargs: Any) -> Any:
        """The result of the replaced method, in new containers; callers share its tensors."""
        original = unpatched_method(self, type(self).method if isinstance(self, Override) else "forward")
        record: Installed | None = vars(self).get(INSTALLED)
        if record is None or not record.active:
            return original(*args, **kwargs)
        settings: TableSettings = record.settings
        if settings.scales:
            return _scaled(self, settings, args, kwargs)
        if torch.compiler.is_compiling():
            return original(*args, **kwargs)
        return _memoized(self, settings, original, args, kwargs)


class MemoizedMethod:
    """A memoized method of a model: an attribute of the instance, which shadows the method of the class.

    The model keeps its class, because its configuration stores the name of the class. The reference to the model is
    weak, because the model refers to this object: a cycle would delay the release of the model. A copy or a pickle of
    the model gets another object.
    """

    def __init__(self, model: torch.nn.Module, method: str, record: Installed) -> None:
        self.method = method
        self.record = record
        self._model = weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result of the method, in new containers; callers share its tensors."""
        model = self._model()
        if model is None:
            raise ReferenceError(f"{self.method} must be called while its model lives, got a call after its end")
        original = functools.partial(getattr(type(model), self.method), model)
        if torch.compiler.is_compiling() or not self.record.active:
            return original(*args, **kwargs)
        return _memoized(model, self.record.settings, original, args, kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _model=weakref.ref(state["_model"]))


def why_not_memoized(target: Any, tables: ModelTables) -> str | None:
    """Why the tables of ``target`` are not memoized; None if they are."""
    cls = unpatched_class(target)
    guard = guard_of(cls, tables.method)
    if guard.unknown is not None:
        return guard.unknown
    if tables.path and guard.owner not in tables.builders:
        return f"{guard.owner} is not the class that dit_rope knows there"
    names = guard.methods - {tables.method}
    held = next((name for name in names if name in vars(target)), None)
    return None if held is None else f"its {held} was replaced on the instance"


def reads_axes(target: Any) -> bool | None:
    """Whether kernels read axis tables instead of the last tables of ``target``; None if it has built none."""
    record: Installed | None = vars(target).get(INSTALLED)
    settings = None if record is None else record.settings
    return settings.token.by_axis if isinstance(settings, TableSettings) else None


def _memoized(
    target: Any, settings: TableSettings, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The result of ``original``, a method of ``target``, in new containers."""
    tables = settings.tables
    if in_mode() or in_transform() or capturing():  # a graph must own the tables that it reads
        return original(*args, **kwargs)
    reason = why_not_memoized(target, tables)
    if reason is not None:
        log_not_patched(settings.name, reason, settings.logged)
        return original(*args, **kwargs)
    held: list[torch.Tensor] = []
    try:
        parts = parts_of(target, tables, settings.parameters, args, kwargs, held)
        state = state_of(target, tables, held)
    except Unkeyed:
        log_not_patched(settings.name, "its tables depend on values that cannot be a cache key", settings.logged)
        with torch.inference_mode(False):
            result = original(*args, **kwargs)
        mark_known([leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)])
        return result
    not_cached = tables.not_cached(target, *args, **kwargs)
    device = _device(args, kwargs)

    def build() -> _Built:
        before = _values(target, tables.sets)
        result = original(*args, **kwargs)
        leaves, structure = pytree.tree_flatten(result[len(not_cached) :] if not_cached else result)
        leaves = [_cacheable(leaf, device if tables.to_device else None) for leaf in leaves]
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        mark_known(tensors)
        if tables.axes is not None and settings.spec is not None:
            rows = _find_axis_tables(target, tables.axes, settings.spec, tensors, args, kwargs)
            settings.token.by_axis = bool(rows)
            held.extend(rows)
        sets = _values(target, tables.sets)
        after = state_of(target, tables, held)
        if after == state:  # the same values: a miss leaves the objects that a hit leaves
            _assign(target, before)
        return _Built(leaves, structure, held, sets, after)

    def key(state: tuple[Hashable, ...]) -> _Key:
        return _Key(settings.token.number, (parts, state, stream_of(device)))

    built = MODEL_TABLES.get(key(state), device, build)
    assert isinstance(built, _Built)
    if built.state != state:  # the next call of this kind finds the attributes that this call set
        _assign(target, built.sets)
        MODEL_TABLES.get(key(built.state), device, lambda: built)
    result = pytree.tree_unflatten(list(built.leaves), built.structure)
    return (*not_cached, *result) if not_cached else result


def _values(target: Any, names: Sequence[str]) -> dict[str, Any]:
    """The attributes and buffers of these names that ``target`` has."""
    return {name: getattr(target, name) for name in names if hasattr(target, name)}


def _assign(target: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(target, name, value)


def _cacheable(leaf: Any, device: torch.device | None) -> Any:
    """A leaf as the cache keeps it: moved to ``device`` unless that is None; a copy if it has no version counter."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    leaf = leaf if device is None else leaf.to(device)
    return leaf.clone() if leaf.is_inference() else leaf


def _find_axis_tables(
    target: Any,
    axes: AxisTables,
    spec: RopeSpec,
    tensors: list[torch.Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> list[torch.Tensor]:
    """Marks the new dense ``tensors`` as the expanded form of axis tables, and returns the rows of these.

    Returns an empty list if they are not the dense form of a grid.
    """
    grid = axes.grid(target, *args, **kwargs)
    frames = grid.sizes[0] if grid.frames is None else len(grid.frames)
    sizes = (frames, *grid.sizes[1:])
    if 0 in sizes or tensors[0].device.type == "meta":
        return []
    ((cos, sin),) = AXES.split(tensors)
    rows = axis_rows((cos, sin), sizes, spec.pairs)
    if rows is None:
        return []
    first_rows = tuple(itertools.accumulate(sizes[:-1], initial=0))
    table = PackedTable(rows, None, cos.shape[1], spec.pairs, spec.pairing, sizes=sizes, first_rows=first_rows)
    mark_axis_tables(tensors, table)
    return [rows]


def _scaled(target: Any, settings: TableSettings, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Cos and sin ``[1, S, 1, rotary_dim]`` of the scaled rotation, instead of the model's own."""
    if settings.choose is not None and torch.compiler.is_compiling():
        # The compiler would make the returned scaling a constant of the graph.
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
    grid = axes.grid(target, *args, **kwargs)
    latent = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    dtype = next(buffer.dtype for buffer in target.buffers())
    table = rope_table(spec, Grid(*grid.sizes), device=latent.device, dtype=dtype)
    cos, sin = table.cos_sin(broadcast=True)
    if grid.frames is not None:
        cos, sin = _of_frames(cos, grid), _of_frames(sin, grid)
    if not (in_mode() or in_transform() or capturing(latent.device)):
        mark_axis_tables((cos, sin), _packed(table, grid))
    return cos, sin


def _packed(table: RopeTable, grid: ForwardGrid) -> PackedTable:
    """The table as kernels read it, for the frames of one forward pass."""
    positions = None if grid.frames is None else _of_frames(table.positions(), grid)
    count = table.count if positions is None else positions.shape[1]
    spec = table.spec
    return PackedTable(
        table.rows, positions, count, spec.pairs, spec.pairing, sizes=table.sizes, first_rows=table.first_rows
    )


def _of_frames(x: torch.Tensor, grid: ForwardGrid) -> torch.Tensor:
    """``[1, frames H W, ...]`` from ``[1, T H W, ...]`` of the whole grid, without a device sync."""
    if grid.frames is None:
        return x
    by_frame = x.unflatten(1, (grid.sizes[0], -1)).unbind(1)
    return torch.cat([by_frame[frame] for frame in grid.frames], dim=1)


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """The device of the tables: an argument that is a device, or else the device of a tensor."""
    leaves = pytree.tree_leaves((args, kwargs))
    # A device comes first, because frame indices may be on the host.
    named = (leaf for leaf in leaves if isinstance(leaf, torch.device))
    tensors = (leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor))
    return next(itertools.chain(named, tensors), torch.device("cpu"))


def _forget(token: int) -> None:
    """Drops the cache entries of one patched object."""
    MODEL_TABLES.discard(lambda key: isinstance(key, _Key) and key.token == token)
