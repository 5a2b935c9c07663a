"""diffusers' context parallelism, on CPU over gloo: a patched model whose sequence is split over ranks.

Every class of diffusers that says how to split it runs unpatched on one rank, unpatched on several, and patched before
and after it was split: the same bits as unpatched on as many ranks.
"""

from __future__ import annotations

import importlib
import re
import unittest.mock
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dit_rope
import wan_models
from dit_rope.hooks import rotating_norms
from dit_rope.models import ADAPTERS
from ranks import Ranks, end_groups
from zoo import EXAMPLES, Example, Noise

WORLD = 4


def _wan_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    frames = 2 if type(model).__name__.startswith("Chrono") else 3
    return {
        "hidden_states": noise(1, 4, frames, 8, 12),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": noise(1, 12, 16),
    }


_WAN_CONFIG = {**wan_models._COMMON, "in_channels": 4, "out_channels": 4}
_MODELS = "diffusers.models.transformers"
_WAN = (
    Example("wan", f"{_MODELS}.transformer_wan.WanTransformer3DModel", _WAN_CONFIG, _wan_inputs),
    Example("chronoedit", f"{_MODELS}.transformer_chronoedit.ChronoEditTransformer3DModel", _WAN_CONFIG, _wan_inputs),
)
BY_NAME = {example.name: example for example in (*_WAN, *EXAMPLES)}
_FOUR_HEADS = {"num_attention_heads": 4}


@dataclass(frozen=True)
class Case:
    """An example whose heads and tokens 4 ranks can share evenly.

    Attributes:
        config: what is changed of the example's.
        shapes: inputs that are made shorter: dim and size, in pairs.
        inputs: inputs that are replaced.
    """

    config: Mapping[str, Any] = field(default_factory=lambda: _FOUR_HEADS)
    shapes: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)


def _shapes(image: int, text: int, ids: int | None) -> dict[str, tuple[tuple[int, int], ...]]:
    """Lengths of both sequences, and of their position ids along the dim ``ids``."""
    shapes: dict[str, tuple[tuple[int, int], ...]]
    shapes = {"hidden_states": ((1, image),), "encoder_hidden_states": ((1, text),)}
    return shapes if ids is None else {**shapes, "img_ids": ((ids, image),), "txt_ids": ((ids, text),)}


_MASKED = {**_shapes(28, 4, None), "encoder_hidden_states_mask": ((1, 4),)}
# diffusers splits the mask, and then gives every rank all heads of it.
_LTX_SIZES = {"num_frames": 2, "height": 2, "width": 7, "encoder_attention_mask": None}
_LTX2_HEADS = {"num_attention_heads": 4, "cross_attention_dim": 80, "caption_channels": 16}
_LTX2_AUDIO = {"audio_num_attention_heads": 4, "audio_cross_attention_dim": 56}
_HELIOS_SIZES = {"hidden_states": ((3, 4), (4, 8)), "encoder_hidden_states": ((1, 4),)}
# Without the longest history, whose two tokens would not be shared evenly.
_HELIOS_SHAPES = _HELIOS_SIZES | {f"latents_history_{which}": ((3, 4), (4, 8)) for which in ("short", "mid")}
_NO_LONG_HISTORY = {"latents_history_long": None, "indices_latents_history_long": None}
CASES = {
    "wan": Case(),
    "chronoedit": Case(),
    "flux": Case(shapes=_shapes(28, 4, 0)),
    "flux2": Case(shapes=_shapes(28, 4, 1)),
    "qwen-image": Case(shapes=_MASKED, inputs={"img_shapes": [[(1, 4, 7)]] * 2}),
    "ltx-padded": Case({**_FOUR_HEADS, "cross_attention_dim": 80}, _MASKED, _LTX_SIZES),
    "ltx2-interleaved": Case(
        {**_LTX2_HEADS, **_LTX2_AUDIO}, _MASKED, {**_LTX_SIZES, "audio_encoder_attention_mask": None}
    ),
    "helios-plain": Case(shapes=_HELIOS_SIZES),
    "helios-history": Case(shapes=_HELIOS_SHAPES, inputs=_NO_LONG_HISTORY),
    "minimax-h3": Case(),
}


