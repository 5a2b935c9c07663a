"""CSV files whose rows name the machine, the versions and the commit they came from."""

from __future__ import annotations

import csv
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
"""One line of results, by column."""


def environment(device: str) -> Row:
    """Device, versions and commit of this run; ``device`` is a torch device's name."""
    cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "cuda": torch.version.cuda or "",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def write_csv(path: Path, rows: Sequence[Row], device: str) -> Path:
    """Writes ``rows``, each with the :func:`environment` of ``device``, as :func:`write_rows` does."""
    return write_rows(path, rows, environment(device))


def write_rows(path: Path, rows: Sequence[Row], machine: Row) -> Path:
    """Writes ``rows``, each with what ``machine`` says, and returns ``path``.

    Columns come in the order in which rows first name them; floats have six digits. Folders that are missing are made.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*columns, *machine], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _short(value) for name, value in {**row, **machine}.items()} for row in rows)
    return path


def read_csv(path: Path) -> list[Row]:
    """The rows of a CSV file, all values as text."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit measured, marked where the working tree differs from it; ``unknown`` outside a checkout."""
    call = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return "unknown"
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
