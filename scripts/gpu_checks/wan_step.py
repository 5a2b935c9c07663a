"""Times a denoising step of Wan 1.3B's architecture at 480p and 81 frames, by what is patched.

    python -m gpu_checks.wan_step [--rounds 3] [--rehearse]        (in the folder scripts/)

Random weights, bfloat16, batch 1; eager, with the variants of ``scripts/benchmarks/end_to_end.py``, then with the
repeated blocks compiled, unpatched and patched. ``rotary_share`` is the share of the rotation in the unpatched step.
Results go to ``wan-step-<device>.csv`` in the folder ``--results``, those of eager mode before anything is compiled; a
variant that fails or has a wrong output becomes a row with the reason, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils import _pytree as pytree

from benchmarks.end_to_end import ARCHITECTURES, Step, architecture_step, measure_step
from benchmarks.results import Row
from benchmarks.rotation import one_line
from zoo import named

from .results import RESULTS, Record, result_path, table

GRID, TINY_GRID = (21, 30, 52), (2, 2, 2)
COLUMNS = ("mode", "variant", "ms_p20", "ms_median", "ms_p80", "times_faster_than_unpatched")


class BlocksCompiled(Step):
    """A step whose compiled form has its models' repeated blocks compiled, which takes seconds, not minutes."""

    def compiled(self) -> Step:
        """The same calls of copies of the models with compiled blocks."""
        twin = self.twin()
        for model in twin.models:
            model.compile_repeated_blocks(fullgraph=True, backend="eager" if self.device == "cpu" else "inductor")
        return twin


def wan_step(device: str, rehearse: bool) -> Step:
    """The step on ``device``; a rehearsal's is of a tiny model.

    It is built on the CPU, as ``from_pretrained`` does: a GPU computes other last bits of some table entries.
    """
    architecture = ARCHITECTURES["wan-1.3b"]
    if rehearse:
        step = architecture_step(architecture, dtype=torch.float32, grid=TINY_GRID, config=named("wan").config)
    else:
        step = architecture_step(architecture, grid=GRID)
    calls = [
        replace(call, kwargs=pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), call.kwargs))
        for call in step.calls
    ]
    return BlocksCompiled(tuple(model.to(device) for model in step.models), tuple(calls))


def measure(step: Step, compiled: bool, rounds: int, record: Record) -> list[Row]:
    """Records a row for each variant, or for each reason why one has no figures; returns those with figures."""
    mode = "compiled" if compiled else "eager"

    def note(variant: str, error: Exception) -> None:
        record.add([{"mode": mode, "variant": variant, "note": one_line(error)}])

    try:
        measured = measure_step(step, rounds=rounds, compiled=compiled, on_error=note)
    except Exception as error:  # such as a patch that is refused: the other mode is measured
        note("all", error)
        return []
    rows = [
        {
            "mode": mode,
            **{column: row[column] for column in ("variant", "ms_p20", "ms_median", "ms_p80")},
            "times_faster_than_unpatched": row["ratio"],
        }
        for row in measured
    ]
    if not compiled:
        rows[0]["rotary_share"] = measured[0]["share_rotation"]
    record.add(rows)
    return rows


def run(device: str, rounds: int, rehearse: bool, record: Record) -> None:
    """Eager, then compiled; the rows of each are written when they are known."""
    step = wan_step(device, rehearse)
    torch._dynamo.config.recompile_limit = 32  # the twins' blocks are one function, compiled for each twin
    for compiled in (False, True):
        rows = measure(step, compiled, rounds, record)
        if rehearse:
            continue
        print("\n".join(table(rows, COLUMNS)), flush=True)
        for row in rows:
            if "rotary_share" in row:
                print(f"rotation takes {row['rotary_share']:.1%} of the unpatched step in eager mode", flush=True)


def main() -> None:
    """Measures and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, metavar="DIR", help="a folder for the CSV file; scripts/results")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model on CPU; no CSV file without --results")
    options = parser.parse_args()
    device = "cpu" if options.rehearse else "cuda"
    folder = options.results or (None if options.rehearse else RESULTS)
    record = Record(result_path("wan-step", device, folder) if folder else None, device)
    run(device, options.rounds, options.rehearse, record)
    failed = [row for row in record.rows if row.get("note")]
    for row in failed:
        print(f"{row['mode']}, {row['variant']}: {row['note']}")
    print(f"{len(record.rows)} rows, {len(failed)} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
