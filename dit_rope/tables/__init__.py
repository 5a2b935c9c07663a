"""Tables of cosines and sines: frequencies and their scaling, axes, grids and shards, dense forms, and every cache."""

from .caches import TableCacheInfo, cache_clear, cache_configure, cache_info
from .scaling import known_scalings, register_scaling, scaling_from_config
from .scaling_types import AxisFrequencies
from .table import RopeTable, rope_table

__all__ = [
    "AxisFrequencies",
    "RopeTable",
    "TableCacheInfo",
    "cache_clear",
    "cache_configure",
    "cache_info",
    "known_scalings",
    "register_scaling",
    "rope_table",
    "scaling_from_config",
]
