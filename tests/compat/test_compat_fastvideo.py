"""FastVideo's builder over our cache: the oracle's bits, FastVideo's cache cases with FIFO, and none of its hazards."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dit_rope import cache_clear, cache_configure, cache_info
from dit_rope.compat.fastvideo import get_rotary_pos_embed
from oracle import full_grid_table

WAN_DIMS, HUNYUAN_DIMS = [44, 42, 42], [16, 56, 56]
GRIDS = [(1, 1, 1), (1, 9, 16), (5, 1, 1), (3, 4, 6), (6, 35, 33)]


def embed(sizes=(3, 4, 6), dims=WAN_DIMS, theta=10_000, hidden=1536, **settings):
    return get_rotary_pos_embed(sizes, hidden, 12, dims, theta, **settings)


def assert_bitwise(actual, expected) -> None:
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert x.is_contiguous()
        assert torch.equal(x, y)


@pytest.mark.parametrize("use_real", [True, False], ids=["use_real", "pairs"])
@pytest.mark.parametrize("start_frame", [0, 3, 18, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", GRIDS, ids=str)
def test_builder_is_bitwise_equal_to_the_full_grid(sizes, dtype, start_frame, use_real) -> None:
    for dims, theta in ((WAN_DIMS, 10_000), (HUNYUAN_DIMS, 256)):
        actual = embed(sizes, dims, theta, dtype=dtype, start_frame=start_frame, use_real=use_real)
        settings = {"dtype": dtype, "start_frame": start_frame, "repeat": use_real}
        assert_bitwise(actual, full_grid_table(sizes, tuple(dims), theta, **settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rescale", "interpolation"),
    [(2.0, 1.0), (1.0, 0.3), ([1.5], [0.7]), ([2.0, 1.0, 3.0], [0.5, 1.0, 1 / 3]), (20 / 24, [2.0, 2.0, 0.1])],
)
def test_builder_is_bitwise_equal_with_factors(rescale, interpolation, dtype) -> None:
    actual = embed(
        (5, 7, 9), theta_rescale_factor=rescale, interpolation_factor=interpolation, dtype=dtype, start_frame=7
    )
    settings = {"rescale": rescale, "interpolation": interpolation, "dtype": dtype, "start_frame": 7}
    assert_bitwise(actual, full_grid_table((5, 7, 9), tuple(WAN_DIMS), 10_000, **settings))


@pytest.mark.parametrize("use_real", [True, False], ids=["use_real", "pairs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("axis", "world"), [(0, 2), (0, 4), (1, 3), (2, 5)])
def test_shards_are_bitwise_equal_and_their_sum_is_the_whole(axis, world, dtype, use_real) -> None:
    sizes, settings = (4, 6, 10), {"dtype": dtype, "start_frame": 18}
    parts = []
    for rank in range(world):
        actual = embed(
            sizes, **settings, use_real=use_real, shard_dim=axis, do_sp_sharding=True, sp_rank=rank, sp_world_size=world
        )
        expected = full_grid_table(
            sizes, tuple(WAN_DIMS), 10_000, **settings, repeat=use_real, shard_axis=axis, rank=rank, world=world
        )
        assert_bitwise(actual, expected)
        local = [size // world if a == axis else size for a, size in enumerate(sizes)]
        parts.append([table.view(*local, -1) for table in actual])
    whole = embed(sizes, **settings, use_real=use_real)
    assert_bitwise([torch.cat(table, dim=axis).flatten(0, 2) for table in zip(*parts, strict=True)], whole)


def test_rank_and_world_come_from_the_default_group(tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        assert embed(do_sp_sharding=True)[0] is embed()[0]
    finally:
        torch.distributed.destroy_process_group()


def test_rank_of_the_default_group_is_used(monkeypatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    assert embed(do_sp_sharding=True)[0] is embed(do_sp_sharding=True, sp_rank=2, sp_world_size=3)[0]
    assert embed()[0].shape == (72, 128)


def test_rank_and_world_are_ignored_without_sharding() -> None:
    assert embed(sp_rank=1, sp_world_size=3)[0] is embed()[0]


def test_repeated_call_returns_the_same_tensors_from_one_entry() -> None:
    first = embed()
    for _ in range(9):
        repeated = embed()
        assert repeated[0] is first[0]
        assert repeated[1] is first[1]
    assert cache_info().tables.entries == 1
    assert (cache_info().tables.hits, cache_info().tables.misses) == (9, 1)


@pytest.mark.parametrize(
    "settings",
    [{}, {"dtype": torch.float64}, {"use_real": False}, {"start_frame": 5, "theta_rescale_factor": 2.0}],
    ids=["plain", "float64", "pairs", "start and rescale"],
)
def test_cached_table_equals_a_fresh_one(settings) -> None:
    first = embed(**settings)
    cached = embed(**settings)
    cache_clear()
    fresh = embed(**settings)
    assert cached[0] is first[0]
    assert fresh[0] is not first[0]
    assert_bitwise(cached, fresh)


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": (3, 6, 4)},
        {"dtype": torch.float64},
        {"use_real": False},
        {"start_frame": 1},
        {"theta": 256},
        {"theta_rescale_factor": 2.0},
        {"interpolation_factor": 0.5},
        {"dims": [40, 44, 44]},
        {"do_sp_sharding": True, "sp_rank": 0, "sp_world_size": 3},
        {"do_sp_sharding": True, "sp_rank": 0, "sp_world_size": 2, "shard_dim": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_argument_makes_an_entry_of_its_own(change) -> None:
    first, second = embed(), embed(**change)
    assert cache_info().tables.entries == 2
    alike = first[0].shape == second[0].shape and first[0].dtype == second[0].dtype
    assert not (alike and torch.equal(first[0], second[0]))
    assert embed()[0] is first[0]


def test_shard_axes_and_ranks_never_share() -> None:
    sizes = (6, 6, 6)
    tables = [
        embed(sizes, do_sp_sharding=True, shard_dim=axis, sp_rank=rank, sp_world_size=2)[0]
        for axis in range(3)
        for rank in range(2)
    ]
    assert cache_info().tables.entries == 6
    assert all(not torch.equal(a, b) for i, a in enumerate(tables) for b in tables[:i])


def test_no_dims_share_an_entry_with_the_explicit_third() -> None:
    first = embed(dims=None, hidden=12 * 96)
    assert embed(dims=[32, 32, 32], hidden=12 * 96)[0] is first[0]
    assert cache_info().tables.entries == 1


def test_width_is_the_head_dim_or_half_of_it() -> None:
    assert embed()[0].shape == (72, 128)
    assert embed(use_real=False)[0].shape == (72, 64)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 30, 52), (21, 1, 1)], ids=str)
def test_degenerate_grids_have_their_rows(sizes) -> None:
    assert embed(sizes)[0].shape == (sizes[0] * sizes[1] * sizes[2], 128)


@pytest.mark.parametrize("spelling", [2.0, [2.0], (2.0, 2.0, 2.0), [2, 2, 2]], ids=str)
def test_a_factor_and_the_list_that_repeats_it_share_one_entry(spelling) -> None:
    first = embed(theta_rescale_factor=2.0, interpolation_factor=2.0)
    assert embed(theta_rescale_factor=spelling, interpolation_factor=spelling)[0] is first[0]
    assert cache_info().tables.entries == 1


def test_casting_a_result_does_not_change_the_cache() -> None:
    expected = embed(dtype=torch.float64)[0].clone()
    for _ in range(2):
        moved = embed(dtype=torch.float64)[0].to("cpu").float()
        moved.zero_()
    assert torch.equal(embed(dtype=torch.float64)[0], expected)


def test_writing_to_a_result_is_noticed_and_the_next_caller_gets_a_fresh_table() -> None:
    expected = embed()[0].clone()
    embed()[0].zero_()
    with pytest.warns(RuntimeWarning, match="written to in place"):
        assert torch.equal(embed()[0], expected)


def test_start_frame_shifts_the_values() -> None:
    later, longer = embed((3, 4, 6), start_frame=2)[0], embed((5, 4, 6))[0]
    assert torch.equal(later, longer[48:])
    assert not torch.equal(later, longer[:72])


def test_cache_keeps_sixteen_first_in_first_out_although_the_oldest_was_hit() -> None:
    oldest = embed(start_frame=0)
    for start in range(1, 16):
        embed(start_frame=start)
    assert embed(start_frame=0)[0] is oldest[0]
    newest = embed(start_frame=16)
    assert (cache_info().tables.entries, cache_info().tables.evictions) == (16, 1)
    assert embed(start_frame=16)[0] is newest[0]
    assert embed(start_frame=0)[0] is not oldest[0]


def test_cache_is_capped_in_bytes() -> None:
    cache_configure(max_bytes=200_000)
    for start in range(8):
        embed(start_frame=start)
    assert cache_info().tables.bytes <= 200_000


@pytest.mark.parametrize(
    "mode", [torch.device("meta"), FakeTensorMode(), torch.inference_mode()], ids=["meta", "fake", "inference"]
)
def test_first_call_in_a_mode_does_not_reach_later_callers(mode) -> None:
    with mode:
        embed()
    cos, sin = embed()
    assert type(cos) is torch.Tensor
    assert cos.device.type == "cpu"
    assert_bitwise((cos, sin), full_grid_table((3, 4, 6), tuple(WAN_DIMS), 10_000))
    x = torch.ones(72, 128, requires_grad=True)
    (x * cos).sum().backward()
    assert torch.equal(x.grad, cos)


def test_compiled_caller_uses_two_graphs_for_many_start_frames() -> None:
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    add = torch.compile(lambda x, start: x + embed(start_frame=start, dtype=torch.float64)[0], backend=count)
    x = torch.zeros(72, 128, dtype=torch.float64)
    for start in range(6):
        cache_clear()
        eager = embed(start_frame=start, dtype=torch.float64)[0].clone()
        assert torch.equal(add(x, start), eager)
    assert len(graphs) <= 3


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"dims": [44, 42, 40]}, ValueError, r"must sum to hidden_size // heads_num \(128\), got \(44, 42, 40\)"),
        ({"dims": None}, ValueError, r"must sum to hidden_size // heads_num \(128\), got \(42, 42, 42\)"),
        ({"start_frame": -1}, ValueError, "start_frame must be at least 0, got -1"),
        ({"shard_dim": 3}, ValueError, r"below the number of axes \(3\), got 3"),
        ({"shard_dim": -1}, ValueError, r"shard_dim must be at least 0"),
        (
            {"do_sp_sharding": True, "sp_rank": 0, "sp_world_size": 2},
            ValueError,
            r"sp_world_size must divide rope_sizes\[0\] \(3\), got 2; this is rank 0 of 2",
        ),
        (
            {"do_sp_sharding": True, "sp_rank": 3, "sp_world_size": 3},
            ValueError,
            r"sp_rank must be below sp_world_size \(3\)",
        ),
        ({"do_sp_sharding": True, "sp_rank": 0}, ValueError, "must be given together, got 0 and None"),
        ({"theta_rescale_factor": [1.0, 2.0]}, ValueError, r"theta_rescale_factor must be .* one value per axis \(3\)"),
        ({"interpolation_factor": [1.0, 2.0]}, ValueError, r"interpolation_factor must be .* one value per axis \(3\)"),
        (
            {"dims": [2, 64, 62], "theta_rescale_factor": 2.0},
            ValueError,
            "theta_rescale_factor must be 1 on an axis of 2",
        ),
        (
            {"sizes": (3, 4)},
            ValueError,
            r"rope_sizes must have one size per axis of rope_dim_list \(44, 42, 42\), got \(3, 4\)",
        ),
        (
            {"sizes": (3, 4, 2**24 + 1)},
            ValueError,
            "rope_sizes and start_frame must end at or before position 16777216",
        ),
        ({"start_frame": 2**24 - 2}, ValueError, "rope_sizes and start_frame must end at or before position 16777216"),
        ({"dims": [43, 43, 42]}, ValueError, "rope_dim_list must have 1 to 4 even numbers, got"),
        (
            {"dims": [64, 16, 16, 16, 16], "sizes": (1,) * 5},
            ValueError,
            "rope_dim_list must have 1 to 4 even numbers, got",
        ),
        ({"theta": [10_000, 256]}, TypeError, r"rope_theta must be a number, got \[10000, 256\]"),
        ({"sizes": (3, 4, 0)}, ValueError, "rope_sizes must be at least 1, got 0"),
        ({"dtype": torch.int64}, TypeError, "^dtype must be float64, float32, bfloat16 or float16, got torch.int64"),
    ],
)
def test_builder_refuses(settings, error, message) -> None:
    with pytest.raises(error, match=message):
        embed(**settings)
