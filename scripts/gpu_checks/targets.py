"""What the kernels are held to, and whether measured rows reach it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that what is missing can be listed where torch is
    from benchmarks.results import Row

HEADLINE = ("wan-1.3b-480p", "wan-14b-720p", "hunyuan-video-720p")
BACKEND = "cuda"
# Runs of the benchmark: which one's figures are held to the shares of copy, which has the other libraries, and which
# has everything.
SHARES_RUN, PEERS_RUN, ALL_RUN = "headline", "peers", "all"
# Stands for the shape in rows of host time, which hardly depends on one.
HOST = "host"
HOST_MICROSECONDS = 15.0
ALLOCATIONS = {
    "rotate": 2,
    "rotate in place": 0,
    "norm per head, rotate": 2,
    "norm across heads, rotate": 2,
}
"""Blocks that one call may allocate: its outputs."""
HOST_OPERATIONS = tuple(ALLOCATIONS)


@dataclass(frozen=True)
class Target:
    """The least share of copy bandwidth, and the least speed as a multiple of the best peer's, at headline shapes."""

    operation: str
    of_copy: float
    times_best_peer: float


TARGETS = (
    Target("rotate", 0.93, 1.0),
    Target("norm per head, rotate", 0.90, 1.3),
    Target("norm across heads, rotate", 0.88, 1.3),
)


@dataclass(frozen=True)
class Verdict:
    """One target at one shape: ``passed`` is None where there was no figure, or nothing to compare it with."""

    name: str
    passed: bool | None
    detail: str


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """Every target's verdict on the rows of ``kernels-<device>.csv``; what was not measured is said to be missing."""
    verdicts = [verdict for target in TARGETS for shape in HEADLINE for verdict in _at_shape(rows, target, shape)]
    return verdicts + [_on_host(rows, operation) for operation in HOST_OPERATIONS]


def _at_shape(rows: Sequence[Row], target: Target, shape: str) -> Iterator[Verdict]:
    name = f"{target.operation} at {shape}"
    row = _find(rows, SHARES_RUN, shape, target.operation)
    share = _number(row, "of_copy")
    expected = f"expected at least {target.of_copy:.0%} of copy bandwidth"
    if share is None:
        yield _without_figure(name, expected, row)
    else:
        yield Verdict(name, share >= target.of_copy, f"{expected}, got {share:.1%}")
    row = _find(rows, PEERS_RUN, shape, target.operation)
    times, name = _number(row, "times_best_peer"), f"{name}, peers"
    expected = f"expected at least {target.times_best_peer} times the best peer"
    if times is None and _number(row, "ms_median") is not None:
        yield Verdict(name, None, f"{expected}, but no peer ran")
    elif times is None:
        yield _without_figure(name, expected, row)
    else:
        yield Verdict(name, times >= target.times_best_peer, f"{expected}, got {times:.2f} ({row['best_peer']})")


def _on_host(rows: Sequence[Row], operation: str) -> Verdict:
    row = _find(rows, SHARES_RUN, HOST, operation)
    milliseconds, blocks = _number(row, "ms_median"), _number(row, "allocations")
    name = f"host time of {operation}"
    expected = f"expected at most {HOST_MICROSECONDS:.0f} us and {ALLOCATIONS[operation]} allocations"
    if milliseconds is None or blocks is None:
        return _without_figure(name, expected, row)
    passed = 1e3 * milliseconds <= HOST_MICROSECONDS and blocks == ALLOCATIONS[operation]
    return Verdict(name, passed, f"{expected}, got {1e3 * milliseconds:.1f} us and {blocks:.0f}")


def _without_figure(name: str, expected: str, row: Row) -> Verdict:
    """A failure where the kernel failed, and open where nobody got so far as to measure it."""
    reason = f"got no figure: {row.get('note') or 'not measured'}"
    return Verdict(name, False if row.get("failed") else None, f"{expected}, {reason}")


def _find(rows: Sequence[Row], run: str, shape: str, operation: str) -> Row:
    """The row of dit_rope in a run, else in a run of everything, else an empty row."""
    for name_of_run in (run, ALL_RUN):
        for row in rows:
            if (row["run"], row["shape"], row["operation"], row["variant"]) == (name_of_run, shape, operation, BACKEND):
                return row
    return {}


def _number(row: Row, column: str) -> float | None:
    value = row.get(column)
    return None if value in (None, "") else float(value)
