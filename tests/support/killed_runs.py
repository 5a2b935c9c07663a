"""Runs a program of a GPU run again and again, on CPU, and kills it each time at another moment.

    python tests/support/killed_runs.py bench_kernels FOLDER 10        (or gpu_check)

Each run is a forked child with a folder of its own, ``FOLDER/0`` for one that is left alone and from ``FOLDER/1`` on
for those that are killed, in which the file ``done`` names what had been measured. It prints, as JSON, the signal and
the exit status of each.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import gpu_check
from gpu_checks import plan, results
from gpu_checks.runner import Check, Part
from measure import bench_kernels

SIGNALS = {"bench_kernels": (signal.SIGKILL,), "gpu_check": (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)}
# Checks that take a moment, so that a whole run takes about a second.
CODE = """
import os, sys, time
open(os.environ["PIDS"], "a").write(f"{os.getpid()}\\n")
for name in sys.argv[1:]:
    time.sleep(0.03)
    print(f"passed {name}: right", flush=True)
"""


def bench(folder: Path) -> None:
    """The headline benchmark at one shape; ``done`` gets the number of rows after each that is written."""
    add = results.Record.add

    def noted(self: results.Record, rows: list[results.Row]) -> None:
        add(self, rows)
        _note(folder, len(self.rows))

    results.Record.add = noted
    shape = ("--shape", "wan-1.3b-480p")
    sys.argv = ["bench_kernels.py", "--rehearse", "--run", "headline", *shape, "--results", str(folder)]
    bench_kernels.main()


def check(folder: Path) -> None:
    """A run of two parts whose checks take a moment; ``done`` gets the name of each result that was announced."""
    os.environ["PIDS"] = str(folder / "pids")
    plan.rehearsal = lambda _: [
        Part(name, 0, tuple(_quick_check(f"{name}{number}") for number in range(2))) for name in ("first", "second")
    ]
    say = gpu_check._say

    def noted(log: object, text: str) -> None:
        say(log, text)
        if text.startswith("passed"):
            _note(folder, text.split()[3].rstrip(":"))

    gpu_check._say = noted
    sys.argv = ["gpu_check.py", "--rehearse", "--results", str(folder)]
    sys.exit(gpu_check.main())


def _quick_check(name: str) -> Check:
    return Check(name, (sys.executable, "-S", "-c", CODE), 60, reports={report: f"{name}-{report}" for report in "abc"})


def _note(folder: Path, text: object) -> None:
    with (folder / "done").open("a") as file:
        file.write(f"{text}\n")


def begin(program: Callable[[Path], None], folder: Path) -> int:
    """Forks a child that runs ``program`` in a process group of its own; its process id."""
    folder.mkdir(parents=True)
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setpgid(0, 0)
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        program(folder)
    except SystemExit as ended:
        status = int(ended.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(status)


def main() -> None:
    """Runs the named program once to its end, then kills it at moments spread over as long."""
    name, folder, times = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    program = {"bench_kernels": bench, "gpu_check": check}[name]
    torch.set_num_threads(1)
    results.environment("cpu")  # kept for the children
    start = time.monotonic()
    statuses = [("", os.waitstatus_to_exitcode(os.waitpid(begin(program, folder / "0"), 0)[1]))]
    whole = time.monotonic() - start
    moments = random.Random(0)
    for number in range(times):
        sent = SIGNALS[name][number % len(SIGNALS[name])]
        child = begin(program, folder / str(number + 1))
        time.sleep(whole * (number + moments.random()) / times)
        with contextlib.suppress(ProcessLookupError):  # on a busy machine the first run may take longer than others
            os.killpg(child, sent)
        statuses.append((sent.name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
    print(json.dumps(statuses))


if __name__ == "__main__":
    main()
