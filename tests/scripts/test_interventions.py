"""The matrix of interventions: that it can fail, and a part of it that runs in less than two minutes."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import dit_rope
import zoo
from long_tests.intervention_cases import INTERVENTIONS, Intervention, judge, runner, tables
from long_tests.intervention_cases.core import Subject
from long_tests.intervention_cases.parts import (
    changed_arguments,
    named_arguments,
    rotated_twice,
    scaled,
    tables_rotated_back,
)
from zoo import named

BY_NAME = {intervention.name: intervention for intervention in INTERVENTIONS}
EXAMPLES = ("wan", "flux", "hunyuan-video-no-norm", "hidream", "cogvideox-1.5", "joyimage")
"""Examples of the part that runs here: each intervention is put onto one of them that it applies to, in turn."""
FLUX = "flux-single-blocks"
FINE = (judge.EQUAL, judge.ROUNDED, judge.SAME_ERROR, judge.REFUSED, judge.REFUSED_LATE)


@pytest.fixture(autouse=True)
def _quiet(one_thread: None) -> Iterator[None]:
    dit_rope.cache_clear()
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


class StandIn:
    """A patch that does what a test makes it do, and takes all of that back but what it is told to leave."""

    def __init__(self, model: Any, put: Callable[[Any, Callable[..., None]], None], leaves: bool = False) -> None:
        self.back: list[Callable[[], Any]] = []
        put(model, lambda undo, *args: self.back.append(lambda: undo(*args)))
        self.leaves = leaves

    def undo(self) -> None:
        for step in () if self.leaves else reversed(self.back):
            step()


def stand_in(put: Callable[..., None], leaves: bool = False) -> Callable[..., StandIn]:
    def patch(model: Any, exact: bool | None = None) -> StandIn:
        return StandIn(model, put, leaves)

    return patch


def outcomes(name: str, example: str, patch: Callable[..., Any], orders: Any = None) -> set[str]:
    """Outcomes by mode."""
    rows = list(runner.rows_of(named(example), BY_NAME[name], patch, orders))
    assert all(row.example == example for row in rows)
    return {row.outcome for row in rows}


def _nothing(model: Any, off: Callable[..., None]) -> None:
    pass


def _forward(model: Any, off: Callable[..., None], around: Callable[[Any], Any]) -> None:
    """Puts ``around(forward)`` in place of the model's forward."""
    model.forward = around(model.forward)
    off(delattr, model, "forward")


def _unrotated(model: Any, off: Callable[..., None]) -> None:
    """Attention modules are given no tables, and nobody rotates instead."""
    for module in model.modules():
        if type(module).__name__ == "FluxAttention":
            handle = module.register_forward_pre_hook(
                lambda m, a, k: (a, {**k, "image_rotary_emb": None}), with_kwargs=True
            )
            off(handle.remove)


def _stale(model: Any, off: Callable[..., None]) -> None:
    """Tables of the first call are those of every call."""
    results: list[Any] = []
    real = model.pos_embed.forward

    def forward(ids: torch.Tensor) -> Any:
        results.append(real(ids))
        return results[0]

    model.pos_embed.forward = forward
    off(delattr, model.pos_embed, "forward")


def _tagged(model: Any, off: Callable[..., None]) -> None:
    model.pos_embed.tag = "left"
    off(delattr, model.pos_embed, "tag")


def _hooked(model: Any, off: Callable[..., None]) -> None:
    off(model.single_transformer_blocks[0].register_forward_hook(lambda m, a, o: None).remove)


def _reclassed(model: Any, off: Callable[..., None]) -> None:
    norm = model.single_transformer_blocks[0].attn.norm_q
    off(setattr, norm, "__class__", type(norm))
    norm.__class__ = type("Seam", (type(norm),), {})


def _other_parameter(model: Any, off: Callable[..., None]) -> None:
    norm = model.single_transformer_blocks[0].attn.norm_q
    off(setattr, norm, "weight", norm.weight)
    norm.weight = torch.nn.Parameter(norm.weight.detach().clone())


