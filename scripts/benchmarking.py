"""Where the scripts write their results, and the timing they share with ``dit-rope bench``."""

from __future__ import annotations

from pathlib import Path

from dit_rope.benchmark.results import Row, write_csv
from dit_rope.benchmark.timing import Timing, interleave, keep_freed_memory

__all__ = ["RESULTS", "Timing", "interleave", "keep_freed_memory", "write_results"]

RESULTS = Path(__file__).resolve().parent / "results"


def write_results(name: str, rows: list[Row], device: str = "cpu") -> Path:
    """Writes ``results/<name>.csv``, one row per measurement, each with the machine, versions and commit."""
    return write_csv(RESULTS / f"{name}.csv", rows, device)
