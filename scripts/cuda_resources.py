"""Compiles every shipped plan of the CUDA kernels for every architecture and writes what each costs. Needs no GPU.

    python scripts/cuda_resources.py                     # all plans of tests/cuda_plans.py, all architectures
    python scripts/cuda_resources.py --check             # writes nothing; fails where a kernel has become larger
    python scripts/cuda_resources.py --check --plans rotate-wan-14b-interleaved-bfloat16 --archs sm_90

``results/cuda-resources.csv`` has one row per plan and architecture. ``--check`` compares with it: no kernel may spill,
nor take over 8 registers more than there. Compile times are those of a machine that compiles on all of its cores.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from benchmarking import RESULTS, write_results
from cuda.bindings import nvrtc
from rich.console import Console
from rich.progress import track

from dit_rope.backends.cuda_launch import compile_plan
from dit_rope.benchmark.results import read_csv

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from cuda_machine_code import ARCHS, disassemble, is_data_load, is_store, resident_threads, resources
from cuda_plans import PLANS

NAME = "cuda-resources"
MORE_REGISTERS = 8

Kernel = tuple[str, str]
"""The name of a plan, and an architecture."""
Result = TypeVar("Result")


def measure(kernel: Kernel) -> dict[str, object]:
    """One row: what a plan costs on an architecture."""
    name, arch = kernel
    plan = PLANS[name]
    start = time.perf_counter()
    cubin = compile_plan(plan, arch)
    milliseconds = 1e3 * (time.perf_counter() - start)
    used, code = resources(cubin)[plan.operation], disassemble(cubin)
    return {
        "plan": name,
        "arch": arch,
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


def nvrtc_version() -> str:
    """The version of the compiler, such as 13.0."""
    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


def complaint(kernel: Kernel, before: dict[Kernel, dict[str, str]]) -> str | None:
    """What has become worse of a kernel since the committed results, or None."""
    name, arch = kernel
    if kernel not in before:
        return f"{name} on {arch} is not in {NAME}.csv; run scripts/cuda_resources.py again"
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


def show(results: Iterable[Result], total: int, what: str) -> Iterable[Result]:
    """The same results, under a progress bar on standard error that disappears in the end."""
    return track(results, what, total=total, transient=True, console=Console(stderr=True))


def main() -> None:
    """Measures and writes, or checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed results, and write nothing")
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=PLANS, metavar="PLAN")
    parser.add_argument("--archs", nargs="+", default=list(ARCHS), choices=ARCHS)
    options = parser.parse_args()
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
