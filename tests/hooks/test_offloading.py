"""Weights that move, change dtype or are copied while a model is patched: the unpatched model's bits, or refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dit_rope
from dit_rope.hooks.class_override import Override
from dit_rope.hooks.rope_modules import MemoizedMethod
from tolerance import all_equal
from zoo import Noise, named, tensors

# Axis tables; memo and norms; projections; a replaced function; a method; complex; a processor; its own override.
KINDS = (
    "wan",
    "ltx-coords",
    "hunyuan-video-no-norm",
    "hidream",
    "joyimage",
    "qwen-image",
    "ideogram4",
    "allegro",
)
BY_KIND = pytest.mark.parametrize("name", KINDS)
CPU = torch.device("cpu")
Change = Callable[[Any], Any]


pytestmark = pytest.mark.usefixtures("one_thread")


def run(name: str, model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """One forward pass without gradients."""
    example = named(name)
    with torch.no_grad():
        return tensors(example.run(model, example.inputs(model, Noise(dtype))))


def patched_parts(model: torch.nn.Module) -> list[object]:
    """What a patch has put in."""
    return [
        target
        for module in model.modules()
        for target in (module, *vars(module).values())
        if isinstance(target, (Override, MemoizedMethod))
    ]


def _group_offload(kind: str) -> Change:
    def offload(model: Any) -> None:
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=kind, **blocks)

    return offload


def _sequential_offload(model: Any) -> None:
    """Weights are on the meta device but while their module runs, as ``enable_sequential_cpu_offload`` leaves them."""
    import accelerate

    accelerate.cpu_offload(model, execution_device=CPU)


def _model_offload(model: Any) -> None:
    import accelerate

    accelerate.cpu_offload_with_hook(model, execution_device=CPU)


def _layerwise_casting(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


OFFLOADS: dict[str, Change] = {
    "group by leaf": _group_offload("leaf_level"),
    "group by block": _group_offload("block_level"),
    "sequential": _sequential_offload,
    "model": _model_offload,
    "layerwise casting": _layerwise_casting,
}


@pytest.mark.parametrize("method", OFFLOADS)
@BY_KIND
def test_offloading_enabled_after_the_patch_stays_bitwise_equal(name: str, method: str) -> None:
    model, plain = named(name).build(), named(name).build()
    try:
        OFFLOADS[method](plain)
        expected = run(name, plain)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        pytest.skip(f"the unpatched model cannot do it: {error!s:.60}")
    handle = dit_rope.patch(model, exact=True)
    OFFLOADS[method](model)
    for _ in range(2):
        assert all_equal(run(name, model), expected)
    handle.undo()
    assert all_equal(run(name, model), expected)
    assert patched_parts(model) == []


def refusal(model: torch.nn.Module) -> str | None:
    """Why ``model`` is not patched; None where it would be."""
    try:
        dit_rope.patch(model).undo()
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("method", OFFLOADS)
@BY_KIND
def test_patch_after_offloading_is_right_or_refused_whole(name: str, method: str) -> None:
    """Libraries that put a forward of their own into a module would run it in place of the patched one."""
    model = named(name).build()
    try:
        OFFLOADS[method](model)
        expected = run(name, model)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        pytest.skip(f"the unpatched model cannot do it: {error!s:.60}")
    refused = refusal(model)
    assert patched_parts(model) == []
    if refused is None:
        with dit_rope.patch(model, exact=True):
            assert all_equal(run(name, model), expected)
    else:
        assert "patch first, then enable offloading or parallelism" in refused
    assert patched_parts(model) == []
    assert all_equal(run(name, model), expected)


@BY_KIND
def test_casts_after_the_patch_stay_bitwise_equal(name: str) -> None:
    """Tables were built and packed for another dtype by then.

    Not back to float32 for Wan: its own tables are rounded by then, and those of dit_rope are not.
    """
    model, plain = named(name).build(), named(name).build()
    handle = dit_rope.patch(model, exact=True)
    for dtype in (torch.float32, torch.bfloat16, *(() if name == "wan" else (torch.float32,))):
        expected = run(name, plain.to(dtype), dtype)
        assert all_equal(run(name, model.to(dtype), dtype), expected), dtype
    handle.undo()
    assert all_equal(run(name, model, dtype), expected)


@BY_KIND
def test_model_without_weights_gives_shapes_and_keeps_nothing(name: str) -> None:
    """On the meta device, as frameworks that plan memory run it; what was cached for CPU is not asked."""
    model = named(name).build()
    expected = run(name, model)
    inputs = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda x: x.to("meta"), named(name).inputs(model, Noise(torch.float32))
    )
    model = model.to("meta")
    with torch.no_grad():
        try:
            plain = tensors(named(name).run(model, inputs))
        except (NotImplementedError, RuntimeError) as error:
            pytest.skip(f"the unpatched model cannot do it: {error!s:.60}")
        with dit_rope.patch(model, exact=True):
            actual = tensors(named(name).run(model, inputs))
    assert [x.shape for x in actual] == [x.shape for x in plain] == [x.shape for x in expected]
    assert all(x.is_meta for x in actual)
    info = dit_rope.cache_info()
    assert (info.tables.entries, info.models.entries) == (0, 0)


def _saved(model: torch.nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _saved,
}


@pytest.mark.parametrize("method", COPIES)
@BY_KIND
def test_copies_of_a_patched_model_are_patched_models_of_their_own(name: str, method: str) -> None:
    model = named(name).build()
    expected = run(name, model)
    with dit_rope.patch(model, exact=True):
        run(name, model)
        twin = COPIES[method](model)
        count = len(patched_parts(model))
    assert len(patched_parts(twin)) == count > 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all_equal(run(name, twin), expected)
    dit_rope.unpatch(twin)
    assert patched_parts(twin) == []
    assert all_equal(run(name, twin), expected)


@BY_KIND
def test_saved_folder_of_a_patched_model_loads_as_one_without_a_patch(name: str, tmp_path: Any) -> None:
    model: Any = named(name).build()
    expected = run(name, model)
    with dit_rope.patch(model, exact=True):
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert patched_parts(loaded) == []
    assert all_equal(run(name, loaded.eval()), expected)


@BY_KIND
def test_inference_mode_stays_bitwise_equal_and_poisons_nothing(name: str) -> None:
    """Tables made in inference mode must serve training afterwards, and the other way round."""
    model = named(name).build()
    expected = run(name, model)
    example = named(name)
    with dit_rope.patch(model, exact=True):
        with torch.inference_mode():
            inside = tensors(example.run(model, example.inputs(model, Noise(torch.float32))))
        assert all_equal([x.clone() for x in inside], expected)
        assert all_equal(run(name, model), expected)
        outs = tensors(example.run(model, example.inputs(model, Noise(torch.float32))))
        sum(out.square().sum() for out in outs if out.requires_grad).backward()
        with torch.inference_mode():
            repeated = tensors(example.run(model, example.inputs(model, Noise(torch.float32))))
        assert all_equal([x.clone() for x in repeated], expected)


@BY_KIND
def test_autocast_on_and_off_stays_bitwise_equal(name: str) -> None:
    """One model, called with and without: neither gets what was made for the other."""
    model, plain = named(name).build(), named(name).build()
    with dit_rope.patch(model, exact=True):
        for enabled in (False, True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                expected = run(name, plain)
                assert all_equal(run(name, model), expected), enabled


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_user_s_hook_on_a_norm_sees_what_it_sees_unpatched_and_is_reported(exact: bool) -> None:
    """Normed queries, before they are rotated; and what the hook was given stays as it is."""
    model = named("wan").build()
    outputs: list[torch.Tensor] = []
    norm = model.blocks[0].attn1.norm_q
    hook = norm.register_forward_hook(lambda module, args, output: outputs.append(output))
    run("wan", model)
    with dit_rope.patch(model, exact=exact) as handle:
        run("wan", model)
        assert "1 hooked or unknown norm" in handle.report()
    run("wan", model)
    plain, patched, after = outputs
    assert torch.equal(plain, patched)
    assert torch.equal(plain, after)
    hook.remove()
    assert "hooked" not in dit_rope.patching.inspect(model)
