"""Runs one example under one intervention, patched in every order and mode, beside an unpatched twin."""

from __future__ import annotations

import contextlib
import functools
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

import dit_rope
from dit_rope.rotation import ops
from zoo import Example, Noise, named

from . import judge
from .core import Intervention, NotApplicable, Stopped, Subject
from .judge import Step
from .parts import Parts, find_parts

MODES = {"exact": True, "fast": False}
ONE_MODE = {"taken off first": "exact", "again": "fast"}
"""Orders that run in one mode."""
ROUNDS = ((0, 1, 2), (0,), (0, 2))
"""Steps while patched, then after ``undo()`` with the intervention still on, then with it off."""
Patching = Callable[..., Any]


@dataclass(frozen=True)
class Row:
    """One case, as the detailed table has it. ``rotated`` counts tensors that were rotated here."""

    example: str
    group: str
    intervention: str
    when: str
    mode: str
    outcome: str
    detail: str = ""
    rotated: int = 0
    changed: bool | None = None


@dataclass
class _Run:
    """The results of one model's rounds, and its objects before and after them."""

    rounds: list[list[Step]] = field(default_factory=list)
    objects: tuple[Any, Any] = ({}, {})
    refused: str = ""
    failed: str = ""
    rotated: int = 0


@functools.cache
def _parts_of_name(name: str) -> Parts:
    example = named(name)
    model = example.build(torch.float32)
    with torch.no_grad():
        return find_parts(model, lambda: example.run(model, example.inputs(model, Noise(torch.float32, 1))))


def parts_of(example: Example) -> Parts:
    """The parts, read from a model that is built for this alone."""
    return _parts_of_name(example.name)


def subject_of(example: Example, intervention: Intervention) -> Subject:
    """A newly built model."""
    return Subject(example, example.build(intervention.dtype), parts_of(example), intervention.dtype)


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """A list that gets a number for each tensor that dit_rope rotates."""
    rotations: list[int] = []
    rotate = ops.rotate

    def counting(xs: Any, *args: Any, **options: Any) -> Any:
        rotations.extend([1] * len(xs))
        return rotate(xs, *args, **options)

    with mock.patch.object(ops, "rotate", counting):
        yield rotations


def steps(subject: Subject, numbers: tuple[int, ...]) -> list[Step]:
    """Runs these steps, each from another seed."""
    steps = []
    for number in numbers:
        torch.manual_seed(number)
        subject.judged.clear()

        def run_step(number: int = number) -> Any:
            subject.before_step(number)
            output = subject.run(subject.inputs(number))
            return output, list(subject.judged)

        steps.append(judge.step(run_step, Stopped))
    return steps


def twin_of(example: Example, intervention: Intervention, warm: bool = False) -> _Run:
    """The unpatched model under the intervention: the same rounds, in which nothing is patched.

    A ``warm`` one is called once before, as a model is that was patched before: some models cache tables.
    """
    subject, run = subject_of(example, intervention), _Run()
    before = judge.objects(subject.model)
    if warm:
        steps(subject, (0,))
    try:
        intervention.put(subject)
        run.rounds = [steps(subject, ROUNDS[0]), steps(subject, ROUNDS[1])]
    finally:
        subject.take_off()
    if intervention.reversible:
        run.rounds.append(steps(subject, ROUNDS[2]))
    run.objects = before, judge.objects(subject.model)
    return run


def patched(
    example: Example, intervention: Intervention, when: str, exact: bool, patch: Patching = dit_rope.patch
) -> _Run:
    """The same rounds of a model that is patched, in one of the orders."""
    subject, run = subject_of(example, intervention), _Run()
    before = judge.objects(subject.model)
    with counted() as rotated:
        try:
            _in_order(subject, intervention, when, functools.partial(patch, exact=exact), run, rotated)
        finally:
            subject.take_off()
    run.objects = before, judge.objects(subject.model)
    return run


def _in_order(
    subject: Subject, intervention: Intervention, when: str, patch: Patching, run: _Run, rotated: list[int]
) -> None:
    handle: Any = None
    if when == "again":
        first = _patched_or_refused(subject, patch, run)
        steps(subject, (0,))
        if first is not None:
            first.undo()
    early = when in ("after", "taken off first")
    if early:
        handle = _patched_or_refused(subject, patch, run)
    intervention.put(subject)
    if not early:
        with subject.patching():
            handle = _patched_or_refused(subject, patch, run)
    rotated.clear()
    run.rounds.append(steps(subject, ROUNDS[0]))
    run.rotated = len(rotated)
    if when == "taken off first":
        subject.take_off()
        run.rounds.append([])
        run.rounds.append(steps(subject, ROUNDS[2]))
        if handle is not None:
            handle.undo()
        return
    if handle is not None:
        handle.undo()
    run.rounds.append(steps(subject, ROUNDS[1]))
    subject.take_off()
    if intervention.reversible:
        run.rounds.append(steps(subject, ROUNDS[2]))


def _patched_or_refused(subject: Subject, patch: Patching, run: _Run) -> Any:
    try:
        return patch(subject.model)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"
        run.refused, run.failed = (reason, "") if isinstance(error, ValueError) else ("", reason)
    return None


