"""Rotary position embedding for diffusion transformers: each table built once, each rotation one pass."""

from .adapters import UnsupportedModelError, register_adapter, unregister_adapter
from .deprecated import rotary_dim
from .hooks.options import Fusion
from .patching import Patch, patch, unpatch
from .rotation import Rounding, norm_rotate, norm_rotate_qk, rotate, rotate_qk
from .spec import Grid, NormKind, Pairing, RopeSpec, Scaling, Shard
from .streaming import PositionPolicy, RollingCache, RopeStream, ShiftTable, plan_eviction, shift_keys
from .tables import (
    AxisFrequencies,
    RopeTable,
    cache_clear,
    cache_configure,
    cache_info,
    known_scalings,
    register_scaling,
    rope_table,
    scaling_from_config,
)

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
    "Rounding",
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
    "register_adapter",
    "register_scaling",
    "rope_table",
    "rotary_dim",
    "rotate",
    "rotate_qk",
    "scaling_from_config",
    "shift_keys",
    "unpatch",
    "unregister_adapter",
]
