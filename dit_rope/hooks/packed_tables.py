"""The form of rotary tables that kernels read, and when a packed table may be reused.

Tables that known code of a patched model built are marked. A marked table is packed once, or recognized as the dense
form of axis tables; so is a range of its tokens. Other tables are packed in every forward pass.
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
        heads: number of heads that have separate rows; 1 if all heads share the rows.
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
    _args: dict[tuple[int, Align, bool], RotationArgs] = field(default_factory=dict, init=False, repr=False)
    _narrowed: dict[torch.dtype, PackedTable] = field(default_factory=dict, init=False, repr=False)
    _identities: dict[int, bool] = field(default_factory=dict, init=False, repr=False)

    @property
    def head_dim(self) -> int:
        """Channels of a head, where all of them rotate."""
        return 2 * sum(self.pairs)

    @property
    def batch(self) -> int:
        """Number of samples that have separate positions; 1 if all samples share them."""
        return 1 if self.positions is None else self.positions.shape[0]

    def narrowed(self, dtype: torch.dtype) -> PackedTable:
        """The same table with its rows rounded to ``dtype``."""
        if self.rows.dtype == dtype:
            return self
        table = self._narrowed.get(dtype)
        if table is None:
            table = self._narrowed[dtype] = replace(self, rows=self.rows.to(dtype))
        return table

    def token_range(self, first: int, count: int) -> PackedTable:
        """The table of ``count`` tokens, from token ``first`` on."""
        return replace(
            self,
            positions=None if self.positions is None else self.positions[:, first : first + count],
            tokens=count,
            token_offset=self.token_offset + first,
        )

    def args(self, length: int, align: Align, exact: bool) -> RotationArgs:
        """The rotation of a sequence of ``length`` tokens that shares its start or its end with the table.

        A longer sequence has tokens that do not rotate; a shorter one uses fewer rows of the table.
        """
        args = self._args.get((length, align, exact))
        if args is None:
            if len(self._args) >= _MOST_REMEMBERED:
                self._args.clear()
            args = self._args[length, align, exact] = self.make_args(length, align, exact)
        return args

    def make_args(self, length: int, align: Align, exact: bool) -> RotationArgs:
        """As :meth:`args`, made in every call: a trace cannot ask what was made before."""
        count = min(length, self.tokens)
        first = self.tokens - count if align is Align.END else 0
        prefix = length - count if align is Align.END else 0
        if self.positions is not None:
            positions = self.positions[:, first : first + count]
            rotation = (self.rows, positions, self.pairs, count, self.pairing)
            return RotationArgs.of_rows(*rotation, prefix=prefix, exact=exact, head_rows=self.head_rows)
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
        if self.heads > 1 or capturing(self.rows.device):  # reading values would wait for the device
            return False
        identity = self._identities.get(count)
        if identity is None:
            rows = self.rows[:, count:] if self.positions is None else self.rows[:, self.positions[:, count:, 0].long()]
            cos, sin = rows.unbind()
            identity = self._identities[count] = bool((cos == 1).all()) and not bool(sin.any())
        return identity


def pack(cos: torch.Tensor, sin: torch.Tensor, pairing: Pairing, device: torch.device) -> PackedTable:
    """Packs cos and sin ``[1 or B, S, 1 or H, P]`` of every token, one value per pair, onto ``device``."""
    if cos.shape != sin.shape:
        raise UnfitTable
    batch, tokens, heads, pairs = cos.shape
    # All tokens of head 0, then all tokens of head 1: the row of a token is its number, plus ``tokens`` for each head.
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
    """The tables packed from ``tensors`` earlier in this forward pass; None if there are none.

    This runs in every layer, so it is the shortest way: :func:`packed_once` makes a longer key and more checks.
    """
    packed = packed_in_this_pass()
    entry: _InPass | None = None if packed is None else packed.get((*key, *map(id, tensors)))
    if entry is None or entry.device != device or in_mode():
        return None
    if device.type != "cpu" and (capturing(device) or entry.stream != stream_of(device)):
        return None
    for ref, version, tensor in zip(entry.tensors, entry.versions, tensors, strict=True):
        same = ref()
        # The id of a freed tensor may belong to another tensor now.
        if same is None or same is not tensor or same._version != version:
            return None
    return entry.tables


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

    __slots__ = ("number", "other_tensors", "tables", "versions")

    def __init__(self, tensors: Sequence[torch.Tensor], tables: list[PackedTable]) -> None:
        self.versions = tuple(tensor._version for tensor in tensors)
        self.other_tensors = [weakref.ref(tensor) for tensor in tensors[1:]]
        self.number = current_pass()
        self.tables = tables

    def is_of(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these are the same tensors, with the same version counters."""
        same = all(of() is tensor for of, tensor in zip(self.other_tensors, tensors[1:], strict=True))
        return same and self.versions == tuple(tensor._version for tensor in tensors)


