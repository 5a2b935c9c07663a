"""What the kernels are held to, and whether measured rows reach it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dit_rope.benchmark.results import Row

HEADLINE = ("wan-1.3b-480p", "wan-14b-720p", "hunyuan-video-720p")
BACKEND = "cuda"
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
    """One target at one shape: ``passed`` is None where there was nothing to compare with."""

    name: str
    passed: bool | None
    detail: str


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """Every target's verdict on the rows of ``kernels-<device>.csv``; a figure that is missing fails."""
    verdicts = [verdict for target in TARGETS for shape in HEADLINE for verdict in _at_shape(rows, target, shape)]
    return verdicts + [verdict for operation in HOST_OPERATIONS for verdict in _on_host(rows, operation)]


def _at_shape(rows: Sequence[Row], target: Target, shape: str) -> Iterator[Verdict]:
    row = _find(rows, shape, target.operation)
    name = f"{target.operation} at {shape}"
    share = _number(row, "of_copy")
    expected = f"expected at least {target.of_copy:.0%} of copy bandwidth"
    if share is None:
        yield Verdict(name, False, f"{expected}, got no figure: {row.get('note') or 'not measured'}")
        return
    yield Verdict(name, share >= target.of_copy, f"{expected}, got {share:.1%}")
    times = _number(row, "times_best_peer")
    expected = f"expected at least {target.times_best_peer} times the best peer"
    if times is None:
        yield Verdict(f"{name}, peers", None, f"{expected}, but no peer ran")
    else:
        yield Verdict(f"{name}, peers", times >= target.times_best_peer, f"{expected}, got {times:.2f}")


def _on_host(rows: Sequence[Row], operation: str) -> Iterator[Verdict]:
    row = _find(rows, HOST, operation)
    milliseconds, blocks = _number(row, "ms_median"), _number(row, "allocations")
    name = f"host time of {operation}"
    expected = f"expected at most {HOST_MICROSECONDS:.0f} us and {ALLOCATIONS[operation]} allocations"
    if milliseconds is None or blocks is None:
        yield Verdict(name, False, f"{expected}, got no figure")
        return
    passed = 1e3 * milliseconds <= HOST_MICROSECONDS and blocks == ALLOCATIONS[operation]
    yield Verdict(name, passed, f"{expected}, got {1e3 * milliseconds:.1f} us and {blocks:.0f}")


def _find(rows: Sequence[Row], shape: str, operation: str) -> Row:
    wanted = (shape, operation, BACKEND)
    return next((row for row in rows if (row["shape"], row["operation"], row["variant"]) == wanted), {})


def _number(row: Row, column: str) -> float | None:
    value = row.get(column)
    return None if value in (None, "") else float(value)
