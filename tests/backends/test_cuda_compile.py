"""The machine code of the CUDA kernels, for every plan of ``cuda_plans.py`` and every architecture that ships.

NVRTC needs no GPU to compile. The models' own calls are compiled and read for every architecture, any other plan for
sm_90; its resources on two more in turn. ``scripts/gpu_checks/cuda_resources.py`` does all of it, which takes twice as
long.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_call_cases import LAYOUTS, LTX, MOCHI, OWN_ANGLES, WAN, meta

pytest.importorskip("triton", exc_type=ImportError)
pytest.importorskip("cuda.core", exc_type=ImportError)

from benchmarks.results import read_csv
from cuda_machine_code import (
    ARCHS,
    RESERVED_SHARED,
    Code,
    Instruction,
    Resources,
    data_accesses,
    disassemble,
    is_barrier,
    is_data_load,
    is_local,
    is_store,
    resident_threads,
    resources,
)
from cuda_plans import MODEL_ROWS, OPTIONS, PLANS, ROWS, is_possible, uncovered_pairs
from dit_rope.rotation.backends.cuda_arguments import ARGUMENTS_SIZE
from dit_rope.rotation.backends.cuda_kernels import plan_of
from dit_rope.rotation.backends.cuda_launch import compile_plan
from dit_rope.rotation.backends.cuda_plan import Plan, kernel_sources
from dit_rope.rotation_args import Norm
from dit_rope.spec import NormKind, Pairing

# Resident threads of an SM for the models' calls, and for any: what was compiled, rounded down. A thread has 64 bytes
# of loads under way, so 768 threads keep 48 KiB of reads in flight and 384 keep 24 KiB; by Little's law an SM of an
# H100 needs 3.35e12 B/s / 132 * 1 us = 25 KB of reads and writes. sm_89 and sm_120 hold 1536 threads at most.
LEAST_THREADS = {
    "sm_80": (640, 448),
    "sm_89": (640, 448),
    "sm_90": (640, 448),
    "sm_100": (640, 448),
    "sm_120": (640, 384),
}
# A LayerNorm keeps weights and biases too, which no model of these has at 32 bits.
LEAST_THREADS_OF_LAYER_NORMS = 384
STATIC_SHARED = 48 * 1024
WORKERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Built:
    """One plan compiled for one architecture; its code where that is checked."""

    arch: str
    used: dict[str, Resources]
    code: Code | None


def build(name: str, arch: str) -> Built:
    cubin = compile_plan(PLANS[name], arch)
    return Built(arch, resources(cubin), disassemble(cubin) if arch == "sm_90" or name in MODEL_ROWS else None)


@pytest.fixture(scope="module", params=PLANS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def plan(name: str) -> Plan:
    return PLANS[name]


def archs_for(name: str) -> list[str]:
    """All architectures for a model's call, else sm_90 and two others, of which each gets half of the plans."""
    others = [arch for arch in ARCHS if arch != "sm_90"]
    turn = list(PLANS).index(name) % 2
    return ["sm_90", *(others if name in MODEL_ROWS else others[turn::2])]


