"""Adapters of classes that users register: patched and reported like those of diffusers, and taken back."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers.models.transformers import transformer_flux

import dit_rope
from dit_rope.adapters import HALF, AttentionRotation, Layout, ModelAdapter, ModelTables, adapter_of
from dit_rope.hooks.known_code import known_digests
from dit_rope.models.wan import WAN
from dit_rope.rotation import ops

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "register_adapter.py"


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The sample program as a module; its model has no adapter after the test."""
    spec = importlib.util.spec_from_file_location("register_adapter", SAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    yield module
    adapter = adapter_of(module.Transformer())
    if adapter is not None:
        dit_rope.unregister_adapter(adapter)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An entry for every rotation by dit_rope."""
    rotations: list[None] = []
    real = ops.rotate

    def counted(*args: Any, **kwargs: Any) -> Any:
        rotations.append(None)
        return real(*args, **kwargs)

    monkeypatch.setattr(ops, "rotate", counted)
    return rotations


def test_sample_prints_a_report_and_equal_bits(sample: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    sample.main()
    printed = capsys.readouterr().out
    assert "rope: Rope, tables memoized" in printed
    assert "layers.* (2 modules): norm_q, norm_k norm and rotate" in printed
    assert "bits are the same: True" in printed


def test_page_shows_the_adapter_of_the_sample() -> None:
    page = (SAMPLE.parents[1] / "docs" / "models.md").read_text()
    (shown,) = re.findall(r"^```py\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert shown in SAMPLE.read_text()


def test_registered_class_is_patched_until_it_is_unregistered(sample: ModuleType, calls: list[None]) -> None:
    model, x = sample.Transformer().eval(), torch.randn(1, 6, 64)
    with pytest.raises(dit_rope.UnsupportedModelError, match="model: Transformer"):
        dit_rope.patch(model)
    with torch.no_grad():
        expected = model(x)
        dit_rope.register_adapter(sample.ADAPTER)
        handle = dit_rope.patch(model)
        assert torch.equal(model(x), expected)
        assert len(calls) == 4
        dit_rope.unregister_adapter(sample.ADAPTER)
        assert torch.equal(model(x), expected)
        assert len(calls) == 4
    assert "not the code that dit_rope knows" in handle.report()
    handle.undo()
    with pytest.raises(dit_rope.UnsupportedModelError):
        dit_rope.patch(model)


def test_code_that_changes_after_registration_is_unknown(
    sample: ModuleType, calls: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    dit_rope.register_adapter(sample.ADAPTER)
    model, x = sample.Transformer().eval(), torch.randn(1, 6, 64)
    with torch.no_grad(), dit_rope.patch(model) as handle:
        monkeypatch.setattr(sample, "rotate", lambda x, rotary: x)
        model(x)
        assert not calls
        assert "register_adapter.rotate" in handle.report()


def test_registration_does_not_make_unknown_code_of_diffusers_known(
    sample: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def apply_rotary_emb(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return x

    apply_rotary_emb.__module__ = transformer_flux.__name__
    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", apply_rotary_emb)
    (rotation,) = sample.ADAPTER.rotations
    adapter = replace(sample.ADAPTER, rotations=(replace(rotation, processors=("FluxAttnProcessor",)),))
    slot, before = f"{transformer_flux.__name__}.apply_rotary_emb", known_digests()
    dit_rope.register_adapter(adapter)
    assert known_digests()[slot] == before[slot]
    assert known_digests().keys() > before.keys()
    dit_rope.unregister_adapter(adapter)
    assert known_digests() == before


def test_names_of_registered_classes_are_suggested(sample: ModuleType) -> None:
    dit_rope.register_adapter(sample.ADAPTER)

    class Transformers(torch.nn.Module):
        pass

    with pytest.raises(dit_rope.UnsupportedModelError, match=r"did you mean .*Transformer\?"):
        dit_rope.patch(Transformers())


ROTATION = AttentionRotation("layers", "SelfAttention", HALF, Layout.BSHD)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tables": ModelTables("rope", "Rope")}, TypeError, "adapter.tables must be a tuple of ModelTables, got Mod"),
        ({"rotations": (HALF,)}, TypeError, "adapter.rotations must be a tuple of AttentionRotation, got"),
        ({"tables": (), "rotations": ()}, ValueError, "adapter.tables and adapter.rotations must not both be empty"),
        ({"model": WAN.model}, ValueError, f"adapter must be of a class that has no adapter, got {WAN.model}"),
        ({"model": "no_such_module.Model"}, ValueError, "adapter.model must be in a module that can be imported, got"),
        ({"model": "Model"}, ValueError, "adapter.model must be the dotted name of a class of torch modules, got"),
        ({"model": "torch.float32"}, ValueError, "adapter.model must be the dotted name of a class of torch modules"),
        ({"model": "torch.nn.Linear"}, ValueError, "use 'torch.nn.modules.linear.Linear'"),
        ({"tables": (ModelTables("rope", "Missing"),)}, ValueError, "classes with the method forward, got 'Missing'"),
        (
            {"rotations": (replace(ROTATION, processors=("SelfAttention",), attention="("),)},
            ValueError,
            "attention must be a regular expression, got '('",
        ),
        (
            {"rotations": (replace(ROTATION, norms={}),)},
            ValueError,
            "norms or replaced_function must be there, got neither for 'layers'",
        ),
    ],
)
def test_wrong_adapters_are_refused_by_name_and_change_nothing(
    sample: ModuleType, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = dit_rope.adapters.supported_models(), known_digests()
    with pytest.raises(error) as raised:
        dit_rope.register_adapter(replace(sample.ADAPTER, **change))
    assert message in str(raised.value)
    assert (dit_rope.adapters.supported_models(), known_digests()) == before


def test_other_objects_and_unregistered_adapters_are_refused(sample: ModuleType) -> None:
    with pytest.raises(TypeError, match="adapter must be a ModelAdapter, got 'Wan'"):
        dit_rope.register_adapter("Wan")  # type: ignore[arg-type]
    for adapter in (WAN, sample.ADAPTER, "Wan"):
        with pytest.raises(ValueError, match="adapter must be one that register_adapter was given, got"):
            dit_rope.unregister_adapter(adapter)
    dit_rope.register_adapter(sample.ADAPTER)
    with pytest.raises(ValueError, match="adapter must be of a class that has no adapter"):
        dit_rope.register_adapter(sample.ADAPTER)
    with pytest.raises(ValueError, match="adapter must be one that register_adapter was given"):
        dit_rope.unregister_adapter(ModelAdapter(sample.ADAPTER.model))


def test_class_without_a_source_is_refused(sample: ModuleType) -> None:
    namespace: dict[str, Any] = {"__name__": "register_adapter", "torch": torch}
    exec("class Rope(torch.nn.Module):\n    def forward(self, x):\n        return x", namespace)
    sample.Rope = namespace["Rope"]
    with pytest.raises(ValueError, match="must be a function in a file that Python can read"):
        dit_rope.register_adapter(sample.ADAPTER)
