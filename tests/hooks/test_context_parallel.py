"""diffusers' context parallelism, on CPU over gloo: a patched model whose sequence is split over ranks.

Every class of diffusers that says how to split it runs unpatched on one rank, unpatched on several, and patched before
and after it was split: the same bits as unpatched on as many ranks.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import dit_rope
from dit_rope.models import ADAPTERS
from ranks import Ranks, end_groups
from split_models import (
    CASES,
    UNEVEN,
    WORLD,
    counted_rotations,
    error,
    example_of,
    groups_of,
    join,
    plan_of,
    run,
    split_over_ranks,
    ulysses,
    wrapped,
)
from tolerance import all_equal
from zoo import Noise, named


@contextmanager
def warnings_of_diffusers() -> Iterator[list[str]]:
    """Every warning that context parallelism of diffusers logs."""
    from diffusers.hooks import context_parallel as upstream

    class RecordingLogger:
        def __init__(self) -> None:
            self.messages: list[str] = []

        def warning_once(self, message: str) -> None:
            self.messages.append(message)

    real, recording = upstream.logger, RecordingLogger()
    upstream.logger = recording
    try:
        yield recording.messages
    finally:
        upstream.logger = real


@dataclass
class Outcome:
    """What one rank saw of one model, patched before or after it was split."""

    unpatched_error: float
    equal: bool
    fast_error: float
    undone_equal: bool
    rotated: set[int]
    new_warnings: list[str]
    handed_back: bool


def patched_and_split(name: str, degree: int, first: str, even: bool) -> Outcome:
    """On every rank; ``first`` is "patch" or "split"."""
    example = example_of(name, even)
    dit_rope.cache_clear()
    model = example.build()
    single = run(example, model)
    split_over_ranks(model, groups_of(degree), not even)
    with warnings_of_diffusers() as warnings_unpatched:
        expected = run(example, model)
    model = example.build()
    handle = dit_rope.patch(model) if first == "patch" else None
    split_over_ranks(model, groups_of(degree), not even)
    before = wrapped(model)
    handle = handle or dit_rope.patch(model)
    with warnings_of_diffusers() as warned:
        actual = [run(example, model)]
    actual.append(run(example, model))
    handle.undo()
    undone, handed_back = run(example, model), first == "patch" or wrapped(model) == before
    with dit_rope.patch(model, exact=False), counted_rotations() as rotated:
        fast = run(example, model)
    equal = all(all_equal(outputs, expected) for outputs in actual)
    new_warnings = [message for message in warned if message not in warnings_unpatched]
    fast_error = error(fast, expected)
    return Outcome(
        error(expected, single), equal, fast_error, all_equal(undone, expected), set(rotated), new_warnings, handed_back
    )


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

    names: set[str] = set()
    root = Path(diffusers.__file__).parent
    for path in (root / "models").rglob("*.py"):
        if re.search(r"^    _cp_plan\b.*= [{\w]", path.read_text(), flags=re.MULTILINE):
            module = ".".join(("diffusers", *path.relative_to(root).with_suffix("").parts))
            members = vars(importlib.import_module(module)).values()
            names |= {cls.__name__ for cls in members if isinstance(cls, type) and getattr(cls, "_cp_plan", None)}
    assert names == {named(name).model_class.__name__ for name in CASES}
    assert names <= {adapter.model_class for adapter in ADAPTERS}


@pytest.mark.parametrize("first", ["patch", "split"])
@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_split_model_stays_bitwise_equal(ranks: Ranks, name: str, degree: int, first: str) -> None:
    for outcome in ranks.run(patched_and_split, name, degree, first, True):
        assert outcome.equal
        assert outcome.undone_equal
        assert outcome.handed_back
        assert outcome.new_warnings == []
        assert outcome.rotated
        assert outcome.fast_error <= 64 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", UNEVEN)
def test_unevenly_split_model_stays_bitwise_equal(ranks: Ranks, name: str) -> None:
    """The first ranks hold one token more, and heads that are fewer than ranks are padded."""
    degree = 4 if UNEVEN[name].config else 2
    lengths = set()
    for first in ("patch", "split"):
        for outcome in ranks.run(patched_and_split, name, degree, first, False):
            assert outcome.equal
            assert outcome.undone_equal
            assert outcome.fast_error <= 64 * torch.finfo(torch.float32).eps
            lengths |= outcome.rotated
    assert len(lengths) > 1


def one_model_split_anew(name: str) -> list[bool]:
    """One patched model, its inputs the same tensors throughout, and its place among the ranks another each time."""
    example = example_of(name)
    dit_rope.cache_clear()
    model, twin = example.build(), example.build()
    inputs = example.inputs(model, Noise(torch.float32))
    equal = []
    with dit_rope.patch(model):
        for groups in ([[0, 1], [2, 3]], [[0, 3], [1, 2]], [[0, 1, 2, 3]], None):
            plans = [] if groups is None else [split_over_ranks(split_model, groups) for split_model in (model, twin)]
            equal += [all_equal(run(example, model, inputs), run(example, twin, inputs)) for _ in range(2)]
            for split_model, plan in zip((model, twin), plans, strict=False):
                join(split_model, plan)
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
    """VeOmni once rotated every rank's tokens by the first rows of the whole table."""
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
    return all_equal(*outputs), not all_equal(outputs[0], run(example, example.build()))


@pytest.mark.parametrize("ring", [WORLD, 2], ids=["ring", "unified"])
@pytest.mark.parametrize("name", ["wan", "flux", "ltx-padded", "helios-plain", "minimax-h3"])
def test_parts_of_a_ring_turn_as_unpatched(ranks: Ranks, name: str, ring: int) -> None:
    """Its attention needs a log-sum-exp, which the native one on CPU does not return: the split is what runs here."""
    assert ranks.run(parts_of_a_ring, name, ring) == [(True, True)] * WORLD
