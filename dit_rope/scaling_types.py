"""The old name of :mod:`dit_rope.tables.scaling_types`, for one minor version; every use of it warns."""

from __future__ import annotations

import warnings
from typing import Any

from .tables import scaling_types


def __getattr__(name: str) -> Any:
    value = getattr(scaling_types, name)
    warnings.warn(
        f"dit_rope.scaling_types.{name} is dit_rope.tables.scaling_types.{name} now; the old name goes in 0.3",
        DeprecationWarning,
        stacklevel=2,
    )
    return value
