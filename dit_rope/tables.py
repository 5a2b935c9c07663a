"""Cos and sin tables of a token grid: built per axis, cached, and expanded only when somebody asks."""

from __future__ import annotations

import enum
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, cast

import torch

from .axis_tables import AXES, axis_arrays
from .cache import CacheInfo, FifoCache
from .dense_memory import check_dense_bytes, empty_rows
from .layout import Layout
from .rotation_args import RotationArgs
from .spec import Grid, Pairing, RopeSpec, Shard, integer
from .validation import checked_device

TABLE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_CPU = torch.device("cpu")
_WHOLE = Shard()
WITHOUT_FLOAT64_OR_COMPLEX = frozenset({"mps", "npu"})


class _Form(enum.Enum):
    """What an entry of the table cache holds."""

    AXES = enum.auto()
    REPEATED = enum.auto()
    PAIRS = enum.auto()
    COMPLEX = enum.auto()
    POSITIONS = enum.auto()

    # Enum's own hash is a Python function that runs at every cache hit; members are singletons.
    __hash__ = object.__hash__


@dataclass(frozen=True, slots=True)
class _TableKey:
    """Everything a table or one of its forms depends on, but for the device, which the cache adds."""

    spec: RopeSpec
    grid: Grid
    shard: Shard
    dtype: torch.dtype
    form: _Form


@dataclass(frozen=True)
class TableCacheInfo:
    """Counters of every cache, as :func:`cache_info` gives them.

    Attributes:
        tables: entries as a user counts them: tables, dense forms and position tensors.
        axes: the arrays of single axes, in host memory, which tables of many grids and shards share.
        angles: what the eager backend expands of tables on CPU, for the next call with the same table.
        models: tables that patched models build themselves.
    """

    tables: CacheInfo
    axes: CacheInfo
    angles: CacheInfo
    models: CacheInfo


@dataclass(frozen=True)
class DenseTable:
    """A pair ``[S, width]`` and the same memory as ``[1, S, 1, width]``."""

    flat: tuple[torch.Tensor, torch.Tensor]
    broadcast: tuple[torch.Tensor, torch.Tensor]


def _tensors_of(value: object) -> tuple[torch.Tensor, ...]:
    if isinstance(value, RopeTable):
        return (value.rows,)
    if isinstance(value, DenseTable):
        return value.flat
    assert isinstance(value, torch.Tensor)
    return (value,)


class ModelTensors(Protocol):
    """A value of the cache of model tables."""

    @property
    def tensors(self) -> Iterable[torch.Tensor]:
        """Everything it keeps in memory."""


_TABLES: FifoCache[_TableKey, object] = FifoCache("table", 16, 256 * 2**20, _tensors_of)
# What the eager backend expands of tables on CPU; here, so that the counters and cache_clear cover it.
ANGLES: FifoCache[Hashable, Sequence[torch.Tensor]] = FifoCache("angle", 8, 64 * 2**20, lambda tensors: tensors)
# What rope modules of patched models build themselves, and what their keys hold.
MODEL_TABLES: FifoCache[Hashable, ModelTensors] = FifoCache(
    "model table", 64, 2**30, lambda built: built.tensors, across_streams=False
)


def cache_info() -> TableCacheInfo:
    """Hits, misses, evictions, rebuilds, entries and bytes of each cache."""
    return TableCacheInfo(_TABLES.info(), AXES.info(), ANGLES.info(), MODEL_TABLES.info())


def cache_clear() -> None:
    """Forgets every table and axis array and zeroes the counters; tables already handed out stay valid.

    Those that only a CUDA graph still reads are freed: replay no graph after this that was captured before.
    """
    _TABLES.clear()
    AXES.clear()
    ANGLES.clear()
    MODEL_TABLES.clear()


