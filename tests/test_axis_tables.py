"""Which tables share an axis, counted by the axis cache."""

from __future__ import annotations

import pytest
import torch

from dit_rope import Grid, Pairing, RopeSpec, Shard, cache_clear, cache_info, rope_table

WAN = RopeSpec(dims=(44, 42, 42))
SMALL = RopeSpec(dims=(8, 6, 4))
GRID = Grid(3, 4, 5)


@pytest.fixture(autouse=True)
def _empty_caches():
    cache_clear()
    yield
    cache_clear()


def test_start_frame_within_its_block_builds_no_axis_and_past_it_the_frame_axis_only():
    rope_table(WAN, Grid(21, 45, 80))
    assert cache_info().axes.misses == 3
    for start in range(1, 12):
        rope_table(WAN, Grid(21, 45, 80, start_frame=start))
    assert cache_info().axes.misses == 3
    rope_table(WAN, Grid(21, 45, 80, start_frame=12))
    assert cache_info().axes.misses == 4
    assert cache_info().tables.misses == 13


def test_shards_and_dense_forms_build_no_axis():
    for rank in range(4):
        rope_table(SMALL, GRID, shard=Shard(rank, 4)).cos_sin()
        rope_table(SMALL, GRID, shard=Shard(rank, 4, axis=1)).complex()
    assert cache_info().axes.misses == 3


def test_specs_share_the_axes_they_have_in_common():
    rope_table(SMALL, GRID)
    rope_table(RopeSpec((8, 6, 10), pairing=Pairing.HALF), GRID)
    assert cache_info().axes.misses == 4


def test_720p_entry_takes_a_thousandth_of_the_dense_bytes():
    rope_table(WAN, Grid(21, 45, 80), dtype=torch.float64)
    info = cache_info()
    assert info.tables.bytes + info.axes.bytes <= 154_828_800 // 1000
    assert info.tables.bytes == rope_table(WAN, Grid(21, 45, 80), dtype=torch.float64).rows.untyped_storage().nbytes()


@pytest.mark.parametrize(
    ("spec", "grid", "dtype"),
    [
        (SMALL, Grid(8, 4, 5, start_frame=40), torch.float32),
        (SMALL, Grid(70, 4, 5), torch.float32),
        (SMALL, Grid(40, 4, 5), torch.float64),
        (RopeSpec((10, 6, 4)), Grid(40, 4, 5), torch.float32),
        (RopeSpec((8, 6, 4), theta_rescale=2.0), Grid(40, 4, 5), torch.float32),
    ],
    ids=["first row", "last row", "dtype", "channels", "theta"],
)
def test_table_after_another_equals_one_built_from_empty_caches(spec, grid, dtype):
    rope_table(SMALL, Grid(40, 4, 5))
    after = rope_table(spec, grid, dtype=dtype).rows
    cache_clear()
    assert torch.equal(after, rope_table(spec, grid, dtype=dtype).rows)
