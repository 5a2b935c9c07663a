"""Runs commands as named checks, each in a process of its own, within a common deadline."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
# With less than this left a check is not begun, because Python and torch take as long to load.
LEAST_SECONDS = 5.0
# Lines of output that a failure shows.
TAIL = 25


@dataclass(frozen=True)
class Check:
    """A command whose exit status is its verdict and whose last line of output is its detail.

    Attributes:
        name: what is checked.
        command: the program and its arguments.
        seconds: the longest it may take.
        needs: names of requirements; a missing optional one skips the check, another fails it.
        environment: variables besides those of this process.
        alone: nothing may run beside it, because it measures time; its output is shown as it comes.
        skips: words in the output of a failure that mean it cannot run here at all.
    """

    name: str
    command: Sequence[str]
    seconds: float
    needs: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    alone: bool = False
    skips: Sequence[str] = ()


@dataclass(frozen=True)
class Result:
    """How a check went."""

    check: str
    result: str
    seconds: float
    detail: str


@dataclass(frozen=True)
class Missing:
    """A requirement that is not here: why, and whether checks can do without."""

    reason: str
    optional: bool


class Deadline:
    """The end of the run; time that checks which run alone are promised is not given to others."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds
        self._promised = 0.0

    def promise(self, seconds: float) -> None:
        """Keeps ``seconds`` before the end for what runs later."""
        self._promised += seconds

    def limit(self, check: Check) -> float:
        """How long ``check`` may run if it begins now."""
        if check.alone:
            self._promised -= min(check.seconds, self._promised)
        return min(check.seconds, self._end - self._clock() - self._promised)


def run_all(
    checks: Sequence[Check],
    deadline: Deadline,
    missing: Mapping[str, Missing],
    environment: Mapping[str, str],
    jobs: int,
    say: Callable[[str], None],
) -> list[Result]:
    """Runs ``jobs`` checks at a time, then those that run alone; results come in the order of ``checks``."""
    together = [check for check in checks if not check.alone]
    alone = [check for check in checks if check.alone]
    for check in alone:
        deadline.promise(check.seconds)

    def one(check: Check) -> Result:
        result = run_one(check, deadline, missing, environment, say)
        say(f"{result.result:8} {result.seconds:6.1f} s  {result.check}: {result.detail}")
        return result

    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(one, together))
    results += [one(check) for check in alone]
    by_name = {result.check: result for result in results}
    return [by_name[check.name] for check in checks]


def run_one(
    check: Check,
    deadline: Deadline,
    missing: Mapping[str, Missing],
    environment: Mapping[str, str],
    say: Callable[[str], None],
) -> Result:
    """Runs one check if what it needs is here and time is left."""
    limit = deadline.limit(check)
    for name in check.needs:
        if name in missing:
            verdict = SKIPPED if missing[name].optional else FAILED
            return Result(check.name, verdict, 0.0, f"needs {name}: {missing[name].reason}")
    if limit < LEAST_SECONDS:
        return Result(check.name, FAILED, 0.0, "not run: the deadline was too near")
    start = time.monotonic()
    status, lines = _run(check, limit, environment, say)
    seconds = time.monotonic() - start
    detail = next((line for line in reversed(lines) if line.strip()), "no output").strip()
    if status == 0:
        return Result(check.name, PASSED, seconds, detail)
    for words in check.skips:
        if any(words in line for line in lines):
            return Result(check.name, SKIPPED, seconds, words)
    if not check.alone:
        say("\n".join(f"    {line}" for line in lines[-TAIL:]))
    if status is None:
        return Result(check.name, FAILED, seconds, f"expected an end within {limit:.0f} s, got none; last: {detail}")
    return Result(check.name, FAILED, seconds, f"exit status {status}: {detail}")


def _run(
    check: Check, limit: float, environment: Mapping[str, str], say: Callable[[str], None]
) -> tuple[int | None, list[str]]:
    """Exit status, None past the limit, and the lines of output."""
    process = subprocess.Popen(
        check.command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **environment, **check.environment},
        start_new_session=True,  # so that what it starts can be ended with it
    )
    received: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in process.stdout:
            received.put(line.rstrip("\n"))
            if check.alone:
                say(line.rstrip("\n"))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        status: int | None = process.wait(limit)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    reader.join(LEAST_SECONDS)
    return status, [received.get() for _ in range(received.qsize())]
