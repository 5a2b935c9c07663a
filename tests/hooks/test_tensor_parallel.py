"""Tensor parallelism: a rank that holds some of the heads rotates them by the table of all heads."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dit_rope
from ranks import Ranks
from split_models import counted_rotations, error, groups_of, run, wrapped
from tolerance import all_equal
from zoo import Example, named

WORLD = 4
# Widths that 4 ranks can share.
CASES: dict[str, dict[str, Any]] = {
    "flux": {"num_attention_heads": 4},
    "flux2": {"num_attention_heads": 4},
    "qwen-image": {"num_attention_heads": 4},
    "qwen-image-21": {"num_attention_heads": 4},
}


def example_of(name: str) -> Example:
    return replace(named(name), config={**named(name).config, **CASES.get(name, {})})


def share_heads(model: Any, degree: int) -> None:
    """Enables diffusers' tensor parallelism on CPU, which it leaves to devices that it was tried on."""
    from diffusers.hooks import tensor_parallel
    from diffusers.models._modeling_parallel import TensorParallelConfig
    from torch.distributed.device_mesh import DeviceMesh

    tensor_parallel._SUPPORTED_TP_DEVICES = ("cpu",)
    mesh = DeviceMesh("cpu", torch.tensor(groups_of(degree)), mesh_dim_names=("group", "tp"))["tp"]
    model.enable_parallelism(config=TensorParallelConfig(mesh=mesh))


def patched_and_shared(name: str, degree: int, first: str) -> dict[str, Any]:
    example = example_of(name)
    model = example.build()
    single = run(example, model)
    share_heads(model, degree)
    expected = run(example, model)
    model = example.build()
    handle = dit_rope.patch(model) if first == "patch" else None
    share_heads(model, degree)
    before = wrapped(model)
    handle = handle or dit_rope.patch(model)
    actual = [run(example, model) for _ in range(2)]
    handle.undo()
    undone = run(example, model)
    with dit_rope.patch(model, exact=False), counted_rotations() as rotated:
        fast = run(example, model)
    return {
        "unpatched": error(expected, single),
        "equal": all(all_equal(outputs, expected) for outputs in actual) and all_equal(undone, expected),
        "handed_back": wrapped(model) == before,
        "fast": error(fast, expected),
        "rotated": len(rotated),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(WORLD, tmp_path_factory.mktemp("ranks")) as started:
        yield started


def test_every_class_that_can_share_heads_is_here() -> None:
    import diffusers

    names: set[str] = set()
    root = Path(diffusers.__file__).parent
    for path in (root / "models").rglob("*.py"):
        if re.search(r"^    _tp_plan\b.*= [{\w]", path.read_text(), flags=re.MULTILINE):
            module = ".".join(("diffusers", *path.relative_to(root).with_suffix("").parts))
            members = vars(importlib.import_module(module)).values()
            names |= {cls.__name__ for cls in members if isinstance(cls, type) and getattr(cls, "_tp_plan", None)}
    assert names == {named(name).model_class.__name__ for name in CASES}


@pytest.mark.parametrize("first", ["patch", "share"])
@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_model_that_shares_heads_stays_bitwise_equal(ranks: Ranks, name: str, degree: int, first: str) -> None:
    for outcome in ranks.run(patched_and_shared, name, degree, first):
        assert outcome["equal"], outcome
        assert outcome["handed_back"]
        assert outcome["rotated"]
        assert outcome["fast"] <= 64 * torch.finfo(torch.float32).eps


def projections_that_share_heads(first: str) -> tuple[bool, float, int]:
    """Without norms the projections rotate; their weights are distributed tensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    example = named("hunyuan-video-no-norm")
    example = replace(example, config={**example.config, "num_attention_heads": 4})
    mesh = init_device_mesh("cpu", (WORLD,))

    def share(model: Any) -> None:
        for block in model.transformer_blocks:
            styles = {f"to_{letter}": ColwiseParallel() for letter in "qkv"}
            styles |= {f"add_{letter}_proj": ColwiseParallel() for letter in "qkv"}
            parallelize_module(
                block.attn, mesh, {**styles, "to_out.0": RowwiseParallel(), "to_add_out": RowwiseParallel()}
            )
            block.attn.heads //= WORLD

    model, twin = example.build(), example.build()
    share(twin)
    expected = run(example, twin)
    if first == "share":
        share(model)
    with dit_rope.patch(model):
        if first == "patch":
            share(model)
        with counted_rotations() as rotated:
            equal = all_equal(run(example, model), expected)
    with dit_rope.patch(model, exact=False):
        return equal, error(run(example, model), expected), len(rotated)


@pytest.mark.parametrize("first", ["patch", "share"])
def test_projections_that_share_heads_stay_bitwise_equal(ranks: Ranks, first: str) -> None:
    for equal, fast_error, rotated in ranks.run(projections_that_share_heads, first):
        assert equal
        assert rotated
        assert fast_error <= 64 * torch.finfo(torch.float32).eps


def keep_heads(model: Any, rank: int, world: int) -> None:
    """Leaves each self-attention module ``rank``'s heads, as engines do that cut the weights themselves."""
    for module in model.modules():
        if not type(module).__name__.endswith("Attention") or not hasattr(module, "to_q") or module.to_out is None:
            continue
        module.heads //= world
        for name in ("to_q", "to_k", "to_v", "norm_q", "norm_k"):
            layer: Any = getattr(module, name, None)
            for parameter in layer.parameters() if layer is not None else ():
                if name.startswith("to") or parameter.shape[0] == module.to_out[0].in_features:
                    parameter.data = parameter.data.chunk(world)[rank].contiguous()
                    if hasattr(layer, "normalized_shape"):
                        layer.normalized_shape = tuple(parameter.shape)
        module.to_out[0].weight.data = module.to_out[0].weight.data.chunk(world, dim=1)[rank].contiguous()


@pytest.mark.parametrize("name", ["wan", "cogvideox-1.0", "helios-plain", "minimax-h3"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.usefixtures("one_thread")
def test_model_with_some_of_the_heads_stays_bitwise_equal(name: str, rank: int) -> None:
    example = named(name)
    model, whole = example.build(), run(example, example.build())
    keep_heads(model, rank, 2)
    expected = run(example, model)
    assert not all_equal(expected, whole)
    with dit_rope.patch(model), counted_rotations() as rotated:
        assert all_equal(run(example, model), expected)
    assert rotated
