"""Patching a model whose modules another library has wrapped before: offloaded, or cast layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import dit_rope
from split_models import counted_turns, example_of, run, same, wrapped


def offloaded_by_accelerate(model: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))


def offloaded_in_groups(model: Any) -> None:
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    apply_group_offloading(model, cpu, cpu, offload_type="leaf_level")


def cast_by_layer(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


@pytest.mark.parametrize("name", ["wan", "flux", "qwen-image", "ltx-padded"])
@pytest.mark.parametrize("change", [offloaded_by_accelerate, offloaded_in_groups, cast_by_layer])
@pytest.mark.usefixtures("one_thread")
def test_patched_after_a_library_has_wrapped_its_modules(name: str, change: Callable[[Any], None]) -> None:
    example = example_of(name)
    model, theirs = example.build(), example.build()
    for each in (model, theirs):
        change(each)
    expected = run(example, theirs)
    before = wrapped(model)
    with dit_rope.patch(model), counted_turns() as turned:
        assert same(run(example, model), expected)
        hits = dit_rope.cache_info().models.hits
        assert same(run(example, model), expected)
        assert dit_rope.cache_info().models.hits > hits  # its rope module builds through us, innermost
    assert turned or name == "qwen-image"  # which multiplies complex numbers, and keeps its own rotation on CPU
    assert wrapped(model) == before
    assert same(run(example, model), expected)


@pytest.mark.usefixtures("one_thread")
def test_patch_outlives_the_hooks_that_it_came_after() -> None:
    """Hooks give back the forward that they have found, which they found before the patch."""
    from accelerate.hooks import remove_hook_from_module

    example = example_of("wan")
    model, theirs = example.build(), example.build()
    expected = run(example, theirs)
    offloaded_by_accelerate(model)
    handle = dit_rope.patch(model)
    remove_hook_from_module(model, recurse=True)
    with counted_turns() as turned:
        assert same(run(example, model), expected)
    assert len(turned) == 4
    handle.undo()
    with counted_turns() as turned:
        assert same(run(example, model), expected)
    assert not turned
    with dit_rope.patch(model), counted_turns() as turned:
        assert same(run(example, model), expected)
    assert len(turned) == 4
