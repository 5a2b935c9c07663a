"""Patched models round where they were told to: bits, roundings and errors of what reaches the first attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dit_rope
from attended import Difference, attention_inputs, differences
from benchmarks.operator_counter import OperatorCounter
from dit_rope import Rounding
from dit_rope.hooks import exact_bits, rotating_norms
from dit_rope.hooks.adapter import Layout
from dit_rope.hooks.exact_bits import one_pass_is_exact
from dit_rope.hooks.formats import COMPLEX
from dit_rope.hooks.fused_norms import fused_norm
from dit_rope.hooks.rotating_norms import AttentionSettings
from dit_rope.models import ADAPTERS
from dit_rope.rotation.backends import eager
from tolerance import all_equal
from zoo import EXAMPLES, Example, named, tensors

PATCHED = [example for example in EXAMPLES if example.model in {adapter.model for adapter in ADAPTERS}]
MOST_DIFFERENT = 1e-3
"""Of the elements, where sums are taken in another order. These models are small: a few elements of each."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def nothing_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """What earlier tests have shown of this machine is not known here."""
    monkeypatch.setattr(exact_bits, "SHOWN_NORMS", {})
    monkeypatch.setattr(exact_bits, "SHOWN_ROTATIONS", {})


def forward(example: Example, model: torch.nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
    with torch.no_grad():
        return tensors(example.forward(model, dtype))


@pytest.mark.parametrize("example", PATCHED, ids=lambda example: example.name)
def test_model_rounding_differs_in_the_order_of_sums_alone(example: Example) -> None:
    by_rounding = differences(example, torch.bfloat16)
    assert by_rounding[Rounding.EXACT].share == 0
    assert by_rounding[Rounding.MODEL].share <= MOST_DIFFERENT
    assert by_rounding[Rounding.MODEL].steps <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name", ["wan", "flux", "hunyuan-video", "qwen-image", "ltx2-split", "cogvideox-1.5", "kandinsky5", "mochi"]
)
def test_roundings_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    """There sums have another order than torch's, and exact mode takes one pass only where its bits are the same."""
    by_rounding = differences(named(name), dtype, "cuda")
    assert by_rounding[Rounding.EXACT].share == 0
    assert by_rounding[Rounding.MODEL].share <= 2 * MOST_DIFFERENT
    assert by_rounding[Rounding.MODEL].steps <= 1


@pytest.mark.parametrize("name", ["wan", "flux", "hunyuan-video", "qwen-image", "ltx2-split", "cogvideox-1.5"])
def test_fast_mode_rounds_elsewhere(name: str) -> None:
    """So that the test above would see a model rounding that is fast mode."""
    assert differences(named(name), torch.float16)[Rounding.FAST].share > 0.1


@pytest.mark.parametrize("name", ["wan", "flux", "hunyuan-video", "kandinsky5", "cogvideox-1.5", "z-image"])
def test_autocast_keeps_the_rounding_of_the_model(name: str) -> None:
    """Under autocast some norms return float32, and the model rotates that."""
    example = named(name)
    with torch.autocast("cpu", torch.bfloat16):
        unpatched, patched = (attention_inputs(example, torch.float32, each) for each in (None, Rounding.MODEL))
    first = next((i for i, calls in enumerate(zip(unpatched, patched, strict=True)) if not all_equal(*calls)), 0)
    assert Difference(unpatched[first], patched[first]).share <= MOST_DIFFERENT


@pytest.mark.parametrize("rounding", [Rounding.EXACT, Rounding.MODEL])
def test_norm_and_rotation_are_two_passes_under_autocast(rounding: Rounding, rotations: list[str]) -> None:
    """On a CPU autocast leaves norms in 16 bits, on CUDA it does not: the results here would not show it."""
    example = named("wan")
    model = example.build(torch.bfloat16)
    with dit_rope.patch(model, rounding=rounding), torch.autocast("cpu", torch.bfloat16):
        forward(example, model, torch.bfloat16)
    assert set(rotations) == {"rotate"}


def test_the_default_depends_on_the_device() -> None:
    settings = AttentionSettings(ADAPTERS[0].rotations[0], None, "auto", True)
    assert settings.rounding_on(torch.device("cpu")) is Rounding.EXACT
    assert settings.rounding_on(torch.device("cuda", 0)) is Rounding.MODEL
    assert settings.rounding_on(torch.device("mps")) is Rounding.MODEL


def test_patch_takes_one_of_two_names_for_the_rounding() -> None:
    model = named("wan").build()
    for exact in (False, True):
        with pytest.raises(ValueError, match=rf"rounding must be None with exact={exact}, got <Rounding.MODEL"):
            dit_rope.patch(model, exact=exact, rounding=Rounding.MODEL)
    with pytest.raises(TypeError, match="rounding must be a Rounding or None, got 'model'"):
        dit_rope.patch(model, rounding="model")  # type: ignore[arg-type]
    for options, text in (
        ({"exact": True}, "  arithmetic: exact (bitwise equal to unpatched;"),
        ({"rounding": Rounding.MODEL}, "  arithmetic: rounded where the model rounds\n"),
        ({"exact": False}, "  arithmetic: fast (float32, rounded once)\n"),
        ({}, "on CPU, rounded where the model rounds elsewhere\n"),
    ):
        with dit_rope.patch(model, **options) as handle:  # type: ignore[arg-type]
            assert text in handle.report()


