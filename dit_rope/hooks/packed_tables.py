"""The form of rotary tables that kernels read, and when a packed table may be reused.

Tables that a patched model builds by memoized code are known objects. They are packed once, or recognised, whole or in
part, as the dense form of axis tables. Tables from elsewhere are packed in every forward pass.
"""

from __future__ import annotations

import enum
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..rotation_args import RotationArgs
from ..spec import Pairing
from ..torch_state import capturing, in_mode, stream_of
from .forward_pass import current_pass, packed_in_this_pass

# Lengths of sequences, and dtypes, that are remembered for one table.
_MOST_REMEMBERED = 64


class UnfitTable(Exception):
    """Rotary tensors do not describe a rotation of these queries and keys; the model's own code must run."""


def require_fit(fits: bool) -> None:
    """Raises UnfitTable unless ``fits``, so that the model's own code runs."""
    if not fits:
        raise UnfitTable


class Align(enum.Enum):
    """The end that a sequence and its table have in common, if one is longer than the other."""

    START = "start"
    END = "end"

    __hash__ = object.__hash__


@dataclass(frozen=True, eq=False)
class PackedTable:
    """The rotation of ``tokens`` tokens, as every backend reads it.

    Attributes:
        rows: ``[2, R, P]`` cos and sin.
        positions: ``[1 or B, tokens, axes]`` int32 rows of ``rows``; None where tokens follow the grid of ``sizes``.
        tokens: length of the table.
        pairs, pairing, head_rows: as in :class:`~dit_rope.rotation_args.RotationArgs`.
        sizes, first_rows, token_offset: the same; None where token i has row i.
        heads: how many heads have rows of their own; 1 where all share them.
    """

    rows: torch.Tensor
    positions: torch.Tensor | None
    tokens: int
    pairs: tuple[int, ...]
    pairing: Pairing
    head_rows: int = 0
    sizes: tuple[int, ...] | None = None
    first_rows: tuple[int, ...] | None = None
    token_offset: int = 0
    heads: int = 1
    _made: dict[tuple[int, Align, bool], RotationArgs] = field(default_factory=dict, repr=False)
    _narrowed: dict[torch.dtype, PackedTable] = field(default_factory=dict, repr=False)
    _identities: dict[int, bool] = field(default_factory=dict, repr=False)

    @property
    def head_dim(self) -> int:
        """Channels of a head, where all of them rotate."""
        return 2 * sum(self.pairs)

    @property
    def batch(self) -> int:
        """Samples that have positions of their own; 1 where all share them."""
        return 1 if self.positions is None else self.positions.shape[0]

    def narrowed(self, dtype: torch.dtype) -> PackedTable:
        """The same table with its rows rounded to ``dtype``."""
        if self.rows.dtype == dtype:
            return self
        found = self._narrowed.get(dtype)
        if found is None:
            found = self._narrowed[dtype] = replace(
                self, rows=self.rows.to(dtype), _made={}, _narrowed={}, _identities={}
            )
        return found

    def part(self, first: int, count: int) -> PackedTable:
        """``count`` of its tokens, from number ``first`` on."""
        return replace(
            self,
            positions=None if self.positions is None else self.positions[:, first : first + count],
            tokens=count,
            token_offset=self.token_offset + first,
            _made={},
            _narrowed={},
            _identities={},
        )

    def args(self, length: int, align: Align, exact: bool) -> RotationArgs:
        """The rotation of a sequence of ``length`` tokens that shares its start or its end with the table.

        A longer sequence holds tokens that do not rotate; a shorter one takes its part of the table.
        """
        found = self._made.get((length, align, exact))
        if found is None:
            if len(self._made) >= _MOST_REMEMBERED:
                self._made.clear()
            found = self._made[length, align, exact] = self._make_args(length, align, exact)
        return found

    def _make_args(self, length: int, align: Align, exact: bool) -> RotationArgs:
        count = min(length, self.tokens)
        first = self.tokens - count if align is Align.END else 0
        prefix = length - count if align is Align.END else 0
        if self.positions is not None:
            where = (self.rows, self.positions[:, first : first + count], self.pairs, count, self.pairing)
            return RotationArgs.of_rows(*where, prefix=prefix, exact=exact, head_rows=self.head_rows)
        return RotationArgs(
            rows=self.rows,
            positions=None,
            pairs=self.pairs,
            sizes=self.sizes or (self.tokens,),
            first_rows=self.first_rows or (0,),
            token_offset=self.token_offset + first,
            prefix=prefix,
            count=count,
            pairing=self.pairing,
            inverse=False,
            exact=exact,
            head_rows=self.head_rows,
        )

    def rest_is_identity(self, count: int) -> bool:
        """Whether the rows of the tokens after the first ``count`` are the identity."""
        if count >= self.tokens:
            return True
        if self.heads > 1 or capturing(self.rows.device):  # a look would wait for the device
            return False
        found = self._identities.get(count)
        if found is None:
            rest = self.rows[:, count:] if self.positions is None else self.rows[:, self.positions[:, count:, 0].long()]
            cos, sin = rest.unbind()
            found = self._identities[count] = bool((cos == 1).all()) and not bool(sin.any())
        return found


