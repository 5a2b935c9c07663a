"""Where the scripts write their results."""

from __future__ import annotations

from pathlib import Path

from dit_rope.benchmark.results import Row, write_csv

RESULTS = Path(__file__).resolve().parent / "results"


def write_results(name: str, rows: list[Row], device: str = "cpu") -> Path:
    """Writes ``results/<name>.csv``, one row per measurement, each with the machine, versions and commit."""
    return write_csv(RESULTS / f"{name}.csv", rows, device)
