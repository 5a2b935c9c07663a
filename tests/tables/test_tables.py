"""Tables against the oracle's full grid and float64 truth, and what of them is cached, shared and counted."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dit_rope import Grid, Pairing, RopeSpec, Scaling, Shard, cache_clear, cache_configure, cache_info, rope_table
from dit_rope.tables import table as tables
from oracle import full_grid_table

WAN = RopeSpec(dims=(44, 42, 42))
SMALL = RopeSpec(dims=(8, 6, 4))
GRID = Grid(3, 4, 5)


def truth(spec: RopeSpec, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin ``[tokens, pairs]`` in float64, each number by Python's own arithmetic on exact integers."""
    lines = []
    for token in range(grid.tokens):
        line, index = [], token
        coordinates = []
        for size in reversed(grid.sizes):
            index, coordinate = divmod(index, size)
            coordinates.insert(0, coordinate)
        coordinates[0] += grid.start_frame
        for coordinate, dim in zip(coordinates, spec.dims, strict=True):
            line += [coordinate * spec.theta ** (-2 * j / dim) for j in range(dim // 2)]
        lines.append(line)
    angles = torch.tensor(lines, dtype=torch.float64)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("start", [0, 5_000, 100_000, 1_000_000])
def test_dense_table_is_within_1e_6_of_float64_truth_at_start_frame(start) -> None:
    grid = Grid(3, 2, 2, start_frame=start)
    for actual, exact in zip(rope_table(WAN, grid).cos_sin(repeat=False), truth(WAN, grid), strict=True):
        assert actual.dtype == torch.float32
        assert (actual.double() - exact).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dims", [(16,), (8, 6), (8, 6, 4), (4, 6, 2, 8)], ids=str)
def test_dense_table_equals_full_grid_build_on_any_number_of_axes(dims, dtype) -> None:
    sizes = (3, 7, 33, 2)[: len(dims)]
    spec = RopeSpec(dims, theta=256.0, frequency_dtype=dtype)
    actual = rope_table(spec, Grid(*sizes, start_frame=30), dtype=dtype).cos_sin()
    for x, y in zip(actual, full_grid_table(sizes, dims, 256.0, dtype=dtype, start_frame=30), strict=True):
        assert x.is_contiguous()
        assert torch.equal(x, y)


def test_dense_table_of_720p_equals_full_grid_build() -> None:
    actual = rope_table(WAN, Grid(21, 45, 80), dtype=torch.float64).cos_sin()
    for x, y in zip(actual, full_grid_table((21, 45, 80), WAN.dims, 1e4, dtype=torch.float64), strict=True):
        assert torch.equal(x, y)


def test_dense_table_of_half_pairing_repeats_the_whole_row() -> None:
    spec = dataclasses.replace(SMALL, pairing=Pairing.HALF)
    table = rope_table(spec, GRID)
    for repeated, pairs in zip(table.cos_sin(), table.cos_sin(repeat=False), strict=True):
        assert torch.equal(repeated, torch.cat((pairs, pairs), dim=-1))


def test_dense_table_broadcasts_the_same_memory() -> None:
    table = rope_table(SMALL, GRID)
    for flat, broadcast in zip(table.cos_sin(), table.cos_sin(broadcast=True), strict=True):
        assert broadcast.shape == (1, 60, 1, 18)
        assert broadcast.data_ptr() == flat.data_ptr()
        assert torch.equal(broadcast[0, :, 0], flat)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_table_is_rounded_from_the_float32_one(dtype) -> None:
    for actual, wide in zip(
        rope_table(WAN, Grid(21, 30, 52), dtype=dtype).cos_sin(),
        full_grid_table((21, 30, 52), WAN.dims, 1e4, dtype=torch.float64),
        strict=True,
    ):
        assert torch.equal(actual, wide.float().to(dtype))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.complex128), (torch.float32, torch.complex64), (torch.bfloat16, torch.complex64)],
    ids=str,
)
def test_complex_table_holds_cos_and_sin(dtype, expected) -> None:
    table = rope_table(SMALL, GRID, dtype=dtype)
    cos, sin = table.cos_sin(repeat=False)
    assert table.complex().dtype == expected
    assert torch.equal(table.complex().real, cos.to(table.complex().real.dtype))
    assert torch.equal(table.complex().imag, sin.to(table.complex().real.dtype))


def test_start_frame_is_a_slice_of_a_longer_table() -> None:
    longer = rope_table(SMALL, Grid(40, 4, 5)).cos_sin()
    later = rope_table(SMALL, Grid(3, 4, 5, start_frame=31)).cos_sin()
    for whole, table in zip(longer, later, strict=True):
        assert torch.equal(whole[31 * 20 : 34 * 20], table)