# Three heads on two ranks, or four on four, and numbers of tokens that these do not divide.
UNEVEN = {
    "wan": Case(shapes={"hidden_states": ((3, 6), (4, 10))}),
    "chronoedit": Case(shapes={"hidden_states": ((3, 6), (4, 10))}),
    "flux": Case({}),
    "flux-kontext": Case({}),
    "flux2": Case({}),
    "qwen-image-layered": Case({}, inputs={"encoder_hidden_states_mask": None}),
    "ltx-padded": Case({**_FOUR_HEADS, "cross_attention_dim": 80}, inputs={"encoder_attention_mask": None}),
    "helios-plain": Case(),
}


def example_of(name: str, even: bool = True) -> Example:
    """The example, changed as its case says."""
    example, case = BY_NAME[name], (CASES if even else UNEVEN)[name]

    def inputs(model: Any, noise: Noise) -> dict[str, Any]:
        given = {**example.inputs(model, noise), **case.inputs}
        for key, cuts in case.shapes.items():
            for dim, size in cuts if key in given else ():
                given[key] = given[key].narrow(dim, 0, size).contiguous()
        return given

    return replace(example, config={**example.config, **case.config}, inputs=inputs)


def groups_of(degree: int) -> list[list[int]]:
    """Neighbouring ranks, ``degree`` of them in each group."""
    groups: list[list[int]] = torch.arange(WORLD).view(-1, degree).tolist()
    return groups


def ulysses(groups: list[list[int]], uneven: bool = False) -> Any:
    """A configuration that splits a sequence over each of ``groups``."""
    from diffusers import ContextParallelConfig
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh("cpu", torch.tensor(groups)[:, None], mesh_dim_names=("group", "ring", "ulysses"))
    return ContextParallelConfig(ulysses_degree=len(groups[0]), ulysses_anything=uneven, mesh=mesh)


def plan_of(model: Any) -> dict[str, Any]:
    """The model's plan, without the blocks that a small model lacks, and whole."""
    plan = {path: part for path, part in model._cp_plan.items() if not re.search(r"\.([2-9]|\d\d)\b", path)}
    if hasattr(model, "cross_attn_rope"):
        # That of LTX-2 forgets the tables with which video attends to sound.
        plan["cross_attn_rope"] = plan["rope"]
    return plan


def split_over_ranks(model: Any, groups: list[list[int]], uneven: bool = False) -> Mapping[str, Any]:
    """Enables Ulysses over each of ``groups``; returns the plan."""
    plan = plan_of(model)
    model.enable_parallelism(config=ulysses(groups, uneven), cp_plan=plan)
    return plan


def join(model: Any, plan: Mapping[str, Any]) -> None:
    """The opposite of :func:`split_over_ranks`."""
    from diffusers.hooks.context_parallel import remove_context_parallel

    remove_context_parallel(model, plan)
    model._parallel_config = None
    for module in model.modules():
        if getattr(module, "processor", None) is not None:
            module.processor._parallel_config = None


