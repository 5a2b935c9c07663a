"""A patch is given back with its model, wherever its parts are by now, and by nobody else."""

from __future__ import annotations

import copy

import pytest
import torch
from test_patching import forward

import dit_rope
from dit_rope.hooks.class_override import Override
from model_state import state_of
from zoo import wan

pytestmark = pytest.mark.usefixtures("one_thread")


def test_copy_of_a_block_is_given_back_with_its_model() -> None:
    """People exchange blocks for copies of others, and copies of a patched block are patched."""
    model = wan.build("wan")
    handle = dit_rope.patch(model)
    model.blocks[1] = copy.deepcopy(model.blocks[0])
    patched = forward(model)
    assert any(isinstance(module.attn1.processor, Override) for module in model.blocks)
    handle.undo()
    assert not any(isinstance(module.attn1.processor, Override) for module in model.blocks)
    assert not any("_dit_rope" in vars(module) for module in model.modules())
    assert torch.equal(forward(model), patched)


def test_copy_of_a_model_outlives_the_undo_of_the_model() -> None:
    model = wan.build("wan")
    with dit_rope.patch(model):
        twin = copy.deepcopy(model)
    assert not isinstance(model.rope, Override)
    assert isinstance(twin.rope, Override)
    dit_rope.unpatch(twin)
    assert not isinstance(twin.rope, Override)


@pytest.mark.parametrize("first", [0, 1])
def test_object_of_two_models_is_patched_until_both_are_undone(first: int) -> None:
    """Two stages of a pipeline that share a rope module and a block."""
    models = [wan.build("wan"), wan.build("wan")]
    models[1].rope, models[1].blocks[0] = models[0].rope, models[0].blocks[0]
    before = [state_of(model) for model in models]
    expected = forward(models[0])
    handles = [dit_rope.patch(model) for model in models]
    assert torch.equal(forward(models[0]), expected)
    shared = models[0].rope, models[0].blocks[0].attn1.processor
    handles[first].undo()
    assert all(isinstance(target, Override) for target in shared)
    assert "undone" not in handles[1 - first].report()
    assert "where the model rotates" not in handles[1 - first].report()
    hits = dit_rope.cache_info().models.hits
    assert torch.equal(forward(models[1 - first]), expected)
    assert torch.equal(forward(models[1 - first]), expected)
    assert dit_rope.cache_info().models.hits > hits
    handles[1 - first].undo()
    assert not any(isinstance(target, Override) for target in shared)
    assert [state_of(model) for model in models] == before
