"""Compiles every shipped plan of the CUDA kernels for every architecture, without a GPU, and writes its cost.

    python scripts/gpu_checks/cuda_resources.py  # all plans of tests/support/cuda_plans.py, all architectures
    python scripts/gpu_checks/cuda_resources.py --check  # writes nothing; fails where a kernel has become larger
    python scripts/gpu_checks/cuda_resources.py --check --plans rotate-wan-14b-interleaved-bfloat16 --archs sm_90
    python scripts/gpu_checks/cuda_resources.py --candidates  # what a sweep tries first, for sm_90, with this NVRTC

``results/cuda-resources.csv`` has one row per plan and architecture. ``--check`` compares with it: no kernel may spill,
nor take over 8 registers more than there. Compile times are those of a machine that compiles on all of its cores.
``results/cuda-candidates.csv`` has one row per operation, shape and choice of a sweep for each version of NVRTC that
it was written with.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from cuda.bindings import nvrtc
from rich.console import Console
from rich.progress import track

from dit_rope.rotation.backends.cuda_launch import compile_plan
from dit_rope.rotation.backends.cuda_plan import Plan

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from benchmarks.results import RESULTS, environment, read_csv, write_results, write_rows
from cuda_machine_code import ARCHS, disassemble, is_data_load, is_store, resident_threads, resources
from cuda_plans import PLANS, ROWS, SWEPT, plan_for
from gpu_checks.candidates import first_steps

NAME, CANDIDATES = "cuda-resources", "cuda-candidates"
MORE_REGISTERS = 8

Kernel = tuple[str, str]
"""The name of a plan, and an architecture."""
Result = TypeVar("Result")


def measure(kernel: Kernel) -> dict[str, object]:
    """One row: what a plan costs on an architecture."""
    name, arch = kernel
    return {"plan": name, "arch": arch, **costs(PLANS[name], arch)}


def costs(plan: Plan, arch: str) -> dict[str, object]:
    """What a kernel costs on an architecture."""
    start = time.perf_counter()
    cubin = compile_plan(plan, arch)
    milliseconds = 1e3 * (time.perf_counter() - start)
    used, code = resources(cubin)[plan.operation], disassemble(cubin)
    return {
        "registers": used.registers,
        "shared_bytes": used.shared,
        "block_threads": plan.threads,
        "resident_threads": resident_threads(used.registers, plan.threads, arch),
        "instructions": len(code.instructions),
        "data_loads": code.count(is_data_load),
        "stores": code.count(is_store),
        "spill_bytes": used.stack + used.local,
        "cubin_bytes": len(cubin),
        "compile_ms": round(milliseconds),
        "nvrtc": nvrtc_version(),
    }


def candidates() -> dict[Kernel, Plan]:
    """What a sweep tries first, by operation and shape, and by what differs from the defaults."""
    steps = {name: first_steps(functools.partial(plan_for, ROWS[name])) for name in SWEPT}
    return {(name, choice): plan_for(ROWS[name], tuning) for name in SWEPT for choice, tuning in steps[name].items()}


def measure_candidate(item: tuple[Kernel, Plan]) -> dict[str, object]:
    """One row: what a candidate costs on an H200."""
    (name, choice), plan = item
    row = costs(plan, "sm_90")
    blocks = int(str(row["resident_threads"])) // plan.threads
    loads = 0 if plan.stages else blocks * len(plan.heads) * plan.tokens * plan.heads[0] * plan.width
    staged = max(1, plan.min_blocks) * plan.stage_bytes
    loaded = loads * plan.data.itemsize // (2 if plan.split else 1)
    return {
        "plan": name,
        "choice": choice,
        "arch": "sm_90",
        "blocks_of_an_sm": blocks,
        "kilobytes_under_way": (staged or loaded) / 1000,
        # Its count knows data by the policy of the default.
        **{name: value for name, value in row.items() if name != "data_loads"},
    }


def nvrtc_version() -> str:
    """The version of the compiler, such as 13.0."""
    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


def complaint(kernel: Kernel, before: dict[Kernel, dict[str, str]]) -> str | None:
    """What has become worse of a kernel since the committed results, or None."""
    name, arch = kernel
    if kernel not in before:
        return f"{name} on {arch} is not in {NAME}.csv; run scripts/gpu_checks/cuda_resources.py again"
    used = resources(compile_plan(PLANS[name], arch))[PLANS[name].operation]
    if used.stack or used.local:
        return f"{name} on {arch} spills {used.stack + used.local} bytes"
    row = before[kernel]
    if used.registers > int(row["registers"]) + MORE_REGISTERS:
        return (
            f"{name} on {arch} takes {used.registers} registers with NVRTC {nvrtc_version()}, "
            f"{row['registers']} with {row['nvrtc']} in {NAME}.csv"
        )
    return None


def committed() -> dict[Kernel, dict[str, str]]:
    """The rows of the committed results."""
    return {(row["plan"], row["arch"]): row for row in read_csv(RESULTS / f"{NAME}.csv")}


def show(results: Iterable[Result], total: int, description: str) -> Iterable[Result]:
    """The same results, under a progress bar on standard error that disappears in the end."""
    return track(results, description, total=total, transient=True, console=Console(stderr=True))


def write_candidates() -> None:
    """Writes the rows of all candidates with this NVRTC beside those that other versions have written."""
    every = candidates()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(show(pool.map(measure_candidate, every.items()), len(every), "compiling"))
    path = RESULTS / f"{CANDIDATES}.csv"
    others = [row for row in read_csv(path) if row["nvrtc"] != nvrtc_version()] if path.exists() else []
    print(write_rows(path, [*others, *({**row, **environment("cpu")} for row in rows)], {}))


def main() -> None:
    """Measures and writes, or checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed results, and write nothing")
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=PLANS, metavar="PLAN")
    parser.add_argument("--archs", nargs="+", default=list(ARCHS), choices=ARCHS)
    parser.add_argument("--candidates", action="store_true", help="what a sweep tries instead of what ships")
    options = parser.parse_args()
    if options.candidates:
        return write_candidates()
    if not options.check and (set(options.plans), set(options.archs)) != (set(PLANS), set(ARCHS)):
        parser.error("--plans and --archs must come with --check: results hold all of them")
    kernels = [(name, arch) for name in options.plans for arch in options.archs]
    # NVRTC and the disassembler run without Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if options.check:
            before = committed()
            complaints = pool.map(lambda kernel: complaint(kernel, before), kernels)
            worse = [text for text in show(complaints, len(kernels), "checking") if text is not None]
            sys.exit("\n".join(worse) or 0)
        rows = list(show(pool.map(measure, kernels), len(kernels), "compiling"))
    print(write_results(NAME, rows))


if __name__ == "__main__":
    main()
