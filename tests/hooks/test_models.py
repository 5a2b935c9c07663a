"""Every model that a patch knows: the same bits as unpatched, nothing left behind, something gained."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import dit_rope
from dit_rope.adapters import adapter_of
from dit_rope.hooks import attention, rotating_norms
from dit_rope.hooks.packed_tables import UnfitTable
from dit_rope.models import ADAPTERS
from dit_rope.rotation import ops
from model_state import state_of
from tolerance import all_equal
from zoo import EXAMPLES, Example, Noise, tensors

DTYPES = [torch.float32, torch.bfloat16]
PATCHED = [example for example in EXAMPLES if example.model in {adapter.model for adapter in ADAPTERS}]
BY_NAME = pytest.mark.parametrize("example", PATCHED, ids=lambda example: example.name)


pytestmark = pytest.mark.usefixtures("one_thread")


def forward(example: Example, model: torch.nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
    with torch.no_grad():
        return tensors(example.forward(model, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@BY_NAME
def test_patched_equals_unpatched_bitwise_and_undo_leaves_nothing(example: Example, dtype: torch.dtype) -> None:
    model = example.build(dtype)
    forward(example, model, dtype)
    earlier = state_of(model)
    expected = forward(example, model, dtype)
    before, keys = state_of(model), list(model.state_dict())
    assigned = {name for path in before for name in before[path][1] if before[path][1][name] != earlier[path][1][name]}
    handle = dit_rope.patch(model, exact=True)
    assert list(model.state_dict()) == keys
    for _ in range(2):
        assert all_equal(forward(example, model, dtype), expected)
    handle.undo()
    after = state_of(model)
    for name in assigned:  # by the model's own forward
        for _, attributes, *_ in (*before.values(), *after.values()):
            attributes.pop(name, None)
    assert after == before
    assert all_equal(forward(example, model, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "example", [example for example in PATCHED if example.trains], ids=lambda example: example.name
)
def test_patched_gradients_equal_unpatched_bitwise(example: Example, dtype: torch.dtype) -> None:
    model = example.build(dtype)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        sum(
            output.square().sum() for output in tensors(example.forward(model, dtype)) if output.requires_grad
        ).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    assert expected
    with dit_rope.patch(model, exact=True):
        actual = gradients()
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@BY_NAME
def test_fast_mode_errs_as_unpatched_does(example: Example, dtype: torch.dtype) -> None:
    """Both against the model in float64 where it runs there; it rounds no more often than the model's own code."""
    model = example.build(dtype)
    expected = forward(example, model, dtype)
    with dit_rope.patch(model, exact=False):
        actual = forward(example, model, dtype)
    # Unpatched, this class rounds rotated queries and keys to bfloat16, whatever its dtype.
    rounded = torch.bfloat16 if example.model_class.__name__ == "Kandinsky5Transformer3DModel" else dtype
    bound = 64 * torch.finfo(rounded).eps
    for x, y in zip(actual, expected, strict=True):
        scale = y.float().abs().max()
        assert (x.float() - y.float()).abs().max() <= bound * scale


@BY_NAME
def test_patching_runs_nothing_and_draws_nothing(example: Example) -> None:
    """Hooks of others are not called, no rank waits for another, and random numbers go on as they would."""
    model = example.build()
    called: list[torch.nn.Module] = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: called.append(module))
    state = torch.get_rng_state()
    dit_rope.patch(model).undo()
    assert not called
    assert torch.equal(torch.get_rng_state(), state)


@BY_NAME
def test_every_norm_rotates(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equality alone would not notice a patch that does nothing."""
    model = example.build()
    calls: list[int] = []
    real = ops.rotate
    monkeypatch.setattr(ops, "rotate", lambda *a, **k: calls.append(1) or real(*a, **k))
    not_rotating: list[torch.nn.Module] = []
    ended: list[tuple[torch.nn.Module, rotating_norms.RotatedCall]] = []
    check, rotate = rotating_norms.RotatedCall.check, attention._with_rotating_norms

    def checked(self: rotating_norms.RotatedCall, module: torch.nn.Module) -> None:
        check(self, module)
        ended.append((module, self))

    def rotated(processor: Any, attn: Any, guard: Any, settings: Any, args: Any, kwargs: Any) -> Any:
        names = dict(zip(guard.parameters[1 if processor is None else 2 :], args, strict=False)) | kwargs
        try:
            return rotate(processor, attn, guard, settings, args, kwargs)
        except UnfitTable:
            if names.get(settings.rotation.rotary[0]) is not None:
                not_rotating.append(attn)
            raise

    monkeypatch.setattr(rotating_norms.RotatedCall, "check", checked)
    monkeypatch.setattr(attention, "_with_rotating_norms", rotated)
    with dit_rope.patch(model, exact=False):
        forward(example, model, torch.float32)
    assert not not_rotating
    complete = [(module, call) for module, call in ended if not call.pending]
    # Some modules pass by their norms in some of their calls, in none of the examples in all of them.
    assert {type(module) for module, _ in complete} == {type(module) for module, _ in ended}
    assert len(calls) >= sum(len(call.rotating) for _, call in complete)
    adapter = adapter_of(model)
    assert adapter is not None
    assert calls or not adapter.rotations


@BY_NAME
def test_second_step_builds_no_table(example: Example) -> None:
    model = example.build()
    inputs = example.inputs(model, Noise(torch.float32))
    with dit_rope.patch(model), torch.no_grad():
        example.run(model, inputs)
        first = dit_rope.cache_info()
        example.run(model, inputs)
        second = dit_rope.cache_info()
    misses = [(info.tables.misses, info.axes.misses, info.models.misses) for info in (first, second)]
    hits = [info.tables.hits + info.models.hits for info in (first, second)]
    assert misses[0] == misses[1]
    assert hits[1] > hits[0] or not any(misses[0])


@BY_NAME
@pytest.mark.usefixtures("young_heap")
def test_patched_and_undone_model_is_garbage(example: Example) -> None:
    model = example.build()
    handle = dit_rope.patch(model)
    forward(example, model, torch.float32)
    handle.undo()
    gone = weakref.ref(model)
    del model, handle
    gc.collect()
    assert gone() is None
