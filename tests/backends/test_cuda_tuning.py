"""Choices of the CUDA kernel: who may have them, where they come from, what a sweep tries."""

from __future__ import annotations

import json
import runpy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.problems import SHAPES, Operation, Problem
from benchmarks.results import read_csv
from cuda_plans import ROWS, SWEPT, plan_for
from dit_rope.rotation.backends import cuda_kernels, cuda_tuning
from dit_rope.rotation.backends.cuda_plan import Plan
from dit_rope.rotation.backends.cuda_tuning import DEFAULT, LOADS, STORES, Tuned, Tuning, read, tuning_for
from gpu_checks import candidates, sweep
from gpu_checks.candidates import first_steps, name_of, registers_for

# What a compiler may move through memory where it was asked for more blocks than registers allow.
SPILL_BYTES = 16
NVRTC = ("13.0", "13.5")
EVERYTHING = Tuning(8, 256, 3, True, True, LOADS[3], STORES[2], 0)
STREAMS = Tuning(stages=2, min_blocks=2)
H200 = {"device": "NVIDIA H200", "operation": "norm across heads", "heads": [40, 40], "head_dim": 128, "itemsize": 2}


@pytest.mark.parametrize("name", ROWS)
def test_plan_leaves_out_what_its_call_cannot_use(name: str) -> None:
    row, default = ROWS[name], plan_for(ROWS[name], DEFAULT)
    plan = plan_for(row, EVERYTHING)
    across = plan.norm is not None and plan.norm.across_heads
    assert plan.split == (len(set(plan.heads)) == 1 and len(plan.heads) == 2)
    assert plan.late_weights == (across and bool(plan.weights))
    stream = plan_for(row, STREAMS)
    assert (stream.stages > 0) == (across and not stream.own_angles and stream.access == 16)
    for each in (plan, stream):
        constant = (
            "operation",
            "data",
            "table",
            "weights",
            "biases",
            "heads",
            "pairs",
            "half",
            "exact",
            "norm",
            "chunk",
        )
        assert all(getattr(each, field) == getattr(default, field) for field in constant)


def test_stages_are_counted_in_whole_128_bytes() -> None:
    """As ``struct Stage`` has them: queries, then keys."""
    plan = plan_for(ROWS["norm-across-heads-wan-14b-interleaved-bfloat16"], STREAMS)
    assert plan.stage_bytes == 2 * 2 * 40 * 128 * 2
    assert replace(plan, stages=0).stage_bytes == 0


def test_table_in_the_package_can_be_read() -> None:
    entries = json.loads(cuda_tuning.FILE.read_text(encoding="utf-8"))
    assert len(read(entries)) == len(entries)


