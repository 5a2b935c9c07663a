"""CSV files whose rows name the device, driver, versions and commit they came from, whole at every moment of a run."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.results import RESULTS, Row, read_csv, write_rows
from benchmarks.results import environment as machine_and_versions

__all__ = ["RESULTS", "Record", "driver_version", "environment", "result_path", "table"]


class Record:
    """The rows of a run, and the CSV file that holds all of them after each :meth:`add`.

    Args:
        path: the file, or None to write none.
        device: a torch device's name, whose :func:`environment` each row gets.
        keep: rows of the file as it is that stay, before those of this run; none by default.
    """

    def __init__(self, path: Path | None, device: str, keep: Callable[[Row], bool] = lambda row: False) -> None:
        self.path = path
        self.rows: list[Row] = []
        self._device = device
        self._kept = [row for row in read_csv(path) if keep(row)] if path is not None and path.exists() else []

    def add(self, rows: Sequence[Row]) -> None:
        """Adds ``rows`` and writes the whole file again."""
        self.rows += rows
        if self.path is not None:
            write_rows(self.path, [*self._kept, *self.rows], environment(self._device))


@functools.cache
def environment(device: str) -> Row:
    """Device, driver, versions and commit of this run."""
    return {
        **machine_and_versions(device),
        "driver": driver_version(),
        "triton": _version("triton"),
        "cuda_core": _version("cuda-core"),
        "cuda_bindings": _version("cuda-bindings"),
        "nvrtc": _nvrtc_version(),
    }


def result_path(stem: str, device: str, folder: Path = RESULTS) -> Path:
    """``<stem>-<device>.csv`` in ``folder``, the device named as the driver names it, in lower case and dashes."""
    name = re.sub(r"[^a-z0-9]+", "-", str(environment(device)["device"]).lower()).strip("-")
    return folder / f"{stem}-{name}.csv"


def driver_version() -> str:
    """The version of the NVIDIA driver, as nvidia-smi prints it."""
    call = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        process = subprocess.run(call, capture_output=True, text=True, check=False, timeout=20)
    except OSError:
        return "unknown"
    return (process.stdout.strip().splitlines() or ["unknown"])[0]


def table(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """The rows as lines of aligned text under a heading."""
    cells = [list(columns), *([_text(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _text(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _nvrtc_version() -> str:
    try:
        from cuda.bindings import nvrtc
    except ImportError:
        return ""
    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"
