"""What each kind of shard holds: dense rows, positions and arguments against the oracle's whole grid."""

from __future__ import annotations

import math

import pytest
import torch

from dit_rope import Grid, RopeSpec, Shard, cache_info, rope_table, rotate
from oracle import full_grid_table

SMALL = RopeSpec(dims=(8, 6, 4))
GRID = Grid(3, 4, 5)
SHARDS = {
    "whole": None,
    "axis 0": Shard(1, 3, axis=0),
    "axis 1": Shard(3, 4, axis=1),
    "axis 2": Shard(0, 5, axis=2),
    "tokens": Shard(2, 4),
    "tokens, with padding": Shard(6, 7),
    "tokens, padding only": Shard(40, 41),
    "slice": Shard.of_tokens(7, 23),
    "slice as long as the grid": Shard.of_tokens(10, 70),
    "slice past the end": Shard.of_tokens(50, 80),
    "slice beyond the end": Shard.of_tokens(70, 80),
}


def expected_dense(shard: Shard | None, start: int, repeat: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The shard's rows of the oracle's table, identity rows where it is padded."""
    settings = {"dtype": torch.float64, "start_frame": start, "repeat": repeat}
    if shard is not None and shard.axis is not None:
        settings |= {"shard_axis": shard.axis, "rank": shard.rank, "world": shard.world}
    cos, sin = full_grid_table(GRID.sizes, SMALL.dims, 1e4, **settings)
    if shard is None or shard.axis is not None:
        return cos, sin
    size = math.ceil(60 / shard.world)
    first, stop = shard.tokens or (shard.rank * size, (shard.rank + 1) * size)
    padding = torch.ones(max(0, stop - max(first, 60)), cos.shape[1], dtype=cos.dtype)
    return torch.cat((cos[first:stop], padding)), torch.cat((sin[first:stop], padding * 0))


@pytest.mark.parametrize("repeat", [True, False], ids=["repeated", "pairs"])
@pytest.mark.parametrize("shard", SHARDS.values(), ids=SHARDS.keys())
def test_dense_table_of_a_shard_is_its_part_of_the_whole(shard, repeat) -> None:
    grid = Grid(*GRID.sizes, start_frame=31)
    actual = rope_table(SMALL, grid, shard=shard, dtype=torch.float64).cos_sin(repeat=repeat)
    for x, y in zip(actual, expected_dense(shard, 31, repeat), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("shard", SHARDS.values(), ids=SHARDS.keys())
def test_positions_and_args_lead_to_the_rows_of_the_dense_table(shard) -> None:
    table = rope_table(SMALL, Grid(*GRID.sizes, start_frame=31), shard=shard, dtype=torch.float64)
    cos, sin = expected_dense(shard, 31, repeat=False)
    args, positions = table.args(), table.positions()
    assert positions.shape == (1, table.count, 3)
    assert positions.dtype == torch.int32
    assert (args.count, args.pairs, args.sizes) == (len(cos), (4, 3, 2), table.sizes)
    for token in range(table.count):
        index, row = args.token_offset + token, []
        inside = index < math.prod(args.sizes)
        for axis in reversed(range(3)):
            index, coordinate = divmod(index, args.sizes[axis])
            row.insert(0, args.first_rows[axis] + coordinate if inside else -1)
        assert positions[0, token].tolist() == row
        for dense, rows in ((cos, args.rows[0]), (sin, args.rows[1])):
            parts = [rows[r, :pairs] for r, pairs in zip(row, args.pairs, strict=True)]
            assert not inside or torch.equal(torch.cat(parts), dense[token])


def test_each_shard_form_has_an_entry_of_its_own() -> None:
    first = {rope_table(SMALL, GRID, shard=shard) for shard in SHARDS.values()}
    assert len(first) == len(SHARDS) == cache_info().tables.entries


def test_seven_tokens_over_four_ranks_rotate_as_on_one() -> None:
    """The last rank's second token is padding, and comes back as it is."""
    grid, x = Grid(7, 1, 1), torch.randn(1, 8, 2, 20)
    whole = rotate(x, rope_table(SMALL, grid), suffix=1)
    parts = [rotate(y, rope_table(SMALL, grid, shard=Shard(rank, 4))) for rank, y in enumerate(x.chunk(4, dim=1))]
    assert torch.equal(torch.cat(parts, dim=1)[:, :7], whole[:, :7])
    assert torch.equal(parts[3][:, 1], x[:, 7])
