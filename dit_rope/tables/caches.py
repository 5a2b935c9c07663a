"""The caches of the package in one place: what each keeps, their counters, their caps, and how to empty them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..cache import CacheInfo, FifoCache
from ..scalars import integer
from .axes import AXES
from .scaling import FREQUENCIES


class HoldsTensors(Protocol):
    """A value of a cache that is more than one tensor."""

    @property
    def tensors(self) -> Iterable[torch.Tensor]:
        """Everything it keeps in memory."""


def _tensors_of(value: HoldsTensors | torch.Tensor) -> Iterable[torch.Tensor]:
    return (value,) if isinstance(value, torch.Tensor) else value.tensors


TABLES: FifoCache[Hashable, HoldsTensors | torch.Tensor] = FifoCache("table", 16, 256 * 2**20, _tensors_of)
# What the eager backend expands of tables on CPU.
ANGLES: FifoCache[Hashable, Sequence[torch.Tensor]] = FifoCache("angle", 8, 64 * 2**20, lambda tensors: tensors)
# What rope modules of patched models build themselves, and what their keys hold.
MODEL_TABLES: FifoCache[Hashable, HoldsTensors] = FifoCache(
    "model table", 64, 2**30, _tensors_of, across_streams=False, in_default_device=True
)
# Rows of the angles by which whole keys are shifted, one for each shift that is in no table.
SHIFTS: FifoCache[Hashable, torch.Tensor] = FifoCache("shift", 256, 2**20, _tensors_of)


@dataclass(frozen=True)
class TableCacheInfo:
    """Counters of every cache, as :func:`cache_info` gives them.

    Attributes:
        tables: entries as a user counts them: tables, dense forms and position tensors.
        axes: the arrays of single axes, in host memory, which tables of many grids and shards share.
        angles: what the eager backend expands of tables on CPU, for the next call with the same table.
        models: tables that patched models build themselves.
        frequencies: what scalings come to on single axes, and copies of it on devices.
        shifts: angles that :func:`~dit_rope.shift_keys` makes for a spec.
    """

    tables: CacheInfo
    axes: CacheInfo
    angles: CacheInfo
    models: CacheInfo
    frequencies: CacheInfo
    shifts: CacheInfo


_ALL: tuple[FifoCache[Any, Any], ...] = (TABLES, AXES, ANGLES, MODEL_TABLES, FREQUENCIES, SHIFTS)


def cache_info() -> TableCacheInfo:
    """Hits, misses, evictions, rebuilds, entries and bytes of each cache.

    Example:
        >>> import dit_rope
        >>> dit_rope.cache_clear()
        >>> table = dit_rope.rope_table(dit_rope.RopeSpec((8, 4, 4)), dit_rope.Grid(2, 3, 4))
        >>> dit_rope.cache_info().tables.entries
        1
    """
    return TableCacheInfo(*(cache.info() for cache in _ALL))


def cache_clear() -> None:
    """Forgets all that is cached and zeroes the counters; tables already handed out stay valid.

    What only a CUDA graph still reads is freed: replay no graph after this that was captured before.

    Example:
        >>> import dit_rope
        >>> dit_rope.cache_clear()
        >>> dit_rope.cache_info().tables.bytes
        0
    """
    for cache in _ALL:
        cache.clear()


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
    given = {
        "max_entries": max_entries,
        "max_bytes": max_bytes,
        "max_model_entries": max_model_entries,
        "max_model_bytes": max_model_bytes,
    }
    caps = {name: None if value is None else integer(name, value, 1) for name, value in given.items()}
    TABLES.configure(max_entries=caps["max_entries"], max_bytes=caps["max_bytes"])
    MODEL_TABLES.configure(max_entries=caps["max_model_entries"], max_bytes=caps["max_model_bytes"])