def test_values_do_not_depend_on_the_callers_modes() -> None:
    spec = dataclasses.replace(SMALL, scaling=Scaling.of("fastvideo", interpolation=0.3), frequency_dtype=torch.float32)
    expected = rope_table(spec, GRID).rows.clone()
    for mode in (torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16)):
        cache_clear()
        with mode:
            assert torch.equal(rope_table(spec, GRID).rows, expected)
    cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(rope_table(spec, GRID).rows, expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_rows_hold_the_axes_one_after_another_with_unused_columns_zero() -> None:
    table = rope_table(SMALL, Grid(3, 40, 5, start_frame=33), dtype=torch.float64)
    assert table.rows.shape == (2, 32 + 64 + 32, 4)
    assert table.first_rows == (1, 32, 96)
    assert not table.rows[:, 32:96, 3:].any()
    assert not table.rows[:, 96:, 2:].any()
    for axis, (size, dim, start) in enumerate(((3, 8, 33), (40, 6, 0), (5, 4, 0))):
        exact = truth(RopeSpec((dim,)), Grid(size, start_frame=start))
        for actual, expected in zip(table.axis(axis), exact, strict=True):
            assert actual.shape == (size, dim // 2)
            assert actual.untyped_storage().data_ptr() == table.rows.untyped_storage().data_ptr()
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)


def test_args_carry_what_the_caller_asks_for() -> None:
    table = rope_table(dataclasses.replace(SMALL, pairing=Pairing.HALF), GRID, shard=Shard(1, 7))
    args = table.args(prefix=5, inverse=True, exact=True)
    assert args.rows is table.rows
    assert args.positions is None
    assert (args.prefix, args.inverse, args.exact, args.pairing) == (5, True, True, Pairing.HALF)
    assert (args.token_offset, args.count, args.first_rows) == (9, 9, table.first_rows)
    positions = torch.zeros(2, 4, 3, dtype=torch.int32)
    assert table.args(positions=positions).positions is positions
    assert table.args(positions=positions).count == 4


@pytest.mark.parametrize("positions", [torch.zeros(1, 4, 3), torch.zeros(4, 3).int(), torch.zeros(1, 4, 2).int()])
def test_args_refuse_positions_of_another_kind(positions) -> None:
    with pytest.raises(ValueError, match=r"positions must be int32 \[1 or B, count, 3\], got torch"):
        rope_table(SMALL, GRID).args(positions=positions)


def test_args_refuse_a_negative_prefix() -> None:
    with pytest.raises(ValueError, match="prefix must not be negative, got -1"):
        rope_table(SMALL, GRID).args(prefix=-1)


def test_repeated_call_returns_the_same_object_however_it_is_spelled() -> None:
    table = rope_table(SMALL, GRID)
    respelled = RopeSpec([8, 6, 4], theta=10_000, scaling=[None, None, None])
    for device in (None, "cpu", "cpu:0", torch.device("cpu")):
        assert rope_table(respelled, Grid(3, 4, 5), device=device) is table
    for shard in (Shard(), Shard(0, 1, axis=2)):
        assert rope_table(SMALL, GRID, shard=shard) is table
    assert cache_info().tables.entries == cache_info().tables.misses == 1


BASE = {"spec": SMALL, "grid": GRID, "shard": None, "dtype": torch.float32}
CHANGES = {
    "dims": {"spec": dataclasses.replace(SMALL, dims=(8, 4, 6))},
    "theta": {"spec": dataclasses.replace(SMALL, theta=256.0)},
    "pairing": {"spec": dataclasses.replace(SMALL, pairing=Pairing.HALF)},
    "scaling of one axis": {"spec": SMALL.with_scaling((None, Scaling.of("ntk", factor=2.0), None))},
    "scaling": {"spec": dataclasses.replace(SMALL, scaling=Scaling.of("linear", factor=4.0))},
    "frequency_dtype": {"spec": dataclasses.replace(SMALL, frequency_dtype=torch.bfloat16)},
    "size": {"grid": Grid(3, 5, 4)},
    "start_frame": {"grid": Grid(3, 4, 5, start_frame=1)},
    "shard rank": {"shard": Shard(1, 4)},
    "shard axis": {"shard": Shard(1, 4, axis=1)},
    "dtype": {"dtype": torch.float64},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_input_is_keyed(change) -> None:
    def dense(settings):
        settings = dict(settings)
        return rope_table(settings.pop("spec"), settings.pop("grid"), **settings).cos_sin()[0]

    first, second = dense(BASE), dense(BASE | change)
    assert cache_info().tables.entries == 4
    assert first.shape != second.shape or first.dtype != second.dtype or not torch.equal(first, second)
    assert dense(BASE) is first
    assert dense(BASE | change) is second


def test_scaling_parameters_are_keyed() -> None:
    four, eight = (
        dataclasses.replace(SMALL, scaling=Scaling.of("yarn", factor=f, original_max_position_embeddings=64))
        for f in (4.0, 8.0)
    )
    assert not torch.equal(rope_table(four, GRID).rows, rope_table(eight, GRID).rows)


def test_table_cache_keeps_the_sixteen_newest() -> None:
    grids = [Grid(1, 1, n) for n in range(1, 21)]
    built = [rope_table(SMALL, grid) for grid in grids]
    assert (cache_info().tables.entries, cache_info().tables.evictions) == (16, 4)
    assert all(rope_table(SMALL, grid) is table for grid, table in zip(grids[4:], built[4:], strict=True))
    assert rope_table(SMALL, grids[0]) is not built[0]


@pytest.mark.parametrize("form", ["cos_sin", "complex", "positions"])
def test_form_is_an_entry_of_its_own_that_hits_and_counts_its_bytes(form) -> None:
    table = rope_table(SMALL, GRID)
    before = cache_info().tables
    first = getattr(table, form)()
    after = cache_info().tables
    tensors = first if isinstance(first, tuple) else (first,)
    assert after.entries == before.entries + 1
    assert after.bytes - before.bytes == sum(t.numel() * t.element_size() for t in tensors)
    repeated = getattr(table, form)()
    assert all(a is b for a, b in zip(tensors, repeated if isinstance(repeated, tuple) else (repeated,), strict=True))
    assert cache_info().tables.hits == after.hits + 1


def test_dense_forms_do_not_escape_the_byte_cap() -> None:
    cache_configure(max_bytes=10_000)
    for start in range(8):
        rope_table(SMALL, Grid(3, 4, 5, start_frame=start)).cos_sin()
    assert cache_info().tables.bytes <= 10_000
    cache_configure(max_bytes=4_000)
    table = rope_table(SMALL, GRID)
    assert table.cos_sin()[0] is not table.cos_sin()[0]


def test_rows_written_to_are_noticed_and_never_reach_a_dense_form() -> None:
    expected = rope_table(SMALL, GRID).rows.clone()
    table = rope_table(SMALL, GRID)
    table.axis(1)[0].zero_()
    oracle = full_grid_table(GRID.sizes, SMALL.dims, 1e4, dtype=torch.float64)
    for x, y in zip(table.cos_sin(), oracle, strict=True):
        assert torch.equal(x, y.float())
    with pytest.warns(RuntimeWarning, match="table cache was written to"):
        repeated = rope_table(SMALL, GRID)
    assert torch.equal(repeated.rows, expected)
    repeated.cos_sin(broadcast=True)[1].add_(1)
    with pytest.warns(RuntimeWarning, match="table cache was written to"):
        assert not repeated.cos_sin()[1][0].any()
    assert cache_info().tables.rebuilds == 2


def test_casting_a_returned_table_leaves_the_cached_one_alone() -> None:
    cos, _ = rope_table(SMALL, GRID, dtype=torch.float64).cos_sin()
    copy = cos.clone()
    cos.to("cpu").float().mul_(0)
    assert torch.equal(rope_table(SMALL, GRID, dtype=torch.float64).cos_sin()[0], copy)


def test_threads_agree_and_build_each_table_once() -> None:
    def ask(seed: int) -> list[tuple[int, int]]:
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed)).tolist()
        return sorted((n, id(rope_table(SMALL, Grid(2, 3, n + 1)).cos_sin()[0])) for n in order[:6] + order)

    cache_configure(max_entries=24)
    with ThreadPoolExecutor(8) as pool:
        results = [set(tables) for tables in pool.map(ask, range(8))]
    assert all(tables == results[0] for tables in results)
    assert cache_info().tables.misses == 24


