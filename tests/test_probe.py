"""The probe: an attention module that does something else under the same names is refused, and nothing changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_models import PATCHED, objects
from zoo import EXAMPLES, Example

import dit_rope
from dit_rope.models import probe as probe_module
from dit_rope.models.plan import Options, make_plan
from dit_rope.patching import adapter_of

BY_NAME = {example.name: example for example in EXAMPLES}
UNPROBED = {
    "cosmos3",
    "cosmos3-edge-omni",
    "cosmos3-line",
    "kandinsky6-sr",
    "prx",
    "sana-wm",
    "sana-wm-cameras",
    "stable-audio-3",
    "stable-audio-3-plain",
}
"""Examples of which some kind of attention module that turns cannot be called with what the probe makes up."""


@pytest.fixture(autouse=True)
def _nothing_probed(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr(probe_module, "_right", set())


def probed(example: Example) -> tuple[set[Any], set[Any]]:
    """Types of the attention modules that turn, and of those that are probed."""
    model = example.build()
    adapter = adapter_of(model)
    assert adapter is not None
    plan = make_plan("model", model, adapter)
    turning = {type(found.attention) for found in plan.rotations if found.turned}
    return turning, {type(probe.found.attention) for probe in probe_module.probes(plan, plan.grid_settings(Options()))}


@pytest.mark.parametrize("example", PATCHED, ids=lambda example: example.name)
def test_every_kind_of_attention_module_is_probed_but_for_those_listed(example: Example) -> None:
    turning, found = probed(example)
    assert (turning != found) == (example.name in UNPROBED)


def test_second_model_of_a_kind_is_not_probed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    real = probe_module._at_attention
    monkeypatch.setattr(probe_module, "_at_attention", lambda *a: runs.append(1) or real(*a))
    example = BY_NAME["flux"]
    dit_rope.patch(example.build())
    assert runs
    runs.clear()
    dit_rope.patch(example.build())
    assert not runs


def turns_backwards(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor], **_: Any) -> torch.Tensor:
    """A rotation of the same name by the other sign, as another version of diffusers might have."""
    from diffusers.models.embeddings import apply_rotary_emb

    cos, sin = table
    turned: torch.Tensor = apply_rotary_emb(x, (cos, -sin), sequence_dim=1)
    return turned


def test_processor_that_turns_otherwise_is_refused_and_the_model_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from diffusers.models.transformers import transformer_flux

    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", turns_backwards)
    model = BY_NAME["flux"].build()
    before = objects(model)
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn must turn its queries and keys as .*not known"):
        dit_rope.patch(model)
    assert objects(model) == before


@pytest.mark.parametrize("name", ["flux", "hunyuan-video", "ltx-padded"])
def test_float64_that_the_model_turns_in_float32_is_refused_for_that_reason(name: str) -> None:
    model = BY_NAME[name].build().double()
    before = objects(model)
    with pytest.raises(ValueError, match=r"must have weights of 16 or 32 bits, got torch\.float64, .*another dtype"):
        dit_rope.patch(model)
    assert objects(model) == before


def test_float64_that_is_turned_otherwise_is_refused_as_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.transformers import transformer_flux

    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", turns_backwards)
    with pytest.raises(ValueError, match="not known"):
        dit_rope.patch(BY_NAME["flux"].build().double())


def test_processor_that_turns_text_too_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of text and image, not only the arithmetic."""
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    def image_first(self: Any, attn: Any, hidden: Any, text: Any = None, mask: Any = None, rotary: Any = None) -> Any:
        rolled = rotary and tuple(part.roll(1, 0) for part in rotary)
        return own(self, attn, hidden, text, mask, rolled)

    own = FluxAttnProcessor.__call__
    monkeypatch.setattr(FluxAttnProcessor, "__call__", image_first)
    with pytest.raises(ValueError, match="not known"):
        dit_rope.patch(BY_NAME["flux"].build())


def test_attention_with_another_argument_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.transformers.transformer_ltx import LTXAttention

    def forward(self: Any, hidden_states: Any, encoder_hidden_states: Any = None, rope: Any = None) -> Any:
        raise AssertionError

    monkeypatch.setattr(LTXAttention, "forward", forward)
    with pytest.raises(ValueError, match=r"must take image_rotary_emb, got LTXAttention\(hidden_states, .*rope\)"):
        dit_rope.patch(BY_NAME["ltx-padded"].build())


def test_rope_module_of_another_class_or_without_its_method_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = BY_NAME["flux"].build()
    model.pos_embed = torch.nn.Identity()
    with pytest.raises(ValueError, match="pos_embed must be a FluxPosEmbed, got Identity"):
        dit_rope.patch(model)


def test_model_without_weights_is_not_probed() -> None:
    with torch.device("meta"):
        model = BY_NAME["flux"].model_class(**BY_NAME["flux"].config)
    with dit_rope.patch(model):
        assert not probe_module._right


def test_probe_runs_no_hooks_of_others_and_leaves_the_random_state() -> None:
    model = BY_NAME["flux"].build()
    for block in model.transformer_blocks:
        block.attn.register_forward_pre_hook(lambda *_: pytest.fail("a hook ran"))
    state = torch.random.get_rng_state()
    dit_rope.patch(model)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ["cogview4", "hidream", "kandinsky5"])
def test_probe_does_not_mind_autocast(name: str) -> None:
    model = BY_NAME[name].build()
    with torch.autocast("cpu", torch.bfloat16):
        dit_rope.patch(model)
    assert probe_module._right


@pytest.mark.parametrize("name", ["lumina2", "ltx2-split", "flux"])
def test_probe_does_not_mind_the_default_dtype(name: str) -> None:
    """``from_pretrained`` builds models under the default dtype that it was asked for."""
    model = BY_NAME[name].build()
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        dit_rope.patch(model)
    finally:
        torch.set_default_dtype(kept)
    assert probe_module._right


def test_weights_that_are_not_loaded_yet_are_not_judged() -> None:
    model = BY_NAME["flux"].build()
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    dit_rope.patch(model)
    assert not probe_module._right