def cache_configure(
    *,
    max_entries: int | None = None,
    max_bytes: int | None = None,
    max_model_entries: int | None = None,
    max_model_bytes: int | None = None,
) -> None:
    """Sets the caps of the table cache (16 entries, 256 MiB at first) and of the model tables (64 entries, 1 GiB).

    The oldest entries leave where a new cap is passed.

    Raises:
        TypeError, ValueError: for caps that are no positive ints.
    """
    values = (max_entries, max_bytes, max_model_entries, max_model_bytes)
    names = ("max_entries", "max_bytes", "max_model_entries", "max_model_bytes")
    for name, value in zip(names, values, strict=True):
        if value is not None:
            integer(name, value, 1)
    _TABLES.configure(max_entries=max_entries, max_bytes=max_bytes)
    MODEL_TABLES.configure(max_entries=max_model_entries, max_bytes=max_model_bytes)


@dataclass(frozen=True, eq=False)
class RopeTable:
    """The cos and sin of one shard of a grid: a few kB that stand for ``count`` tokens. Made by :func:`rope_table`.

    Tensors of a table, and those its methods return, are shared by everybody who asks: clone before writing.

    Attributes:
        spec, grid, shard: what the table is of.
        device: where ``rows`` is.
        dtype: of ``rows`` and of the dense forms.
        rows: ``[2, R, P]`` cos and sin, axis after axis along R, P = max(spec.pairs); unused columns are zero.
        sizes: the grid's sizes on this shard.
        first_rows: row of ``rows`` that holds coordinate 0 of each axis of this shard.
        token_offset: flat index, in a row-major grid of ``sizes``, of the shard's first token.
        count: tokens of the shard, padding included.
        validated: layouts of calls that were found to fit the table, and their arguments and backend; kept here by
            :mod:`dit_rope.rotation` so that they live as long as the table.
    """

    spec: RopeSpec
    grid: Grid
    shard: Shard
    device: torch.device
    dtype: torch.dtype
    rows: torch.Tensor
    sizes: tuple[int, ...]
    first_rows: tuple[int, ...]
    token_offset: int
    count: int
    validated: dict[object, tuple[RotationArgs, str]] = field(default_factory=dict, repr=False)

    def axis(self, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin ``[sizes[axis], spec.pairs[axis]]`` of one axis: views of ``rows``."""
        first, pairs = self.first_rows[axis], self.spec.pairs[axis]
        cos, sin = self.rows[:, first : first + self.sizes[axis], :pairs].unbind()
        return cos, sin

    def cos_sin(self, repeat: bool = True, broadcast: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin of every token, the dense form; cached as an entry of its own.

        Padding tokens have cos 1 and sin 0.

        Args:
            repeat: ``[S, rotary_dim]``, each value at both channels of its pair (neighbours when interleaved, halves
                when half); else ``[S, rotary_dim / 2]``.
            broadcast: ``[1, S, 1, width]``, for ``[B, S, H, D]`` queries; the same memory.

        Raises:
            ValueError: it would take more than 16 GiB (``dense_memory.MAX_DENSE_BYTES``).
        """
        key = _TableKey(self.spec, self.grid, self.shard, self.dtype, _Form.REPEATED if repeat else _Form.PAIRS)
        dense = cast(DenseTable, _TABLES.get(key, self.device, lambda: _build_dense(key, self.device)))
        return dense.broadcast if broadcast else dense.flat

    def complex(self) -> torch.Tensor:
        """Cos + i sin of every token: ``[S, rotary_dim / 2]``, complex128 for float64 tables, else complex64."""
        key = _TableKey(self.spec, self.grid, self.shard, self.dtype, _Form.COMPLEX)
        return cast(torch.Tensor, _TABLES.get(key, self.device, lambda: _build_complex(key, self.device)))

    def positions(self) -> torch.Tensor:
        """The row of ``rows`` of every token on every axis: ``[1, S, axes]`` int32, -1 for padding tokens."""
        key = _TableKey(self.spec, self.grid, self.shard, self.dtype, _Form.POSITIONS)
        return cast(torch.Tensor, _TABLES.get(key, self.device, lambda: build_positions(self)))

    def args(
        self,
        *,
        prefix: int = 0,
        inverse: bool = False,
        exact: bool = False,
        positions: torch.Tensor | None = None,
    ) -> RotationArgs:
        """What a backend needs to rotate a sequence that holds ``prefix`` other tokens and then this shard's.

        ``positions``, ``[1 or B, count, axes]`` int32 rows of ``rows``, replace the shard's own.

        Raises:
            ValueError: for a negative prefix, or positions of another shape or dtype.
        """
        if isinstance(prefix, int) and prefix < 0:
            raise ValueError(f"prefix must not be negative, got {prefix}")
        count = self.count
        if positions is not None:
            if positions.ndim != 3 or positions.shape[2] != len(self.sizes) or positions.dtype != torch.int32:
                raise ValueError(
                    f"positions must be int32 [1 or B, count, {len(self.sizes)}], "
                    f"got {positions.dtype} {list(positions.shape)}"
                )
            count = positions.shape[1]
        return RotationArgs(
            rows=self.rows,
            positions=positions,
            pairs=self.spec.pairs,
            sizes=self.sizes,
            first_rows=self.first_rows,
            token_offset=self.token_offset,
            prefix=prefix,
            count=count,
            pairing=self.spec.pairing,
            inverse=inverse,
            exact=exact,
        )


def rope_table(
    spec: RopeSpec,
    grid: Grid,
    *,
    shard: Shard | None = None,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype = torch.float32,
) -> RopeTable:
    """The table of a grid, or of one shard of it; the same object at every call with equal arguments.

    Args:
        spec: channels and frequencies.
        grid: sizes after patching, one per axis of ``spec``, and the start frame.
        shard: the part one sequence-parallel rank holds; None for the whole grid.
        device: where the rows go, CPU when None. Values are computed on CPU, hence equal everywhere.
        dtype: float32, float64, bfloat16 or float16, rounded once from the angles' dtype (16-bit ones by way of
            float32, as models do). Devices without float64 get float32 instead.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
        RuntimeError: when a CUDA graph is being captured and the table is not cached yet.
    """
    shard, device, dtype = _canonical(spec, grid, shard, device, dtype)
    key = _TableKey(spec, grid, shard, dtype, _Form.AXES)
    return cast(RopeTable, _TABLES.get(key, device, lambda: _build_table(key, device)))


def build_table(spec: RopeSpec, grid: Grid, *, device: torch.device, dtype: torch.dtype) -> RopeTable:
    """The table that :func:`rope_table` gives, built anew, for a look that should leave no entry."""
    return _build_table(_TableKey(spec, grid, _WHOLE, dtype, _Form.AXES), device)


def dense_table(
    spec: RopeSpec,
    grid: Grid,
    shard: Shard | None,
    device: torch.device | str | int | None,
    dtype: torch.dtype,
    repeat: bool,
) -> DenseTable:
    """The dense form alone, as :meth:`RopeTable.cos_sin` gives it, without an entry for the table it expands."""
    shard, device, dtype = _canonical(spec, grid, shard, device, dtype)
    key = _TableKey(spec, grid, shard, dtype, _Form.REPEATED if repeat else _Form.PAIRS)
    return cast(DenseTable, _TABLES.get(key, device, lambda: _build_dense(key, device)))


def _canonical(
    spec: RopeSpec, grid: Grid, shard: Shard | None, device: torch.device | str | int | None, dtype: torch.dtype
) -> tuple[Shard, torch.device, torch.dtype]:
    """One spelling for equal requests: a world of one is no shard, a device has its index, float64 only where it is.

    Refuses what is no key, since looking it up would fail without a name.
    """
    if not (isinstance(spec, RopeSpec) and isinstance(grid, Grid) and isinstance(dtype, torch.dtype)):
        Layout.check(spec, grid, _WHOLE)
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
    if shard is None:
        shard = _WHOLE
    elif not isinstance(shard, Shard) or shard.world == 1:
        Layout.check(spec, grid, shard)
        shard = shard if shard.tokens else _WHOLE
    if device is None:
        return shard, _CPU, dtype
    device = checked_device(device)
    if device.type == "cpu":
        return shard, _CPU, dtype
    if device.type in WITHOUT_FLOAT64_OR_COMPLEX and dtype == torch.float64:
        dtype = torch.float32
    if device.index is None and device.type != "meta":
        module = torch.get_device_module(device)
        index = module.current_device() if hasattr(module, "current_device") else 0
        device = torch.device(device.type, index)
    return shard, device, dtype


def _build_table(key: _TableKey, device: torch.device) -> RopeTable:
    layout = _layout(key)
    check_dense_bytes("rows of its axes", 2 * sum(layout.sizes) * max(key.spec.pairs) * key.dtype.itemsize)
    arrays = axis_arrays(key.spec, key.grid, key.dtype)
    height, width = sum(array.shape[1] for _, array in arrays), max(key.spec.pairs)
    rows = torch.zeros((2, height, width), dtype=key.dtype, device=_CPU)
    first_rows, packed = [], 0
    for (first, array), start, pairs in zip(arrays, layout.starts, key.spec.pairs, strict=True):
        rows[:, packed : packed + array.shape[1], :pairs] = array
        first_rows.append(packed + start - first)
        packed += array.shape[1]
    return RopeTable(
        spec=key.spec,
        grid=key.grid,
        shard=key.shard,
        device=device,
        dtype=key.dtype,
        rows=rows.to(device),
        sizes=layout.sizes,
        first_rows=tuple(first_rows),
        token_offset=layout.token_offset,
        count=layout.count,
    )


def _layout(key: _TableKey) -> Layout:
    if key.dtype not in TABLE_DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, TABLE_DTYPES))}, got {key.dtype!r}")
    return Layout.of(key.spec, key.grid, key.shard)


