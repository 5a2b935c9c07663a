"""Models, and parts of them, in other dtypes than they were tested in: as the unpatched model does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dit_rope
from twins import BEFORE_AND_AFTER, Outcome, run
from zoo import named, tensors

WHEN = pytest.mark.parametrize("when", BEFORE_AND_AFTER)
MODE = pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
OTHERS = ("kandinsky5", "kandinsky5-offset", "prx", "stable-audio-3", "kandinsky6-sr", "sana-wm-refiner", "wan", "flux")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["float64", "float16"])
@pytest.mark.parametrize(
    "name",
    [
        "kandinsky5",
        "kandinsky5-offset",
        "prx",
        "stable-audio-3",
        "kandinsky6-sr",
        "sana-wm-refiner",
        "wan",
        "flux",
        "helios-plain",
    ],
)
@WHEN
def test_models_in_other_dtypes(name: str, dtype: torch.dtype, when: str) -> None:
    """In float16 Kandinsky 5 rounds once, to bfloat16; in float64 the model rotates by itself."""
    example = named(name)
    twin, model = example.build().to(dtype), example.build()
    if when == "before":
        model.to(dtype)
    with dit_rope.patch(model, exact=True), torch.no_grad():
        model.to(dtype)
        expected = Outcome.of(lambda: tensors(example.forward(twin, dtype)))
        actual = Outcome.of(lambda: tensors(example.forward(model, dtype)))
    assert type(actual.error) is type(expected.error)
    for x, y in zip(actual.outputs, expected.outputs, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


@MODE
@pytest.mark.parametrize("name", ["cosmos3", "ideogram4", "flux", "wan"])
def test_norms_in_another_dtype_than_the_model(name: str, exact: bool) -> None:
    def act(model: Any) -> None:
        for path, module in model.named_modules():
            if "norm_" in path.rpartition(".")[2] and list(module.parameters()):
                module.to(torch.bfloat16)

    example = named(name)
    twin, model = example.build(), example.build()
    act(twin)
    expected = Outcome.of(lambda: run(example, twin))
    act(model)
    with dit_rope.patch(model, exact=exact):
        actual = Outcome.of(lambda: run(example, model))
    assert type(actual.error) is type(expected.error)
    for x, y in zip(actual.outputs, expected.outputs, strict=True):
        bound = 0.0 if exact else 64 * torch.finfo(torch.bfloat16).eps * float(y.abs().max())
        assert float((x - y).abs().max()) <= bound