@pytest.fixture(scope="module")
def builds(name: str) -> list[Built]:
    """The plan on its architectures, compiled side by side: NVRTC and the disassembler run without Python's lock."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(lambda arch: build(name, arch), archs_for(name)))


@pytest.fixture(scope="module")
def codes(builds: list[Built]) -> dict[str, Code]:
    return {built.arch: built.code for built in builds if built.code is not None}


def named(*starts: str) -> Callable[[Instruction], bool]:
    return lambda instruction: instruction.name.startswith(starts)


def test_plans_cover_every_pair_of_options() -> None:
    assert uncovered_pairs(list(ROWS.values())) == []
    assert all(is_possible(row) for row in ROWS.values())
    for option, values in OPTIONS.items():
        assert {row[option] for row in ROWS.values()} == set(values)
    assert {plan.access for plan in PLANS.values()} == {16, 8, 4, 2}
    assert {plan.weight_access for plan in PLANS.values() if plan.weights} == {16, 8, 4, 2}
    assert {plan.table_access for plan in PLANS.values() if plan.own_angles} == {16, 8, 4, 2}


def test_plan_spills_nothing_and_fits_an_sm(name: str, plan: Plan, builds: list[Built]) -> None:
    for built in builds:
        assert list(built.used) == [plan.operation], built.arch
        used = built.used[plan.operation]
        assert used.stack == used.local == 0, built.arch
        assert used.shared - RESERVED_SHARED[built.arch] <= STATIC_SHARED, built.arch
        least = LEAST_THREADS[built.arch][0 if name in MODEL_ROWS else 1]
        if plan.norm is not None and plan.norm.centred and name not in MODEL_ROWS:
            least = min(least, LEAST_THREADS_OF_LAYER_NORMS)
        assert resident_threads(used.registers, plan.threads, built.arch) >= least, (built.arch, used)


def test_plan_uses_no_local_memory(codes: dict[str, Code]) -> None:
    for arch, code in codes.items():
        assert code.count(is_local) == 0, arch


def test_plan_reads_and_writes_its_data_once_in_whole_accesses(plan: Plan, codes: dict[str, Code]) -> None:
    for arch, code in codes.items():
        loads = [instruction for instruction in code.instructions if is_data_load(instruction)]
        stores = [instruction for instruction in code.instructions if is_store(instruction)]
        assert len(loads) == len(stores) == data_accesses(plan), arch
        assert {instruction.bytes for instruction in loads + stores} == {plan.access}, arch
        assert all(instruction.name.startswith("STG.E") for instruction in stores), arch


def test_plan_of_aligned_data_moves_16_bytes_at_once(name: str, plan: Plan) -> None:
    row = ROWS[name]
    dim_in_chunks = plan.head_dim % 16 == 0 and (not plan.half or sum(plan.pairs) % 8 == 0)
    if dim_in_chunks or plan.data is torch.float32:
        assert plan.access == row["alignment"]
    assert plan.access <= row["alignment"]


def test_plan_issues_every_load_before_a_store_or_barrier(codes: dict[str, Code]) -> None:
    for arch, code in codes.items():
        last_load = max(code.places(is_data_load))
        assert last_load < min(code.places(is_store)), arch
        assert last_load < min(code.places(is_barrier), default=last_load + 1), arch


def test_plan_meets_no_more_barriers_than_it_needs(plan: Plan, codes: dict[str, Code]) -> None:
    """Two for angles that heads share, of which a norm across heads needs one itself, and each further sum another."""
    across = plan.norm is not None and plan.norm.across_heads
    sums = (2 if plan.norm.centred else 1) if plan.norm is not None and across else 0
    for arch, code in codes.items():
        assert code.count(is_barrier) == sums + (0 if plan.own_angles else 1 if across else 2), arch


@pytest.mark.parametrize("name", [name for name in MODEL_ROWS if PLANS[name].own_angles], scope="module")
def test_plan_of_a_model_reads_own_angles_at_once_and_before_it_sums(
    name: str, plan: Plan, builds: list[Built]
) -> None:
    """All 16 bytes wide, one after another: none waits for the data or for the angles of another head."""
    angles = 2 * max(-(-heads // plan.rows) for heads in plan.heads) * (2 if plan.half else 1)
    for built in builds:
        assert built.code is not None
        after = built.code.instructions[max(built.code.places(is_data_load)) :]
        reads = [i for i, instruction in enumerate(after) if "CONSTANT" in instruction.modifiers]
        reads = [i for i in reads if after[i].bytes == 16][-angles:]
        uses = [i for i, instruction in enumerate(after) if named("SHFL", "STG")(instruction)]
        assert len(reads) == angles, built.arch
        assert max(reads) < min(uses), built.arch


def test_plan_waits_for_no_load_before_its_data_but_of_an_entry(codes: dict[str, Code]) -> None:
    """A load that an address depends on delays all others; only that of the number of a batch entry may be one."""
    for arch, code in codes.items():
        before = code.instructions[: max(code.places(is_data_load))]
        loads = [load for load in before if named("LD")(load) and not named("LDC", "LDCU")(load)]
        others = [load for load in loads if not is_data_load(load) and "CONSTANT" not in load.modifiers]
        assert len(others) <= 1, arch
        assert all(load.name == "LDG.E" and load.predicate for load in others), arch


def test_plan_fuses_multiply_add_unless_exact(plan: Plan, codes: dict[str, Code]) -> None:
    """Integer division, the one other arithmetic of a rotation, takes no fused multiply-add of floats."""
    pairs = data_accesses(plan) * plan.access // plan.data.itemsize // 2
    for arch, code in codes.items():
        fused = code.count(named("FFMA"))
        assert (fused == 0) if plan.exact else (fused >= 2 * pairs), arch
        assert not plan.exact or code.count(named("FMUL")) >= 4 * pairs, arch


def test_plan_rounds_to_nearest(plan: Plan, codes: dict[str, Code]) -> None:
    words = data_accesses(plan) * plan.access // 4
    for arch, code in codes.items():
        packs = [instruction for instruction in code.instructions if named("F2F")(instruction)]
        assert not any(instruction.modifiers & {"RZ", "RM", "RP"} for instruction in packs), arch
        if plan.data is torch.float32:
            assert not packs, arch
        else:
            assert len(packs) >= words, arch
            assert {"BF16" in instruction.modifiers for instruction in packs} == {plan.data is torch.bfloat16}, arch


def test_plan_takes_the_packed_arguments(codes: dict[str, Code]) -> None:
    for arch, code in codes.items():
        assert code.parameter_bytes == ARGUMENTS_SIZE, arch


MORE_LAYOUTS = {
    "large-batch": (meta(70_000, 61), {}),
    "table-view": (meta(1, 60), {"rows": torch.zeros(2, 4096, 23)[:, 1:, 1:]}),
    "positions": (meta(1, 60), {"positions": torch.zeros(1, 60, 3).int()}),
    "inverse": (meta(1, 60), {"inverse": True}),
}
NORM = Norm(NormKind.PER_HEAD, 1e-6, [torch.ones(128, dtype=torch.bfloat16) for _ in "qk"])


@pytest.mark.parametrize("norm", [None, NORM], ids=["rotate", "norm"])
@pytest.mark.parametrize(("x", "changes"), (LAYOUTS | MORE_LAYOUTS).values(), ids=LAYOUTS | MORE_LAYOUTS)
def test_call_compiles_nothing_for_a_new_length_position_or_layout(
    x: torch.Tensor, changes: dict[str, Any], norm: Norm | None
) -> None:
    base = plan_of([meta(1, 60)] * 2, WAN, [meta(1, 60)] * 2, norm)
    changed = plan_of([x] * 2, replace(WAN, **changes), [x] * 2, norm)
    assert changed == base
    assert changed.source() == base.source()


@pytest.mark.parametrize("changes", OWN_ANGLES.values(), ids=OWN_ANGLES)
def test_call_compiles_nothing_for_other_rows_of_its_heads(changes: dict[str, Any]) -> None:
    x = meta(3, 60, heads=24)
    assert plan_of([x] * 2, replace(MOCHI, **changes), [x] * 2, NORM) == plan_of([x] * 2, MOCHI, [x] * 2, NORM)


@pytest.mark.parametrize(("step", "access"), [(4, 16), (2, 8), (1, 4)])
@pytest.mark.parametrize("pairing", Pairing)
def test_call_narrows_its_accesses_to_the_tables_strides(step: int, access: int, pairing: Pairing) -> None:
    x, rows = meta(1, 60, heads=32, dim=64), torch.zeros(2, 32 * 60, 32 + step)
    args = replace(LTX, rows=rows[:, :, :32], pairing=pairing)
    assert plan_of([x], args, [x]).table_access == access
    assert plan_of([x], replace(args, rows=rows[:, :, step:]), [x]).table_access == access


@pytest.mark.parametrize(
    ("pairs", "dtype", "access"),
    [
        ((32,), torch.float32, 16),
        ((32,), torch.bfloat16, 8),
        ((24,), torch.float32, 16),
        ((22,), torch.float32, 8),
        ((21,), torch.float32, 4),
        ((21,), torch.bfloat16, 2),
        ((16, 8, 8), torch.float32, 16),
        ((12, 10, 10), torch.float32, 8),
        ((12, 9, 11), torch.bfloat16, 2),
    ],
    ids=str,
)
def test_call_reads_angles_of_one_axis_at_once(pairs: tuple[int, ...], dtype: torch.dtype, access: int) -> None:
    """Of aligned tables, whose rows have room for 32 pairs."""
    x, axes = meta(1, 60, heads=32, dim=64), len(pairs)
    rows = torch.zeros(2, 32 * 60, 32, dtype=dtype)
    args = replace(LTX, rows=rows, pairs=pairs, sizes=(4,) * axes, first_rows=(0,) * axes)
    assert plan_of([x], args, [x]).table_access == access


def test_call_of_queries_and_keys_in_other_layouts_moves_16_bytes_at_once() -> None:
    """A fused projection, heads before tokens, and text tokens in front: all are views of aligned rows."""
    fused = torch.empty(2, 60, 3 * 1536, dtype=torch.bfloat16).chunk(3, dim=-1)[1].unflatten(2, (12, 128))
    transposed = torch.empty(2, 12, 90, 128, dtype=torch.bfloat16).transpose(1, 2)[:, 30:]
    plan = plan_of([fused, transposed], WAN, [transposed, fused], NORM)
    assert (plan.access, plan.weight_access) == (16, 16)
    assert plan == plan_of([fused.contiguous()] * 2, WAN, [fused.contiguous()] * 2, NORM)


@pytest.mark.parametrize(("step", "access"), [(8, 16), (4, 8), (2, 4), (1, 2)])
def test_call_narrows_its_accesses_to_the_strides(step: int, access: int) -> None:
    x = meta(1, 61).as_strided((1, 60, 12, 128), (0, 1536 + step, 128, 1))
    assert plan_of([x], WAN, [meta(1, 60)]).access == access
    assert plan_of([meta(1, 60)], WAN, [x]).access == access


def test_compiler_says_what_is_wrong_with_a_plan() -> None:
    plan = replace(PLANS["rotate-wan-1.3b-interleaved-bfloat16"], access=3)
    with pytest.raises(Exception, match="AccessOf<3>"):
        compile_plan(plan, "sm_90")


def test_kernels_are_compiled_from_this_repository(repository: Path) -> None:
    assert kernel_sources() == repository / "kernels"


CHECKED = ["rotate-wan-14b-interleaved-bfloat16", "norm-across-heads-wan-14b-interleaved-bfloat16"]


def test_check_of_resources_passes_on_the_committed_results(repository: Path) -> None:
    script = repository / "scripts" / "gpu_checks" / "cuda_resources.py"
    command = [sys.executable, str(script), "--check", "--archs", "sm_90", "sm_120", "--plans", *CHECKED]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_check_of_resources_names_what_became_worse(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(repository / "scripts")
    script = runpy.run_path(str(repository / "scripts" / "gpu_checks" / "cuda_resources.py"))
    complaint, kernel = script["complaint"], (CHECKED[0], "sm_90")
    now = resources(compile_plan(PLANS[CHECKED[0]], "sm_90"))["rotate"].registers
    for fewer in (0, 8):
        assert complaint(kernel, {kernel: {"registers": str(now - fewer), "nvrtc": "13.0"}}) is None
    worse = complaint(kernel, {kernel: {"registers": str(now - 9), "nvrtc": "13.0"}})
    assert f"takes {now} registers" in worse
    assert f"{now - 9} with 13.0" in worse
    assert "run scripts/gpu_checks/cuda_resources.py again" in complaint(kernel, {})


def test_committed_resources_hold_every_plan_and_no_spill(repository: Path) -> None:
    rows = read_csv(repository / "scripts" / "results" / "cuda-resources.csv")
    assert [(row["plan"], row["arch"]) for row in rows] == [(name, arch) for name in PLANS for arch in ARCHS]
    assert {row["spill_bytes"] for row in rows} == {"0"}
    assert all(row["data_loads"] == row["stores"] == str(data_accesses(PLANS[row["plan"]])) for row in rows)
