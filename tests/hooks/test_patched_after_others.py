"""Patching a model whose modules another library has wrapped before: offloaded, or cast layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import dit_rope
from split_models import counted_rotations, example_of, run, wrapped
from tolerance import all_equal


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
    model, twin = example.build(), example.build()
    for target in (model, twin):
        change(target)
    expected = run(example, twin)
    before = wrapped(model)
    with dit_rope.patch(model), counted_rotations() as rotated:
        assert all_equal(run(example, model), expected)
        hits = dit_rope.cache_info().models.hits
        assert all_equal(run(example, model), expected)
        assert dit_rope.cache_info().models.hits > hits  # its rope module builds through us, innermost
    assert rotated or name == "qwen-image"  # which multiplies complex numbers, and keeps its own rotation on CPU
    assert wrapped(model) == before
    assert all_equal(run(example, model), expected)


@pytest.mark.usefixtures("one_thread")
def test_patch_outlives_the_hooks_that_it_came_after() -> None:
    """Hooks give back the forward that they have found, which they found before the patch."""
    from accelerate.hooks import remove_hook_from_module

    example = example_of("wan")
    model, twin = example.build(), example.build()
    expected = run(example, twin)
    offloaded_by_accelerate(model)
    handle = dit_rope.patch(model)
    remove_hook_from_module(model, recurse=True)
    with counted_rotations() as rotated:
        assert all_equal(run(example, model), expected)
    assert len(rotated) == 4
    handle.undo()
    with counted_rotations() as rotated:
        assert all_equal(run(example, model), expected)
    assert not rotated
    with dit_rope.patch(model), counted_rotations() as rotated:
        assert all_equal(run(example, model), expected)
    assert len(rotated) == 4
