"""Where a norm and a rotation round, as callers name it."""

from __future__ import annotations

import enum

from ..scalars import check_flags


class Rounding(enum.Enum):
    """Where the norm and the rotation of queries and keys round to the dtype of the data.

    ``EXACT``: the bits of the model's own eager code. A norm runs as the model's own code, in a pass of its own.

    ``MODEL``: where the model's code rounds, with norm and rotation in one pass over memory. Arithmetic in between is
    float32, and its sums may be taken in another order: then a few values in ten thousand round to their other
    neighbour.

    ``FAST``: once, at the end; float32 in between (float64 for float64 data), with fused multiply-adds. This is closest
    to the true result, and farthest from the bits of a model in 16 bits.

    Without a norm, and for float32 and float64 data, ``MODEL`` rounds as ``EXACT`` does.

    Example:
        >>> import torch, dit_rope
        >>> table = dit_rope.rope_table(dit_rope.RopeSpec((8, 4, 4)), dit_rope.Grid(2, 3, 4))
        >>> x, weight = torch.randn(1, 24, 2, 16).bfloat16(), torch.ones(16).bfloat16()
        >>> normed = torch.nn.functional.rms_norm(x, (16,), weight, 1e-6)
        >>> expected = dit_rope.rotate(normed, table, rounding=dit_rope.Rounding.EXACT)
        >>> rounded = dit_rope.norm_rotate(x, table, weight, rounding=dit_rope.Rounding.MODEL)
        >>> bool((rounded == expected).float().mean() > 0.99)
        True
    """

    EXACT = "exact"
    MODEL = "model"
    FAST = "fast"

    __hash__ = object.__hash__


def rounding_of(exact: bool, rounding: Rounding | None) -> Rounding:
    """The rounding that a caller asks for by ``rounding``, or by the flag ``exact`` without it.

    Raises:
        TypeError: ``exact`` is not a bool, or ``rounding`` neither a Rounding nor None.
        ValueError: ``exact`` asks for the bits of the model, and ``rounding`` for something else.
    """
    if rounding is None:
        if exact is True:
            return Rounding.EXACT
        check_flags(exact=exact)
        return Rounding.FAST
    check_flags(exact=exact)
    if not isinstance(rounding, Rounding):
        raise TypeError(f"rounding must be a Rounding or None, got {rounding!r}")
    if exact and rounding is not Rounding.EXACT:
        raise ValueError(f"rounding must be Rounding.EXACT or None with exact=True, got {rounding}; leave exact out")
    return rounding
