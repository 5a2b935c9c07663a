"""The arguments of one rotation and of the norm before it, the same for every backend."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from .spec import NormKind, Pairing

Memo = dict[object, Any]
"""A backend's memory between calls that differ in the addresses of their tensors alone."""

# Looked up once: they are needed for every tensor of every call.
_TENSOR, _STRIDED = torch.Tensor, torch.strided


def layout_of(x: object) -> object:
    """The part of a cache key for one argument: everything about a tensor but its address and its values.

    That decides whether a call is valid, and which backend takes it. For anything else its type, so that an argument
    that is refused never shares a key with one that was accepted.
    """
    if isinstance(x, _TENSOR):
        return (x.shape, x.stride() if x.layout is _STRIDED else x.layout, x.dtype, x.device, x.is_neg())
    return type(x)


@dataclass(frozen=True, eq=False)
class RotationArgs:
    """The position of each token, its cos and sin, and the channels that they rotate.

    Token ``i`` of a sequence of S tokens is number ``j = i - prefix`` of the grid's tokens. It rotates when
    ``0 <= j < count`` and, without ``positions``, ``token_offset + j < prod(sizes)``; every other token is copied.

    Its row on axis ``a`` is ``positions[b, j, a]`` with ``positions`` (dims of size 1 are shared; a negative row leaves
    the pairs of that axis unrotated), else ``first_rows[a]`` plus the ``a``-th coordinate of flat index
    ``token_offset + j`` in a row-major grid of ``sizes``. ``rows[0, row, p]`` and ``rows[1, row, p]`` are cos and sin
    of pair ``p`` of the axis. The pairs of the axes follow one another: axis 0 has the first ``pairs[0]`` pairs of the
    head, and so on.

    With ``head_rows`` every head has its own cos and sin: the row of head ``h`` is the one above plus
    ``h * head_rows``, on every axis. A negative row is negative for all heads.

    A dense table is one axis of as many rows as tokens, or, with a table for each head, as tokens and heads together.

    With ``n = sum(pairs)``, pair ``p`` of a head is channels (2 p, 2 p + 1) when interleaved and (p, p + n) when half;
    channels past ``2 n`` are copied. A pair (x1, x2) becomes (x1 cos - x2 sin, x1 sin + x2 cos); ``inverse`` takes
    -sin.

    Attributes:
        rows: ``[2, R, P]`` cos and sin of all axes, axis after axis along R, P = max(pairs), last dim contiguous.
        positions: ``[1 or B, 1 or count, axes]`` int32 rows of ``rows``, or None.
        pairs: channel pairs of each axis.
        sizes: the local grid, ignored with positions.
        first_rows: row of each axis' coordinate 0, ignored with positions.
        token_offset: flat index of the first token, ignored with positions.
        prefix: tokens before the grid's.
        count: the grid's tokens in this sequence, padding included.
        pairing: which channels are a pair.
        inverse: rotate backwards.
        exact: the roundings of the model's eager code, no fused multiply-add; else float32 arithmetic (float64 for
            float64 data), rounded once.
        entries: int32 ``[n]``: only these batch entries of the tensors rotate, in place, and positions are ``[1 or n,
            1 or count, axes]``, the b-th for batch entry ``entries[b]``; None for all batch entries, in order.
        head_rows: distance in ``rows`` from the rows of one head to those of the next, at least 0; 0 where all heads
            share them. The tensors of a call may have different numbers of heads.
    """

    rows: torch.Tensor
    positions: torch.Tensor | None
    pairs: tuple[int, ...]
    sizes: tuple[int, ...]
    first_rows: tuple[int, ...]
    token_offset: int
    prefix: int
    count: int
    pairing: Pairing
    inverse: bool
    exact: bool
    entries: torch.Tensor | None = None
    head_rows: int = 0

    @classmethod
    def of_rows(
        cls,
        rows: torch.Tensor,
        positions: torch.Tensor | None,
        pairs: tuple[int, ...],
        count: int,
        pairing: Pairing,
        *,
        prefix: int = 0,
        inverse: bool = False,
        exact: bool = False,
        entries: torch.Tensor | None = None,
        head_rows: int = 0,
    ) -> RotationArgs:
        """The rotation of ``count`` tokens by the rows that ``positions`` names for each.

        Without positions there is one axis, and token i has row i.
        """
        zeros = (0,) * len(pairs)
        sizes = (count,) if positions is None else zeros
        return cls(rows, positions, pairs, sizes, zeros, 0, prefix, count, pairing, inverse, exact, entries, head_rows)

    def at(self, positions: torch.Tensor) -> RotationArgs:
        """The same rotation at other positions."""
        other = object.__new__(RotationArgs)  # a tenth of what dataclasses.replace takes, in every call of a layer
        vars(other).update(vars(self), positions=positions)
        return other

    def of_frames(self, first: int, frames: int) -> RotationArgs:
        """The rotation of ``frames`` whole frames of this grid, from frame ``first`` on."""
        return replace(
            self,
            sizes=(frames, *self.sizes[1:]),
            first_rows=(self.first_rows[0] + first, *self.first_rows[1:]),
            count=frames * (self.count // self.sizes[0]),
        )

    @cached_property
    def numbers(self) -> tuple[object, ...]:
        """Everything but the tensors, as part of a cache key."""
        return (
            self.pairs,
            self.sizes,
            self.first_rows,
            self.token_offset,
            self.prefix,
            self.count,
            self.pairing,
            self.inverse,
            self.exact,
            self.head_rows,
        )


class NormRounding(enum.Enum):
    """Where the norm before a rotation rounds to the dtype of the data; in between, arithmetic is float32.

    ``NONE``: nowhere. ``RESULT``: its result, as torch's norms do. ``EVERY_STEP``: also what it multiplies by the
    weight, and that before it adds the bias, as norms made of single operations on 16-bit weights do.
    """

    NONE = "none"
    RESULT = "result"
    EVERY_STEP = "every_step"

    __hash__ = object.__hash__


class Norm(NamedTuple):
    """The norm of the tensors of one call, before their rotation.

    Attributes:
        kind: which norm, and what one mean is taken over.
        eps: added to the mean of squares, or to the variance.
        weights: one for each tensor, ``[D]`` per head or ``[H * D]`` across heads; empty without weights.
        biases: as ``weights``, added after them.
        rounding: where it rounds. Before an exact rotation it must round its result.
    """

    kind: NormKind
    eps: float
    weights: Sequence[torch.Tensor] = ()
    biases: Sequence[torch.Tensor] = ()
    rounding: NormRounding = NormRounding.NONE

    @classmethod
    def of(
        cls,
        xs: Sequence[torch.Tensor],
        kind: NormKind,
        eps: float,
        weights: Sequence[torch.Tensor | None] = (),
        biases: Sequence[torch.Tensor | None] = (),
        rounding: NormRounding = NormRounding.NONE,
    ) -> Norm:
        """The norm of ``xs`` ``[B, S, H, D]``, of which some may have no weight or no bias.

        Where only one of two tensors has a weight or a bias, the other gets ones or zeros: a kernel reads both or none.
        """
        added = _for_all(xs, biases, kind, 0.0) if biases else ()
        return cls(kind, eps, _for_all(xs, weights, kind, 1.0), added, rounding)

    def of_tensor(self, index: int) -> Norm:
        """The norm of one of the tensors alone."""
        return self._replace(weights=self.weights[index : index + 1], biases=self.biases[index : index + 1])


def _for_all(
    xs: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor | None], kind: NormKind, default: float
) -> list[torch.Tensor]:
    present = [parameter for parameter in parameters if parameter is not None]
    if not present or len(present) == len(parameters):
        return present
    return [
        x.new_full((x.shape[2] * x.shape[3] if kind.across_heads else x.shape[3],), default)
        if parameter is None
        else parameter
        for x, parameter in zip(xs, parameters, strict=True)
    ]
