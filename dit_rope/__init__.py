"""Rotary position embedding for video diffusion transformers: each table built once, each rotation one pass."""

from .patching import Patch, UnsupportedModelError, patch, unpatch
from .rotation import norm_rotate, norm_rotate_qk, rotate, rotate_qk
from .spec import Grid, NormKind, Pairing, RopeSpec, Scaling, Shard
from .tables import RopeTable, cache_clear, cache_configure, cache_info, rope_table

__version__ = "0.1.0"

__all__ = [
    "Grid",
    "NormKind",
    "Pairing",
    "Patch",
    "RopeSpec",
    "RopeTable",
    "Scaling",
    "Shard",
    "UnsupportedModelError",
    "__version__",
    "cache_clear",
    "cache_configure",
    "cache_info",
    "norm_rotate",
    "norm_rotate_qk",
    "patch",
    "rope_table",
    "rotate",
    "rotate_qk",
    "unpatch",
]
