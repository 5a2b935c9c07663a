"""Writes the fastest choices of a sweep into the table that the CUDA kernels' plans read.

    python scripts/gpu_checks/write_cuda_tuning.py scripts/results/sweep-nvidia-h200.csv

``backends/cuda_tuning.json`` gets one entry for each operation and shape that was swept, with the choices that
differ from the defaults; entries of other devices stay. Shapes whose sweep found nothing faster than the defaults have
no entry.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from dit_rope.rotation.backends.cuda_tuning import DEFAULT, FILE, Tuning, read

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.problems import Operation
from benchmarks.results import Row, read_csv
from gpu_checks.sweep import KEPT

OPERATIONS = {
    Operation.ROTATE.value: "rotate",
    Operation.IN_PLACE.value: "rotate in place",
    Operation.PER_HEAD.value: "norm per head",
    Operation.ACROSS_HEADS.value: "norm across heads",
}
_VALUES = {"int": int, "str": str, "bool": lambda text: text == "True"}


def entries(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The entries of the table that the rows of a sweep give.

    Raises:
        ValueError: no row says what was kept.
    """
    best = [row for row in rows if row["knob"] == KEPT]
    if not best:
        raise ValueError(f"a sweep must have rows of the knob {KEPT!r}, got {len(rows)} rows without one")
    entries = []
    for row in best:
        heads, itemsize = int(row["heads"]), getattr(torch, row["dtype"]).itemsize
        where = {"device": row["device"], "operation": OPERATIONS[row["operation"]]}
        shape = {"heads": [heads, heads], "head_dim": int(row["head_dim"]), "itemsize": itemsize}
        choices = {field.name: _VALUES[str(field.type)](row[field.name]) for field in fields(Tuning)}
        differing = {name: value for name, value in choices.items() if value != getattr(DEFAULT, name)}
        if differing:
            entries.append({**where, **shape, **differing})
    return entries


def merged(before: Sequence[dict[str, Any]], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The table, in which entries of these rows replace all entries of the same device."""
    devices = {row["device"] for row in rows}
    table = [entry for entry in before if entry["device"] not in devices] + entries(rows)
    read(table)
    return table


def main() -> None:
    """Reads the sweeps that are named, writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", type=Path, help="sweep-<device>.csv")
    table = json.loads(FILE.read_text(encoding="utf-8"))
    for sweep in parser.parse_args().sweeps:
        table = merged(table, read_csv(sweep))
    FILE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"{FILE}: {len(table)} entries")


if __name__ == "__main__":
    main()
