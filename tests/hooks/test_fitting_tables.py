"""Tables that do not belong to the tokens: what the model makes of them, which may be an error, is what happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import dit_rope
from dit_rope.hooks.adapter import AttentionRotation, Layout, Tokens
from dit_rope.hooks.formats import HEAD_HALVES, INTERLEAVED, Format
from dit_rope.hooks.heads import fits
from dit_rope.hooks.packed_tables import PackedTable, pack
from dit_rope.models.qwen_image import NUCLEUS
from dit_rope.models.stable_audio import STABLE_AUDIO_3
from dit_rope.spec import Pairing
from tolerance import all_equal
from zoo import Noise, named, tensors

CPU = torch.device("cpu")
Change = Callable[[torch.Tensor], torch.Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


class Attention:
    """One attention module of a model, and what the model gives it."""

    def __init__(self, name: str, path: str) -> None:
        self.model = named(name).build()
        self.module = self.model.get_submodule(path)
        calls = []
        hook = self.module.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        with torch.no_grad():
            named(name).run(self.model, named(name).inputs(self.model, Noise(torch.float32)))
        hook.remove()
        self.args, self.kwargs = calls[0]

    def outcome(self, **changes: Any) -> Any:
        """What it returns with other arguments, or its error in words."""
        try:
            with torch.no_grad():
                return tensors(self.module(*self.args, **{**self.kwargs, **changes}))
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def assert_same(actual: Any, expected: Any, exact: bool) -> None:
    if isinstance(actual, str) or isinstance(expected, str):
        assert actual == expected
        return
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, **({"rtol": 0, "atol": 0} if exact else {}))


def tokens(dim: int) -> dict[str, Change]:
    """Tables whose tokens stand on ``dim``, of other numbers of them."""
    return {
        "a row too many": lambda x: torch.cat((x, x.narrow(dim, 0, 1)), dim),
        "twice the rows": lambda x: torch.cat((x, x), dim),
        "a row too few": lambda x: x.narrow(dim, 1, x.shape[dim] - 1),
        "one row": lambda x: x.narrow(dim, 1, 1),
        "no row": lambda x: x.narrow(dim, 0, 0),
    }


WIDTH: dict[str, Change] = {
    "narrower": lambda x: x[..., :-4],
    "half as wide": lambda x: x[..., : x.shape[-1] // 2],
    "wider": lambda x: torch.cat((x, x[..., :4]), -1),
    "twice as wide": lambda x: torch.cat((x, x), -1),
}
BATCH: dict[str, Change] = {
    "one sample": lambda x: x[:1],
    "a sample too many": lambda x: torch.cat((x, x[:1])),
    "twice the samples": lambda x: torch.cat((x, x)),
}
KIND: dict[str, Change] = {
    "float64": lambda x: x.double() + 1e-9,
    "bfloat16": lambda x: x.bfloat16(),
    "one channel": lambda x: torch.cat((x[..., :-1], x[..., -1:] + 0.5), -1),
    "first channel": lambda x: torch.cat((x[..., :1] + 0.5, x[..., 1:]), -1),
}
HEADS: dict[str, Change] = {
    "one head": lambda x: x[:, :1],
    "a head too many": lambda x: torch.cat((x, x[:, :1]), 1),
}
PLACES: dict[str, tuple[str, str, str, dict[str, Change]]] = {
    "flux": ("flux", "transformer_blocks.0.attn", "image_rotary_emb", tokens(0) | WIDTH | KIND),
    "flux-single": ("flux", "single_transformer_blocks.0.attn", "image_rotary_emb", tokens(0)),
    "ltx": ("ltx-padded", "transformer_blocks.0.attn1", "image_rotary_emb", tokens(1) | WIDTH | BATCH | KIND),
    "ltx2": ("ltx2-split", "transformer_blocks.0.attn1", "query_rotary_emb", tokens(2) | WIDTH | BATCH | HEADS | KIND),
    "ltx2-sound": (
        "ltx2-interleaved",
        "transformer_blocks.0.video_to_audio_attn",
        "key_rotary_emb",
        tokens(1) | BATCH | WIDTH,
    ),
    "mochi": (
        "mochi",
        "transformer_blocks.0.attn1",
        "image_rotary_emb",
        tokens(0) | HEADS | KIND | {"half as wide": WIDTH["half as wide"]},
    ),
    "hunyuan-dit": ("hunyuan-dit", "blocks.0.attn1", "image_rotary_emb", tokens(0) | WIDTH | KIND),
    "ideogram4": ("ideogram4", "layers.0.attention", "image_rotary_emb", tokens(1) | KIND),
    "refiner": ("sana-wm-refiner", "transformer_blocks.0.attn1", "query_rotary_emb", tokens(1) | BATCH | WIDTH | KIND),
}
CASES = [
    (place, change, exact) for place, (*_, changes) in PLACES.items() for change in changes for exact in (True, False)
]


@pytest.mark.parametrize(("place", "change", "exact"), CASES)
def test_table_of_other_tokens_is_what_the_model_makes_of_it(
    place: str, change: str, exact: bool, rotations: list[str]
) -> None:
    """Its error in the same words, or its result; and the table that fits rotates before and after."""
    name, path, argument, changes = PLACES[place]
    attention = Attention(name, path)
    changed = tuple(map(changes[change], attention.kwargs[argument]))
    expected = attention.outcome(**{argument: changed})
    plain = attention.outcome()
    with dit_rope.patch(attention.model, exact=exact):
        assert_same(attention.outcome(), plain, exact)
        assert rotations or (exact and place == "ltx2")  # exact mode rotates there if it has shown the bits
        assert_same(attention.outcome(**{argument: changed}), expected, exact)
        assert_same(attention.outcome(), plain, exact)


@pytest.mark.parametrize("change", ["narrower", "one sample", "a sample too many", "twice as wide"])
def test_compiled_module_leaves_a_table_that_does_not_fit_to_the_model(change: str) -> None:
    """It raises what the unpatched compiled model raises, or computes what that computes."""
    attention = Attention("ltx-padded", "transformer_blocks.0.attn1")
    changed = tuple(map((WIDTH | BATCH)[change], attention.kwargs["image_rotary_emb"]))

    def outcome() -> Any:
        torch._dynamo.reset()
        module = torch.compile(attention.module, backend="eager", fullgraph=True)
        with torch.no_grad():
            try:
                return tensors(module(*attention.args, **{**attention.kwargs, "image_rotary_emb": changed}))
            except Exception as error:  # whatever the model raises
                return type(error)

    expected = outcome()
    with dit_rope.patch(attention.model, exact=True, compiled=True):
        actual = outcome()
    if isinstance(expected, type):
        assert actual is expected
    else:
        assert_same(actual, expected, exact=True)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("kind", ["cosines and sines", "sines", "one sine of the last row"])
@pytest.mark.parametrize("name", ["hidream", "hidream-half"])
def test_text_that_rotates_where_it_does_not_elsewhere(name: str, kind: str, exact: bool) -> None:
    """Norms of text are not patched: rows of text must rotate nothing."""
    attention = Attention(name, "double_stream_blocks.0.block.attn1")
    rotary = attention.kwargs["image_rotary_emb"]
    text = attention.args[2].shape[1]
    assert torch.equal(rotary[:, -text:, 0, :, 0, 0], torch.ones_like(rotary[:, -text:, 0, :, 0, 0]))
    changed = rotary.clone()
    rows = changed[:, -1:] if kind.startswith("one") else changed[:, -text:]
    angles = torch.rand(rows.shape[:-2])
    if kind.startswith("cosines"):
        rows[..., 0, 0] = rows[..., 1, 1] = angles.cos()
    rows[..., 1, 0], rows[..., 0, 1] = angles.sin(), -angles.sin()
    expected, plain = attention.outcome(image_rotary_emb=changed), attention.outcome()
    assert not torch.equal(expected[0], plain[0])
    with dit_rope.patch(attention.model, exact=exact):
        assert_same(attention.outcome(image_rotary_emb=changed), expected, exact)
        assert_same(attention.outcome(), plain, exact)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_table_that_learns_gets_its_gradient(exact: bool) -> None:
    attention = Attention("flux", "transformer_blocks.0.attn")
    cos, sin = attention.kwargs["image_rotary_emb"]

    def gradient() -> torch.Tensor:
        learned = cos.clone().requires_grad_()
        outs = attention.module(*attention.args, **{**attention.kwargs, "image_rotary_emb": (learned, sin)})
        (grad,) = torch.autograd.grad(sum(out.square().sum() for out in outs), learned)
        return grad

    expected = gradient()
    with dit_rope.patch(attention.model, exact=exact):
        assert torch.equal(gradient(), expected)


@pytest.mark.parametrize("differentiated", ["inputs", "parameters"])
@pytest.mark.parametrize(
    ("name", "path"),
    [("flux", "transformer_blocks.0.attn"), ("sana-wm-refiner", "transformer_blocks.0.attn1")],
)
def test_exact_mode_leaves_passes_that_want_gradients_to_the_model(
    name: str, path: str, differentiated: str, rotations: list[str]
) -> None:
    """In norms and in functions; in fast mode dit_rope rotates, and computes the gradients."""
    attention = Attention(name, path)
    attention.model.requires_grad_(differentiated == "parameters")

    def requiring(value: Any) -> Any:
        wants = isinstance(value, torch.Tensor) and value.ndim == 3 and differentiated == "inputs"
        return value.detach().requires_grad_() if wants else value

    args = tuple(map(requiring, attention.args))
    kwargs = {key: requiring(value) for key, value in attention.kwargs.items()}
    for exact, count in ((True, 0), (False, 1)):
        with dit_rope.patch(attention.model, exact=exact):
            rotations.clear()
            outs = tensors(attention.module(*args, **kwargs))
            assert outs[0].requires_grad
            assert (len(rotations) > 0) == bool(count)
            with torch.no_grad():
                attention.module(*args, **kwargs)
            assert rotations


@pytest.mark.parametrize("name", ["flux", "sana-wm-refiner"])
def test_dual_numbers_go_through_the_model_s_own_code(name: str, rotations: list[str]) -> None:
    """Kernels have no tangents."""
    place = next(candidate for candidate in PLACES.values() if candidate[0] == name)
    attention = Attention(name, place[1])
    key = next(iter(attention.kwargs))
    args = attention.args or (attention.kwargs[key],)
    kwargs = attention.kwargs if attention.args else {k: v for k, v in attention.kwargs.items() if k != key}

    def tangent() -> tuple[torch.Tensor, torch.Tensor]:
        def call(x: torch.Tensor) -> torch.Tensor:
            return tensors(attention.module(x, *args[1:], **kwargs))[0]

        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # others have none of their own either
            return torch.func.jvp(call, (args[0],), (torch.ones_like(args[0]),))

    expected = tangent()
    with dit_rope.patch(attention.model, exact=False):
        assert all_equal(tangent(), expected)
    assert not rotations


@pytest.mark.parametrize("rows", [0, 1, 6, 7, 8, 14])
def test_only_a_row_for_each_token_fits(rows: int) -> None:
    arguments = {"hidden_states": torch.zeros(2, 4, 3), "encoder_hidden_states": torch.zeros(2, 3, 3), "none": None}
    streams, first = ("encoder_hidden_states", "hidden_states"), ("none", "hidden_states", "encoder_hidden_states")
    assert Tokens(streams).fit(arguments, 1, rows) == (rows == 7)
    assert Tokens(first, first_of=True).fit(arguments, 1, rows + 4) == (rows == 0)
    assert not Tokens(("none",)).fit(arguments, 1, rows)
    assert not Tokens().fit({"hidden_states": torch.zeros(2, 0, 3)}, 1, rows)
    assert not Tokens().fit({"hidden_states": torch.zeros(2, rows, 3, 3)}, 1, rows)
    assert not Tokens().fit({"hidden_states": [0] * rows}, 1, rows)


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5])
def test_a_longer_table_fits_stable_audio_3_and_any_table_fits_the_cached_text_of_nucleus(rows: int) -> None:
    hidden = torch.zeros(2, 4, 3)
    (last,), (_, text) = STABLE_AUDIO_3.rotations[0].covers, NUCLEUS.rotations[0].covers
    assert last.fit({"hidden_states": hidden}, 1, rows) == (rows >= 4)
    assert text.fit({"hidden_states": hidden, "encoder_hidden_states": None}, 1, rows)
    assert text.fit({"encoder_hidden_states": hidden}, 1, rows) == (rows == 4)


def table(batch: int, heads: int, pairs: int) -> PackedTable:
    cos, sin = torch.rand(2, batch, 5, heads, pairs)
    return pack(cos, sin, Pairing.INTERLEAVED, CPU)


def declared(form: Format = INTERLEAVED, partial: bool = False) -> AttentionRotation:
    return AttentionRotation("attn", "Attention", form, Layout.BSHD, partial=partial)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("pairs", [3, 4, 5])
def test_heads_fit_tables_of_their_batch_their_number_and_their_width(batch: int, heads: int, pairs: int) -> None:
    x = torch.zeros(2, 5, 4, 8)
    number = heads in (1, 4)
    assert fits(x, table(batch, heads, pairs), declared()) == (batch < 3 and number and pairs == 4)
    assert fits(x, table(batch, heads, pairs), declared(partial=True)) == (batch < 3 and number and pairs <= 4)
    assert fits(x, table(batch, heads, pairs), declared(HEAD_HALVES)) == (batch == 2 and heads == 4 and pairs == 4)