def test_table_under_fake_tensor_mode_is_fake_and_leaves_no_entry() -> None:
    with FakeTensorMode():
        fake = rope_table(WAN, Grid(21, 45, 80))
        assert isinstance(fake.rows, FakeTensor)
        assert fake.cos_sin()[0].shape == (75_600, 128)
    assert cache_info().tables.entries == cache_info().axes.entries == 0
    assert type(rope_table(WAN, Grid(21, 45, 80)).rows) is torch.Tensor


def test_uncached_table_is_on_the_asked_device_whatever_the_default() -> None:
    with torch.device("meta"), FakeTensorMode():
        table = rope_table(SMALL, GRID, shard=Shard(6, 7))
        for tensor in (table.rows, table.complex(), table.positions(), *table.cos_sin()):
            assert tensor.device.type == "cpu"


def test_table_on_meta_is_not_cached() -> None:
    table = rope_table(SMALL, GRID, device="meta")
    assert table.rows.is_meta
    assert table.cos_sin()[0].is_meta
    assert table.positions().is_meta
    assert cache_info().tables.entries == 0


def test_device_without_float64_gets_float32(monkeypatch) -> None:
    monkeypatch.setattr(tables, "WITHOUT_FLOAT64_OR_COMPLEX", frozenset({"meta"}))
    table = rope_table(SMALL, GRID, device="meta", dtype=torch.float64)
    assert table.dtype == table.rows.dtype == table.cos_sin()[0].dtype == torch.float32