def bound_of(example: Example, intervention: Intervention) -> float:
    """How far results may be off where only roundings differ, relative to the largest value of a tensor.

    It is counted in roundings of the coarsest dtype that queries and keys are rounded to.
    """
    dtypes = [intervention.rounded or intervention.dtype, torch.float32]
    if intervention.dtype == torch.float64:
        return intervention.roundings * torch.finfo(torch.float32).eps  # of the tables of most
    cls = parts_of(example).classes[""]
    model = f"{cls.__module__}.{cls.__qualname__}"
    if "Kandinsky" in model:
        dtypes.append(torch.bfloat16)  # its own code rounds rotated queries and keys to it, whatever their dtype
    return intervention.roundings * max(torch.finfo(dtype).eps for dtype in dtypes)


def judged(run: _Run, twin: _Run, when: str, exact: bool, bound: float, undo_reaches: bool = True) -> tuple[str, str]:
    """The worst of the rounds, and of what was left behind."""
    outcomes = []
    names = ("patched", "after undo", "taken off")
    for number, (patched, unpatched) in enumerate(zip(run.rounds, twin.rounds, strict=False)):
        if not patched:
            continue
        undone = number > 0 and when != "taken off first" and undo_reaches
        bitwise = exact or run.refused or run.failed or undone
        outcome, reason = judge.compared(patched, unpatched, bool(bitwise), bound)
        outcomes.append((outcome, f"{names[number]}, {reason}" if reason else ""))
    remains = judge.left_after_undo(run.objects, twin.objects)
    if remains:
        outcomes.append((judge.LEFT, remains))
    if run.failed:
        outcomes.append((judge.CRASHED, f"patch raises {run.failed}"))
    worst = max(outcomes, key=lambda outcome: judge.OUTCOMES.index(outcome[0]))
    if run.refused and worst[0] in (judge.EQUAL, judge.ROUNDED, judge.SAME_ERROR):
        return judge.REFUSED, run.refused
    return worst


def rows_of(
    example: Example, intervention: Intervention, patch: Patching = dit_rope.patch, orders: Any = None
) -> Iterator[Row]:
    """All orders and modes of one example under one intervention."""
    orders = [order for order in intervention.orders if orders is None or order in orders]
    row = functools.partial(Row, example.name, intervention.group, intervention.name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            twin = twin_of(example, intervention)
        except NotApplicable as why:
            yield row("", "", judge.NOT_APPLICABLE, str(why))
            return
        except Exception as error:
            yield row("", "", judge.NOT_JUDGED, f"unpatched: {type(error).__name__}: {str(error)[:200]}")
            return
        changed = _changed(example, intervention, twin) if intervention.changes else None
        bound = bound_of(example, intervention)
        for when in orders:
            if when == "taken off first" and not intervention.reversible:
                continue
            if when == "again":
                twin = twin_of(example, intervention, warm=True)
            for mode in modes_of(example, intervention, when):
                exact = MODES[mode]
                yield _row(example, intervention, (when, mode, exact), twin, bound, patch, changed)


def modes_of(example: Example, intervention: Intervention, when: str) -> tuple[str, ...]:
    """The modes that one order runs in."""
    if when in ONE_MODE:
        return (ONE_MODE[when],)
    if not intervention.halved:
        return tuple(MODES)
    odd = zlib.crc32(example.name.encode()) % 2
    return (tuple(MODES)[(odd + (when == "after")) % 2],)


def _row(
    example: Example, intervention: Intervention, case: tuple[str, str, bool], twin: _Run, bound: float,
    patch: Patching, changed: bool | None,
) -> Row:  # fmt: skip
    when, mode, exact = case
    row = functools.partial(Row, example.name, intervention.group, intervention.name, when, mode, changed=changed)
    try:
        run = patched(example, intervention, when, exact, patch)
    except (Exception, Stopped) as error:
        return row(judge.CRASHED, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}")
    outcome, detail = judged(run, twin, when, exact, bound, intervention.undo_reaches)
    if outcome in judge.SILENT and _nondeterministic(example, intervention, twin, when == "again"):
        outcome, detail = judge.NOT_JUDGED, "two unpatched twins differ"
    return row(outcome, detail, run.rotated)


def _nondeterministic(example: Example, intervention: Intervention, twin: _Run, warm: bool) -> bool:
    other = twin_of(example, intervention, warm)
    outcomes = [judge.compared(a, b, True, 0.0)[0] for a, b in zip(other.rounds, twin.rounds, strict=True)]
    return any(outcome not in (judge.EQUAL, judge.SAME_ERROR) for outcome in outcomes)


def _changed(example: Example, intervention: Intervention, twin: _Run) -> bool:
    """Whether the intervention changes what the unpatched model gives, or makes it raise."""
    subject = subject_of(example, intervention)
    alone = steps(subject, ROUNDS[0])
    outcomes = (judge.compared([a], [b], True, 0.0)[0] for a, b in zip(twin.rounds[0], alone, strict=True))
    return any(outcome != judge.EQUAL for outcome in outcomes)
