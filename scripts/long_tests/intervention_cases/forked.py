"""Cases in separate processes: a case that crashes or changes its process does not affect others."""

from __future__ import annotations

import os
import pickle
import select
import signal
import time
from collections.abc import Iterator
from typing import Any

from zoo import Example

from . import judge
from .core import Intervention
from .runner import Row, rows_of


def forked(example: Example, interventions: list[Intervention], seconds: float) -> Iterator[tuple[str, list[Row]]]:
    """The rows of one example by name of intervention, each in a fork of this process.

    One that takes longer than ``seconds`` is killed, and counts as crashed, as one does that ends its process.
    """
    for intervention in interventions:
        started = time.monotonic()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            _answer(example, intervention, write)
        os.close(write)
        answer = _received(read, seconds)
        os.close(read)
        if not answer:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        yield intervention.name, pickle.loads(answer) if answer else [_ended(example, intervention, started, status)]


def _answer(example: Example, intervention: Intervention, pipe: int) -> None:
    """Runs in the fork, and does not return."""
    code = 1
    try:
        rows = list(rows_of(example, intervention))
        with os.fdopen(pipe, "wb") as file:
            pickle.dump(rows, file)
        code = 0
    finally:
        os._exit(code)


def _received(pipe: int, seconds: float) -> bytes:
    """All that is written to the pipe until its other end is closed; nothing where that takes too long."""
    parts, stop = [], time.monotonic() + seconds
    while select.select([pipe], [], [], max(0.0, stop - time.monotonic()))[0]:
        part = os.read(pipe, 1 << 16)
        if not part:
            return b"".join(parts)
        parts.append(part)
    return b""


def _ended(example: Example, intervention: Intervention, started: float, status: Any) -> Row:
    reason = f"its process ended with {os.waitstatus_to_exitcode(status)} after {time.monotonic() - started:.0f} s"
    return Row(example.name, intervention.group, intervention.name, "", "", judge.CRASHED, reason)
