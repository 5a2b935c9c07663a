"""Which tables share an axis, counted by the axis cache; which layers, threads and devices share a table."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import pytest
import torch

from dit_rope import Grid, Pairing, RopeSpec, Scaling, Shard, cache_clear, cache_configure, cache_info, rope_table
from dit_rope.cache import FifoCache
from dit_rope.tables.scaling import axis_frequencies

WAN = RopeSpec(dims=(44, 42, 42))
SMALL = RopeSpec(dims=(8, 6, 4))
GRID = Grid(3, 4, 5)
GRID_1D = Grid(40)


def in_threads(count: int, call: Callable[[int], object]) -> list[object]:
    """What ``call(0)``, ``call(1)``, ... return, or raise, in threads that start together."""
    barrier, results = threading.Barrier(count), [None] * count

    def work(number: int) -> None:
        barrier.wait()
        try:
            results[number] = call(number)
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def yarn(factor: float, **options: float) -> Scaling:
    return Scaling.of("yarn", factor=factor, original_max_position_embeddings=64, **options)


def test_start_frame_within_its_block_builds_no_axis_and_past_it_the_frame_axis_only() -> None:
    rope_table(WAN, Grid(21, 45, 80))
    assert cache_info().axes.misses == 3
    for start in range(1, 12):
        rope_table(WAN, Grid(21, 45, 80, start_frame=start))
    assert cache_info().axes.misses == 3
    rope_table(WAN, Grid(21, 45, 80, start_frame=12))
    assert cache_info().axes.misses == 4
    assert cache_info().tables.misses == 13


def test_blocks_of_rows_as_long_as_one_another_are_told_apart() -> None:
    tables = [rope_table(SMALL, Grid(8, 4, 4, start_frame=start)) for start in (0, 32, 320)]
    for start, table in zip((0, 32, 320), tables, strict=True):
        cache_clear()
        assert torch.equal(table.rows, rope_table(SMALL, Grid(8, 4, 4, start_frame=start)).rows)
    assert not torch.equal(tables[0].rows, tables[1].rows)


def test_shards_and_dense_forms_build_no_axis() -> None:
    for rank in range(4):
        rope_table(SMALL, GRID, shard=Shard(rank, 4)).cos_sin()
        rope_table(SMALL, GRID, shard=Shard(rank, 4, axis=1)).complex()
    assert cache_info().axes.misses == 3


def test_specs_share_the_axes_they_have_in_common() -> None:
    rope_table(SMALL, GRID)
    rope_table(RopeSpec((8, 6, 10), pairing=Pairing.HALF), GRID)
    assert cache_info().axes.misses == 4


def test_720p_entry_takes_a_thousandth_of_the_dense_bytes() -> None:
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
        (RopeSpec((8, 6, 4), scaling=Scaling.of("ntk", factor=2.0)), Grid(40, 4, 5), torch.float32),
    ],
    ids=["first row", "last row", "dtype", "channels", "theta"],
)
def test_table_after_another_equals_one_built_from_empty_caches(spec, grid, dtype) -> None:
    rope_table(SMALL, Grid(40, 4, 5))
    after = rope_table(spec, grid, dtype=dtype).rows
    cache_clear()
    assert torch.equal(after, rope_table(spec, grid, dtype=dtype).rows)


def test_scalings_of_one_type_with_other_options_share_nothing() -> None:
    four, eight = (rope_table(RopeSpec((16,), scaling=yarn(factor)), GRID_1D) for factor in (4.0, 8.0))
    assert cache_info().tables.entries == cache_info().axes.entries == 2
    assert not torch.equal(four.rows, eight.rows)


def test_scalings_of_other_names_with_equal_numbers_share_an_axis() -> None:
    first = rope_table(RopeSpec((16,)), GRID_1D)
    for scaling in (Scaling.of("default"), Scaling.of("linear", factor=1.0), Scaling.of("ntk", factor=1.0)):
        assert torch.equal(rope_table(RopeSpec((16,), scaling=scaling), GRID_1D).rows, first.rows)
    assert cache_info().axes.misses == 1
    rope_table(RopeSpec((16,), scaling=Scaling.of("fastvideo", theta_rescale=2.0)), GRID_1D)
    rope_table(RopeSpec((16,), scaling=Scaling.of("ntk", factor=2.0)), GRID_1D)
    assert cache_info().axes.misses == 2


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (None, Scaling.of("linear", factor=2.0)),
        (None, Scaling.of("kandinsky5", scale=2.0)),
        (None, Scaling.of("fps", fps=48.0, base_fps=1.0)),
        (None, Scaling.of("fps", fps=1.0, base_fps=12.0)),
        (yarn(2.0, attention_factor=1.5), yarn(2.0, attention_factor=2.0)),
    ],
    ids=str,
)
def test_every_number_of_a_scaling_is_keyed(first, second) -> None:
    rope_table(RopeSpec((16,), scaling=first), GRID_1D)
    after = rope_table(RopeSpec((16,), scaling=second), GRID_1D).rows
    cache_clear()
    assert torch.equal(after, rope_table(RopeSpec((16,), scaling=second), GRID_1D).rows)


def test_axes_of_one_spec_are_scaled_apart() -> None:
    spec = RopeSpec((16, 16, 16), scaling=(yarn(4.0), None, Scaling.of("linear", factor=2.0)))
    table = rope_table(spec, Grid(5, 5, 5))
    for axis in range(3):
        alone = rope_table(RopeSpec((16,), scaling=spec.axis_scaling(axis)), Grid(5))
        for actual, single in zip(table.axis(axis), alone.axis(0), strict=True):
            assert torch.equal(actual, single)
    assert cache_info().axes.misses == 3


def test_forty_layers_share_one_table() -> None:
    def ask() -> object:
        return rope_table(RopeSpec((8, 6, 4), scaling=(yarn(4.0), None, None)), Grid(3, 4, 5))

    tables = [ask() for _ in range(40)]
    assert len({table.rows.data_ptr() for table in tables}) == len({id(table) for table in tables}) == 1
    info = cache_info()
    assert (info.tables.entries, info.tables.misses, info.tables.hits) == (1, 1, 39)
    assert info.axes.misses == 3


def test_eight_threads_on_two_devices_get_tables_of_their_own_device() -> None:
    """Tables on meta hold nothing and are not kept; the axis arrays, in host memory, serve both devices."""
    devices = ["cpu", "meta"]
    spec = RopeSpec((8, 6, 4), scaling=yarn(4.0))
    tables = in_threads(8, lambda number: rope_table(spec, GRID, device=devices[number % 2]))
    assert [table.rows.device.type for table in tables] == devices * 4
    assert len({id(table) for table in tables[::2]}) == 1
    assert (cache_info().tables.misses, cache_info().tables.entries, cache_info().axes.misses) == (1, 1, 3)


def test_eight_threads_on_two_devices_build_once_for_each() -> None:
    """Two device numbers that this machine need not have stand in for two that keep their entries."""
    devices = [torch.device("privateuseone", index) for index in range(2)]
    cache: FifoCache[str, list[object]] = FifoCache("test", 4, 2**20, lambda _: ())
    built = []

    def ask(number: int) -> list[object]:
        device = devices[number % 2]
        return [cache.get("key", device, lambda: built.append(device) or [device]) for _ in range(100)][-1]

    tables = in_threads(8, ask)
    assert sorted(built, key=str) == devices
    assert tables == [[device] for device in devices] * 4
    assert len({id(value) for value in tables}) == 2


@pytest.mark.parametrize("entries", [2, 16])
def test_sixteen_threads_agree_bitwise_and_build_each_table_once_unless_it_was_evicted(entries) -> None:
    specs = [RopeSpec((8, 6, 4), scaling=yarn(factor)) for factor in (2.0, 3.0, 4.0, 5.0, 6.0)]
    expected = [rope_table(spec, GRID).rows.clone() for spec in specs]
    cache_clear()
    cache_configure(max_entries=entries)

    def hammer(seed: int) -> bool:
        order = torch.randint(len(specs), (200,), generator=torch.Generator().manual_seed(seed)).tolist()
        return all(torch.equal(rope_table(specs[number], GRID).rows, expected[number]) for number in order)

    assert in_threads(16, hammer) == [True] * 16
    tables = cache_info().tables
    assert tables.hits + tables.misses == 16 * 200
    assert (tables.misses == len(specs)) == (tables.evictions == 0) == (entries == 16)


def test_rows_carry_the_magnitude_of_a_scaling_and_its_angles_do_not() -> None:
    spec = RopeSpec((16,), scaling=yarn(4.0))
    cos, sin = rope_table(spec, Grid(50), dtype=torch.float64).axis(0)
    length = torch.full_like(cos, 0.1 * math.log(4.0) + 1.0)
    torch.testing.assert_close(torch.hypot(cos, sin), length, rtol=4e-16, atol=0)
    frequencies = axis_frequencies(spec, 0)
    angles = frequencies.angles(torch.arange(50.0))
    torch.testing.assert_close(torch.atan2(sin, cos), torch.atan2(angles.sin(), angles.cos()), rtol=0, atol=1e-15)
