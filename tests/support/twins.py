"""A patched model beside an unpatched twin to which the same was done: what comes out, or what is raised."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import dit_rope
from dit_rope.adapters import adapter_of
from tolerance import all_equal
from zoo import Example, Noise, named, tensors

Act = Callable[[Any], Any]
BEFORE_AND_AFTER = ("before", "after")


def run(example: Example, model: Any, inputs: Mapping[str, Any] | None = None) -> list[torch.Tensor]:
    """One forward pass without gradients."""
    with torch.no_grad():
        arguments = example.inputs(model, Noise(torch.float32)) if inputs is None else inputs
        return tensors(example.run(model, dict(arguments)))


def attentions(model: Any) -> list[Any]:
    """The attention modules that a declaration says rotate, in order."""
    adapter = adapter_of(model)
    assert adapter is not None
    patterns = [(rotation.attention, rotation.when) for rotation in adapter.rotations]
    return [
        module
        for path, module in model.named_modules()
        if any(re.fullmatch(pattern, path) and (not when or when(model, module)) for pattern, when in patterns)
    ]


@dataclass(frozen=True)
class Outcome:
    """What some calls gave, or the exception that one of them raised."""

    outputs: list[torch.Tensor]
    error: BaseException | None

    @classmethod
    def of(cls, call: Callable[[], list[torch.Tensor]]) -> Outcome:
        """Runs ``call``."""
        try:
            return cls(call(), None)
        except Exception as error:
            return cls([], error)


def assert_like(patched: Outcome, twin: Outcome, exact: bool) -> None:
    """The same bits in exact mode, the same but for roundings in fast mode, or the same type of exception."""
    assert type(patched.error) is type(twin.error), (patched.error, twin.error)
    assert len(patched.outputs) == len(twin.outputs)
    for actual, expected in zip(patched.outputs, twin.outputs, strict=True):
        if exact:
            assert torch.equal(actual, expected), (actual - expected).abs().max()
        else:
            scale = float(expected.abs().max())
            assert float((actual - expected).abs().max()) <= 64 * torch.finfo(torch.float32).eps * max(1.0, scale)


def check(name: str, act: Act, when: str, exact: bool, changes: bool = True, calls: int = 1) -> None:
    """Does ``act`` to a model before or after it is patched, and to a twin that is not.

    ``changes``: what was done changes the twin's output, so that missing it would show.
    """
    example = named(name)
    twin, model = example.build(), example.build()
    plain = run(example, twin)
    act(twin)
    expected = Outcome.of(lambda: [x for _ in range(calls) for x in run(example, twin)])
    if changes and expected.error is None:
        assert not all_equal(plain, expected.outputs)
    run(example, model)
    if when == "before":
        act(model)
    handle = dit_rope.patch(model, exact=exact)
    if when == "after":
        run(example, model)
        act(model)
    assert_like(Outcome.of(lambda: [x for _ in range(calls) for x in run(example, model)]), expected, exact)
    handle.undo()
    assert_like(Outcome.of(lambda: [x for _ in range(calls) for x in run(example, model)]), expected, True)