def build_positions(table: RopeTable) -> torch.Tensor:
    """What :meth:`RopeTable.positions` gives, built anew."""
    layout = Layout.of(table.spec, table.grid, table.shard)
    check_dense_bytes("positions", 4 * layout.count * len(layout.sizes))
    positions = torch.full((1, layout.count, len(layout.sizes)), -1, dtype=torch.int32, device=table.device)
    for axis, coordinate in enumerate(layout.coordinates(table.device)):
        positions[0, : layout.inside, axis] = coordinate + table.first_rows[axis]
    return positions


def _build_dense(key: _TableKey, device: torch.device) -> DenseTable:
    """Expands axis arrays by copying each to its columns; no trigonometry, and no gather for a whole grid."""
    layout, spec = _layout(key), key.spec
    repeated, half = key.form is _Form.REPEATED, spec.rotary_dim // 2
    width = 2 * half if repeated else half
    check_dense_bytes("the dense form", 2 * layout.count * width * key.dtype.itemsize)
    flat = empty_rows(layout.count, width, key.dtype, device), empty_rows(layout.count, width, key.dtype, device)
    coordinates = None if layout.whole else layout.coordinates(device)
    column = 0
    for axis, (first, array) in enumerate(axis_arrays(spec, key.grid, key.dtype)):
        start, pairs = layout.starts[axis] - first, spec.pairs[axis]
        values = array[:, start : start + layout.sizes[axis]].to(device)
        columns = [slice(column, column + pairs)]
        if repeated and spec.pairing is Pairing.INTERLEAVED:
            values, columns = values.repeat_interleave(2, dim=-1), [slice(2 * column, 2 * (column + pairs))]
        elif repeated:
            columns.append(slice(column + half, column + half + pairs))
        column += pairs
        for target, value in zip(flat, values, strict=True):
            if coordinates is None:
                shape = [1] * len(layout.sizes)
                shape[axis] = layout.sizes[axis]
                target, value = target.view(*layout.sizes, width), value.view(*shape, -1)
            else:
                target, value = target[: layout.inside], value[coordinates[axis]]
            for part in columns:
                target[..., part] = value
    flat[0][layout.inside :] = 1.0
    flat[1][layout.inside :] = 0.0
    return DenseTable(flat, (flat[0][None, :, None], flat[1][None, :, None]))


def _build_complex(key: _TableKey, device: torch.device) -> torch.Tensor:
    check_dense_bytes("complex numbers", _layout(key).count * sum(key.spec.pairs) * 2 * max(key.dtype.itemsize, 4))
    cos, sin = _build_dense(replace(key, form=_Form.PAIRS), device).flat
    if key.dtype.itemsize == 2:
        cos, sin = cos.float(), sin.float()
    return torch.complex(cos, sin)
