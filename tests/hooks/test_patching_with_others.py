"""A patched model under what people do to models besides: casts, adapters, training, caches, compilers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing

import dit_rope
from compiled_graphs import one_layer
from dit_rope.hooks.formats import AXES
from dit_rope.hooks.packed_tables import Align
from dit_rope.rotation import ops
from zoo import wan

DTYPES = [torch.float32, torch.bfloat16]


pytestmark = pytest.mark.usefixtures("one_thread")


def forward(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return wan.forward(model, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_model_cast_as_a_whole_stays_bitwise_equal(dtype: torch.dtype) -> None:
    """``model.to(dtype)`` casts the rope buffers too, and all of the rotation's arithmetic with them."""
    model = wan.build("wan").to(dtype)
    expected = forward(model, dtype)
    with dit_rope.patch(model):
        assert torch.equal(forward(model, dtype), expected)


def test_model_cast_after_patching_stays_bitwise_equal() -> None:
    model = wan.build("wan")
    expected = forward(copy.deepcopy(model).to(torch.bfloat16), torch.bfloat16)
    with dit_rope.patch(model):
        model.to(torch.bfloat16)
        assert torch.equal(forward(model, torch.bfloat16), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_projections_stay_bitwise_equal(dtype: torch.dtype) -> None:
    model = wan.build("wan", dtype)
    model.fuse_qkv_projections()
    expected = forward(model, dtype)
    with dit_rope.patch(model):
        assert torch.equal(forward(model, dtype), expected)
        model.unfuse_qkv_projections()
        unfused = forward(model, dtype)
    assert torch.equal(forward(model, dtype), unfused)


def test_lora_stays_bitwise_equal_loaded_before_or_after_the_patch() -> None:
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    model, later = wan.build("wan"), wan.build("wan")
    plain = forward(model)
    torch.manual_seed(5)
    model.add_adapter(config)
    expected = forward(model)
    assert not torch.equal(expected, plain)
    with dit_rope.patch(model):
        assert torch.equal(forward(model), expected)
    with dit_rope.patch(later):
        torch.manual_seed(5)
        later.add_adapter(config)
        assert torch.equal(forward(later), expected)
        later.delete_adapters("default")
        assert torch.equal(forward(later), plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_with_checkpointing_stay_bitwise_equal(dtype: torch.dtype) -> None:
    model = wan.build("wan", dtype).train()
    model.enable_gradient_checkpointing()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        wan.forward(model, dtype).float().square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    with dit_rope.patch(model):
        actual = gradients()
    assert len(expected) == len(actual) > 20
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_gradients_of_fast_mode_are_close() -> None:
    model = wan.build("wan").train()
    expected = torch.autograd.grad(wan.forward(model).square().mean(), list(model.blocks.parameters()))
    with dit_rope.patch(model, exact=False):
        actual = torch.autograd.grad(wan.forward(model).square().mean(), list(model.blocks.parameters()))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-5 * e.abs().max().item())


@pytest.mark.parametrize("cache_first", [True, False])
def test_first_block_cache_stays_bitwise_equal(cache_first: bool) -> None:
    import diffusers

    model = wan.build("wan")
    config = diffusers.FirstBlockCacheConfig(threshold=0.0)

    def run() -> list[torch.Tensor]:
        with model.cache_context("cond"):
            return [forward(model) for _ in range(2)]

    model.enable_cache(config)
    expected = run()
    model.disable_cache()
    if cache_first:
        model.enable_cache(config)
    with dit_rope.patch(model):
        if not cache_first:
            model.enable_cache(config)
        actual = run()
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    model.disable_cache()


def test_autocast_stays_bitwise_equal() -> None:
    model = wan.build("wan")
    with torch.autocast("cpu", torch.bfloat16):
        expected = forward(model)
        with dit_rope.patch(model):
            assert torch.equal(forward(model), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_by_aot_eager_stays_bitwise_equal(dtype: torch.dtype) -> None:
    model = one_layer("wan").build(dtype)
    expected = forward(model, dtype)
    torch._dynamo.reset()
    with dit_rope.patch(model):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(forward(compiled, dtype), expected)


def test_compiled_blocks_behind_an_eager_rope_module_stay_bitwise_equal() -> None:
    """The blocks' graphs get rows of axis tables from outside, and make dense tables of them."""
    model = wan.build("wan")
    expected = forward(model)
    torch._dynamo.reset()
    with dit_rope.patch(model):
        model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        assert torch.equal(forward(model), expected)


def test_equal_blocks_are_compiled_once() -> None:
    """Dynamo guards on hooks, also on their numbers; each block would be compiled again, until a limit refuses."""
    model = wan.build("wan")
    model.blocks.extend(copy.deepcopy(model.blocks[0]) for _ in range(9))
    expected = forward(model)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    with dit_rope.patch(model):
        model.compile_repeated_blocks(backend=counter, fullgraph=True)
        assert torch.equal(forward(model), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["flux", "ltx-coords", "qwen-image", "cogvideox-1.0"])
def test_compiled_models_with_tables_of_their_own_stay_bitwise_equal(name: str) -> None:
    example = one_layer(name)
    model = example.build()

    def run(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            output: torch.Tensor = example.forward(model)[0]
            return output

    torch._dynamo.reset()
    expected = run(torch.compile(model, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    with dit_rope.patch(model):
        assert torch.equal(run(torch.compile(model, backend="aot_eager", fullgraph=True)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_by_inductor_stays_within_the_unpatched_models_error(dtype: torch.dtype) -> None:
    """The bound: what compiling the unpatched model changes, plus one rounding of the output."""
    model = one_layer("wan").build(dtype)
    eager = forward(model, dtype)
    torch._dynamo.reset()
    unpatched = forward(torch.compile(model, fullgraph=True), dtype)
    torch._dynamo.reset()
    with dit_rope.patch(model):
        patched = forward(torch.compile(model, fullgraph=True), dtype)
    allowed = (unpatched - eager).abs().max() + torch.finfo(dtype).eps / 2 * eager.abs().max()
    assert (patched - eager).abs().max() <= allowed


@pytest.mark.parametrize("split", [torch.Tensor.chunk, torch.Tensor.tensor_split], ids=["chunk", "tensor_split"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_rotation_of_a_split_rope_output_is_the_part_of_the_whole(world: int, split: Callable[..., Any]) -> None:
    """Context parallelism splits what the rope module returns along dim 1, four dims as the model's own tables have."""
    model = wan.build("wan")
    latent = torch.empty(1, 0, 3, 8, 12)
    with dit_rope.patch(model):
        whole = model.rope(latent)
        parts = list(zip(*(split(table, world, dim=1) for table in whole), strict=True))
        x = torch.randn(1, whole[0].shape[1], 2, model.rope.attention_head_dim)

        def rotated(x: torch.Tensor, rotary: Any) -> torch.Tensor:
            (table,) = AXES.pack(rotary, x.device)
            assert len(table.sizes) == 3  # the axis form was recognised
            return ops.rotate([x], table.args(x.shape[1], Align.START, exact=True))[0]

        pieces = [rotated(piece, rotary) for piece, rotary in zip(split(x, world, dim=1), parts, strict=True)]
        assert torch.equal(torch.cat(pieces, dim=1), rotated(x, whole))