def _swallowing(model: Any, off: Callable[..., None]) -> None:
    def around(real: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            try:
                return real(*args, **kwargs)
            except RuntimeError:
                return (kwargs["hidden_states"],)

        return forward

    _forward(model, off, around)


def _failing(error: BaseException) -> Callable[..., None]:
    def put(model: Any, off: Callable[..., None]) -> None:
        def around(real: Any) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                raise error

            return forward

        _forward(model, off, around)

    return put


def _off_by(share: float) -> Callable[..., None]:
    def put(model: Any, off: Callable[..., None]) -> None:
        off(model.register_forward_hook(lambda m, a, o: (o[0] * (1 + share),)).remove)

    return put


@pytest.mark.parametrize(
    ("name", "put", "expected"),
    [
        ("nothing", _nothing, {judge.EQUAL}),
        ("nothing", _unrotated, {judge.DIFFERENT}),
        ("nothing", _stale, {judge.EQUAL}),
        ("other ids in every step", _stale, {judge.DIFFERENT}),
        ("ids and tables written in place", _stale, {judge.DIFFERENT}),
        ("hook on blocks scales", _unrotated, {judge.DIFFERENT}),
        ("nothing", _swallowing, {judge.EQUAL}),
        ("ids 4 short", _swallowing, {judge.NO_ERROR}),
        ("nothing", _failing(ArithmeticError("no")), {judge.CRASHED}),
        ("ids 4 short", _failing(ArithmeticError("no")), {judge.OTHER_ERROR}),
        ("nothing", _off_by(1e-6), {judge.DIFFERENT, judge.ROUNDED}),
        ("nothing", _off_by(1e-2), {judge.DIFFERENT}),
    ],
)
def test_matrix_tells_what_is_wrong(name: str, put: Callable[..., None], expected: set[str]) -> None:
    assert outcomes(name, FLUX, stand_in(put), ("before", "after")) == expected


@pytest.mark.parametrize("put", [_tagged, _hooked, _reclassed, _other_parameter])
def test_matrix_sees_what_is_left_behind(put: Callable[..., None]) -> None:
    assert outcomes("nothing", FLUX, stand_in(put), ("after",)) == {judge.EQUAL}
    assert outcomes("nothing", FLUX, stand_in(put, leaves=True), ("before",)) == {judge.LEFT}
    assert outcomes("hook on blocks scales", FLUX, stand_in(put, leaves=True), ("after",)) == {judge.LEFT}


def test_patch_that_stays_when_undone_is_different_afterwards() -> None:
    """Even by rounding: after ``undo()`` fast mode owes the same bits."""
    rows = list(runner.rows_of(named(FLUX), BY_NAME["nothing"], stand_in(_off_by(1e-6), True), ("after",)))
    assert [(row.mode, row.outcome) for row in rows] == [("exact", judge.DIFFERENT), ("fast", judge.DIFFERENT)]
    assert rows[1].detail.startswith("after undo")


def test_refusals_are_told_from_crashes_and_must_change_nothing() -> None:
    def patch(error: Exception, before: Callable[[Any], None] = lambda model: None) -> Callable[..., Any]:
        def refuse(model: Any, exact: bool | None = None) -> Any:
            before(model)
            raise error

        return refuse

    assert outcomes("nothing", FLUX, patch(ValueError("model must be another"))) == {judge.REFUSED}
    assert outcomes("nothing", FLUX, patch(NotImplementedError("meta"))) == {judge.CRASHED}
    tagged = patch(ValueError("model must be another"), lambda model: setattr(model, "tag", 1))
    assert outcomes("nothing", FLUX, tagged) == {judge.LEFT}
    assert {row["reason"] for row in tables.reasons(
        runner.rows_of(named(FLUX), BY_NAME["nothing"], patch(ValueError("model must be another")))
    )} == {"ValueError: model must be another"}  # fmt: skip


def test_errors_of_the_package_in_a_call_are_told_from_others() -> None:
    refusal = runner.judge.step(lambda: dit_rope.patch(torch.nn.Linear(2, 2)), KeyboardInterrupt)
    assert refusal.refused
    assert refusal.error == "UnsupportedModelError"
    assert not runner.judge.step(lambda: torch.ones(2) @ torch.ones(3), KeyboardInterrupt).refused


def test_twin_that_is_random_is_not_judged_and_one_that_fails_neither() -> None:
    count = itertools.count()

    def shaky(subject: Subject) -> None:
        subject.run = lambda inputs: torch.tensor(next(count))

    def broken(subject: Subject) -> None:
        raise OSError("no library")

    for put in (shaky, broken):
        rows = list(runner.rows_of(named(FLUX), Intervention("x", "test", put), stand_in(_nothing)))
        assert {row.outcome for row in rows} == {judge.NOT_JUDGED}


def test_intervention_that_changes_nothing_is_named() -> None:
    blind = Intervention("nothing", "control", lambda subject: None, changes=True)
    rows = list(runner.rows_of(named(FLUX), blind, stand_in(_nothing)))
    assert [row.changed for row in rows] == [False] * len(rows)
    intervention = BY_NAME["hook on blocks scales"]
    rows += runner.rows_of(named(FLUX), intervention, stand_in(_nothing))
    assert all(row.changed for row in rows if row.intervention == intervention.name)
    assert tables.blind(rows) == []
    assert tables.blind(
        [runner.Row(FLUX, intervention.group, intervention.name, "after", "exact", judge.EQUAL, changed=False)]
    ) == [intervention.name]


def test_rotated_tensors_are_counted() -> None:
    rows = list(runner.rows_of(named("wan"), BY_NAME["nothing"]))
    assert all(row.rotated > 0 for row in rows)
    assert all(row.rotated == 0 for row in runner.rows_of(named("wan"), BY_NAME["nothing"], stand_in(_nothing)))


def test_every_example_has_parts_that_rotate() -> None:
    """What interventions act on is found without dit_rope; where nothing is found, they would all not apply."""
    for name in EXAMPLES:
        parts = runner.parts_of(named(name))
        assert parts.attentions
        assert parts.blocks
        assert parts.norms or parts.projections
    assert len(zoo.EXAMPLES) == len({example.name for example in zoo.EXAMPLES}) >= 129


def test_helpers_change_what_they_say() -> None:
    x = torch.arange(1.0, 5).reshape(1, 4)
    assert torch.equal(scaled(x, 2.0, even=True), 2 * x)
    assert scaled(x, 1) is x
    assert not torch.equal(scaled(x) / x, torch.full_like(x, 1.5))
    assert all(map(torch.equal, tables_rotated_back((x, x)), (x, -x)))
    assert torch.equal(tables_rotated_back(torch.complex(x, x)), torch.complex(x, -x))
    assert torch.equal(rotated_twice(lambda y, n: y + n)(x, 2), x + 4)
    assert torch.equal(rotated_twice(lambda y, z, n: (y + n, z + n))(x, x, 2)[1], x + 4)
    attention = torch.nn.Identity()
    assert named_arguments(attention, (x,), {}) == {"input": x}
    assert changed_arguments(attention, (x,), {"a": 1}, lambda name, value: name) == (("input",), {"a": "a"})


@pytest.mark.parametrize("number", range(len(INTERVENTIONS)), ids=lambda number: INTERVENTIONS[number].name)
def test_no_silent_difference(number: int) -> None:
    """One example for each cheap intervention, in one mode before the patch and in the other after it.

    scripts/long_tests/interventions.py runs all examples in both.
    """
    intervention = INTERVENTIONS[number]
    if not intervention.quick:
        pytest.skip("slow: scripts/long_tests/interventions.py runs it")
    for offset in range(len(EXAMPLES)):
        name = EXAMPLES[(number + offset) % len(EXAMPLES)]
        rows = list(runner.rows_of(named(name), replace(intervention, halved=True), orders=("before", "after")))
        if rows and rows[0].outcome not in (judge.NOT_APPLICABLE, judge.NOT_JUDGED):
            break
    else:
        pytest.skip(rows[0].detail)
    bad = [tables.line(row) for row in rows if row.outcome not in FINE]
    assert not bad, "\n".join(bad)
