"""A report is worked out when it is asked for, and is never better than the truth."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import sys
import textwrap
import types
from typing import Any

import pytest
import torch

import dit_rope
from dit_rope.hooks.class_override import unpatched_class
from tolerance import all_equal
from twins import attentions, check, run
from zoo import named

pytestmark = pytest.mark.usefixtures("one_thread")


def test_report_says_where_the_model_rotates_by_itself(rotations: list[str]) -> None:
    model = named("wan").build()

    def rotated() -> int:
        rotations.clear()
        run(named("wan"), model)
        return len(rotations)

    with dit_rope.patch(model) as handle:
        assert rotated() == 4
        assert "blocks.*.attn1 (2 modules): norm_q, norm_k norm and rotate" in handle.report()

        class Derived(unpatched_class(model.blocks[0].attn1.processor)):  # type: ignore[misc]
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                return super().__call__(*args, **kwargs)

        model.blocks[0].attn1.processor = Derived()
        assert rotated() == 2
        assert "blocks.*.attn1 (1 module): norm_q, norm_k norm and rotate" in handle.report()
        assert "not patched: blocks.*.attn1 (1 module), where the model rotates: " in handle.report()
        assert "Derived.__call__ is " in handle.report()

        model.blocks[1].attn1 = copy.deepcopy(model.blocks[0].attn1)
        assert rotated() == 0
        assert "(2 modules), where the model rotates: " in handle.report()
        assert "norm and rotate" not in handle.report()
        assert "arithmetic" not in handle.report()
    assert "(undone)" in handle.report()


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_report_says_that_a_part_was_replaced_after_the_patch(name: str) -> None:
    model: Any = named(name).build()
    path = "rope" if name == "wan" else "pos_embed"
    with dit_rope.patch(model) as handle:
        assert f"{path} was replaced" not in handle.report()
        original = unpatched_class(getattr(model, path))
        fresh = original(*_arguments(getattr(model, path), original))
        setattr(model, path, fresh)
        assert f"{path} was replaced after the patch; undo it and patch again" in handle.report()


def _arguments(module: Any, cls: type) -> list[Any]:
    names = list(inspect.signature(cls).parameters)
    known = {"max_seq_len": 32, "axes_dim": getattr(module, "axes_dim", None), "theta": getattr(module, "theta", 1e4)}
    return [known.get(name, getattr(module, name, None)) for name in names]


def test_report_of_a_model_in_float64_says_that_it_rotates_by_itself() -> None:
    model = named("flux").build()
    with dit_rope.patch(model) as handle:
        model.double()
        assert "norm and rotate" not in handle.report()
        assert "its weights are float64, in which it rotates by itself" in handle.report()


def test_source_of_known_code_in_another_module_is_not_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Copied word for word into a file of one's own, in which it finds another function."""
    from diffusers.models.transformers import transformer_flux

    source = textwrap.dedent(inspect.getsource(transformer_flux.FluxAttnProcessor.__call__))
    lines = [
        "from diffusers.models.transformers.transformer_flux import *",
        "from diffusers.models.transformers import transformer_flux as own",
        "import torch",
        "_get_qkv_projections, dispatch_attention_fn = own._get_qkv_projections, own.dispatch_attention_fn",
        "def apply_rotary_emb(x, freqs, **kwargs):",
        "    return own.apply_rotary_emb(x, (freqs[0], -freqs[1]), **kwargs)",
    ]
    path = tmp_path / "copied_processor.py"
    path.write_text("\n".join(lines) + "\n" + source)
    spec = importlib.util.spec_from_file_location("copied_processor", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "copied_processor", module)
    spec.loader.exec_module(module)
    copied = vars(module)["__call__"]
    example = named("flux")
    model, twin = example.build(), example.build()
    plain = run(example, twin)
    with dit_rope.patch(model, exact=True) as handle:
        run(example, model)
        monkeypatch.setattr(transformer_flux.FluxAttnProcessor, "__call__", copied)
        expected = run(example, twin)
        assert not torch.equal(plain[0], expected[0])
        assert all_equal(run(example, model), expected)
        assert "where the model rotates" in handle.report()
        scope = {**vars(transformer_flux), "apply_rotary_emb": module.apply_rotary_emb}
        moved = types.FunctionType(copied.__code__, scope, "__call__", copied.__defaults__)
        moved.__module__ = transformer_flux.__name__
        monkeypatch.setattr(transformer_flux.FluxAttnProcessor, "__call__", moved)
        assert all_equal(run(example, model), run(example, twin))


@pytest.mark.parametrize("when", ["before", "after"])
def test_layers_that_diffusers_skips_by_the_class_of_their_processor(when: str) -> None:
    """Its registry of processors is asked by class, and a patched one has a class of its own."""
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip

    def skip(model: Any) -> None:
        config = LayerSkipConfig(indices=[0], fqn="layers", skip_attention=True, skip_ff=False)
        apply_layer_skip(model, config)

    def skip_scores(model: Any) -> None:
        config = LayerSkipConfig(
            indices=[0], fqn="layers", skip_attention=False, skip_attention_scores=True, skip_ff=False, dropout=1.0
        )
        apply_layer_skip(model, config)

    for act in (skip, skip_scores):
        for exact in (True, False):
            check("z-image", act, when, exact, changes=False)
    assert attentions(named("z-image").build())
