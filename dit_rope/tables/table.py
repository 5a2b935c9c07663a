"""Cos and sin tables of a token grid: built per axis, cached, and expanded on request."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from ..rotation_args import RotationArgs
from ..scalars import as_int, integer
from ..spec import Grid, RopeSpec, Shard
from ..torch_state import WITHOUT_FLOAT64_OR_COMPLEX
from ..validation import checked_device, coordinate_rows
from .axes import axis_arrays, axis_block
from .caches import TABLES
from .dense import DenseTable, Form, TableKey, build_complex, build_dense, token_range
from .dense_memory import check_dense_bytes
from .shards import TokenRange

_CPU = torch.device("cpu")
_WHOLE = Shard()


@dataclass(frozen=True, eq=False)
class RopeTable:
    """The cos and sin of one shard of a grid: a few kB for ``count`` tokens. :func:`rope_table` makes it.

    The tensors of a table, and those its methods return, are shared by all callers: clone before writing.
    ``dataclasses.replace(table, rows=...)`` makes a table of other rows, which shares nothing.

    Attributes:
        spec, grid, shard: the arguments of :func:`rope_table`.
        device: the device of ``rows``.
        dtype: the dtype of ``rows`` and of the dense forms.
        rows: ``[2, R, P]`` cos and sin, axis after axis along R, P = max(spec.pairs); unused columns are zero.
        sizes: the grid's sizes on this shard.
        first_rows: row of ``rows`` that holds coordinate 0 of each axis of this shard.
        token_offset: flat index, in a row-major grid of ``sizes``, of the shard's first token.
        count: tokens of the shard, including padding.
        blocks: first row of each axis in ``rows``, and the row after its last.
        validated: checked calls by the layouts of their tensors. :mod:`dit_rope.rotation.api` keeps them here, so that
            they live as long as the table.
        cached: whether ``rows`` are those of spec and grid, so that dense forms come from the cache.
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
    validated: dict[object, Any] = field(default_factory=dict, init=False)
    cached: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():  # dynamo cannot trace properties of an object that is still being made
            return
        rows, shape = self.rows, (2, self.blocks[-1][1], max(self.spec.pairs))
        if tuple(rows.shape) != shape or rows.dtype != self.dtype or rows.device.type != self.device.type:
            raise ValueError(
                f"rows must have shape {shape}, {self.dtype} on {self.device}, for the axes of {self.grid}, got "
                f"{tuple(rows.shape)} {rows.dtype} on {rows.device}"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out validated calls: backends and launches of this process, on this machine."""
        return {**vars(self), "validated": {}}

    def __repr__(self) -> str:
        dtype, rows = str(self.dtype).removeprefix("torch."), tuple(self.rows.shape)
        shard = "" if self.shard == _WHOLE else f", {self.shard}"
        return f"RopeTable({self.spec}, {self.grid}{shard}, {self.count} tokens, rows {rows} {dtype} on {self.device})"

    @property
    def tensors(self) -> tuple[torch.Tensor]:
        """The tensors that it keeps in memory."""
        return (self.rows,)

    @functools.cached_property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """First row of each axis in ``rows``, and the row after its last: a token's row on an axis is one of these."""
        blocks, end = [], 0
        for start, size in zip(self._starts, self.grid.sizes, strict=True):
            first, stop = axis_block(start, size)
            blocks.append((end, end + stop - first))
            end += stop - first
        return tuple(blocks)

    @property
    def _starts(self) -> tuple[int, ...]:
        """Position of the grid's first token on each axis."""
        return (self.grid.start_frame, *(0 for _ in self.grid.sizes[1:]))

    def axis(self, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin ``[sizes[axis], spec.pairs[axis]]`` of one axis: views of ``rows``.

        Raises:
            TypeError, ValueError: not an int, or not the number of an axis.

        Example:
            >>> from dit_rope import Grid, RopeSpec, rope_table
            >>> table = rope_table(RopeSpec((8, 4, 4)), Grid(2, 3, 4))
            >>> [x.shape for x in table.axis(1)]
            [torch.Size([3, 2]), torch.Size([3, 2])]
        """
        axis = integer("axis", axis, 0)
        if axis >= len(self.sizes):
            raise ValueError(f"axis must be below the table's number of axes ({len(self.sizes)}), got {axis}")
        first, pairs = self.first_rows[axis], self.spec.pairs[axis]
        cos, sin = self.rows[:, first : first + self.sizes[axis], :pairs].unbind()
        return cos, sin

    def cos_sin(self, repeat: bool = True, broadcast: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin of every token, the dense form. It is an entry of the cache of tables.

        Padding tokens have cos 1 and sin 0.

        Args:
            repeat: True for ``[S, rotary_dim]``, each value at both channels of its pair (neighbours when interleaved,
                halves when half); False for ``[S, rotary_dim / 2]``.
            broadcast: True for views ``[1, S, 1, width]``, which broadcast over ``[B, S, H, D]`` queries.

        Raises:
            ValueError: it would take more than 16 GiB (``dense_memory.MAX_DENSE_BYTES``).

        Example:
            >>> from dit_rope import Grid, RopeSpec, rope_table
            >>> cos, sin = rope_table(RopeSpec((8, 4, 4)), Grid(2, 3, 4)).cos_sin(broadcast=True)
            >>> cos.shape
            torch.Size([1, 24, 1, 16])
        """
        key = TableKey(self.spec, self.grid, self.shard, self.dtype, Form.REPEATED if repeat else Form.PAIRS)
        if not self.cached:
            dense = build_dense(key, self.device, self._arrays())
        else:
            dense = cast(DenseTable, TABLES.get(key, self.device, lambda: build_dense(key, self.device)))
        return dense.broadcast if broadcast else dense.flat

    def complex(self) -> torch.Tensor:
        """Cos + i sin of every token: ``[S, rotary_dim / 2]``, complex128 for float64 tables, else complex64.

        Example:
            >>> from dit_rope import Grid, RopeSpec, rope_table
            >>> rope_table(RopeSpec((4,)), Grid(1)).complex()
            tensor([[1.+0.j, 1.+0.j]])
        """
        key = TableKey(self.spec, self.grid, self.shard, self.dtype, Form.COMPLEX)
        if not self.cached:
            return build_complex(key, self.device, self._arrays())
        return cast(torch.Tensor, TABLES.get(key, self.device, lambda: build_complex(key, self.device)))

    def _arrays(self) -> list[tuple[int, torch.Tensor]]:
        """The axis arrays that ``rows`` holds, in the form of :func:`axis_arrays`."""
        arrays = []
        for (begin, end), start, size, pairs in zip(
            self.blocks, self._starts, self.grid.sizes, self.spec.pairs, strict=True
        ):
            arrays.append((axis_block(start, size)[0], self.rows[:, begin:end, :pairs]))
        return arrays

    def positions(self) -> torch.Tensor:
        """The row of ``rows`` of every token on every axis: ``[1, S, axes]`` int32, -1 for padding tokens.

        Example:
            >>> from dit_rope import Grid, RopeSpec, rope_table
            >>> rope_table(RopeSpec((4, 4)), Grid(1, 2)).positions().tolist()
            [[[0, 32], [0, 33]]]
        """
        key = TableKey(self.spec, self.grid, self.shard, self.dtype, Form.POSITIONS)
        return cast(torch.Tensor, TABLES.get(key, self.device, lambda: build_positions(self)))

    def positions_at(self, *coordinates: torch.Tensor | int) -> torch.Tensor:
        """The argument ``positions`` of a rotation, for tokens at any coordinates of the grid, in any order and number.

        ``positions`` counts rows of :attr:`rows`, in which the axes follow one another. Frame, height and width of a
        token are not such rows; this method converts them.

        Args:
            coordinates: one for each axis: ints, or int32 or int64 tensors ``[S]`` or ``[B, S]`` on the table's device,
                broadcast against each other. Axis 0 counts from ``grid.start_frame``, the others from 0, for every
                shard. A negative coordinate leaves the channels of its axis unrotated.

        Returns:
            int32 ``[1 or B, S, axes]``, a new tensor on the table's device. A coordinate outside the grid raises on
            CPU. On a GPU the check would wait for the device, so the coordinate counts as negative.

        Raises:
            TypeError, ValueError: another number of coordinates than axes, another dtype, shape or device, or on CPU a
                coordinate outside the grid.

        Example:
            >>> import torch, dit_rope
            >>> table = dit_rope.rope_table(dit_rope.RopeSpec((8, 4, 4)), dit_rope.Grid(2, 3, 4))
            >>> rows = table.positions_at(torch.tensor([0, 1]), torch.tensor([2, 2]), 3)
            >>> dit_rope.rotate(torch.randn(1, 2, 1, 16), table, positions=rows).shape
            torch.Size([1, 2, 1, 16])
        """
        if len(coordinates) != len(self.grid.sizes):
            raise ValueError(f"coordinates must be one for each of {len(self.grid.sizes)} axes, got {len(coordinates)}")
        rows = []
        for axis, (coordinate, start, size) in enumerate(zip(coordinates, self._starts, self.grid.sizes, strict=True)):
            base = self.blocks[axis][0] - axis_block(start, size)[0]
            rows.append(coordinate_rows(axis, coordinate, start, start + size, base, self.device))
        return _side_by_side(rows)

    def args(
        self,
        *,
        prefix: int = 0,
        inverse: bool = False,
        exact: bool = False,
        positions: torch.Tensor | None = None,
    ) -> RotationArgs:
        """The rotation of a sequence of ``prefix`` unrotated tokens and then the tokens of this shard.

        ``positions``, ``[1 or B, count, axes]`` int32 rows of ``rows``, replace those of the shard.

        Raises:
            ValueError: a negative prefix, or positions of another shape or dtype.
        """
        number = as_int(prefix)  # None for the length of a traced tensor
        prefix = prefix if number is None else number
        if number is not None and number < 0:
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
        shard: the tokens that one sequence-parallel rank holds; None for the whole grid.
        device: the device of the rows; CPU when None. Values are computed on CPU, so they are equal on every device.
        dtype: float32, float64, bfloat16 or float16; rounded once from the dtype of angles, to 16 bits by way of
            float32, as models do. A device without float64 gets float32.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
        RuntimeError: a CUDA graph is being captured and the table is not cached yet.

    Example:
        >>> from dit_rope import Grid, RopeSpec, rope_table
        >>> wan = RopeSpec((44, 42, 42))
        >>> table = rope_table(wan, Grid(21, 45, 80))
        >>> table.count, table.rows.shape
        (75600, torch.Size([2, 192, 22]))
        >>> rope_table(wan, Grid(21, 45, 80)) is table
        True
    """
    shard, device, dtype = _canonical(spec, grid, shard, device, dtype)
    key = TableKey(spec, grid, shard, dtype, Form.AXES)
    return cast(RopeTable, TABLES.get(key, device, lambda: _build_table(key, device)))


def build_table(spec: RopeSpec, grid: Grid, *, device: torch.device, dtype: torch.dtype) -> RopeTable:
    """A table as from :func:`rope_table`, built without the cache, for inspection that must leave no entry."""
    return _build_table(TableKey(spec, grid, _WHOLE, dtype, Form.AXES), device)


def dense_table(
    spec: RopeSpec,
    grid: Grid,
    shard: Shard | None,
    device: torch.device | str | int | None,
    dtype: torch.dtype,
    repeat: bool,
) -> DenseTable:
    """The dense form of a table as :meth:`RopeTable.cos_sin` returns it, without an entry for the table."""
    shard, device, dtype = _canonical(spec, grid, shard, device, dtype)
    key = TableKey(spec, grid, shard, dtype, Form.REPEATED if repeat else Form.PAIRS)
    return cast(DenseTable, TABLES.get(key, device, lambda: build_dense(key, device)))


def _canonical(
    spec: RopeSpec, grid: Grid, shard: Shard | None, device: torch.device | str | int | None, dtype: torch.dtype
) -> tuple[Shard, torch.device, torch.dtype]:
    """One form for equal arguments: a world of one as no shard, a device with its index, float64 if the device has it.

    Raises TypeError for unhashable arguments, which a lookup would report without their names.
    """
    if not (isinstance(spec, RopeSpec) and isinstance(grid, Grid) and isinstance(dtype, torch.dtype)):
        TokenRange.check(spec, grid, _WHOLE)
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
    if shard is None:
        shard = _WHOLE
    elif not isinstance(shard, Shard) or shard.world == 1:
        TokenRange.check(spec, grid, shard)
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


def _build_table(key: TableKey, device: torch.device) -> RopeTable:
    tokens = token_range(key)
    check_dense_bytes("rows of its axes", 2 * sum(tokens.sizes) * max(key.spec.pairs) * key.dtype.itemsize)
    arrays = axis_arrays(key.spec, key.grid, key.dtype)
    height, width = sum(array.shape[1] for _, array in arrays), max(key.spec.pairs)
    rows = torch.zeros((2, height, width), dtype=key.dtype, device=_CPU)
    first_rows, packed = [], 0
    for (first, array), start, pairs in zip(arrays, tokens.starts, key.spec.pairs, strict=True):
        rows[:, packed : packed + array.shape[1], :pairs] = array
        first_rows.append(packed + start - first)
        packed += array.shape[1]
    table = RopeTable(
        spec=key.spec,
        grid=key.grid,
        shard=key.shard,
        device=device,
        dtype=key.dtype,
        rows=rows.to(device),
        sizes=tokens.sizes,
        first_rows=tuple(first_rows),
        token_offset=tokens.token_offset,
        count=tokens.count,
    )
    object.__setattr__(table, "cached", True)
    return table


def _side_by_side(rows: list[torch.Tensor]) -> torch.Tensor:
    """``[S]`` or ``[B, S]`` of each axis as ``[1 or B, S, axes]``.

    Raises:
        ValueError: shapes that do not broadcast.
    """
    try:
        together = torch.stack(torch.broadcast_tensors(*rows), dim=-1)
    except RuntimeError as error:
        shapes = [tuple(row.shape) for row in rows]
        raise ValueError(f"coordinates must have shapes that broadcast to [S] or [B, S], got {shapes}") from error
    if together.ndim == 1:
        together = together[None]
    return together if together.ndim == 3 else together[None]


def build_positions(table: RopeTable) -> torch.Tensor:
    """Positions as from :meth:`RopeTable.positions`, built without the cache."""
    tokens = TokenRange.of(table.spec, table.grid, table.shard)
    check_dense_bytes("positions", 4 * tokens.count * len(tokens.sizes))
    positions = torch.full((1, tokens.count, len(tokens.sizes)), -1, dtype=torch.int32, device=table.device)
    for axis, coordinate in enumerate(tokens.coordinates(table.device)):
        positions[0, : tokens.inside, axis] = coordinate + table.first_rows[axis]
    return positions
