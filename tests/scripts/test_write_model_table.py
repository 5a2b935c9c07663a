"""The tables of models: what they claim of a class is what a test of that class has shown."""

from __future__ import annotations

import functools
import re

import pytest
import torch

import dit_rope
from dit_rope.hooks import table_keys
from dit_rope.models import ADAPTERS
from pages import write_model_table
from split_models import CASES
from zoo import Noise, named


@functools.cache
def cells() -> dict[str, list[str]]:
    """The row of each class in the wide table, without its name."""
    lines = [re.split(r" \| ", line.strip("| \n")) for line in write_model_table.compatibility().splitlines()[2:]]
    return {name.strip("`"): rest for name, *rest in lines}


def test_every_class_has_a_row() -> None:
    assert list(cells()) == [adapter.model_class for adapter in ADAPTERS]


def test_classes_with_context_parallelism_are_those_that_were_split() -> None:
    split = {named(name).model_class.__name__ for name in CASES}
    assert {name for name, (*_, parallel, _) in cells().items() if parallel == "yes"} == split


def test_tables_say_where_they_are_memoized() -> None:
    rows = cells()
    names = (
        "WanTransformer3DModel",
        "FluxTransformer2DModel",
        "LTXVideoTransformer3DModel",
        "AllegroTransformer3DModel",
    )
    assert [rows[name][0] for name in names] == [
        "memoized, axis tables",
        "memoized on a CPU",
        "memoized",
        "not its own",
    ]


@pytest.mark.parametrize("name", ["flux", "chroma", "lumina2", "ltx-padded", "hunyuan-video", "qwen-image", "omnigen"])
@pytest.mark.usefixtures("one_thread")
def test_tables_memoized_on_a_cpu_are_those_that_depend_on_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where values cannot be compared, as on a GPU, nothing of these is memoized, and all of the others."""
    example = named(name)
    model = example.build(torch.float32)

    def no_value(tensor: torch.Tensor) -> None:
        raise table_keys.Unkeyed

    monkeypatch.setattr(table_keys, "_by_value", no_value)
    dit_rope.cache_clear()
    with torch.no_grad(), dit_rope.patch(model):
        example.run(model, example.inputs(model, Noise(torch.float32, 1)))
        memoized = dit_rope.cache_info().models.entries > 0
    assert cells()[type(model).__name__][0] == ("memoized" if memoized else "memoized on a CPU")


def test_exact_mode_says_who_rotates() -> None:
    rows = cells()
    assert [rows[name][2] for name in ("FluxTransformer2DModel", "AnyFlowTransformer3DModel")] == ["yes", "no"]
    assert rows["QwenImageTransformer2DModel"][2] == "if shown"
    assert rows["LTX2VideoTransformer3DModel"][2] == "yes; if shown"


def test_text_without_the_marks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"text must have the marks of 'models', got none"):
        write_model_table.with_section("# A page\n", "| a |\n")


def test_section_replaces_what_stood_between_its_marks() -> None:
    text = "a\n<!-- models: written by scripts/x.py -->\nold\n<!-- end of models -->\nb <!-- other -->\n"
    assert write_model_table.with_section(text, "new\n") == text.replace("old", "new")