def test_table_first_asked_for_in_inference_mode_serves_autograd() -> None:
    with torch.inference_mode():
        rope_table(SMALL, GRID).cos_sin()
    x = torch.ones(60, 18, requires_grad=True)
    cos = rope_table(SMALL, GRID).cos_sin()[0]
    (x * cos).sum().backward()
    assert torch.equal(x.grad, cos)
    assert cache_info().tables.misses == 2


def test_compiled_function_builds_its_table_without_a_graph_break_or_an_entry() -> None:
    def scale(x: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        table = rope_table(SMALL, Grid(3, 4, 5, start_frame=start))
        return x * table.cos_sin()[0], table.complex(), table.positions(), table.args().rows

    torch._dynamo.reset()
    compiled = torch.compile(scale, fullgraph=True, backend="aot_eager")
    x = torch.randn(60, 18)
    for start in (0, 3, 40):
        traced = compiled(x, start)
        assert cache_info().tables.entries == cache_info().axes.entries == 0
        for actual, eager in zip(traced, scale(x, start), strict=True):
            assert torch.equal(actual, eager)
        cache_clear()


def test_first_call_of_a_process_may_be_compiled() -> None:
    program = """
import torch
from dit_rope import Grid, RopeSpec, cache_info, rope_table
spec, grid = RopeSpec((8, 6, 4)), Grid(3, 4, 5)
f = torch.compile(lambda x: x * rope_table(spec, grid).cos_sin()[0], fullgraph=True, backend="aot_eager")
x = torch.ones(60, 18)
y = f(x)
assert cache_info().tables.misses == 0
assert torch.equal(y, rope_table(spec, grid).cos_sin()[0])
"""
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", program], check=True, timeout=120)


@pytest.mark.gpu
def test_table_on_a_gpu_has_the_bits_of_the_cpu_one_and_is_not_built_during_capture() -> None:
    on_cpu, on_gpu = rope_table(SMALL, GRID), rope_table(SMALL, GRID, device="cuda")
    assert rope_table(SMALL, GRID, device="cuda:0") is on_gpu
    for x, y in zip((on_cpu.rows, *on_cpu.cos_sin()), (on_gpu.rows, *on_gpu.cos_sin()), strict=True):
        assert torch.equal(x, y.cpu())
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert rope_table(SMALL, GRID, device="cuda") is on_gpu
        with pytest.raises(RuntimeError, match="once before the capture"):
            rope_table(SMALL, Grid(5, 5, 5), device="cuda")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"spec": (8, 6, 4)}, TypeError, r"spec must be a RopeSpec, got \(8, 6, 4\)"),
        ({"grid": (3, 4, 5)}, TypeError, r"grid must be a Grid, got \(3, 4, 5\)"),
        ({"shard": (0, 2)}, TypeError, r"shard must be a Shard, got \(0, 2\)"),
        ({"dtype": torch.int32}, TypeError, "dtype must be one of .*, got torch.int32"),
        ({"grid": Grid(4, 5)}, ValueError, r"one size per axis of spec.dims \(8, 6, 4\), got \(4, 5\)"),
        ({"grid": Grid(1, 4, 5, start_frame=2**24)}, ValueError, "at or before position 16777216, got 16777217"),
        ({"shard": Shard(0, 2, axis=3)}, ValueError, r"shard.axis must be below .* \(3\), got 3"),
        ({"shard": Shard(0, 3, axis=1)}, ValueError, r"must divide the grid's size on axis 1 \(4\), got 3; shard the"),
    ],
)
def test_rope_table_refuses(arguments, error, message) -> None:
    settings = BASE | arguments
    with pytest.raises(error, match=message):
        rope_table(settings.pop("spec"), settings.pop("grid"), **settings)
    assert cache_info().tables.entries == 0