def run(example: Example, model: Any, inputs: Mapping[str, Any] | None = None) -> list[torch.Tensor]:
    with torch.no_grad():
        output = example.run(model, example.inputs(model, Noise(torch.float32)) if inputs is None else inputs)
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) > 0 and all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def error(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The largest difference, in units of the largest value."""
    pairs = zip(ours, theirs, strict=True)
    return max(float((mine - other).abs().max() / other.abs().max()) for mine, other in pairs)


@contextmanager
def warnings_of_diffusers() -> Iterator[list[str]]:
    """What its splitting warns of, each time."""
    from diffusers.hooks import context_parallel as theirs

    class Keeps:
        def __init__(self) -> None:
            self.said: list[str] = []

        def warning_once(self, message: str) -> None:
            self.said.append(message)

    real, keeps = theirs.logger, Keeps()
    theirs.logger = keeps
    try:
        yield keeps.said
    finally:
        theirs.logger = real


@contextmanager
def counted_turns() -> Iterator[list[int]]:
    """Tokens of what the norms rotate."""
    counts: list[int] = []
    real = rotating_norms._RotatingModule.__call__

    def rotated(self: Any, x: torch.Tensor) -> torch.Tensor:
        counts.append(x.shape[1])
        return real(self, x)

    with unittest.mock.patch.object(rotating_norms._RotatingModule, "__call__", rotated):
        yield counts


@dataclass
class Seen:
    """What one rank saw of one model, patched before or after it was split."""

    unpatched_error: float
    equal: bool
    fast_error: float
    undone_equal: bool
    turned: set[int]
    more_said: list[str]
    handed_back: bool


def patched_and_split(name: str, degree: int, first: str, even: bool) -> Seen:
    """On every rank; ``first`` is "patch" or "split"."""
    example = example_of(name, even)
    dit_rope.cache_clear()
    model = example.build()
    single = run(example, model)
    split_over_ranks(model, groups_of(degree), not even)
    with warnings_of_diffusers() as said_unpatched:
        theirs = run(example, model)
    model = example.build()
    handle = dit_rope.patch(model) if first == "patch" else None
    split_over_ranks(model, groups_of(degree), not even)
    before = wrapped(model)
    handle = handle or dit_rope.patch(model)
    with warnings_of_diffusers() as said:
        ours = [run(example, model)]
    ours.append(run(example, model))
    handle.undo()
    undone, handed_back = run(example, model), first == "patch" or wrapped(model) == before
    with dit_rope.patch(model, exact=False), counted_turns() as turned:
        fast = run(example, model)
    equal = all(same(each, theirs) for each in ours)
    more_said = [message for message in said if message not in said_unpatched]
    fast_error = error(fast, theirs)
    return Seen(error(theirs, single), equal, fast_error, same(undone, theirs), set(turned), more_said, handed_back)


def wrapped(model: torch.nn.Module) -> dict[str, Any]:
    """By module, every forward in it or in its hooks."""
    return {
        path: [vars(module).get(name) for name in ("forward", "_old_forward")]
        + [vars(ref).copy() for ref in getattr(vars(module).get("_diffusers_hook"), "_fn_refs", ())]
        for path, module in model.named_modules()
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(WORLD, tmp_path_factory.mktemp("ranks")) as started:
        yield started


@pytest.fixture(autouse=True)
def _groups_end(ranks: Ranks) -> Iterator[None]:
    yield
    ranks.run(end_groups)


def test_every_class_that_can_be_split_is_here() -> None:
    import diffusers

    found: set[str] = set()
    root = Path(diffusers.__file__).parent
    for path in (root / "models").rglob("*.py"):
        if re.search(r"^    _cp_plan\b.*= [{\w]", path.read_text(), flags=re.MULTILINE):
            module = ".".join(("diffusers", *path.relative_to(root).with_suffix("").parts))
            members = vars(importlib.import_module(module)).values()
            found |= {cls.__name__ for cls in members if isinstance(cls, type) and getattr(cls, "_cp_plan", None)}
    assert found == {BY_NAME[name].model_class.__name__ for name in CASES}
    assert found <= {adapter.model_class for adapter in ADAPTERS}


@pytest.mark.parametrize("first", ["patch", "split"])
@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_split_model_stays_bitwise_equal(ranks: Ranks, name: str, degree: int, first: str) -> None:
    for seen in ranks.run(patched_and_split, name, degree, first, True):
        assert seen.equal
        assert seen.undone_equal
        assert seen.handed_back
        assert seen.more_said == []
        assert seen.turned
        assert seen.fast_error <= 64 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", UNEVEN)
def test_unevenly_split_model_stays_bitwise_equal(ranks: Ranks, name: str) -> None:
    """The first ranks hold one token more, and heads that are fewer than ranks are padded."""
    degree = 4 if UNEVEN[name].config else 2
    lengths = set()
    for first in ("patch", "split"):
        for seen in ranks.run(patched_and_split, name, degree, first, False):
            assert seen.equal
            assert seen.undone_equal
            assert seen.fast_error <= 64 * torch.finfo(torch.float32).eps
            lengths |= seen.turned
    assert len(lengths) > 1


def one_model_split_anew(name: str) -> list[bool]:
    """One patched model, its inputs the same tensors throughout, and its place among the ranks another each time."""
    example = example_of(name)
    dit_rope.cache_clear()
    model, theirs = example.build(), example.build()
    inputs = example.inputs(model, Noise(torch.float32))
    equal = []
    with dit_rope.patch(model):
        for groups in ([[0, 1], [2, 3]], [[0, 3], [1, 2]], [[0, 1, 2, 3]], None):
            plans = [] if groups is None else [split_over_ranks(each, groups) for each in (model, theirs)]
            equal += [same(run(example, model, inputs), run(example, theirs, inputs)) for _ in range(2)]
            for each, plan in zip((model, theirs), plans, strict=False):
                join(each, plan)
    return equal


@pytest.mark.parametrize("name", ["flux", "wan", "ltx2-interleaved", "helios-history"])
def test_no_rank_gets_a_table_of_another_place(ranks: Ranks, name: str) -> None:
    for equal in ranks.run(one_model_split_anew, name):
        assert all(equal), equal


def split_by_a_plan_that_forgets_a_table() -> list[str]:
    """What LTX-2 raises unpatched and patched, split by its own plan: video, and not the table of its queries."""
    errors, example = [], example_of("ltx2-interleaved")
    for patched in (False, True):
        model: Any = example.build()
        if patched:
            dit_rope.patch(model)
        model.enable_parallelism(config=ulysses(groups_of(2)))
        try:
            run(example, model)
        except RuntimeError as raised:
            errors.append(str(raised))
    return errors


def test_sequence_split_without_its_table_is_an_error_as_in_the_unpatched_model(ranks: Ranks) -> None:
    """VeOmni once turned every rank's tokens by the first rows of the whole table."""
    for unpatched, patched in ranks.run(split_by_a_plan_that_forgets_a_table):
        assert "size of tensor a (14) must match the size of tensor b (28)" in unpatched
        assert patched == unpatched


def patched_at_times_of_their_own() -> bool:
    """Every rank patches while all others wait for it elsewhere."""
    model = example_of("flux").build()
    split_over_ranks(model, groups_of(WORLD))
    for rank in range(WORLD):
        if torch.distributed.get_rank() == rank:
            dit_rope.patch(model).undo()
        torch.distributed.barrier()
    return True


def test_patching_asks_no_other_rank(ranks: Ranks) -> None:
    assert ranks.run(patched_at_times_of_their_own) == [True] * WORLD


def parts_of_a_ring(name: str, ring: int) -> tuple[bool, bool]:
    """Patched against unpatched where each rank attends to its own part alone; and whether every rank's is its own."""
    from diffusers import ContextParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    example, outputs = example_of(name), []
    for patched in (False, True):
        model: Any = example.build()
        handle = dit_rope.patch(model) if patched else None
        mesh = init_device_mesh("cpu", (ring, WORLD // ring), mesh_dim_names=("ring", "ulysses"))
        config = ContextParallelConfig(ring_degree=ring, ulysses_degree=WORLD // ring, mesh=mesh)
        model.enable_parallelism(config=config, cp_plan=plan_of(model))
        for module in model.modules():
            if getattr(module, "processor", None) is not None:
                module.processor._parallel_config = None
        outputs.append(run(example, model))
        if handle is not None:
            handle.undo()
    return same(*outputs), not same(outputs[0], run(example, example.build()))


@pytest.mark.parametrize("ring", [WORLD, 2], ids=["ring", "unified"])
@pytest.mark.parametrize("name", ["wan", "flux", "ltx-padded", "helios-plain", "minimax-h3"])
def test_parts_of_a_ring_turn_as_unpatched(ranks: Ranks, name: str, ring: int) -> None:
    """Its attention needs a log-sum-exp, which the native one on CPU does not return: the split is what runs here."""
    assert ranks.run(parts_of_a_ring, name, ring) == [(True, True)] * WORLD
