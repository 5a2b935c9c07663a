"""The shapes and operations that are timed, and the inputs of each."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from dit_rope.spec import Grid, NormKind, Pairing, RopeSpec
from dit_rope.tables.table import RopeTable, rope_table

from .reference import Expectation

Tensors = tuple[torch.Tensor, torch.Tensor]
Call = Callable[[torch.Tensor, torch.Tensor], Tensors]

EPS = 1e-6


class Unavailable(Exception):
    """Why something cannot run here."""


class NotOffered(Unavailable):
    """An operation that a library does not have; it is left out silently."""


class Operation(enum.Enum):
    """What is done to queries and keys, in the order in which it is measured: what has a target first."""

    ROTATE = "rotate"
    PER_HEAD = "norm per head, rotate"
    ACROSS_HEADS = "norm across heads, rotate"
    IN_PLACE = "rotate in place"
    HALF_IN_PLACE = "rotate half in place"
    POSITIONS = "rotate by positions"
    EXACT = "rotate exact"
    BACKWARD = "backward"
    SHIFT = "shift"

    @property
    def norm(self) -> NormKind | None:
        """The norm before the rotation."""
        return {Operation.PER_HEAD: NormKind.PER_HEAD, Operation.ACROSS_HEADS: NormKind.ACROSS_HEADS}.get(self)

    @property
    def in_place(self) -> bool:
        """Whether q and k are overwritten."""
        return self in (Operation.IN_PLACE, Operation.HALF_IN_PLACE, Operation.SHIFT)


@dataclass(frozen=True)
class Shape:
    """Queries and keys ``[1, prefix + grid.tokens, heads, sum(dims)]`` of a model.

    ``norm`` is the model's own; ``headline`` marks the video shapes, which are held to the targets.
    """

    name: str
    grid: Grid
    heads: int
    dims: tuple[int, ...]
    norm: NormKind
    prefix: int = 0
    theta: float = 10_000.0
    headline: bool = False

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return sum(self.dims)

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.prefix + self.grid.tokens

    @property
    def elements(self) -> int:
        """Elements of q and k together."""
        return 2 * self.tokens * self.heads * self.head_dim

    def operations(self) -> list[Operation]:
        """All of them at a headline shape, else those that the model needs."""
        other = {NormKind.PER_HEAD: Operation.ACROSS_HEADS, NormKind.ACROSS_HEADS: Operation.PER_HEAD}[self.norm]
        return [operation for operation in Operation if self.headline or operation is not other]

    def within(self, tokens: int) -> Shape:
        """The same on as many frames, or else lines, as make at most ``tokens`` tokens; never less than one line."""
        frames, height, width = self.grid.sizes
        room = tokens - self.prefix
        frames = max(1, min(frames, room // (height * width)))
        height = max(1, min(height, room // (frames * width)))
        return replace(self, grid=Grid(frames, height, width, start_frame=self.grid.start_frame))

    def tiny(self) -> Shape:
        """The same on a few tokens and two heads."""
        few = Grid(*(min(size, 3) for size in self.grid.sizes), start_frame=self.grid.start_frame)
        return replace(self, grid=few, heads=2, prefix=min(self.prefix, 5))


_WAN = (44, 42, 42)
_FLUX = (16, 56, 56)
_ACROSS, _PER_HEAD = NormKind.ACROSS_HEADS, NormKind.PER_HEAD
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("wan-1.3b-480p", Grid(21, 30, 52), 12, _WAN, _ACROSS, headline=True),
        Shape("wan-14b-720p", Grid(21, 45, 80), 40, _WAN, _ACROSS, headline=True),
        Shape("hunyuan-video-720p", Grid(33, 45, 80), 24, _FLUX, _PER_HEAD, theta=256.0, headline=True),
        Shape("flux-1024", Grid(1, 64, 64), 24, _FLUX, _PER_HEAD, prefix=512),
        Shape("ltx", Grid(13, 16, 24), 32, (20, 22, 22), _ACROSS),
        Shape("streaming-chunk", Grid(3, 30, 52, start_frame=18), 12, _WAN, _ACROSS),
    )
}


@dataclass(frozen=True)
class Problem:
    """One operation at one shape on one device, with everything a rotation of q and k needs but q and k."""

    shape: Shape
    operation: Operation
    device: str
    dtype: torch.dtype = torch.bfloat16

    @property
    def half(self) -> bool:
        """Whether channels of the two halves of a head rotate together."""
        return self.operation is Operation.HALF_IN_PLACE

    @cached_property
    def table(self) -> RopeTable:
        """The axis tables of the grid, float32."""
        pairing = Pairing.HALF if self.half else Pairing.INTERLEAVED
        spec = RopeSpec(self.shape.dims, theta=self.shape.theta, pairing=pairing)
        return rope_table(spec, self.shape.grid, device=self.device)

    @cached_property
    def cos_sin(self) -> Tensors:
        """Dense cos and sin ``[tokens, pairs]``, float32, (1, 0) where the prefix stands."""
        shape = self.shape
        cos, sin = self.table.cos_sin(repeat=False)
        unrotated = cos.new_ones(shape.prefix, cos.shape[1]), sin.new_zeros(shape.prefix, sin.shape[1])
        return torch.cat((unrotated[0], cos)), torch.cat((unrotated[1], sin))

    @cached_property
    def weights(self) -> tuple[torch.Tensor, ...]:
        """Norm weights of q and k around one, or none."""
        norm = self.operation.norm
        if norm is None:
            return ()
        channels = self.shape.head_dim * (self.shape.heads if norm.across_heads else 1)
        generator = torch.Generator(self.device).manual_seed(1)
        noise = [torch.randn(channels, generator=generator, device=self.device) for _ in range(2)]
        return tuple((1 + 0.1 * values).to(self.dtype) for values in noise)

    @property
    def expectation(self) -> Expectation:
        """What the operation must give; not for :attr:`Operation.SHIFT`, which rotates by other rows."""
        inverse = self.operation is Operation.BACKWARD
        return Expectation(self.table, self.shape.prefix, self.operation.norm, self.weights, EPS, inverse)

    def inputs(self, sets: int) -> list[Tensors]:
        """``sets`` pairs of random queries and keys."""
        generator = torch.Generator(self.device).manual_seed(0)
        size = (1, self.shape.tokens, self.shape.heads, self.shape.head_dim)

        def noise() -> torch.Tensor:
            return torch.empty(size, device=self.device, dtype=self.dtype).normal_(generator=generator)

        return [(noise(), noise()) for _ in range(sets)]

    def data_bytes(self) -> int:
        """Bytes of q and k read and written, of the rotated keys alone for a shift."""
        moved = 2 * self.shape.elements * self.dtype.itemsize
        if self.operation is Operation.SHIFT:
            frames = self.shape.grid.sizes[0]
            return moved // 2 * (frames - 1) // frames
        return moved

    def axis_table_bytes(self) -> int:
        """Bytes of the axis tables, and of int32 positions where they are given, read once."""
        rows = self.table.rows
        positions = 4 * self.shape.grid.tokens * len(self.shape.dims) if self.operation is Operation.POSITIONS else 0
        return rows.numel() * rows.element_size() + positions

    def dense_table_bytes(self) -> int:
        """Bytes of dense float32 cos and sin, one value per pair, read once."""
        return 2 * 4 * self.shape.tokens * self.shape.head_dim // 2
