"""Where shifts get their angles: one row for one shift, none kept that nobody reads; tables copy, pickle and fork."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dit_rope import Pairing, RopeSpec, Scaling, ShiftTable, cache_clear, cache_info, plan_eviction, shift_keys
from dit_rope.streaming import shift as shifting
from rotated_keys import BLOCK, F64, int32, naively_rotated, pool, rotated
from tolerance import assert_within

TEXT, VIDEO = RopeSpec((16,)), RopeSpec((8, 6, 6), pairing=Pairing.HALF)


class Layer(torch.nn.Module):
    """What holds a table in a model."""

    def __init__(self) -> None:
        super().__init__()
        self.table = ShiftTable(VIDEO, axis=1, step=4, dtype=F64)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids="cdp")
@pytest.mark.parametrize("rows", [64, 300])
def test_table_can_be_copied_and_pickled(copied: Any, rows: int) -> None:
    table = ShiftTable(VIDEO, axis=1, step=4, dtype=F64)
    table.reserve(rows - 1)
    twin = copied(table)
    assert (twin.spec, twin.axis, twin.step, twin.device, twin.dtype) == (VIDEO, 1, 4, table.device, F64)
    assert torch.equal(twin.rows, table.rows)
    assert torch.equal(twin.reserve(1000), ShiftTable(VIDEO, axis=1, step=4, dtype=F64).reserve(1000))
    assert table.rows.shape[1] < 1000


def test_module_with_a_table_can_be_copied_saved_and_averaged(tmp_path: Path) -> None:
    layer = Layer()
    torch.save(layer, tmp_path / "layer.pt")
    averaged = torch.optim.swa_utils.AveragedModel(layer).module
    for twin in (copy.deepcopy(layer), torch.load(tmp_path / "layer.pt", weights_only=False), averaged):
        keys = torch.randn(2, BLOCK, 2, 20, dtype=F64)
        assert torch.equal(
            shift_keys(keys, twin.table, delta_frames=-8), shift_keys(keys, layer.table, delta_frames=-8)
        )


def test_copy_made_while_the_table_grows_is_whole() -> None:
    table = ShiftTable(TEXT)
    grower = threading.Thread(target=lambda: [table.reserve(2**n) for n in range(7, 17)])
    grower.start()
    copies = []
    while grower.is_alive():
        copies.append(copy.deepcopy(table))
    grower.join()
    for twin in copies:
        assert torch.equal(twin.rows, table.rows[:, : twin.rows.shape[1]])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_child_forked_while_a_table_grows_can_grow_it(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """On one thread: threads of torch end with a fork, and a child would wait for them."""
    table, inside, leave = ShiftTable(TEXT), threading.Event(), threading.Event()
    build = table._build

    def slow(first: int, stop: int) -> torch.Tensor:
        if threading.current_thread() is grower:
            inside.set()
            leave.wait(30)
        return build(first, stop)

    monkeypatch.setattr(table, "_build", slow)
    grower = threading.Thread(target=table.reserve, args=(100,))
    grower.start()
    inside.wait(30)
    child = os.fork()
    if not child:
        os._exit(0 if table.reserve(200).shape[1] > 200 else 1)
    deadline = time.monotonic() + 20
    done, status = os.waitpid(child, os.WNOHANG)
    while not done and time.monotonic() < deadline:
        time.sleep(0.02)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, 9)
        os.waitpid(child, 0)
    leave.set()
    grower.join()
    assert done
    assert os.waitstatus_to_exitcode(status) == 0
    assert table.rows.shape[1] == 128


@pytest.mark.parametrize("table", [TEXT, None], ids=["spec", "table"])
@pytest.mark.parametrize("delta", [-200_000, 200_000, 3 * 10**9, -(2**40)])
def test_one_large_shift_makes_one_row(table: RopeSpec | None, delta: int) -> None:
    cache_clear()
    fresh = ShiftTable(TEXT, dtype=F64) if table is None else None
    keys = pool(2, dtype=F64)
    out = shift_keys(keys, fresh or TEXT, delta_frames=delta)
    assert (out - rotated(keys, TEXT, torch.full((2, BLOCK), delta))).abs().max() <= (
        1e-9 if abs(delta) < 2**30 else 1e-3
    )
    assert cache_info().shifts.entries == 1
    assert cache_info().shifts.bytes <= 256
    assert fresh is None or fresh.rows.shape[1] == 64
    hits = cache_info().shifts.hits
    assert torch.equal(shift_keys(keys, fresh or TEXT, delta_frames=delta), out)
    assert cache_info().shifts.hits == hits + 1
    cache_clear()
    assert (cache_info().shifts.entries, cache_info().shifts.bytes) == (0, 0)


def test_no_delta_makes_no_row() -> None:
    cache_clear()
    keys = pool(2)
    assert torch.equal(shift_keys(keys, TEXT, delta_frames=0), keys)
    assert cache_info().shifts.misses == 0


@pytest.mark.parametrize("spec", [TEXT, VIDEO, RopeSpec((16,), scaling=Scaling.of("linear", factor=3.0))], ids=str)
@pytest.mark.parametrize("width", [1, BLOCK])
def test_deltas_of_a_spec_have_a_row_each_however_long(spec: RopeSpec, width: int) -> None:
    cache_clear()
    keys = torch.randn(3, BLOCK, 2, 20)
    deltas = torch.randint(2**20, 2**31 - 1, (3, width), dtype=torch.int32)
    out = shift_keys(keys, spec, deltas=deltas, blocks=int32(2, 0, 1))
    order = torch.tensor([2, 0, 1])
    unscaled = RopeSpec(spec.dims, pairing=spec.pairing)
    moved = -deltas.double().expand(3, BLOCK) / (3.0 if spec.scaling else 1.0)
    assert (out[order] - rotated(keys[order], unscaled, moved)).abs().max() <= 2e-5
    assert cache_info().shifts.entries == 0


@pytest.mark.parametrize("argument", ["deltas", "delta_frames"])
def test_shift_by_a_spec_is_that_by_a_table(argument: str) -> None:
    keys, table = torch.randn(2, BLOCK, 2, 20), ShiftTable(VIDEO)
    for delta in (1, 9, 63, 64, 200):
        options: dict[str, Any] = {argument: delta if argument == "delta_frames" else int32([delta], [delta])}
        actual = shift_keys(keys, VIDEO, **options)
        expected = shift_keys(keys, table, **options)
        moved = torch.full((2, BLOCK), delta if argument == "delta_frames" else -delta)
        for out in (actual, expected):
            assert_within(out, rotated(keys, VIDEO, moved), naively_rotated(keys, VIDEO, moved))


def test_table_on_a_cpu_keeps_no_rows_that_it_has_outgrown() -> None:
    table = ShiftTable(TEXT)
    for steps in (100, 1000, 10_000):
        table.reserve(steps)
    assert table._outgrown == []


def test_shift_of_a_spec_in_a_compiled_graph_is_that_outside() -> None:
    def f(keys: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
        return shift_keys(shift_keys(keys, TEXT, deltas=deltas), TEXT, delta_frames=70_000)

    keys, deltas = pool(3, dtype=F64), int32([5], [0], [70_001])
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert (compiled(keys, deltas) - f(keys, deltas)).abs().max() <= 1e-9
    unseen = int32([5], [-1], [70_001])  # nobody looks, and keys that cannot move stay
    assert torch.equal(compiled(keys, unseen)[1], shift_keys(keys, TEXT, delta_frames=70_000)[1])


@pytest.mark.parametrize("inplace", [True, False])
def test_lazily_negated_keys_and_deltas_are_refused(inplace: bool) -> None:
    with pytest.raises(
        ValueError, match=r"keys must hold its own values, got a lazily negated view; call keys.resolve"
    ):
        shift_keys(torch._neg_view(pool(2)), TEXT, delta_frames=1, inplace=inplace)
    with pytest.raises(ValueError, match="deltas must hold its own values"):
        shift_keys(pool(2), TEXT, deltas=torch._neg_view(int32([-1], [-1])), inplace=inplace)
    with pytest.raises(ValueError, match="blocks must hold its own values"):
        shift_keys(pool(2), TEXT, deltas=int32([1]), blocks=torch._neg_view(int32(-1)), inplace=inplace)


def test_delta_past_what_is_counted_is_refused() -> None:
    for delta in (10**30, -(10**30)):
        with pytest.raises(ValueError, match="delta_frames must be at most 4503599627370496 positions, got"):
            shift_keys(pool(1), TEXT, delta_frames=delta)


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_next_position_is_the_number_of_tokens_that_stay(block_size: int) -> None:
    for blocks in range(1, 6):
        for tokens in range((blocks - 1) * block_size + 1, blocks * block_size + 1):
            for gone in range(2**blocks):
                evicted = {block for block in range(blocks) if gone >> block & 1}
                stays = sum(token // block_size not in evicted for token in range(tokens))
                plan = plan_eviction(evicted, blocks, block_size, tokens=tokens)
                assert plan.next_position == stays
                assert (plan.kept, plan.steps) == (lambda p: (p.kept, p.steps))(
                    plan_eviction(evicted, blocks, block_size)
                )


@pytest.mark.parametrize("tokens", [48, 65, 0, -3, 2.0, True])
def test_tokens_that_do_not_fill_the_blocks_are_refused(tokens: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="tokens must "):
        plan_eviction({1}, 4, 16, tokens=tokens)


def test_numbers_of_numpy_are_numbers() -> None:
    two, keys = np.int64(2), pool(2)
    assert plan_eviction(np.array([1, 2]).tolist(), 4, 16) == plan_eviction(
        [np.int64(1), two], np.int64(4), np.int32(16)
    )
    assert type(plan_eviction([np.int64(1)], 4, 16, tokens=np.int64(49)).next_position) is int
    assert torch.equal(shift_keys(keys, TEXT, delta_frames=two), shift_keys(keys, TEXT, delta_frames=2))
    table = ShiftTable(VIDEO, axis=np.int64(1), step=two)
    assert (type(table.axis), type(table.step)) == (int, int)
    assert table.reserve(np.int64(99)).shape[1] == 128


def test_growth_is_shared_by_threads() -> None:
    table = ShiftTable(TEXT)
    threads = [threading.Thread(target=table.reserve, args=(64 * n,)) for n in range(1, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(table.rows, ShiftTable(TEXT).reserve(table.rows.shape[1] - 1))
    assert shifting._TABLES
