"""Makes random calls, many more than the tests do, and counts their outcomes.

    python scripts/long_tests/fuzz.py --draws 100000

Each draw is a call of ``tests/support/properties.py``: it must give what float64 gives within a derived bound, or be
refused with ValueError or TypeError where it may be. Writes ``scripts/results/fuzz.csv``: draws by strategy, backend
and outcome. A draw that does neither is printed, reduced to a small one, and counted as ``wrong``; the script then
exits with 1. Batches that are done are kept in ``--checkpoint``, from which a run that was stopped goes on.

Kernels run on the CPU, each in a separate process: Triton's in its interpreter, CUDA's built by a C++ compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import write_results

ROOT = Path(__file__).resolve().parents[2]
BATCH = 500
SHARES = {
    ("rotation", "eager"): 0.35,
    ("table", "eager"): 0.2,
    ("shift", "eager"): 0.1,
    ("kernel", "eager"): 0.03,
    ("kernel", "cuda"): 0.015,
    ("kernel", "triton"): 0.005,
    ("argument", "eager"): 0.3,
}
"""Of all draws, by strategy and backend."""


def run_batch(strategy: str, number: int, draws: int) -> Counter[str]:
    """Counts the outcomes of ``draws`` draws of one seed; a wrong one is printed and ends the batch."""
    import kernel_properties
    import properties
    import wrong_arguments

    draws_of, check = {
        **properties.STRATEGIES,
        "argument": wrong_arguments.STRATEGY,
        "kernel": kernel_properties.STRATEGY,
    }[strategy]
    counts: Counter[str] = Counter()

    @seed(number)
    @settings(
        max_examples=draws,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(draws_of)
    def make(draw: Any) -> None:
        counts[check(draw)] += 1

    try:
        make()
    except Exception:
        traceback.print_exc(limit=-3)
        counts["wrong"] += 1
    return counts


def worker(strategy: str, backend: str, first: int, draws: int) -> None:
    """Runs batches in this process, printing the counts of each as a line of JSON."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    torch.set_num_threads(1)
    from contract_calls import prepared

    kernels = Path(os.environ.get("DIT_ROPE_EMULATION_CACHE", ROOT / ".fuzz-kernels"))
    with prepared(kernels):
        finished, number = 0, first
        while finished < draws:
            started, size = time.monotonic(), min(BATCH, draws - finished)
            counts = run_batch(strategy, number, size)
            line = {"batch": number, "counts": counts, "seconds": time.monotonic() - started}
            print(json.dumps(line), flush=True)
            # What hypothesis draws is what it makes of a seed, which may be fewer than asked for.
            finished, number = finished + max(1, sum(counts.values())), number + 1


def rows_of(entries: list[dict[str, Any]]) -> list[dict[str, object]]:
    """One row per strategy, backend and outcome."""
    counts: Counter[tuple[str, str, str]] = Counter()
    spent: Counter[tuple[str, str]] = Counter()
    for entry in entries:
        which = entry["strategy"], entry["backend"]
        spent[which] += entry["seconds"]
        for outcome in ("right", "refused", "wrong"):
            counts[(*which, outcome)] += entry["counts"].get(outcome, 0)
    return [
        {
            "strategy": strategy,
            "backend": backend,
            "outcome": outcome,
            "draws": count,
            "all draws": sum(counts.values()),
            "seconds": round(spent[strategy, backend], 1),
            "hypothesis": version("hypothesis"),
        }
        for (strategy, backend, outcome), count in counts.items()
    ]


def run(draws: int, checkpoint: Path, only: list[str]) -> list[dict[str, Any]]:
    """Strategies on their backends, each up to its share of the draws; goes on from ``checkpoint`` and adds to it."""
    entries = [json.loads(line) for line in checkpoint.read_text().splitlines()] if checkpoint.exists() else []
    for (strategy, backend), share in SHARES.items():
        batches = [e for e in entries if (e["strategy"], e["backend"]) == (strategy, backend)]
        missing = round(draws * share) - sum(sum(e["counts"].values()) for e in batches)
        if missing <= 0 or (only and strategy not in only):
            continue
        first = 1 + max((e["batch"] for e in batches), default=-1)
        environment = os.environ | {"DIT_ROPE_BACKEND": backend}
        if backend == "triton":
            environment["TRITON_INTERPRET"] = "1"
        command = [sys.executable, __file__, "--worker", strategy, backend, str(first), str(missing)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                entry = {"strategy": strategy, "backend": backend, **json.loads(line)}
                entries.append(entry)
                with checkpoint.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
        if process.returncode:
            raise SystemExit(f"{strategy} on {backend} must end with 0, got {process.returncode}")
    return entries


def main() -> None:
    """Reads the arguments, makes the draws and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=100_000)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "fuzz-checkpoint.jsonl")
    parser.add_argument("--only", nargs="*", default=[], help="strategies to draw from; all unless given")
    parser.add_argument("--worker", nargs=4, metavar=("STRATEGY", "BACKEND", "FIRST", "DRAWS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        strategy, backend, first, draws = arguments.worker
        worker(strategy, backend, int(first), int(draws))
        return
    rows = rows_of(run(arguments.draws, arguments.checkpoint, arguments.only))
    for row in rows:
        print(f"{row['strategy']:<9} {row['backend']:<7} {row['outcome']:<8} {row['draws']:>7,}")
    print(f"wrote {write_results('fuzz', rows)}")
    if any(row["outcome"] == "wrong" and row["draws"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
