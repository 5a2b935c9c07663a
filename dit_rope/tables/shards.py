"""The tokens of a grid that a shard holds, and their coordinates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..spec import Grid, RopeSpec, Shard

MAX_POSITION = 2**24
_MAX_TOKENS = 2**62  # so that twice as many still fit a 64-bit integer


@dataclass(frozen=True)
class TokenRange:
    """The tokens of a shard: a range of flat indices in a row-major grid.

    Attributes:
        sizes: sizes of that grid: the whole grid, or with a shard along an axis the rank's block of it.
        starts: position of its first index on each axis.
        token_offset: flat index of the shard's first token.
        count: tokens of the shard, including padding.
    """

    sizes: tuple[int, ...]
    starts: tuple[int, ...]
    token_offset: int
    count: int

    @classmethod
    def of(cls, spec: RopeSpec, grid: Grid, shard: Shard) -> TokenRange:
        """The tokens of ``shard``; an axis is cut as ``chunk(world)[rank]``, after the start frame is added.

        Raises:
            TypeError, ValueError: naming the argument, the rule and the value.
        """
        cls.check(spec, grid, shard)
        starts = (grid.start_frame, *([0] * (len(grid.sizes) - 1)))
        if shard.tokens is not None:
            first, last = shard.tokens
            return cls(grid.sizes, starts, first, last - first)
        if shard.axis is None:
            count = -(-grid.tokens // shard.world)
            return cls(grid.sizes, starts, shard.rank * count, count)
        return cls._along(shard.axis, shard, grid.sizes, starts)

    @staticmethod
    def check(spec: RopeSpec, grid: Grid, shard: Shard) -> None:
        """Checks the types, that the grid has the axes of the spec, and that positions and tokens can be counted.

        Raises:
            TypeError, ValueError: naming the argument, the rule and the value.
        """
        for name, value, kind in (("spec", spec, RopeSpec), ("grid", grid, Grid), ("shard", shard, Shard)):
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {value!r}")
        if len(grid.sizes) != len(spec.dims):
            raise ValueError(f"grid must have one size per axis of spec.dims {spec.dims}, got {grid.sizes}")
        stop = max(grid.start_frame + grid.sizes[0], *grid.sizes)
        if stop > MAX_POSITION:
            raise ValueError(
                f"grid must end at or before position {MAX_POSITION}, got {stop}; float32 counts no further"
            )
        if shard.axis is not None and shard.axis >= len(grid.sizes):
            raise ValueError(
                f"shard.axis must be below the grid's number of axes ({len(grid.sizes)}), got {shard.axis}"
            )
        for name, last in (("grid", grid.tokens), ("shard", (shard.tokens or (0, shard.world))[1])):
            if last > _MAX_TOKENS:
                raise ValueError(f"{name} must have numbers of tokens up to {_MAX_TOKENS}, got {last}")

    @classmethod
    def _along(cls, axis: int, shard: Shard, sizes: tuple[int, ...], starts: tuple[int, ...]) -> TokenRange:
        if sizes[axis] % shard.world:
            raise ValueError(
                f"shard.world must divide the grid's size on axis {axis} ({sizes[axis]}), got {shard.world}; "
                f"shard the flattened tokens (axis=None) instead; this is rank {shard.rank} of {shard.world}"
            )
        size = sizes[axis] // shard.world
        local = (*sizes[:axis], size, *sizes[axis + 1 :])
        first = (*starts[:axis], starts[axis] + shard.rank * size, *starts[axis + 1 :])
        return cls(local, first, 0, math.prod(local))

    @property
    def inside(self) -> int:
        """Tokens of the shard that are in the grid; the tokens after them are padding."""
        return max(0, min(self.count, math.prod(self.sizes) - self.token_offset))

    @property
    def whole(self) -> bool:
        """Whether the shard holds exactly the tokens of ``sizes``."""
        return self.token_offset == 0 and self.count == math.prod(self.sizes)

    def coordinates(self, device: torch.device) -> list[torch.Tensor]:
        """Per axis, the coordinates int64 ``[inside]`` of the tokens within ``sizes``."""
        return grid_coordinates(self.sizes, self.token_offset, self.count, device)


def grid_coordinates(sizes: tuple[int, ...], offset: int, count: int, device: torch.device) -> list[torch.Tensor]:
    """Per axis, the int64 coordinates of the tokens ``offset <= i < offset + count`` that are in a row-major grid.

    Example:
        >>> [x.tolist() for x in grid_coordinates((2, 3), 2, 3, torch.device("cpu"))]
        [[0, 1, 1], [2, 0, 1]]
    """
    total = math.prod(sizes)
    tokens = torch.arange(min(offset, total), min(offset + count, total), device=device)
    coordinates = []
    for size in reversed(sizes):
        coordinates.append(tokens % size)
        tokens = tokens // size
    return coordinates[::-1]
