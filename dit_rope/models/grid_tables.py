"""Axis tables of ours in place of the dense tables that a model's rope module builds in every forward pass.

What travels through the model then is a pair of tensors: int32 rows of the axis tables, ``[1, S, 1, axes]``, which
whoever splits a sequence can split, and the packed axis tables ``[2, R, P]``, a few kB. Where context parallelism is
about to split both, each token is given the whole of the second, by a stride of 0, so that every part has it too.

A compiled block behind an uncompiled rope module gets its dense tables back from the rows. A rope module that scales
frequencies is not the model's own: its tables are traced, or, where a function of the user's chooses the scaling, made
outside the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..spec import Grid, RopeSpec, Scalings
from ..tables import RopeTable, build_positions, build_table, rope_table
from .adapter import FrameRows, GridTables
from .context_parallel import splits_outputs
from .formats import AxisRows
from .swapping import SETTINGS, Seam, unpatched_method


@dataclass(frozen=True)
class GridSettings:
    """What a rope module's own forward is replaced with; ``choose`` is asked for the scaling of each forward.

    ``dense``: the model rotates by itself, and reads dense tables.
    """

    spec: RopeSpec
    frames: Callable[..., FrameRows]
    choose: Callable[[], Scalings] | None = None
    dense: bool = False


class GridSeam(Seam):
    """Memoized rows and axis tables instead of dense tables built in every forward."""

    def replacement(self, *args: Any, **kwargs: Any) -> Any:
        """Int32 rows ``[1, S, 1, axes]`` and packed axis tables ``[2, R, P]``, or as many for each token.

        Or cos and sin ``[1, S, 1, rotary_dim]``, where the model rotates by itself.
        """
        settings: GridSettings | None = vars(self).get(SETTINGS)
        if settings is None:
            return unpatched_method(self)(*args, **kwargs)
        tables = self._dense if settings.dense else self._rows
        if not torch.compiler.is_compiling():
            return tables(settings, args, kwargs)
        if settings.choose is not None:
            # What it returns is new at any call, and would be compiled in.
            return torch.compiler.disable(tables)(settings, args, kwargs)
        if settings.spec.scaling is None:
            return unpatched_method(self)(*args, **kwargs)
        return AxisRows(settings.spec).traceable(self._rows(settings, args, kwargs))

    def _rows(
        self, settings: GridSettings, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        here, table, scaled = self._tables(settings, args, kwargs)
        rows = scaled.rows
        # Positions are those of any scaling, so that one entry of the cache serves all that are chosen.
        positions = _of_frames(table.positions(), here).unsqueeze(2)
        if splits_outputs(self):  # type: ignore[arg-type]
            rows = rows.expand(1, positions.shape[1], 1, *rows.shape).flatten(3)
        return positions, rows

    def _dense(
        self, settings: GridSettings, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        here, _, scaled = self._tables(settings, args, kwargs)
        cos, sin = scaled.cos_sin(broadcast=True)
        return _of_frames(cos, here), _of_frames(sin, here)

    def _tables(
        self, settings: GridSettings, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[FrameRows, RopeTable, RopeTable]:
        """The grid of one forward, its table, and the same in the scaling chosen for this forward."""
        here = settings.frames(self, *args, **kwargs)
        latent = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        dtype = next(buffer.dtype for buffer in self.buffers())  # type: ignore[attr-defined]
        grid = Grid(*here.grid)
        table = rope_table(settings.spec, grid, device=latent.device, dtype=dtype)
        if settings.choose is None:
            return here, table, table
        spec = settings.spec.with_scaling(settings.choose())
        return here, table, rope_table(spec, grid, device=latent.device, dtype=dtype)


def _of_frames(x: torch.Tensor, here: FrameRows) -> torch.Tensor:
    """``[1, frames H W, ...]`` from ``[1, T H W, ...]`` of the whole grid, without a device sync."""
    if here.frames is None:
        return x
    by_frame = x.unflatten(1, (here.grid[0], -1)).unbind(1)
    return torch.cat([by_frame[frame] for frame in here.frames], dim=1)


def table_mismatch(rope: torch.nn.Module, tables: GridTables) -> str | None:
    """Where the rope module's tables and ours differ in a bit, if they do; a meta module has none to compare."""
    buffer = next(rope.buffers())
    if buffer.is_meta:
        return None
    spec = tables.spec(rope)
    for latent in tables.probes(rope, buffer.device):
        here = tables.frames(rope, latent)
        table = build_table(spec, Grid(*here.grid), device=buffer.device, dtype=buffer.dtype)
        ours = AxisRows(spec).traceable((_of_frames(build_positions(table), here).unsqueeze(2), table.rows))
        theirs = unpatched_method(rope)(latent)  # and not what hooks of others make of it
        if not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
            return f"got other values on a grid of {here.grid}; were its buffers changed?"
    return None
