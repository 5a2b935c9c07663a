"""The caches of the package in one place: what each keeps, their counters, their caps, and how to empty them.

Everything that keeps tensors longer than their owner lives is one of these. Other results are remembered on an object
and freed with it (validated calls of a table, packed tables of a model), or hold no tensors (specs, launches, source
code).
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..cache import CacheInfo, FifoCache
from ..scalars import integer
from .scaling_types import AxisFrequencies


class HoldsTensors(Protocol):
    """A value of a cache that is more than one tensor."""

    @property
    def tensors(self) -> Iterable[torch.Tensor]:
        """Every tensor that the value keeps in memory."""


def _tensors_of(value: HoldsTensors | torch.Tensor) -> Iterable[torch.Tensor]:
    return (value,) if isinstance(value, torch.Tensor) else value.tensors


TABLES: FifoCache[Hashable, HoldsTensors | torch.Tensor] = FifoCache("table", 16, 256 * 2**20, _tensors_of)
"""Tables, their dense forms, and positions, as users ask for them."""
AXES: FifoCache[Hashable, torch.Tensor] = FifoCache("axis", 256, 64 * 2**20, _tensors_of)
"""Cos and sin of single axes in host memory, by :class:`~dit_rope.tables.axes.AxisKey`."""
EXPANDED: FifoCache[Hashable, Sequence[torch.Tensor]] = FifoCache(
    "expanded table", 8, 64 * 2**20, lambda tensors: tensors
)
"""Cos and sin of every token, which the eager backend expands from tables on CPU."""
MODEL_TABLES: FifoCache[Hashable, HoldsTensors] = FifoCache(
    "model table", 64, 2**30, _tensors_of, across_streams=False, in_default_device=True
)
"""Tables that patched models build themselves, and tensors that their cache keys identify."""
FREQUENCIES: FifoCache[Hashable, AxisFrequencies] = FifoCache(
    "frequency", 256, 2**20, lambda frequencies: (frequencies.inverse,)
)
"""Frequencies of axes: a stream, or a scaling that changes with the step, asks for the same frequencies again."""
SHIFTS: FifoCache[Hashable, torch.Tensor] = FifoCache("shift", 256, 2**20, _tensors_of)
"""Cos and sin of shifts of whole keys: one row for each shift that is not in a table."""


@dataclass(frozen=True)
class TableCacheInfo:
    """Counters of every cache, as :func:`cache_info` gives them.

    Attributes:
        tables: tables, dense forms and position tensors, one entry each.
        axes: cos and sin of single axes in host memory, which tables of many grids and shards share.
        expanded: cos and sin of every token, which the eager backend expands from tables on CPU.
        models: tables that patched models build themselves.
        frequencies: frequencies of axes, and their copies on devices.
        shifts: cos and sin by which :func:`~dit_rope.shift_keys` moves whole keys.
    """

    tables: CacheInfo
    axes: CacheInfo
    expanded: CacheInfo
    models: CacheInfo
    frequencies: CacheInfo
    shifts: CacheInfo

    @property
    def angles(self) -> CacheInfo:
        """Deprecated: the old name of ``expanded``."""
        warnings.warn(
            "cache_info().angles is cache_info().expanded now; the old name goes in 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.expanded


_ALL: tuple[FifoCache[Any, Any], ...] = (TABLES, AXES, EXPANDED, MODEL_TABLES, FREQUENCIES, SHIFTS)


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
    """Drops every entry of every cache and zeroes the counters; tables already handed out stay valid.

    This also frees memory that only CUDA graphs read: a graph captured before must not be replayed after it.

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
    """Sets the caps of the cache of tables and of the cache of model tables; the other caches have fixed caps.

    The oldest entries leave a cache that exceeds its new cap. None leaves a cap as it is.

    Args:
        max_entries: entries of the cache of tables; 16 when the package is imported.
        max_bytes: bytes of its tensors; 256 MiB.
        max_model_entries: entries of the cache of model tables; 64.
        max_model_bytes: bytes of its tensors; 1 GiB.

    Raises:
        TypeError, ValueError: a cap that is not an int of at least 1.

    Example:
        >>> import dit_rope
        >>> dit_rope.cache_configure(max_entries=32, max_bytes=2**28)
        >>> dit_rope.cache_info().tables.max_entries
        32
    """
    caps = {
        "max_entries": max_entries,
        "max_bytes": max_bytes,
        "max_model_entries": max_model_entries,
        "max_model_bytes": max_model_bytes,
    }
    caps = {name: None if cap is None else integer(name, cap, 1) for name, cap in caps.items()}
    TABLES.configure(max_entries=caps["max_entries"], max_bytes=caps["max_bytes"])
    MODEL_TABLES.configure(max_entries=caps["max_model_entries"], max_bytes=caps["max_model_bytes"])
