"""Only code that is known is taken over, and whether it is known is judged when it runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import dit_rope
from dit_rope.hooks.adapter import ModelTables
from dit_rope.hooks.attention import why_unknown
from dit_rope.hooks.class_override import copy_of
from dit_rope.hooks.known_code import Guard, guard_of
from dit_rope.hooks.rope_modules import why_not_memoized
from dit_rope.models import flux
from dit_rope.models.wan import WAN
from known_classes import known, memoize
from tolerance import all_equal
from zoo import Noise, named, tensors, wan

pytestmark = pytest.mark.usefixtures("one_thread")


def run(name: str, model: torch.nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return tensors(named(name).run(model, named(name).inputs(model, Noise(torch.float32))))


def forward(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return wan.forward(model)


def backwards(x: torch.Tensor, rotary: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Somebody's own rotation."""
    return -x


def _flux_function(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.transformers import transformer_flux

    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", backwards)


def _flux_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.transformers import transformer_flux

    monkeypatch.setattr(transformer_flux.apply_rotary_emb, "__code__", backwards.__code__)


def _imported_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models import embeddings

    monkeypatch.setattr(embeddings, "apply_rotary_emb", backwards)


def _method_of_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    def silent(self: Any, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, *args: Any) -> Any:
        return hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)

    monkeypatch.setattr(FluxAttnProcessor, "__call__", silent)


