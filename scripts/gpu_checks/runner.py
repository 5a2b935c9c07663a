"""Runs commands as named checks, each in a separate process, part by part until the time is up."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

PASSED, FAILED, SKIPPED, LEFT_OUT = "passed", "failed", "skipped", "left out"
# With less than this left a check is not begun, because Python and torch take as long to load.
LEAST_SECONDS = 5.0
# How often it is looked whether a process that prints nothing has ended.
POLL_SECONDS = 0.1
# Lines of output that a failure shows.
TAIL = 25
_REPORT = re.compile(rf"({PASSED}|{FAILED}|{SKIPPED}) (\S+): (.*)")


@dataclass(frozen=True)
class Check:
    """A command whose exit status is its verdict and whose last line of output is its detail.

    Attributes:
        name: what is checked.
        command: the program and its arguments.
        seconds: the longest it may take, or the longest until the first result and between one and the next.
        needs: names of requirements; a missing optional one skips the check, another fails it.
        environment: variables besides those of this process.
        shown: its output is shown as it comes, not only where it fails.
        skips: words in the output of a failure that mean it cannot run here at all.
        reports: further arguments of the command, each with the name of its result, in place of the check's.
            The command prints ``passed ARGUMENT: detail`` for each, or ``failed`` or ``skipped``. Where it ends before
            it has got to all of them, it is begun again for the rest.
    """

    name: str
    command: Sequence[str]
    seconds: float
    needs: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    shown: bool = False
    skips: Sequence[str] = ()
    reports: Mapping[str, str] = field(default_factory=dict)

    @property
    def results(self) -> tuple[str, ...]:
        """Names of the results it gives."""
        return tuple(self.reports.values()) or (self.name,)


@dataclass(frozen=True)
class Part:
    """Checks that run at the same time, and the seconds that they take together, by estimate."""

    name: str
    seconds: float
    checks: tuple[Check, ...]

    @property
    def results(self) -> tuple[str, ...]:
        """Names of the results it gives."""
        return tuple(name for check in self.checks for name in check.results)


@dataclass(frozen=True)
class Result:
    """How a check went."""

    check: str
    result: str
    seconds: float
    detail: str


@dataclass(frozen=True)
class Missing:
    """A missing requirement: the reason, and whether checks can run without it."""

    reason: str
    optional: bool


class Deadline:
    """The end of the run."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Seconds until then."""
        return self._end - self._clock()


def planned(parts: Sequence[Part], seconds: float) -> Iterator[tuple[Part, bool]]:
    """Each part, and whether it runs within ``seconds`` if all of them take as long as estimated."""
    for part in parts:
        fits = part.seconds <= seconds
        yield part, fits
        seconds -= part.seconds if fits else 0


