"""What the benchmarks share: interleaved timing, and results with the machine they came from."""

from __future__ import annotations

import csv
import ctypes
import platform
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dit_rope.cli.bench import measure

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one case over all rounds."""

    p20: float
    median: float
    p80: float


def interleave(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Times every case once per round, in turn, so that a machine that slows down favours none.

    Two rounds beforehand are not counted.
    """
    return {name: _summary(seconds) for name, seconds in measure(cases, rounds, warm_up=2).items()}


def write_results(name: str, rows: list[dict[str, object]], device: str = "cpu") -> Path:
    """Writes ``results/<name>.csv``, one row per measurement, each with the machine, versions and commit."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    machine = environment(device)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], *machine], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **machine} for row in rows)
    return path


def environment(device: str) -> dict[str, object]:
    """Device, driver, versions and commit of this run."""
    cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "cuda": torch.version.cuda or "",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def keep_freed_memory() -> None:
    """Makes glibc keep what is freed, as tcmalloc, jemalloc and torch's CUDA allocator do; elsewhere does nothing.

    By default it returns every block over 32 MiB to the system, which zeroes its pages when they are next touched: a
    cost that is the same for all variants and hides their difference.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mmap_threshold, trim_threshold = -3, -1
    libc = ctypes.CDLL(None)
    for option in (mmap_threshold, trim_threshold):
        libc.mallopt(option, 2**30)


def _summary(seconds: list[float]) -> Timing:
    cuts = statistics.quantiles(seconds, n=5, method="inclusive")
    return Timing(1e3 * cuts[0], 1e3 * statistics.median(seconds), 1e3 * cuts[3])


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit measured, marked where the working tree differs from it."""
    call = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    done = subprocess.run(call, cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
