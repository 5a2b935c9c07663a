"""Streams of video chunks: rotary positions, rolling caches of keys and values, and keys that move."""

from .eviction import EvictionPlan, plan_eviction
from .rolling_cache import RollingCache
from .shift import ShiftTable, shift_keys
from .stream import Chunk, PositionPolicy, RopeStream

__all__ = [
    "Chunk",
    "EvictionPlan",
    "PositionPolicy",
    "RollingCache",
    "RopeStream",
    "ShiftTable",
    "plan_eviction",
    "shift_keys",
]