class Runner:
    """Runs parts.

    Args:
        deadline: after which nothing runs.
        missing: requirements that are not here, by name.
        environment: variables of every check.
        record: called with each result as soon as it is known.
        say: called with text for whoever watches.
        log: called with each line of output that is not shown.
    """

    def __init__(
        self,
        deadline: Deadline,
        missing: Mapping[str, Missing],
        environment: Mapping[str, str],
        record: Callable[[Result], None],
        say: Callable[[str], None],
        log: Callable[[str], None],
    ) -> None:
        self._deadline = deadline
        self._missing = missing
        self._environment = environment
        self._record = record
        self._say = say
        self._log = log
        self._lock, self._telling = threading.Lock(), threading.Lock()
        self._ended = False
        self._running: set[subprocess.Popen[str]] = set()

    def run(self, parts: Sequence[Part]) -> None:
        """Runs the parts in order; a part that does not fit into the remaining time is left out."""
        for part in parts:
            seconds_left = self._deadline.left()
            if seconds_left < part.seconds:
                reason = f"needs about {part.seconds:.0f} s, {max(seconds_left, 0):.0f} s were left"
                for name in part.results:
                    self._tell(Result(name, LEFT_OUT, 0.0, reason))
                continue
            self._say(f"-- {part.name}: about {part.seconds:.0f} s of the {seconds_left:.0f} s left")
            with ThreadPoolExecutor(len(part.checks)) as pool:
                try:
                    for future in [pool.submit(self._check, check) for check in part.checks]:
                        future.result()
                except BaseException:  # such as a signal: the pool waits for what runs
                    self.end()
                    raise

    def end(self) -> None:
        """Ends running checks and every process that they started, and begins no more."""
        with self._lock:
            self._ended = True
            for process in self._running:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)

    def _tell(self, result: Result) -> None:
        with self._telling:
            self._record(result)
        self._say(f"{result.result:8} {result.seconds:6.1f} s  {result.check}: {result.detail}")

    def _check(self, check: Check) -> None:
        """Runs one check if what it needs is here."""
        for name in check.needs:
            if name in self._missing:
                verdict = SKIPPED if self._missing[name].optional else FAILED
                for name_of_report in check.results:
                    self._tell(Result(name_of_report, verdict, 0.0, f"needs {name}: {self._missing[name].reason}"))
                return
        if check.reports:
            self._run_reports(check)
        else:
            result = self._run(check, (), lambda line: False)
            self._tell(replace(result, check=check.name))

    def _run_reports(self, check: Check) -> None:
        """Runs the command until each of its arguments has a result."""
        pending = dict(check.reports)
        while pending:
            verdicts: list[str] = []
            begun = time.monotonic()

            def hear(line: str, verdicts: list[str] = verdicts) -> bool:
                nonlocal begun
                match = _REPORT.fullmatch(line)
                if match is None or match[2] not in pending:
                    return False
                verdicts.append(match[1])
                begun, before = time.monotonic(), begun
                self._tell(Result(pending.pop(match[2]), match[1], begun - before, match[3]))
                return True

            ended = self._run(check, tuple(pending), hear)
            # A failure may end a process before the rest has run; otherwise the check that was running has ended it.
            if pending and verdicts[-1:] != [FAILED]:
                name = pending.pop(next(iter(pending)))
                if ended.result == PASSED:
                    ended = replace(ended, result=FAILED, detail=f"no result was printed; last: {ended.detail}")
                self._tell(replace(ended, check=name))

    def _run(self, check: Check, arguments: tuple[str, ...], hear: Callable[[str], bool]) -> Result:
        """Runs a command; a line that ``hear`` takes for a result gives it the time of another."""
        if self._ended or self._deadline.left() < min(LEAST_SECONDS, check.seconds):
            return Result(check.name, LEFT_OUT, 0.0, "not run: the time was up")
        start = time.monotonic()
        try:
            status, lines, cut = self._output(check, arguments, hear)
        except OSError as error:
            return Result(check.name, FAILED, 0.0, f"cannot be begun: {error}")
        seconds = time.monotonic() - start
        detail = next((line for line in reversed(lines) if line.strip()), "no output").strip()
        if status == 0:
            return Result(check.name, PASSED, seconds, detail)
        for words in check.skips:
            if any(words in line for line in lines):
                return Result(check.name, SKIPPED, seconds, words)
        if self._ended:
            return Result(check.name, LEFT_OUT, seconds, f"the run was ended; last: {detail}")
        if not check.shown:
            self._say("\n".join(f"    {line}" for line in lines[-TAIL:]))
        if status is not None:
            return Result(check.name, FAILED, seconds, f"exit status {status}: {detail}")
        if cut:
            return Result(check.name, LEFT_OUT, seconds, f"cut off by the end of the run; last: {detail}")
        expected = f"expected an end within {check.seconds:.0f} s, got none"
        return Result(check.name, FAILED, seconds, f"{expected}; last: {detail}")

    def _output(
        self, check: Check, arguments: tuple[str, ...], hear: Callable[[str], bool]
    ) -> tuple[int | None, list[str], bool]:
        """Exit status, None where it was ended; the lines of output; whether the deadline ended it."""
        process = self._begin(check, arguments)
        received: queue.SimpleQueue[str] = queue.SimpleQueue()

        def read() -> None:
            for line in process.stdout or ():
                received.put(line.rstrip("\n"))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        lines: list[str] = []
        until = time.monotonic() + check.seconds

        def take(seconds: float) -> bool:
            """Takes a line that comes within ``seconds``; whether one came."""
            nonlocal until
            try:
                lines.append(received.get(timeout=max(seconds, 0)))
            except queue.Empty:
                return False
            if check.shown:
                self._say(lines[-1])
            else:
                self._log(f"{check.name} | {lines[-1]}")
            if hear(lines[-1]):
                until = time.monotonic() + check.seconds
            return True

        try:
            while process.poll() is None and (remaining := self._seconds_left(until)) > 0:
                take(min(remaining, POLL_SECONDS))
            cut = process.poll() is None and time.monotonic() < until
        finally:
            status = self._finish(process)
        reader.join(LEAST_SECONDS)
        while take(0):
            pass
        return status, lines, cut

    def _seconds_left(self, until: float) -> float:
        return min(until - time.monotonic(), self._deadline.left())

    def _begin(self, check: Check, arguments: tuple[str, ...]) -> subprocess.Popen[str]:
        with self._lock:
            process = subprocess.Popen(
                [*check.command, *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env={**os.environ, **self._environment, **check.environment},
                process_group=0,  # so that what it starts can be ended with it
            )
            self._running.add(process)
            if self._ended:
                os.killpg(process.pid, signal.SIGKILL)
            return process

    def _finish(self, process: subprocess.Popen[str]) -> int | None:
        """The exit status of a process that ended by itself; ends one that did not."""
        with self._lock:
            self._running.discard(process)
            status = process.poll()
            if status is None:
                os.killpg(process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):  # one that a driver holds cannot be ended
                    process.wait(LEAST_SECONDS)
            return status