def pack(cos: torch.Tensor, sin: torch.Tensor, pairing: Pairing, device: torch.device) -> PackedTable:
    """Packs cos and sin ``[1 or B, S, 1 or H, P]`` of every token, one value per pair, onto ``device``."""
    if cos.shape != sin.shape:
        raise UnfitTable
    batch, tokens, heads, pairs = cos.shape
    # Tokens of one head follow one another, so that the row of a token is its number.
    rows = torch.stack((cos, sin)).transpose(2, 3).reshape(2, -1, pairs).to(device)
    positions = None
    if batch > 1:
        starts = torch.arange(batch, device=device, dtype=torch.int32).mul_(heads * tokens)
        positions = (starts[:, None] + torch.arange(tokens, device=device, dtype=torch.int32))[..., None]
    return PackedTable(rows, positions, tokens, (pairs,), pairing, tokens if heads > 1 else 0, heads=heads)


class _InPass(NamedTuple):
    """Tables packed in a forward pass, and the tensors that they were packed from."""

    device: torch.device
    stream: int
    tensors: tuple[weakref.ref[torch.Tensor], ...]
    versions: tuple[int, ...]
    tables: list[PackedTable]


def recall(key: tuple[object, ...], tensors: Sequence[Any], device: torch.device) -> list[PackedTable] | None:
    """The tables packed from ``tensors`` earlier in this forward pass; None without any. All layers get the same."""
    packed = packed_in_this_pass()
    found: _InPass | None = None if packed is None else packed.get((*key, *map(id, tensors)))
    if found is None or found.device != device or in_mode():
        return None
    if device.type != "cpu" and (capturing(device) or found.stream != stream_of(device)):
        return None
    for of, version, tensor in zip(found.tensors, found.versions, tensors, strict=True):
        same = of()
        if same is None or same is not tensor or same._version != version:
            return None
    return found.tables


def remember(
    key: tuple[object, ...], tensors: Sequence[torch.Tensor], device: torch.device, tables: list[PackedTable]
) -> None:
    """Lets :func:`recall` find ``tables`` for the rest of this forward pass."""
    packed = packed_in_this_pass()
    if packed is None or in_mode() or capturing(device) or any(tensor.is_inference() for tensor in tensors):
        return
    refs, versions = tuple(map(weakref.ref, tensors)), tuple(tensor._version for tensor in tensors)
    packed[*key, *map(id, tensors)] = _InPass(device, stream_of(device), refs, versions, tables)


