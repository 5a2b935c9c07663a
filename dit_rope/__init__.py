"""Rotary position embedding for diffusion transformers: each table built once, each rotation one pass."""

from .eviction import plan_eviction
from .patching import Patch, UnsupportedModelError, patch, unpatch
from .rolling_cache import RollingCache
from .rotation import norm_rotate, norm_rotate_qk, rotate, rotate_qk
from .scaling import known_scalings, register_scaling, rotary_dim, scaling_from_config
from .scaling_types import AxisFrequencies
from .shifting import ShiftTable, shift_keys
from .spec import Fusion, Grid, NormKind, Pairing, RopeSpec, Scaling, Shard
from .streaming import PositionPolicy, RopeStream
from .table_caches import cache_clear, cache_configure, cache_info
from .tables import RopeTable, rope_table

__version__ = "0.1.0"

__all__ = [
    "AxisFrequencies",
    "Fusion",
    "Grid",
    "NormKind",
    "Pairing",
    "Patch",
    "PositionPolicy",
    "RollingCache",
    "RopeSpec",
    "RopeStream",
    "RopeTable",
    "Scaling",
    "Shard",
    "ShiftTable",
    "UnsupportedModelError",
    "__version__",
    "cache_clear",
    "cache_configure",
    "cache_info",
    "known_scalings",
    "norm_rotate",
    "norm_rotate_qk",
    "patch",
    "plan_eviction",
    "register_scaling",
    "rope_table",
    "rotary_dim",
    "rotate",
    "rotate_qk",
    "scaling_from_config",
    "shift_keys",
    "unpatch",
]
