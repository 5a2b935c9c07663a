"""The options of a patch."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from ..rotation import Rounding


class Fusion(enum.Enum):
    """Which operations on queries and keys :func:`dit_rope.patch` takes over; tables are memoized in any case.

    ``NORM_AND_ROTATION``: norm and rotation in one pass, for norms that the kernels know, unless the rounding is exact;
    otherwise as ``ROTATION``. ``ROTATION``: the rotation; the model runs its own norms. ``NOTHING``: the model norms
    and rotates.
    """

    NOTHING = "nothing"
    ROTATION = "rotation"
    NORM_AND_ROTATION = "norm_and_rotation"

    __hash__ = object.__hash__


@dataclass(frozen=True)
class Options:
    """How a patched model computes, as :func:`dit_rope.patch` takes it; ``scaling`` may be a function.

    Without a ``rounding`` it is exact on a CPU, and the model's elsewhere.
    """

    rounding: Rounding | None = None
    backend: str = "auto"
    scaling: Any = None
    fuse: Fusion = Fusion.NORM_AND_ROTATION
    compiled: bool = False