# By the first tensor of a table. Packed tables are freed with it.
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# Tensors that memoized code returned, with their versions: only the model has them.
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# Entries of one first tensor. If its partner is new in every step, each step adds an entry.
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

    Marked tables are reused until somebody writes to them. Other tables are reused for the rest of a forward pass. On a
    CPU they are packed again in the next pass, and the earlier result is kept if it is equal.
    """
    if any(tensor.is_inference() for tensor in tensors) or in_mode() or capturing(device):
        # A captured graph must pack in every replay, because its inputs are written for every replay.
        return build()
    number = current_pass()
    entries = _packed.setdefault(tensors[0], {})
    key = (*key, device, stream_of(device), *map(id, tensors[1:]))
    found: _Packed | None = entries.get(key)
    if found is not None and found.is_of(tensors):
        if (number is not None and found.number == number) or is_known(tensors):
            return found.tables
        built = build()
        if device.type == "cpu" and len(built) == len(found.tables) and all(map(_equal, built, found.tables)):
            # Keep the earlier rows: other caches, such as that of expanded tables, have entries for these tensors.
            found.number = number
            return found.tables
    else:
        built = build()
    entries[key] = _Packed(tensors, built)
    for oldest in list(entries)[:-_MOST_PACKED]:
        entries.pop(oldest, None)
    return built


def _equal(a: PackedTable, b: PackedTable) -> bool:
    numbers = [(t.tokens, t.pairs, t.head_rows, t.sizes, t.first_rows, t.token_offset, t.heads) for t in (a, b)]
    if numbers[0] != numbers[1] or a.rows.dtype != b.rows.dtype or not torch.equal(a.rows, b.rows):
        return False
    if a.positions is None or b.positions is None:
        return a.positions is b.positions
    return torch.equal(a.positions, b.positions)


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
    # Entries of freed tensors go: their storage's address may belong to another tensor now.
    for freed in [key for key, form in list(_axis_tables.items()) if any(ref() is None for ref in form.tensors)]:
        _axis_tables.pop(freed, None)


def axis_tables_of(tensors: Sequence[Any]) -> PackedTable | None:
    """The axis tables of ``tensors``: a marked dense table, or a range of its tokens. None for other tensors."""
    form = _axis_tables.get(tensors[0].untyped_storage()._cdata)
    if form is None or len(tensors) != len(form.tensors):
        return None
    places = [_place(view, ref()) for view, ref in zip(tensors, form.tensors, strict=True)]
    if places[0] is None or any(place != places[0] for place in places):
        return None
    return form.table.token_range(*places[0])


def _place(view: torch.Tensor, whole: torch.Tensor | None) -> tuple[int, int] | None:
    """First token and token count if ``view`` is a range ``[1, n, 1, D]`` of the tokens of ``whole``, else None."""
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
    offset, remainder = divmod(int(view.storage_offset() - whole.storage_offset()), whole.stride(1))
    return None if remainder or view.shape[1] == 0 else (offset, view.shape[1])


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of an element. As integers, 0.0 and -0.0 differ and equal NaNs are equal: the comparison is of bits."""


def axis_rows(values: Sequence[torch.Tensor], sizes: Sequence[int], pairs: Sequence[int]) -> torch.Tensor | None:
    """Takes the rows of every axis out of the cos and sin of a grid.

    On a GPU this waits once for the device.

    Args:
        values: cos and sin ``[1, S, 1, P]`` of every token of a row-major grid, one value per pair.
        sizes: tokens of the grid on each axis, at least 1.
        pairs: pairs of each axis; P is the pairs of axis 0, then those of axis 1, and so on.

    Returns:
        ``[2, sum(sizes), max(pairs)]``, axis after axis; None unless they expand to ``values`` bit for bit.
    """
    shape = (1, math.prod(sizes), 1, sum(pairs))
    if any(value.shape != shape for value in values):
        return None
    dtype = values[0].dtype
    bits = [value.view(_INTEGERS[dtype.itemsize]).reshape(*sizes, -1) for value in values]
    rows = bits[0].new_zeros((len(values), sum(sizes), max(pairs)))
    first_row = first_pair = 0
    same = []
    for axis, (size, count) in enumerate(zip(sizes, pairs, strict=True)):
        # The tokens with coordinate 0 on every other axis hold the rows of this axis; all other tokens repeat them.
        along_axis = tuple(slice(None) if dim == axis else 0 for dim in range(len(sizes)))
        around = [size if dim == axis else 1 for dim in range(len(sizes))]
        for axis_row, of_grid in zip(rows, bits, strict=True):
            of_axis = of_grid[..., first_pair : first_pair + count]
            axis_row[first_row : first_row + size, :count] = of_axis[along_axis]
            same.append((of_axis == of_axis[along_axis].view(*around, count)).all())
        first_row, first_pair = first_row + size, first_pair + count
    return rows.view(dtype) if bool(torch.stack(same).all()) else None
