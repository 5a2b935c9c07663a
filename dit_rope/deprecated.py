"""Old names that work until 0.3, with a warning: paths of modules, and a function."""

from __future__ import annotations

import math
import sys
import warnings
from types import ModuleType
from typing import Any

from .scalars import as_number, integer
from .streaming import eviction, rolling_cache, shift
from .tables import caches, scaling_types

MOVED = {
    "eviction": eviction,
    "rolling_cache": rolling_cache,
    "scaling_types": scaling_types,
    "shifting": shift,
    "table_caches": caches,
}


class _MovedModule(ModuleType):
    """An old path, whose names are looked up in the module that has them now."""

    def __init__(self, path: str, module: ModuleType) -> None:
        super().__init__(path, f"The old path of :mod:`{module.__name__}`.")
        self.__dict__["_module"] = module

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # whoever lists the modules of a process asks for these
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        module = self.__dict__["_module"]
        value = getattr(module, name)
        warnings.warn(
            f"{self.__name__}.{name} is {module.__name__}.{name} now; the old path goes in 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        return value


def _register() -> None:
    """Imports, and pickles of tables from before 0.2, find the old paths."""
    package = sys.modules[__package__]
    for name, module in MOVED.items():
        moved = _MovedModule(f"{__package__}.{name}", module)
        sys.modules[moved.__name__] = moved
        setattr(package, name, moved)


_register()


def rotary_dim(head_dim: int, partial_rotary_factor: float = 1.0) -> int:
    """Deprecated: a share of the channels of a head, rounded half up and then down to an even number, at least 2.

    A factor of 0 or less, or of 1 or more, means all. The rule of InfiniLM (``model_config.cpp`` at df1a1fd9).

    Raises:
        TypeError, ValueError: for a head of fewer than 2 channels, or a factor that is not finite.
    """
    warnings.warn(
        "rotary_dim goes in 0.3; compute int(head_dim * partial_rotary_factor) // 2 * 2",
        DeprecationWarning,
        stacklevel=2,
    )
    head_dim = integer("head_dim", head_dim, 2)
    factor = as_number(partial_rotary_factor)
    if factor is None:
        raise TypeError(f"partial_rotary_factor must be a number, got {partial_rotary_factor!r}")
    if not abs(factor) < math.inf:
        raise ValueError(f"partial_rotary_factor must be finite, got {partial_rotary_factor}")
    whole = not 0.0 < factor < 1.0
    channels = head_dim if whole else math.floor(head_dim * factor + 0.5)
    return max(2, min(channels, head_dim) // 2 * 2)