# One pass is exact where this machine has shown that it is.


@pytest.mark.parametrize("name", ["wan", "flux", "hunyuan-video", "cogvideox-1.5", "krea2", "mochi"])
@pytest.mark.parametrize("shown", [False, True])
def test_exact_mode_takes_one_pass_if_that_was_shown(
    name: str, shown: bool, rotations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    example = named(name)
    model = example.build(torch.bfloat16)
    monkeypatch.setattr(exact_bits, "_norms_are_equal", lambda *args: shown)
    with dit_rope.patch(model, exact=True):
        forward(example, model, torch.bfloat16)
    assert set(rotations) == ({"norm_rotate"} if shown else {"rotate"})


@pytest.mark.parametrize(
    "name", ["kandinsky5", "kandinsky6-sr", "cogview4", "glm-image", "hidream", "wan", "hunyuan-video", "minimax-h3"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_two_passes_have_the_bits_of_the_model_too(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere they run only where one pass is not exact: on another machine, or under a hook."""
    example = named(name)
    model = example.build(dtype)
    expected = forward(example, model, dtype)
    monkeypatch.setattr(exact_bits, "_norms_are_equal", lambda *args: False)
    for rounding in (Rounding.EXACT, Rounding.MODEL):
        monkeypatch.setattr(rotating_norms, "fused_norm", lambda *args: None)
        with dit_rope.patch(model, rounding=rounding):
            assert all_equal(forward(example, model, dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["wan", "hunyuan-video", "cogvideox-1.5", "mochi"])
def test_a_kernel_with_other_bits_is_not_used(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sum in another order, in float32, is enough; in 16 bits few numbers show it."""
    example = named(name)
    model = example.build(dtype)
    expected = forward(example, model, dtype)
    call = eager._ChunkNorm.__call__

    def off(self: Any, x: torch.Tensor, index: int, out: torch.Tensor) -> torch.Tensor:
        return call(self, x.float() * (1 + 2**-22), index, out)

    monkeypatch.setattr(eager._ChunkNorm, "__call__", off)
    with dit_rope.patch(model, exact=True):
        assert all_equal(forward(example, model, dtype), expected)
    assert set(exact_bits.SHOWN_NORMS.values()) == {False}


@pytest.mark.parametrize("name", ["qwen-image", "z-image", "ltx2-split", "lumina-next", "sana-wm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_that_do_not_round_products_are_exact_where_that_is_shown(
    name: str, dtype: torch.dtype, rotations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    example = named(name)
    model = example.build(dtype)
    expected = forward(example, model, dtype)
    with dit_rope.patch(model, exact=True):
        assert all_equal(forward(example, model, dtype), expected)
        assert exact_bits.SHOWN_ROTATIONS
        tried = len(rotations)
        exact_bits.SHOWN_ROTATIONS.update(
            dict.fromkeys(exact_bits.SHOWN_ROTATIONS)
        )  # as if no arithmetic had their bits
        for _ in range(2):
            rotations.clear()
            assert all_equal(forward(example, model, dtype), expected)
            assert not rotations
    assert tried


def test_a_kind_without_bits_is_asked_once() -> None:
    """The model's code starts again where no arithmetic fits, so it must not start with a patch in the next call."""
    example = named("qwen-image")
    model = example.build()
    with dit_rope.patch(model, exact=True):
        forward(example, model, torch.float32)
        exact_bits.SHOWN_ROTATIONS.update(dict.fromkeys(exact_bits.SHOWN_ROTATIONS))
        forward(example, model, torch.float32)
        exact_bits.SHOWN_ROTATIONS.clear()
        forward(example, model, torch.float32)
        assert not exact_bits.SHOWN_ROTATIONS


def test_nothing_is_shown_while_a_mode_sees_operations() -> None:
    """It would count what only looks."""
    example = named("wan")
    model = example.build(torch.bfloat16)
    expected = forward(example, model, torch.bfloat16)
    with dit_rope.patch(model, exact=True), OperatorCounter():
        assert all_equal(forward(example, model, torch.bfloat16), expected)
    assert not exact_bits.SHOWN_NORMS


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_defaults_of_torch_change_nothing(device: str) -> None:
    module = torch.nn.RMSNorm(48, eps=1e-6)
    heads = torch.randn(1, 4, 3, 48)
    numbers = fused_norm(module, torch.float32)
    assert numbers is not None
    expected = one_pass_is_exact(module, numbers, heads, Layout.BSHD, "auto")
    exact_bits.SHOWN_NORMS.clear()
    state = torch.random.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device(device):
            assert one_pass_is_exact(module, numbers, heads, Layout.BSHD, "auto") == expected
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_formula_is_the_rotation() -> None:
    x, angles = torch.randn(2, 5, 3, 8), torch.randn(1, 5, 1, 4)
    assert COMPLEX.formula is not None
    rotated = COMPLEX.formula(x, angles.cos(), angles.sin())
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones(1), angles))
    torch.testing.assert_close(rotated, expected.flatten(-2))
