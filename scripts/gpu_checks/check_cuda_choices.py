"""Runs the contract of the backends over CUDA kernels compiled with other choices, on a CPU.

    python scripts/gpu_checks/check_cuda_choices.py

The choices are those of ``Tuning`` in ``backends/cuda_tuning.py``, some of them together, so that every value that
changes code is in one run. Kernels run in ``tests/support/cuda_emulation.py``, which lets a bulk copy arrive as late as
it may. What it cannot see: how a GPU orders memory accesses of its threads and of its copies, and what its caches do,
so cache policies and minimum blocks only have to compile. ``results/cuda-choices.csv`` has a row for each run. It takes
half an hour.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

from dit_rope.rotation.backends.cuda_tuning import LOADS, STORES, Tuning

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from benchmarks.results import write_results
from contract_calls import run_contract
from gpu_checks.candidates import name_of

TUNINGS = (
    Tuning(split=True, late_weights=True, min_blocks=2, loads=LOADS[1], stores=STORES[1]),
    Tuning(stages=2, min_blocks=2, late_weights=True),
    Tuning(stages=3, thread_chunks=2, min_threads=256, loads=LOADS[2]),
    Tuning(thread_chunks=8, min_threads=64, late_weights=True, loads=LOADS[3], stores=STORES[2]),
)


def main() -> None:
    """Runs all of them and writes a row for each; the first failure ends the run with its output."""
    rows = []
    for tuning in TUNINGS:
        start = time.perf_counter()
        line = run_contract("cuda", "cpu", tuning)
        counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|skipped)", line)}
        row = {"choices": name_of(tuning), **counts, "seconds": round(time.perf_counter() - start)}
        rows.append(row)
        print(row, flush=True)
    print(write_results("cuda-choices", rows))


if __name__ == "__main__":
    main()
