"""CSV files under ``scripts/results/`` whose rows name the device, driver, versions and commit they came from."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarking import RESULTS

from dit_rope.benchmark.results import Row, write_rows
from dit_rope.benchmark.results import environment as machine_and_versions

__all__ = ["RESULTS", "driver_version", "environment", "result_path", "table", "write_rows"]


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


def result_path(stem: str, device: str) -> Path:
    """``results/<stem>-<device>.csv``, the device named as the driver names it, in lower case and dashes."""
    name = re.sub(r"[^a-z0-9]+", "-", str(environment(device)["device"]).lower()).strip("-")
    return RESULTS / f"{stem}-{name}.csv"


def driver_version() -> str:
    """The version of the NVIDIA driver, as nvidia-smi prints it."""
    call = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=20)
    except OSError:
        return "unknown"
    return (done.stdout.strip().splitlines() or ["unknown"])[0]


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
