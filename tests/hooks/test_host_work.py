"""Work of the host that upstream repeats in every step, and that a patched model does once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dit_rope
from dit_rope.hooks import rope_modules
from zoo import EXAMPLES, Example, Noise

BY_NAME = {example.name: example for example in EXAMPLES}
SYNCING = ("qwen-image-21", "lumina2", "omnigen")
COPYING = ("easyanimate", "cogview4", "glm-image", "joyimage", "joyimage-edit-plus", "lumina2", "omnigen", "nucleus")


class Operators(TorchDispatchMode):
    """Counts operators other than views, in table code and elsewhere."""

    only_watches = True

    def __init__(self) -> None:
        super().__init__()
        self.in_tables = False
        self.tables: Counter[str] = Counter()
        self.elsewhere: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A buffer on the host is compared with what it was; elsewhere its version tells.
        if not func.is_view and func is not torch.ops.aten.equal.default:
            (self.tables if self.in_tables else self.elsewhere)[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Operators:
    counter = Operators()
    real = rope_modules._memoized

    def memoized(*args: Any) -> Any:
        counter.in_tables = True
        try:
            return real(*args)
        finally:
            counter.in_tables = False

    monkeypatch.setattr(rope_modules, "_memoized", memoized)
    dit_rope.cache_clear()
    return counter


def second_step(example: Example, operators: Operators) -> None:
    """Runs two steps; counts the second alone."""
    model = example.build()
    inputs = example.inputs(model, Noise(torch.float32))
    with dit_rope.patch(model), torch.no_grad():
        with operators:
            example.run(model, inputs)
        assert operators.tables
        operators.tables.clear()
        operators.elsewhere.clear()
        with operators:
            example.run(model, inputs)


@pytest.mark.parametrize("name", sorted({*SYNCING, *COPYING}))
def test_second_step_runs_no_table_code(name: str, operators: Operators) -> None:
    """None to build, none to copy, and no ``.item()`` or ``.tolist()``, which are the operator _local_scalar_dense.

    Lumina's rope module also cuts the latent into patches, which is data.
    """
    second_step(BY_NAME[name], operators)
    patches = {"clone", "_unsafe_view", "copy_"} if name == "lumina2" else set()
    assert operators.tables.keys() <= patches


@pytest.mark.parametrize("name", SYNCING)
def test_second_step_waits_for_fewer_numbers_than_the_model_does_alone(name: str, operators: Operators) -> None:
    """QwenImage-2.1 waits for more in its processor, outside of table code."""
    example = BY_NAME[name]
    with torch.no_grad(), operators:
        example.forward(example.build())
    alone = operators.elsewhere["_local_scalar_dense"]
    second_step(example, operators)
    assert operators.elsewhere["_local_scalar_dense"] < alone


@pytest.mark.parametrize("name", ["easyanimate", "cogview4", "glm-image", "joyimage"])
def test_tables_made_on_the_host_are_kept_where_the_model_computes(
    name: str, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a second device: the memo moves what it builds to the device of the model's tensors."""
    moved: list[torch.device] = []
    real: Callable[..., torch.device] = rope_modules._device
    monkeypatch.setattr(rope_modules, "_device", lambda *a: moved.append(real(*a)) or moved[-1])
    model = BY_NAME[name].build()
    with dit_rope.patch(model) as handle, torch.no_grad():
        BY_NAME[name].forward(model)
        tables = [target.tables for plan in handle._plans for target in plan.tables]
    assert moved
    assert all(table.to_device for table in tables)  # type: ignore[union-attr]
