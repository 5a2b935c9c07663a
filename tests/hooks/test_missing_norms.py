"""A norm of queries or keys that somebody takes away: the model's own code runs, and the report says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dit_rope
from dit_rope.adapters import adapter_of
from dit_rope.hooks.plan import make_plan
from tolerance import all_equal
from zoo import Noise, named, tensors

MISSING = [
    ("glm-image", ("norm_k",)),
    ("hunyuan-dit", ("norm_k",)),
    ("nucleus", ("norm_k",)),
    ("qwen-image", ("norm_k",)),
    ("qwen-image", ("norm_added_k",)),
    ("qwen-image", ("norm_added_q", "norm_added_k")),
]


def run(name: str, model: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return tensors(named(name).run(model, named(name).inputs(model, Noise(torch.float32))))


def without(model: Any, names: tuple[str, ...]) -> int:
    """Takes these norms from every attention module that rotates; how many there were."""
    removed = 0
    for plan in make_plan("model", model, adapter_of(model)).rotations:
        for name in names:
            if getattr(plan.attention, name, None) is not None:
                setattr(plan.attention, name, None)
                removed += 1
    return removed


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("name", "names"), MISSING, ids=str)
def test_model_whose_norms_were_taken_away_computes_what_the_unpatched_one_does(
    one_thread: None, name: str, names: tuple[str, ...], exact: bool
) -> None:
    twin, before, after = (named(name).build() for _ in range(3))
    assert without(twin, names) > 0
    without(before, names)
    attentions = [plan.attention for plan in make_plan("model", after, adapter_of(after)).rotations]
    handles = [dit_rope.patch(model, exact=exact) for model in (before, after)]
    run(name, after)
    for attention in attentions:
        for attribute in names:
            setattr(attention, attribute, None)
    bound = 0.0 if exact else 64 * torch.finfo(torch.float32).eps
    expected = run(name, twin)
    for model, handle in zip((before, after), handles, strict=True):
        for actual, twin_output in zip(run(name, model), expected, strict=True):
            assert (actual - twin_output).abs().max() <= bound * twin_output.abs().max()
        assert f"it has no {names[0]}" in str(handle.report())
        handle.undo()
        assert all_equal(run(name, model), expected)