CHANGES = {
    "global": ("flux", _flux_function),
    "code": ("flux", _flux_code),
    "import": ("hunyuan-video", _imported_inside),
    "method": ("flux", _method_of_the_class),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("patched", [True, False], ids=["after", "before"])
def test_code_that_somebody_replaces_is_what_runs(
    change: str, patched: bool, rotations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether before the patch or after a pass with it; and when it is put back, the patch rotates again."""
    name, replace = CHANGES[change]
    model = named(name).build()
    plain = run(name, model)
    with monkeypatch.context() as changed:
        replace(changed)
        expected = run(name, model)
    assert not all_equal(plain, expected)
    with monkeypatch.context() as changed:
        if not patched:
            replace(changed)
        with dit_rope.patch(model, exact=True) as handle:
            if patched:
                assert all_equal(run(name, model), plain)
                assert "where the model rotates" not in handle.report()
                replace(changed)
            rotations.clear()
            assert all_equal(run(name, model), expected)
            assert not rotations
            assert "where the model rotates" in handle.report()
            changed.undo()
            assert all_equal(run(name, model), plain)
            assert rotations
            assert "where the model rotates" not in handle.report()


class Helped(torch.nn.Module):
    """Builds tables by a method of its own."""

    def angles(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.float() * 2.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.angles(ids).cos()


class Between(Helped):
    """A class that may be given a method later."""


known(Helped)
HELPED = ModelTables("rope", ("Helped", "Between"))


def test_method_that_a_known_one_calls_is_known_too(monkeypatch: pytest.MonkeyPatch) -> None:
    rope, ids = Helped(), torch.arange(4)
    memoize(rope, HELPED, ("ids",))
    first = rope(ids)
    assert rope(ids) is first
    monkeypatch.setattr(Helped, "angles", lambda self, ids: ids.float() * 3.0)
    assert torch.equal(rope(ids), (ids.float() * 3.0).cos())
    monkeypatch.undo()
    assert rope(ids) is first


@pytest.mark.parametrize("name", ["forward", "angles"])
def test_class_between_may_be_given_the_method_later(name: str) -> None:
    guard = Guard(Between, "forward")
    assert guard.unknown is None
    assert guard.holds()
    try:
        setattr(Between, name, lambda self, ids: ids)
        assert not guard.holds()
        assert guard_of(Between, "forward").unknown is not None
    finally:
        delattr(Between, name)
    assert guard.holds()


def test_method_that_an_object_holds_itself_is_not_known() -> None:
    rope = Helped()
    assert why_not_memoized(rope, HELPED) is None
    rope.angles = lambda ids: ids.float() * 3.0  # type: ignore[method-assign]
    assert why_not_memoized(rope, HELPED) == "its angles was replaced on the instance"


def test_builder_of_another_name_is_not_what_was_declared() -> None:
    assert (
        why_not_memoized(Helped(), ModelTables("rope", "Rope")) == "Helped is not the class that dit_rope knows there"
    )


def test_known_processor_of_another_model_is_not_known_here() -> None:
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    processor = FluxAttnProcessor()
    guard = guard_of(FluxAttnProcessor, "__call__")
    assert why_unknown(processor, guard, flux.FLUX.rotations[0]) is None
    assert "is not the class that dit_rope knows there" in str(why_unknown(processor, guard, WAN.rotations[0]))


def test_function_that_wraps_a_known_one_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    import functools

    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    original = WanAttnProcessor.__call__
    assert Guard(WanAttnProcessor, "__call__").unknown is None

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    monkeypatch.setattr(WanAttnProcessor, "__call__", wrapper)
    assert Guard(WanAttnProcessor, "__call__").unknown is not None
    monkeypatch.setattr(WanAttnProcessor, "__call__", torch.no_grad()(original))  # which is in front of many of them
    assert Guard(WanAttnProcessor, "__call__").unknown is None


def test_known_name_of_unknown_source_is_not_known() -> None:
    class Another(Helped):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return -ids

    known(Another)
    assert Guard(Another, "forward").unknown is None
    Another.forward = lambda self, ids: ids  # type: ignore[method-assign]
    assert "Another.forward is " in str(Guard(Another, "forward").unknown)


def attend(self: Any, attn: Any, query: Any, key: Any, hidden_states: Any) -> Any:
    """Plain attention."""
    value = attn.to_v(hidden_states)
    query, key, value = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    return attn.to_out[0](attended.transpose(1, 2).flatten(2))


def _rotates(x: torch.Tensor, heads: int, rotary: Any) -> torch.Tensor:
    if rotary is None:
        return x
    from diffusers.models.embeddings import apply_rotary_emb

    cos, sin = (table[0, :, 0] for table in rotary)
    return apply_rotary_emb(x.unflatten(2, (heads, -1)), (cos, sin), sequence_dim=1).flatten(2)


def _processor(norms: int) -> Any:
    """A known processor called as Wan's, which calls so many of the norms."""

    class WanAttnProcessor:
        def project(self, attn: Any, hidden_states: Any) -> Any:
            query, key = attn.to_q(hidden_states), attn.to_k(hidden_states)
            query = attn.norm_q(query) if norms > 0 else query
            return query, attn.norm_k(key) if norms > 1 else key

        def __call__(
            self,
            attn: Any,
            hidden_states: Any,
            encoder_hidden_states: Any = None,
            attention_mask: Any = None,
            rotary_emb: Any = None,
        ) -> Any:
            query, key = self.project(attn, hidden_states)
            query, key = _rotates(query, attn.heads, rotary_emb), _rotates(key, attn.heads, rotary_emb)
            return attend(self, attn, query, key, hidden_states)

    WanAttnProcessor.__qualname__ = f"{norms}.WanAttnProcessor"
    return known(WanAttnProcessor, "__call__")()


def test_known_code_that_leaves_out_a_norm_is_an_error() -> None:
    """Its keys would not be rotated."""
    model = wan.build("wan")
    model.blocks[1].attn1.processor = _processor(1)
    expected = forward(model)
    with (
        dit_rope.patch(model) as handle,
        pytest.raises(RuntimeError, match="WanAttention must call norm_k once each where dit_rope has patched it"),
    ):
        forward(model)
    assert not handle.active
    assert torch.equal(forward(model), expected)


def test_method_that_a_processor_holds_itself_is_what_runs(rotations: list[str]) -> None:
    model = wan.build("wan")
    processor = model.blocks[1].attn1.processor = _processor(2)
    with dit_rope.patch(model) as handle:
        forward(model)
        assert len(rotations) == 4
        processor.project = lambda attn, x: (attn.to_q(x), attn.to_k(x))
        rotations.clear()
        actual = forward(model)
        assert len(rotations) == 2
        assert "its project was replaced on the instance" in handle.report()
    assert torch.equal(forward(model), actual)


def test_stand_in_is_gone_after_the_call(rotations: list[str]) -> None:
    """During it, it is of the module's class, has its attributes, and leaves the module as it is."""
    model = wan.build("wan")
    attention = model.blocks[0].attn1
    before, calls = dict(vars(attention)), []

    class WanAttnProcessor(type(_processor(2))):  # type: ignore[misc]
        def __call__(
            self,
            attn: Any,
            hidden_states: Any,
            encoder_hidden_states: Any = None,
            attention_mask: Any = None,
            rotary_emb: Any = None,
        ) -> Any:
            calls.append((attn, type(attn), dict(vars(attention))))
            query, key = self.project(attn, hidden_states)
            query, key = _rotates(query, attn.heads, rotary_emb), _rotates(key, attn.heads, rotary_emb)
            return attend(self, attn, query, key, hidden_states)

    WanAttnProcessor.__qualname__ = "seen.WanAttnProcessor"
    attention.processor = known(WanAttnProcessor, "__call__")()
    before = dict(vars(attention))
    expected = forward(model)
    with dit_rope.patch(model, exact=True):
        calls.clear()
        assert torch.equal(forward(model), expected)
    ((stand_in, cls, during),) = calls
    assert stand_in is not attention
    assert cls is type(attention)
    assert during.keys() - before.keys() == {"_dit_rope"}
    assert vars(attention) == before
    assert len(rotations) == 4


def test_report_follows_processors_that_come_and_go(rotations: list[str]) -> None:
    model = wan.build("wan")
    attention = model.blocks[1].attn1
    original = type(attention.processor)

    class Derived(original):
        pass

    with dit_rope.patch(model) as handle:
        forward(model)  # of tables that were built the report says what kernels read
        rotations.clear()
        first = handle.report()
        assert "not patched: blocks" not in first
        processor = attention.processor
        attention.processor = Derived()
        assert "blocks.*.attn1 (1 module), where the model rotates: its processor was replaced" in handle.report()
        attention.processor = _processor(2)
        assert "blocks.*.attn1 (1 module), where the model rotates: its processor was replaced" in handle.report()
        forward(model)
        assert handle.report() == first
        assert len(rotations) == 4
        attention.processor = object()
        assert "where the model rotates: builtins.object.__call__" in handle.report()
        attention.processor = processor
        assert handle.report() == first


def test_report_follows_modules_that_come_and_go() -> None:
    model, twin = wan.build("wan"), wan.build("wan")
    with dit_rope.patch(model) as handle:
        first = handle.report()
        rope, attention = model.rope, model.blocks[1].attn1
        model.rope = twin.rope
        assert "not patched, builds its tables in every forward pass: rope was replaced after" in handle.report()
        model.rope, model.blocks[1].attn1 = rope, twin.blocks[1].attn1
        assert "blocks.*.attn1 (1 module), where the model rotates: it was replaced after the patch" in handle.report()
        model.blocks[1].attn1 = attention
        assert handle.report() == first


def test_same_source_among_other_names_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """It calls other functions."""
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    original: Any = FluxAttnProcessor.__call__
    names = {**original.__globals__, "apply_rotary_emb": backwards}
    for scope, known_there in ((original.__globals__, True), (names, False), (dict(original.__globals__), False)):
        monkeypatch.setattr(FluxAttnProcessor, "__call__", copy_of(original, scope))
        assert (Guard(FluxAttnProcessor, "__call__").unknown is None) == known_there


def test_processor_put_in_while_patched_rotates_in_norms_too(rotations: list[str]) -> None:
    model = wan.build("wan")
    expected = forward(model)
    with dit_rope.patch(model, exact=True):
        for block in model.blocks:
            block.attn1.processor = type(copy.deepcopy(block.attn1.processor)).unpatched()
        assert torch.equal(forward(model), expected)
    assert len(rotations) == 4