class _Packed:
    """Packed tables, with the tensors that they were packed from, their versions, and the forward pass."""

    __slots__ = ("number", "rest", "tables", "versions")

    def __init__(self, tensors: Sequence[torch.Tensor], tables: list[PackedTable]) -> None:
        self.versions = tuple(tensor._version for tensor in tensors)
        self.rest = [weakref.ref(tensor) for tensor in tensors[1:]]
        self.number = current_pass()
        self.tables = tables

    def is_of(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these are the same tensors, with the same version counters."""
        same = all(of() is tensor for of, tensor in zip(self.rest, tensors[1:], strict=True))
        return same and self.versions == tuple(tensor._version for tensor in tensors)


# By the first tensor of a table: packed tables die with it.
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# Tensors that memoized code returned, with their versions: only the model has them.
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# A table that stays beside one that is new in every step would otherwise collect an entry for each step.
_MOST_PACKED = 16


def mark_known(tensors: Sequence[torch.Tensor]) -> None:
    """Marks ``tensors`` as tables built by known code of a model."""
    for tensor in tensors:
        if not tensor.is_inference():
            _known[tensor] = tensor._version


def is_known(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all of ``tensors`` were marked, and none was written to since."""
    return all(not tensor.is_inference() and _known.get(tensor) == tensor._version for tensor in tensors)


def packed_once(
    key: tuple[object, ...],
    tensors: Sequence[torch.Tensor],
    device: torch.device,
    build: Callable[[], list[PackedTable]],
) -> list[PackedTable]:
    """The result of ``build`` for ``tensors``, reused as long as they have certainly not changed.

    Tables of known code are reused until somebody writes to them. Other tables are reused for the rest of a forward
    pass, and on CPU in the next passes too, if packing them again gives the same.
    """
    if any(tensor.is_inference() for tensor in tensors) or in_mode() or capturing(device):
        # A captured graph must pack in every replay, because its inputs are written for every replay.
        return build()
    number = current_pass()
    known = _packed.setdefault(tensors[0], {})
    key = (*key, device, stream_of(device), *map(id, tensors[1:]))
    found: _Packed | None = known.get(key)
    if found is not None and found.is_of(tensors):
        if (number is not None and found.number == number) or is_known(tensors):
            return found.tables
        built = build()
        if device.type == "cpu" and len(built) == len(found.tables) and all(map(_equal, built, found.tables)):
            found.number = number  # what was made of the same rows since, such as expanded angles, serves again
            return found.tables
    else:
        built = build()
    known[key] = _Packed(tensors, built)
    for oldest in list(known)[:-_MOST_PACKED]:
        known.pop(oldest, None)
    return built


def _equal(one: PackedTable, other: PackedTable) -> bool:
    numbers = [(t.tokens, t.pairs, t.head_rows, t.sizes, t.first_rows, t.token_offset, t.heads) for t in (one, other)]
    if (
        numbers[0] != numbers[1]
        or one.rows.dtype != other.rows.dtype
        or (one.positions is None) != (other.positions is None)
    ):
        return False
    same = torch.equal(one.rows, other.rows)
    return same and (one.positions is None or other.positions is None or torch.equal(one.positions, other.positions))


class _AxisTables(NamedTuple):
    """A dense pair ``[1, S, 1, D]``, and its axis form."""

    tensors: tuple[weakref.ref[torch.Tensor], ...]
    table: PackedTable


# By the storage of the first tensor, which its views share: sequence parallelism hands out views of tables.
_axis_tables: dict[int, _AxisTables] = {}


def mark_axis_tables(tensors: Sequence[torch.Tensor], table: PackedTable) -> None:
    """Marks the dense ``tensors`` ``[1, S, 1, D]`` as the expanded form of ``table``."""
    mark_known(tensors)
    storage = tensors[0].untyped_storage()._cdata
    _axis_tables[storage] = _AxisTables(tuple(map(weakref.ref, tensors)), table)
    for gone in [key for key, form in list(_axis_tables.items()) if any(ref() is None for ref in form.tensors)]:
        _axis_tables.pop(gone, None)


def axis_tables_of(tensors: Sequence[Any]) -> PackedTable | None:
    """The axis tables of ``tensors``, a marked dense table or a range of its tokens; None for others."""
    form = _axis_tables.get(tensors[0].untyped_storage()._cdata)
    if form is None or len(tensors) != len(form.tensors):
        return None
    places = [_place(view, of()) for view, of in zip(tensors, form.tensors, strict=True)]
    if places[0] is None or any(place != places[0] for place in places):
        return None
    return form.table.part(*places[0])


def _place(view: torch.Tensor, whole: torch.Tensor | None) -> tuple[int, int] | None:
    """First token and number of tokens of a ``view`` ``[1, n, 1, D]`` of ``whole``; None where it is none of these."""
    if whole is None or view.untyped_storage()._cdata != whole.untyped_storage()._cdata:
        return None
    if view.is_inference() or not is_known((whole,)) or view.dtype != whole.dtype or view.ndim != 4:
        return None
    if (
        view.is_neg()
        or view.shape[0] != 1
        or view.shape[2:] != whole.shape[2:]
        or view.stride()[1:] != whole.stride()[1:]
    ):
        return None
    offset, rest = divmod(int(view.storage_offset() - whole.storage_offset()), whole.stride(1))
    return None if rest or view.shape[1] == 0 else (offset, view.shape[1])


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes: what tells the bits of two numbers apart, their zeros too."""


def axis_rows(values: Sequence[torch.Tensor], sizes: Sequence[int], pairs: Sequence[int]) -> torch.Tensor | None:
    """The rows of every axis that cos and sin of a grid are made of, taken from them.

    On a GPU this waits for the device, once.

    Args:
        values: cos and sin ``[1, S, 1, P]`` of every token of a row-major grid, one value per pair.
        sizes: of the grid, at least 1 on each axis.
        pairs: of each axis, which follow one another along P.

    Returns:
        ``[2, sum(sizes), max(pairs)]``, axis after axis; None where a token has other bits than those of its axes.
    """
    shape = (1, math.prod(sizes), 1, sum(pairs))
    if any(each.shape != shape for each in values):
        return None
    dtype = values[0].dtype
    bits = [each.view(_INTEGERS[dtype.itemsize]).reshape(*sizes, -1) for each in values]
    rows = bits[0].new_zeros((len(values), sum(sizes), max(pairs)))
    first_row = first_pair = 0
    same = []
    for axis, (size, count) in enumerate(zip(sizes, pairs, strict=True)):
        along_axis = tuple(slice(None) if other == axis else 0 for other in range(len(sizes)))
        around = [size if other == axis else 1 for other in range(len(sizes))]
        for kept, of_grid in zip(rows, bits, strict=True):
            of_axis = of_grid[..., first_pair : first_pair + count]
            kept[first_row : first_row + size, :count] = of_axis[along_axis]
            same.append((of_axis == of_axis[along_axis].view(*around, count)).all())
        first_row, first_pair = first_row + size, first_pair + count
    return rows.view(dtype) if bool(torch.stack(same).all()) else None