def test_plan_has_what_was_measured_for_its_device_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    table = read([{**H200, "late_weights": True, "loads": "no_allocate"}])
    monkeypatch.setattr(cuda_tuning, "_measured", lambda: table)
    monkeypatch.setattr(cuda_kernels, "device_name", lambda device: "NVIDIA H200")
    name = "norm-across-heads-wan-14b-interleaved-bfloat16"
    assert plan_for(ROWS[name]) == plan_for(ROWS[name], Tuning(late_weights=True, loads="no_allocate"))
    others = ("norm-per-head-wan-14b", "norm-across-heads-wan-1.3b", "rotate-wan-14b", "rotate-in-place-wan-14b")
    for other in others:
        row = ROWS[f"{other}-interleaved-bfloat16"]
        assert plan_for(row) == plan_for(row, DEFAULT)
    monkeypatch.setattr(cuda_kernels, "device_name", lambda device: "NVIDIA B200")
    assert plan_for(ROWS[name]) == plan_for(ROWS[name], DEFAULT)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({**H200, "blocks": 3}, "blocks"),
        ({"device": "NVIDIA H200", "min_blocks": 3}, "heads"),
        ({**H200, "loads": "sometimes"}, "known choices"),
        ({**H200, "stores": "no_allocate"}, "known choices"),
    ],
)
def test_entry_that_makes_no_sense_is_named(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read([entry])
    with pytest.raises(ValueError, match="each shape once"):
        read([H200, H200])


def test_calls_are_tuned_while_a_context_is_open_and_not_after() -> None:
    row = ROWS["rotate-wan-14b-interleaved-bfloat16"]
    before = plan_for(row)
    with cuda_kernels.tuned(Tuning(split=True)):
        assert plan_for(row).split
        with cuda_kernels.tuned(Tuning(min_blocks=4)):
            assert (plan_for(row).split, plan_for(row).min_blocks) == (False, 4)
        assert plan_for(row).split
    assert plan_for(row) == before
    with pytest.raises(KeyError), cuda_kernels.tuned(Tuning(split=True)):
        raise KeyError
    assert plan_for(row) == before


def test_devices_without_a_measurement_have_the_defaults() -> None:
    assert tuning_for(Tuned("another", "rotate", (12, 12), 128, 2)) == DEFAULT
    assert cuda_tuning.device_name(torch.device("cpu")) == "cpu"


@pytest.mark.parametrize("name", SWEPT)
def test_sweep_begins_with_distinct_plans_of_every_knob(name: str) -> None:
    steps = first_steps(lambda tuning: plan_for(ROWS[name], tuning))
    plans = [plan_for(ROWS[name], tuning) for tuning in steps.values()]
    assert len(set(plans)) == len(plans) >= 10
    assert next(iter(steps)) == "default"
    for field in ("split", "loads", "stores", "min_blocks"):
        assert len({getattr(plan, field) for plan in plans}) > 1, field
    across = "across" in name
    assert any(plan.stages for plan in plans) == any(plan.late_weights for plan in plans) == across


def test_registers_for_blocks_are_those_that_the_hardware_gives_out() -> None:
    machine_code = pytest.importorskip("cuda_machine_code", reason="it needs Triton's tools", exc_type=ImportError)
    for threads in (96, 128, 192, 320, 512):
        for blocks in range(1, 2048 // threads + 1):
            registers = registers_for(blocks, threads)
            assert machine_code.resident_threads(registers, threads, "sm_90") >= blocks * threads
            assert machine_code.resident_threads(registers + 8, threads, "sm_90") < blocks * threads


def test_committed_candidates_hold_every_first_step_and_no_large_spill(repository: Path) -> None:
    rows = read_csv(repository / "scripts" / "results" / "cuda-candidates.csv")
    steps = {name: first_steps(lambda tuning, name=name: plan_for(ROWS[name], tuning)) for name in SWEPT}
    expected = [(name, choice) for name in SWEPT for choice in steps[name]]
    for version in NVRTC:
        of_version = [row for row in rows if row["nvrtc"] == version]
        assert [(row["plan"], row["choice"]) for row in of_version] == expected
    assert max(int(row["spill_bytes"]) for row in rows) <= SPILL_BYTES


COMPILED = ["split=True", "late_weights=True", "min_blocks=3", "min_blocks=2 stages=2", "loads=no_allocate_evict_first"]


@pytest.mark.parametrize("choice", COMPILED)
def test_candidate_compiles_and_spills_little(choice: str) -> None:
    pytest.importorskip("cuda.core", reason="the CUDA bindings compile it", exc_type=ImportError)
    machine_code = pytest.importorskip("cuda_machine_code", reason="it needs Triton's tools", exc_type=ImportError)
    from dit_rope.rotation.backends.cuda_launch import compile_plan

    row = ROWS["norm-across-heads-wan-14b-interleaved-bfloat16"]
    plan = plan_for(row, first_steps(lambda tuning: plan_for(row, tuning))[choice])
    used = machine_code.resources(compile_plan(plan, "sm_90"))["norm_rotate"]
    assert used.stack + used.local <= SPILL_BYTES
    if plan.min_blocks:
        blocks = machine_code.resident_threads(used.registers, plan.threads, "sm_90") // plan.threads
        assert blocks >= plan.min_blocks


def test_sweep_checks_and_times_every_candidate(
    cuda_on_cpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen = ("split", "late weights", "stages")
    monkeypatch.setattr(sweep, "KNOBS", {knob: candidates.KNOBS[knob] for knob in chosen})
    monkeypatch.setattr(sweep, "OPERATIONS", (Operation.ACROSS_HEADS,))
    built: list[Plan] = []
    monkeypatch.setattr(cuda_on_cpu, "prepare", lambda plans, device: built.extend(plans), raising=False)
    rows = sweep.run([SHAPES["wan-1.3b-480p"].tiny()], "cpu", 1, results=tmp_path)
    assert not any(row.get("failed") for row in rows), rows
    timed = {row["variant"] for row in rows if row.get("ms_median")}
    assert {"copy", "default", sweep.UNROTATED} <= timed
    assert any("stages=2" in name for name in timed)
    assert rows[-1]["knob"] == sweep.KEPT
    assert {plan.stages for plan in built} >= {0, 2}
    (file,) = tmp_path.iterdir()
    assert len(read_csv(file)) == len(rows)


def test_candidate_that_fails_is_a_row_with_the_reason(cuda_on_cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "KNOBS", {"split": candidates.KNOBS["split"]})
    monkeypatch.setattr(sweep, "OPERATIONS", (Operation.ROTATE,))
    monkeypatch.setattr(cuda_on_cpu, "prepare", lambda plans, device: None, raising=False)
    right = cuda_on_cpu.run

    def run(launch: Any, pointers: bytes, device: torch.device) -> None:
        if launch.plan.split:
            raise RuntimeError("the driver must accept a launch\nand so on")
        right(launch, pointers, device)

    monkeypatch.setattr(cuda_on_cpu, "run", run)
    rows = sweep.run([SHAPES["wan-1.3b-480p"].tiny()], "cpu", 1)
    (failed,) = [row for row in rows if row.get("failed")]
    assert failed["variant"] == "split=True"
    assert failed["note"] == "RuntimeError: the driver must accept a launch"
    assert rows[-1]["variant"] == "default"


def test_default_that_fails_is_replaced_by_the_first_that_does_not(
    cuda_on_cpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "KNOBS", {"split": candidates.KNOBS["split"], "stores": candidates.KNOBS["stores"]})
    monkeypatch.setattr(sweep, "OPERATIONS", (Operation.ROTATE,))
    monkeypatch.setattr(cuda_on_cpu, "prepare", lambda plans, device: None, raising=False)
    right = cuda_on_cpu.run

    def run(launch: Any, pointers: bytes, device: torch.device) -> None:
        if not launch.plan.split:
            raise RuntimeError("refused")
        right(launch, pointers, device)

    monkeypatch.setattr(cuda_on_cpu, "run", run)
    rows = sweep.run([SHAPES["wan-1.3b-480p"].tiny()], "cpu", 1)
    assert [row["variant"] for row in rows if row.get("failed")] == ["default"]
    assert rows[-1]["split"]


@pytest.mark.parametrize("where", ["prepare", "inputs"])
def test_operation_that_fails_is_a_row_and_the_next_is_swept(
    where: str, cuda_on_cpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By what compiles its kernels, or for want of memory."""
    monkeypatch.setattr(sweep, "KNOBS", {"split": candidates.KNOBS["split"]})
    monkeypatch.setattr(sweep, "OPERATIONS", (Operation.PER_HEAD, Operation.ROTATE))
    inputs = Problem.inputs

    def prepare(plans: Any, device: torch.device) -> None:
        if where == "prepare" and any(plan.norm for plan in plans):
            raise MemoryError("no room")

    def made(problem: Problem, sets: int) -> Any:
        if where == "inputs" and problem.operation is Operation.PER_HEAD:
            raise MemoryError("no room")
        return inputs(problem, sets)

    monkeypatch.setattr(cuda_on_cpu, "prepare", prepare, raising=False)
    monkeypatch.setattr(Problem, "inputs", made)
    rows = sweep.run([SHAPES["wan-1.3b-480p"].tiny()], "cpu", 1, results=tmp_path)
    (failed,) = [row for row in rows if row.get("failed")]
    assert (failed["operation"], failed["note"]) == (Operation.PER_HEAD.value, "MemoryError: no room")
    assert (rows[-1]["operation"], rows[-1]["knob"]) == (Operation.ROTATE.value, sweep.KEPT)
    (file,) = tmp_path.iterdir()
    assert len(read_csv(file)) == len(rows)


def swept_rows(tuning: Tuning, operation: str = "norm across heads, rotate") -> list[dict[str, Any]]:
    """What a sweep leaves of a shape, as it is read from a file."""
    where = {"device": "NVIDIA H200", "operation": operation, "heads": 40, "head_dim": 128, "dtype": "bfloat16"}
    kept = {**where, "variant": name_of(tuning), "knob": sweep.KEPT, **asdict(tuning)}
    return [{name: str(value) for name, value in row.items()} for row in ({**where, "knob": "loads"}, kept)]


def test_table_is_made_of_what_a_sweep_kept(repository: Path) -> None:
    script = runpy.run_path(str(repository / "scripts" / "gpu_checks" / "write_cuda_tuning.py"))
    tuning = Tuning(thread_chunks=8, late_weights=True, stores="streaming", stages=2, min_blocks=2)
    other = {**H200, "device": "NVIDIA B200", "split": True}
    table = script["merged"]([other, {**H200, "split": True}], swept_rows(tuning))
    assert table[0] == other
    assert read(table)[Tuned("NVIDIA H200", "norm across heads", (40, 40), 128, 2)] == tuning
    assert script["entries"](swept_rows(DEFAULT)) == []
    for operation in sweep.OPERATIONS:
        assert len(script["entries"](swept_rows(tuning, operation.value))) == 1
    with pytest.raises(ValueError, match="rows of the knob 'kept'"):
        script["entries"](swept_rows(tuning)[:1])
