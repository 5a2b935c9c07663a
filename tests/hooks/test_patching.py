"""The patch: bitwise the same model, whatever else is done to it, and nothing left behind."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch

import dit_rope
from dit_rope import patching
from dit_rope.hooks import plan as plan_module
from dit_rope.hooks.class_override import Override, unpatched_class
from dit_rope.models import ADAPTERS
from dit_rope.rotation import ops
from model_state import state_of
from tolerance import all_equal
from zoo import wan

DTYPES = [torch.float32, torch.bfloat16]


pytestmark = pytest.mark.usefixtures("one_thread")


def forward(model: torch.nn.Module, dtype: torch.dtype = torch.float32, **size: int) -> torch.Tensor:
    with torch.no_grad():
        return wan.forward(model, dtype, **size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["wan", "chronoedit"])
def test_patched_equals_unpatched_at_any_number_of_frames(name: str, dtype: torch.dtype) -> None:
    model = wan.build(name, dtype)
    expected = [forward(model, dtype, frames=frames) for frames in (2, 3)]
    with dit_rope.patch(model):
        for _ in range(2):
            assert all(torch.equal(forward(model, dtype, frames=2 + i), expected[i]) for i in range(2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fast_mode_is_close_and_fused(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wan.build("wan", dtype)
    expected = forward(model, dtype)
    calls = []
    real = ops.rotate
    monkeypatch.setattr(ops, "rotate", lambda *a, **k: calls.append(1) or real(*a, **k))
    with dit_rope.patch(model, exact=False):
        calls.clear()
        actual = forward(model, dtype)
    assert len(calls) == 4
    # Two blocks, each with one more or one fewer rounding of queries and keys than the unpatched model has.
    torch.testing.assert_close(actual, expected, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


def test_patch_changes_no_state_dict_key_and_undo_restores_every_object() -> None:
    model = wan.build("wan")
    keys, before = list(model.state_dict()), state_of(model)
    handle = dit_rope.patch(model)
    assert list(model.state_dict()) == keys
    assert state_of(model) != before
    forward(model)
    handle.undo()
    assert state_of(model) == before
    handle.undo()
    assert state_of(model) == before
    assert "undone" in handle.report()


def test_undo_keeps_hooks_of_others() -> None:
    model = wan.build("wan")
    calls = []
    with dit_rope.patch(model):
        model.blocks[0].attn1.register_forward_hook(lambda *_: calls.append(1))
    forward(model)
    assert calls == [1]


@pytest.mark.parametrize("method", ["deepcopy", "pickle", "torch.save"])
def test_patched_model_copies_into_one_that_uses_its_own_weights(method: str) -> None:
    model = wan.build("wan")
    expected = forward(model)
    with dit_rope.patch(model):
        if method == "deepcopy":
            twin = copy.deepcopy(model)
        elif method == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        else:
            torch.save(model, buffer := io.BytesIO())
            twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert torch.equal(forward(twin), expected)
    assert type(twin.rope) is not type(model.rope)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        twin.blocks[0].attn1.norm_q.weight.mul_(2)
    changed = forward(twin)
    assert not torch.equal(changed, expected)
    dit_rope.unpatch(twin)
    assert torch.equal(forward(twin), changed)
    assert type(twin.rope) is type(model.rope)


def test_two_threads_generate_at_two_sizes_with_one_patched_model() -> None:
    model = wan.build("wan")
    sizes = [{"frames": 3, "height": 8, "width": 12}, {"frames": 5, "height": 12, "width": 8}]
    expected = [forward(model, **size) for size in sizes]
    wrong: list[object] = []

    def work(index: int) -> None:
        try:
            for _ in range(20):
                if not torch.equal(forward(model, **sizes[index]), expected[index]):
                    wrong.append(index)
        except Exception as error:
            wrong.append(error)

    with dit_rope.patch(model):
        threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1, 0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_second_step_runs_no_operator_to_get_its_tables() -> None:
    """None to build, and none to cast or to copy from the host."""
    model = wan.build("wan")
    latent = torch.empty(1, 0, 2, 4, 6)
    with dit_rope.patch(model):
        model.rope(latent)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model.rope(latent)
    ran = {event.key for event in profile.key_averages() if event.key.startswith("aten::")}
    # Buffers on the host are compared with what they were; on a GPU they are known by their versions.
    looks = {"equal", "detach", "view", "to", "resolve_neg", "resolve_conj"}
    assert ran <= {f"aten::{name}" for name in looks}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_error_in_a_forward_does_not_reach_the_next(error: type[BaseException]) -> None:
    model = wan.build("wan")
    expected = forward(model)

    def fail(*_: object) -> None:
        raise error

    with dit_rope.patch(model):
        bomb = model.blocks[0].attn1.norm_k.register_forward_pre_hook(fail)
        with pytest.raises(error):
            forward(model)
        bomb.remove()
        assert torch.equal(forward(model), expected)


def skips_a_norm(name: str, processor: Any) -> Any:
    """A processor whose class is called ``name`` and does not norm keys."""
    known = unpatched_class(processor)

    def call(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        norm, attn.norm_k = attn.norm_k, torch.nn.Identity()
        try:
            return known.__call__(self, attn, *args, **kwargs)
        finally:
            attn.norm_k = norm

    return type(name, (known,), {"__call__": call})()


@pytest.mark.parametrize("name", ["MyProcessor", "WanAttnProcessor"])
def test_unknown_processor_is_left_to_rotate_by_itself(name: str) -> None:
    """The name of a processor proves nothing; its code decides."""
    model = wan.build("wan")
    attention = model.blocks[1].attn1
    original = attention.processor
    attention.set_processor(skips_a_norm(name, original))
    expected = forward(model)
    attention.set_processor(original)
    with dit_rope.patch(model) as handle:
        attention.set_processor(skips_a_norm(name, original))
        assert torch.equal(forward(model), expected)
        assert "not patched: blocks.*.attn1 (1 module), where the model rotates: " in handle.report()


def test_replaced_norm_is_left_to_the_model() -> None:
    """A norm that somebody replaces after the patch runs; the whole attention module then runs its own code."""
    model = wan.build("wan")
    replacement = torch.nn.RMSNorm(48, eps=0.5)
    model.blocks[0].attn1.norm_q, original = replacement, model.blocks[0].attn1.norm_q
    expected = forward(model)
    model.blocks[0].attn1.norm_q = original
    with dit_rope.patch(model):
        model.blocks[0].attn1.norm_q = replacement
        assert torch.equal(forward(model), expected)


def test_skipped_attention_raises_nothing() -> None:
    """Pyramid Attention Broadcast returns the output of an earlier step without running the module."""
    from diffusers import PyramidAttentionBroadcastConfig

    model = wan.build("wan")
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        spatial_attention_block_identifiers=["blocks"],
        current_timestep_callback=lambda: 500,
    )
    model.enable_cache(config)
    with model.cache_context("cond"):
        expected = [forward(model) for _ in range(3)]
    model.disable_cache()
    model.enable_cache(config)
    with dit_rope.patch(model), model.cache_context("cond"):
        actual = [forward(model) for _ in range(3)]
    assert all_equal(actual, expected)


def test_patch_refuses_a_patched_model_and_leaves_it_patched() -> None:
    model = wan.build("wan")
    with dit_rope.patch(model):
        before = state_of(model)
        with pytest.raises(ValueError, match="model must not be patched already"):
            dit_rope.patch(model)
        assert state_of(model) == before


@pytest.mark.parametrize("patched", [False, True], ids=["before", "after"])
def test_tables_that_were_changed_are_the_models_own(patched: bool) -> None:
    model = wan.build("wan")
    if patched:
        dit_rope.patch(model)
        forward(model)
    model.rope.freqs_sin[2, 3] += 0.5
    if not patched:
        dit_rope.patch(model)
    fused = forward(model)
    dit_rope.unpatch(model)
    assert torch.equal(fused, forward(model))
    model.rope.freqs_sin[2, 3] -= 0.5
    assert not torch.equal(fused, forward(model))


def test_patch_leaves_no_entry_in_the_table_cache() -> None:
    with dit_rope.patch(wan.build("wan")):
        assert dit_rope.cache_info().tables.entries == 0


def test_rope_module_whose_forward_was_replaced_is_left_to_it() -> None:
    model = wan.build("wan")
    original = model.rope.forward
    model.rope.forward = lambda latent: tuple(2 * table for table in original(latent))
    expected = forward(model)
    with dit_rope.patch(model) as handle:
        assert torch.equal(forward(model), expected)
        assert "rope: WanRotaryPosEmbed, not patched" in handle.report()
        with pytest.raises(ValueError, match="must not be patched already"):
            dit_rope.patch(model, scaling=dit_rope.Scaling.of("linear", factor=2.0))
    with pytest.raises(ValueError, match="scaling must be None where dit_rope does not know the code"):
        dit_rope.patch(model, scaling=dit_rope.Scaling.of("linear", factor=2.0))


def test_failing_patch_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wan.build("wan")
    before = state_of(model)
    real = plan_module.override_method

    def fail_late(target: Any, *args: Any) -> None:
        real(target, *args)
        if target is model.blocks[1].attn1.processor:
            raise MemoryError

    monkeypatch.setattr(plan_module, "override_method", fail_late)
    with pytest.raises(MemoryError):
        dit_rope.patch(model)
    assert state_of(model) == before


def test_unsupported_models_are_refused_by_name() -> None:
    supported = ", ".join(adapter.model_class for adapter in ADAPTERS)
    with pytest.raises(dit_rope.UnsupportedModelError, match=f"got model: Linear; supported models: {supported}"):
        dit_rope.patch(torch.nn.Linear(2, 2))
    with pytest.raises(dit_rope.UnsupportedModelError, match="got str"):
        dit_rope.patch("wan")


def test_unsupported_models_are_told_what_they_may_have_meant() -> None:
    model = type("WanTransformer3DModell", (torch.nn.Module,), {})()
    with pytest.raises(dit_rope.UnsupportedModelError, match="did you mean .*WanTransformer3DModel"):
        dit_rope.patch(model)


def test_class_of_another_library_that_has_a_supported_name_is_named_whole() -> None:
    body = {"__module__": "theirs.models", "__qualname__": "WanTransformer3DModel"}
    model = type("WanTransformer3DModel", (torch.nn.Module,), body)()
    with pytest.raises(dit_rope.UnsupportedModelError) as refused:
        dit_rope.patch(model)
    message = str(refused.value).partition("; supported models")[0]
    assert "got model: theirs.models.WanTransformer3DModel, another class than that of diffusers" in message
    assert "did you mean WanTransformer3DModel?" not in message


def test_subclass_is_patched() -> None:
    import diffusers

    class Tuned(diffusers.WanTransformer3DModel):
        def count(self) -> int:
            return 1

    class Derived(diffusers.WanTransformer3DModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model = wan.build("wan")
    expected = forward(model)
    model.__class__ = Tuned
    with dit_rope.patch(model) as handle:
        assert torch.equal(forward(model), expected)
        assert "model: Tuned" in handle.report()
    model.__class__ = Derived
    with dit_rope.patch(model):
        assert torch.equal(forward(model), expected)


def test_models_inside_another_are_found() -> None:
    """Several ControlNets come as one module that holds them."""
    nets = torch.nn.Module()
    nets.nets = torch.nn.ModuleList([wan.build("wan"), wan.build("wan")])
    with dit_rope.patch(nets) as handle:
        assert "model.nets.0: WanTransformer3DModel" in handle.report()
        assert "model.nets.1: WanTransformer3DModel" in handle.report()


def test_pipeline_has_both_of_its_transformers_patched() -> None:
    """Wan 2.2 switches between two transformers along the way."""
    import diffusers

    first, second = wan.build("wan"), wan.build("wan")
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=first, transformer_2=second
    )
    with dit_rope.patch(pipe) as handle:
        assert "transformer: WanTransformer3DModel" in handle.report()
        assert "transformer_2: WanTransformer3DModel" in handle.report()
        assert all(isinstance(model.rope, Override) for model in (first, second))
    assert not any(isinstance(model.rope, Override) for model in (first, second))


def test_options_are_checked() -> None:
    model = wan.build("wan")
    with pytest.raises(TypeError, match="exact must be True, False or None, got 1"):
        dit_rope.patch(model, exact=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend must be one of"):
        dit_rope.patch(model, backend="cutlass")


def test_inspect_says_what_patch_would_do_and_does_nothing() -> None:
    model = wan.build("wan")
    before = state_of(model)
    text = patching.inspect(model)
    assert state_of(model) == before
    with dit_rope.patch(model) as handle:
        assert handle.report() == text
    assert "blocks.*.attn1 (2 modules): norm_q, norm_k norm and rotate" in text
    assert "not patched: 2 attention modules without rotary embedding" in text
