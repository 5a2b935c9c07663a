"""CSV files whose rows name the machine, the versions and the commit they came from."""

from __future__ import annotations

import csv
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parents[1] / "results"
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


def write_results(name: str, rows: Sequence[Row], device: str = "cpu") -> Path:
    """Writes ``scripts/results/<name>.csv``, one row per measurement, each with the machine, versions and commit."""
    return write_csv(RESULTS / f"{name}.csv", rows, device)


def write_rows(path: Path, rows: Sequence[Row], machine: Row) -> Path:
    """Writes ``rows``, each with what ``machine`` says and it does not say itself, and returns ``path``.

    Columns come in the order in which rows first name them, those of ``machine`` last; floats have six digits. Folders
    that are missing are made. The file is replaced at once: whoever is killed meanwhile leaves the one before.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in machine))
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    with new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*columns, *machine], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _short(value) for name, value in {**machine, **row}.items()} for row in rows)
    new.replace(path)
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
    """The commit measured, marked where the working tree differs from it.

    Where git does not know, such as outside a checkout, what the environment variable DIT_ROPE_COMMIT says, or else
    ``unknown``.
    """
    call = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    folder = Path(__file__).resolve().parents[2]
    commit = ""
    if (folder / ".git").exists() and shutil.which("git"):
        commit = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False).stdout.strip()
    return commit or os.environ.get("DIT_ROPE_COMMIT", "unknown")
