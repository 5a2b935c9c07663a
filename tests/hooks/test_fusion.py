"""How much of queries and keys a patch takes over: each part left to the model gives the model's own bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dit_rope
from compiled_graphs import one_layer
from dit_rope import Fusion, Rounding, Scaling
from dit_rope.hooks.class_override import Override
from tolerance import all_equal
from zoo import Noise, named, tensors, wan

NAMES = ("hunyuan-video", "flux", "ltx-padded", "qwen-image", "kandinsky5")
FUSIONS = pytest.mark.parametrize("fuse", Fusion, ids=lambda fuse: fuse.value)
BY_NAME = pytest.mark.parametrize("name", ["wan", "chronoedit", *NAMES])


pytestmark = pytest.mark.usefixtures("one_thread")


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Any]:
    """A model, and a function that runs it."""
    example = named(name)
    model = example.build(dtype)
    inputs = example.inputs(model, Noise(dtype))
    return model, lambda: tensors(example.run(model, inputs))


def run(forward: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return forward()


@FUSIONS
@BY_NAME
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_exact_mode_gives_the_bits_of_the_model_whatever_is_fused(name: str, dtype: torch.dtype, fuse: Fusion) -> None:
    model, forward = build(name, dtype)
    expected = run(forward)
    with dit_rope.patch(model, exact=True, fuse=fuse):
        for _ in range(2):
            assert all_equal(run(forward), expected)
    assert all_equal(run(forward), expected)


@BY_NAME
def test_nothing_fused_builds_tables_once_and_leaves_attention_alone(name: str, rotations: list[str]) -> None:
    model, forward = build(name)
    expected = run(forward)
    with dit_rope.patch(model, exact=False, fuse=Fusion.NOTHING) as handle:
        rotations.clear()
        assert all_equal(run(forward), expected)
        first = dit_rope.cache_info()
        assert all_equal(run(forward), expected)
        second = dit_rope.cache_info()
        assert not rotations
        assert second.tables.misses == first.tables.misses
        assert second.models.misses == first.models.misses
        assert second.tables.hits + second.models.hits > first.tables.hits + first.models.hits
        patched = {path for path, module in model.named_modules() if isinstance(module, Override)}
        assert patched == {target.tables.path for plan in handle._plans for target in plan.tables}
        assert not any(len(module._forward_pre_hooks) for path, module in model.named_modules() if path)
        assert "not patched: norm and rotation of queries and keys, because fuse is Fusion.NOTHING" in handle.report()
        assert "norm and rotate" not in handle.report()


@pytest.mark.parametrize("name", ["wan", "hunyuan-video", "flux", "ltx-padded", "qwen-image"])
def test_rotation_leaves_the_norm_to_the_model(name: str, rotations: list[str]) -> None:
    model, forward = build(name)
    ran = {}
    for fuse in (Fusion.ROTATION, Fusion.NORM_AND_ROTATION):
        with dit_rope.patch(model, exact=False, fuse=fuse):
            rotations.clear()
            run(forward)
            ran[fuse] = list(rotations)
    assert set(ran[Fusion.ROTATION]) == {"rotate"}
    assert set(ran[Fusion.NORM_AND_ROTATION]) == {"norm_rotate"}
    assert len(ran[Fusion.ROTATION]) == len(ran[Fusion.NORM_AND_ROTATION])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "norm and rotation; in exact mode only norms of which one pass has the same bits"),
        ({"exact": False}, "norm and rotation"),
        ({"exact": True}, "norm and rotation; in exact mode only norms of which one pass has the same bits"),
        ({"rounding": Rounding.MODEL}, "norm and rotation"),
        ({"fuse": Fusion.ROTATION}, "rotation, because fuse is Fusion.ROTATION; norms are the model's own"),
    ],
)
def test_report_says_what_is_fused(options: dict[str, Any], message: str) -> None:
    with dit_rope.patch(wan.build("wan"), **options) as handle:
        assert f"  fused: {message}\n" in handle.report()


def test_report_says_where_a_norm_is_missing() -> None:
    model, _ = build("stable-audio")
    with dit_rope.patch(model, exact=False) as handle:
        assert "  fused: rotation; the model has no norm before it\n" in handle.report()


def test_nothing_fused_scales_dense_tables() -> None:
    model = wan.build("wan")
    scaling = Scaling.of("linear", factor=2.0)
    with dit_rope.patch(model, scaling=scaling):
        expected = run(lambda: [wan.forward(model)])
    assert not all_equal(run(lambda: [wan.forward(model)]), expected)
    for option in (scaling, lambda: scaling):
        with dit_rope.patch(model, scaling=option, fuse=Fusion.NOTHING):
            assert all_equal(run(lambda: [wan.forward(model)]), expected)


def test_nothing_fused_compiles_with_scaled_tables() -> None:
    model = one_layer("wan").build()
    with dit_rope.patch(model, scaling=Scaling.of("linear", factor=2.0), fuse=Fusion.NOTHING):
        expected = run(lambda: [wan.forward(model)])
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert all_equal(run(lambda: [wan.forward(compiled)]), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("fuse", ["rotation", None, True])
def test_patch_refuses_a_fuse_of_another_type(fuse: Any) -> None:
    model = wan.build("wan")
    with pytest.raises(TypeError, match=r"fuse must be a Fusion, got "):
        dit_rope.patch(model, fuse=fuse)
    assert not any(isinstance(module, Override) for module in model.modules())
