"""The dense forms of a table: cos and sin of every token, expanded from the arrays of single axes."""

from __future__ import annotations

import dataclasses
import enum

import torch

from ..spec import Grid, Pairing, RopeSpec, Shard
from .axes import axis_arrays
from .dense_memory import check_dense_bytes, empty_rows
from .shards import TokenRange

TABLE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Form(enum.Enum):
    """The form of a table that an entry of the cache holds."""

    AXES = enum.auto()
    REPEATED = enum.auto()
    PAIRS = enum.auto()
    COMPLEX = enum.auto()
    POSITIONS = enum.auto()

    # The hash of Enum is a Python function, which would run at every hit of the cache. Members are singletons.
    __hash__ = object.__hash__


@dataclasses.dataclass(frozen=True, slots=True)
class TableKey:
    """Everything that a table or one of its forms depends on, except the device, which the cache adds."""

    spec: RopeSpec
    grid: Grid
    shard: Shard
    dtype: torch.dtype
    form: Form


@dataclasses.dataclass(frozen=True)
class DenseTable:
    """Cos and sin ``[S, width]``, and views of them as ``[1, S, 1, width]``."""

    flat: tuple[torch.Tensor, torch.Tensor]
    broadcast: tuple[torch.Tensor, torch.Tensor]

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The tensors that it keeps in memory."""
        return self.flat


def token_range(key: TableKey) -> TokenRange:
    """The tokens of the table of ``key``.

    Raises:
        TypeError, ValueError: an unsupported dtype, or as :meth:`TokenRange.of`.
    """
    if key.dtype not in TABLE_DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, TABLE_DTYPES))}, got {key.dtype!r}")
    return TokenRange.of(key.spec, key.grid, key.shard)


def build_dense(
    key: TableKey, device: torch.device, arrays: list[tuple[int, torch.Tensor]] | None = None
) -> DenseTable:
    """Expands axis arrays by copying each to its columns, without trigonometry, and without a gather for a whole grid.

    ``arrays`` is the result of :func:`axis_arrays` for the spec and grid of ``key`` by default.
    """
    arrays = axis_arrays(key.spec, key.grid, key.dtype) if arrays is None else arrays
    tokens, spec = token_range(key), key.spec
    repeated, half = key.form is Form.REPEATED, spec.rotary_dim // 2
    width = 2 * half if repeated else half
    check_dense_bytes("the dense form", 2 * tokens.count * width * key.dtype.itemsize)
    flat = empty_rows(tokens.count, width, key.dtype, device), empty_rows(tokens.count, width, key.dtype, device)
    coordinates = None if tokens.whole else tokens.coordinates(device)
    column = 0
    for axis, (first, array) in enumerate(arrays):
        start, pairs = tokens.starts[axis] - first, spec.pairs[axis]
        values = array[:, start : start + tokens.sizes[axis]].to(device)
        columns = [slice(column, column + pairs)]
        if repeated and spec.pairing is Pairing.INTERLEAVED:
            values, columns = values.repeat_interleave(2, dim=-1), [slice(2 * column, 2 * (column + pairs))]
        elif repeated:
            columns.append(slice(column + half, column + half + pairs))
        column += pairs
        for target, value in zip(flat, values, strict=True):
            if coordinates is None:
                shape = [1] * len(tokens.sizes)
                shape[axis] = tokens.sizes[axis]
                target, value = target.view(*tokens.sizes, width), value.view(*shape, -1)
            else:
                target, value = target[: tokens.inside], value[coordinates[axis]]
            for span in columns:
                target[..., span] = value
    flat[0][tokens.inside :] = 1.0
    flat[1][tokens.inside :] = 0.0
    return DenseTable(flat, (flat[0][None, :, None], flat[1][None, :, None]))


def build_complex(
    key: TableKey, device: torch.device, arrays: list[tuple[int, torch.Tensor]] | None = None
) -> torch.Tensor:
    """Cos + i sin ``[S, rotary_dim / 2]``, as :func:`build_dense` expands both."""
    check_dense_bytes("complex numbers", token_range(key).count * sum(key.spec.pairs) * 2 * max(key.dtype.itemsize, 4))
    cos, sin = build_dense(dataclasses.replace(key, form=Form.PAIRS), device, arrays).flat
    if key.dtype.itemsize == 2:
        cos, sin = cos.float(), sin.float()
    return torch.complex(cos, sin)
