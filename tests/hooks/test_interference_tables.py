"""Wrong tables and ids are the model's own errors, and changed ones are changed tables, as without the patch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

import dit_rope
from tolerance import all_equal
from twins import BEFORE_AND_AFTER, Act, Outcome, assert_like, attentions, run
from zoo import Noise, named, tensors, wan

WHEN = pytest.mark.parametrize("when", BEFORE_AND_AFTER)
MODE = pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
Change = Callable[[torch.Tensor], torch.Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


def inputs_of(name: str, model: Any, key: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    """The example's inputs, of which every tensor of one is changed."""
    inputs = named(name).inputs(model, Noise(torch.float32))
    return {**inputs, key: pytree.tree_map_only(torch.Tensor, change, inputs[key])}


def shorter(dim: int, by: int = 2) -> Change:
    return lambda x: x.narrow(dim, 0, x.shape[dim] - by)


def longer(dim: int) -> Change:
    return lambda x: torch.cat((x, x.narrow(dim, 0, 2)), dim=dim)


def first(dim: int) -> Change:
    return lambda x: x.narrow(dim, 0, 1)


# Where the tokens of ids and tables stand.
IDS = [
    *((name, key, 0) for name in ("flux", "chroma", "ovis-image", "flux-controlnet") for key in ("img_ids", "txt_ids")),
    *((name, key, 0) for name in ("longcat-image", "bria") for key in ("img_ids", "txt_ids")),
    *((name, key, 1) for name in ("flux2", "flux3") for key in ("img_ids", "txt_ids")),
    ("krea2", "position_ids", 1),
    ("ltx-coords", "video_coords", 2),
    ("ltx2-split-coords", "video_coords", 2),
    ("cogvideox-1.0", "image_rotary_emb", 0),
    ("consisid", "image_rotary_emb", 0),
    ("hunyuan-dit", "image_rotary_emb", 0),
    ("stable-audio", "rotary_embedding", 0),
    ("kandinsky5", "visual_rope_pos", 0),
]


@MODE
@pytest.mark.parametrize("change", [shorter, longer, first])
@pytest.mark.parametrize(("name", "key", "dim"), IDS)
def test_ids_and_tables_of_a_wrong_length(
    name: str, key: str, dim: int, change: Callable[[int], Change], exact: bool
) -> None:
    """diffusers#9799, T2ITrainer#94: the error that people look for; and one row, which the model broadcasts."""
    example = named(name)
    twin, model = example.build(), example.build()
    inputs = inputs_of(name, twin, key, change(dim))
    expected = Outcome.of(lambda: run(example, twin, inputs))
    with dit_rope.patch(model, exact=exact):
        run(example, model)
        assert_like(Outcome.of(lambda: run(example, model, inputs)), expected, exact)


@MODE
@pytest.mark.parametrize("tokens", [4200, 1030])
def test_prompts_longer_than_the_rows_that_a_model_keeps(tokens: int, exact: bool) -> None:
    example = named("qwen-image")
    twin, model = example.build(), example.build()
    inputs = example.inputs(twin, Noise(torch.float32))
    prompt = inputs["encoder_hidden_states"]
    inputs["encoder_hidden_states"] = prompt[:, :1].expand(-1, tokens, -1)
    inputs["encoder_hidden_states_mask"] = None
    expected = Outcome.of(lambda: run(example, twin, inputs))
    with dit_rope.patch(model, exact=exact):
        assert_like(Outcome.of(lambda: run(example, model, inputs)), expected, exact)


@MODE
def test_video_longer_than_the_rows_of_wan_raises_as_unpatched(exact: bool) -> None:
    model = wan.build("wan")
    with dit_rope.patch(model, exact=exact), pytest.raises(RuntimeError, match="shape"), torch.no_grad():
        wan.forward(model, frames=40)


@pytest.mark.parametrize("name", ["ltx-coords", "flux2", "wan"])
def test_sequences_without_tokens(name: str) -> None:
    example = named(name)
    twin, model = example.build(), example.build()
    inputs = example.inputs(twin, Noise(torch.float32))
    hidden = inputs["hidden_states"]
    inputs["hidden_states"] = hidden.narrow(-1 if name == "wan" else 1, 0, 0)
    for key in ("img_ids", "video_coords"):
        if key in inputs:
            dim = 2 if key == "video_coords" else 1
            inputs[key] = inputs[key].narrow(dim, 0, 0)
    expected = Outcome.of(lambda: run(example, twin, inputs))
    with dit_rope.patch(model):
        assert_like(Outcome.of(lambda: run(example, model, inputs)), expected, exact=True)


CALLERS = [
    ("cogvideox-1.0", "image_rotary_emb"),
    ("consisid", "image_rotary_emb"),
    ("hunyuan-dit", "image_rotary_emb"),
    ("stable-audio", "rotary_embedding"),
    ("allegro", "image_rotary_emb"),
]


def floats(change: Change) -> Change:
    return lambda x: change(x) if x.is_floating_point() else x


@MODE
@pytest.mark.parametrize(
    "change",
    [lambda x: x + torch.linspace(0, 1, x.numel()).view(x.shape), torch.Tensor.double, torch.Tensor.half],
    ids=["unpaired", "float64", "float16"],
)
@pytest.mark.parametrize(("name", "key"), CALLERS)
def test_tables_of_other_values_and_dtypes(name: str, key: str, change: Change, exact: bool) -> None:
    """Made for the other pairing, the two channels of a pair are multiplied by different numbers."""
    example = named(name)
    twin, model = example.build(), example.build()
    inputs = inputs_of(name, twin, key, floats(change))
    expected = Outcome.of(lambda: run(example, twin, inputs))
    with dit_rope.patch(model, exact=exact):
        assert_like(Outcome.of(lambda: run(example, model, inputs)), expected, exact)


@MODE
@pytest.mark.parametrize(("name", "key"), CALLERS)
def test_tables_whose_whole_numbers_are_floats_too(name: str, key: str, exact: bool) -> None:
    """Rows to take of a table, which the model's own code refuses then."""
    example = named(name)
    twin, model = example.build(), example.build()
    inputs = inputs_of(name, twin, key, torch.Tensor.double)
    expected = Outcome.of(lambda: run(example, twin, inputs))
    with dit_rope.patch(model, exact=exact):
        assert_like(Outcome.of(lambda: run(example, model, inputs)), expected, exact)


@pytest.mark.parametrize(("name", "key"), CALLERS)
def test_tables_that_are_written_to_without_a_version(name: str, key: str) -> None:
    example = named(name)
    twin, model = example.build(), example.build()
    inputs = example.inputs(twin, Noise(torch.float32))
    with dit_rope.patch(model, exact=True):
        for _ in range(3):
            assert_like(Outcome(run(example, model, inputs), None), Outcome(run(example, twin, inputs), None), True)
            for leaf in pytree.tree_leaves(inputs[key]):
                if leaf.is_floating_point():
                    leaf.data.mul_(0.9)


class Step:
    """The timestep that a wrapper looks at."""

    number = 0


def moved(ids: torch.Tensor) -> torch.Tensor:
    return ids + 3.0 * Step.number


def by_pre_hook(model: Any) -> None:
    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "img_ids": moved(kwargs["img_ids"])}

    model.register_forward_pre_hook(hook, with_kwargs=True)


def by_wrapper(model: Any) -> None:
    original = model.forward
    model.forward = lambda **kwargs: original(**{**kwargs, "img_ids": moved(kwargs["img_ids"])})


def by_hook_of_diffusers(model: Any) -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    class Moves(ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            return args, {**kwargs, "img_ids": moved(kwargs["img_ids"])}

    HookRegistry.check_if_exists_or_initialize(model).register_hook(Moves(), "moves")


def by_subclass(model: Any) -> None:
    """A rope module of the same name that follows the timestep: DyPE."""
    original = getattr(type(model.pos_embed), "unpatched", type(model.pos_embed))

    class FluxPosEmbed(original):  # type: ignore[misc, valid-type]
        def forward(self, ids: torch.Tensor) -> Any:
            return super().forward(moved(ids))

    model.pos_embed = FluxPosEmbed(model.pos_embed.theta, model.pos_embed.axes_dim)


def by_instance(model: Any) -> None:
    original = model.pos_embed.forward
    model.pos_embed.forward = lambda ids: original(moved(ids))


def by_attribute(model: Any) -> None:
    """A timestep in an attribute of the rope module, which a hook sets."""

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        module.pos_embed.theta = 10_000 + 5_000 * Step.number

    model.register_forward_pre_hook(hook, with_kwargs=True)


@WHEN
@MODE
@pytest.mark.parametrize("act", [by_pre_hook, by_wrapper, by_hook_of_diffusers, by_subclass, by_instance, by_attribute])
@pytest.mark.parametrize("name", ["flux", "chroma"])
def test_ids_that_change_inside_the_call(name: str, act: Act, exact: bool, when: str) -> None:
    example = named(name)
    twin, model = example.build(), example.build()
    inputs = example.inputs(twin, Noise(torch.float32))
    act(twin)
    expected = []
    for Step.number in range(3):
        expected.append(run(example, twin, inputs))
    assert not torch.equal(expected[0][0], expected[2][0])
    Step.number = 0
    if when == "before":
        act(model)
    with dit_rope.patch(model, exact=exact):
        if when == "after":
            run(example, model, inputs)
            act(model)
        for Step.number in range(3):
            actual = Outcome(run(example, model, inputs), None)
            assert_like(actual, Outcome(expected[Step.number], None), exact)
    Step.number = 0


@MODE
def test_new_ids_over_memory_that_is_rewritten(exact: bool) -> None:
    example = named("flux")
    twin, model = example.build(), example.build()
    inputs = example.inputs(twin, Noise(torch.float32))
    base = inputs["img_ids"].numpy().copy()
    buffer = base.copy()
    with dit_rope.patch(model, exact=exact):
        for step in range(3):
            buffer[...] = base * (step + 1)
            arguments = {**inputs, "img_ids": torch.from_numpy(buffer)}
            assert_like(
                Outcome(run(example, model, arguments), None), Outcome(run(example, twin, arguments), None), exact
            )


@pytest.mark.parametrize("fused", [True, False])
def test_tables_of_a_parameter_that_is_trained(fused: bool) -> None:
    """Mochi's; a fused optimizer raises no version."""
    example = named("mochi")
    models = [example.build(), example.build()]
    handle = dit_rope.patch(models[0], exact=True)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused) for model in models]
    for _ in range(3):
        actual, expected = (run(example, model) for model in models)
        assert all_equal(actual, expected)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            sum(x.square().sum() for x in tensors(example.forward(model))).backward()
            optimizer.step()
    handle.undo()


READS: list[tuple[str, Callable[[Any], Any]]] = [
    ("hunyuan-video-framepack", lambda model: setattr(model.rope, "theta", 40.0)),
    (
        "hunyuan-video-framepack",
        lambda model: model.rope.register_forward_hook(lambda m, a, out: (out[0].flip(0), out[1])),
    ),
    ("joyimage-edit-plus", lambda model: model.register_to_config(theta=9)),
    ("joyimage", lambda model: setattr(model, "theta", 9)),
    ("sana-wm-refiner", lambda model: setattr(model.rope, "base_height", 17)),
    ("ltx2-split", lambda model: setattr(model.rope, "causal_offset", 3)),
    ("ltx2-split", lambda model: setattr(model.rope, "scale_factors", (4, 16, 16))),
    ("wan", lambda model: setattr(model.rope, "freqs_cos", model.rope.freqs_cos.roll(1, dims=0))),
    ("wan", lambda model: model.rope.freqs_sin.neg_()),
    ("wan", lambda model: model.rope.freqs_sin.numpy().__imul__(np.float32(-1))),
    ("hunyuan-video", lambda model: setattr(model.rope, "theta", 40.0)),
]


@WHEN
@MODE
@pytest.mark.parametrize(("name", "act"), READS, ids=[f"{name}-{number}" for number, (name, _) in enumerate(READS)])
def test_what_the_tables_are_made_of_changes(name: str, act: Act, exact: bool, when: str) -> None:
    example = named(name)
    twin, model = example.build(), example.build()
    act(twin)
    expected = [run(example, twin) for _ in range(2)]
    if when == "before":
        act(model)
    with dit_rope.patch(model, exact=exact):
        if when == "after":
            run(example, model)
            act(model)
        for output in expected:
            assert_like(Outcome(run(example, model), None), Outcome(output, None), exact)


@MODE
@pytest.mark.parametrize("order", [slice(None, None, -1), slice(None, None, 2), slice(0, 36)])
def test_tokens_that_are_put_in_another_order_between_rope_and_attention(order: slice, exact: bool) -> None:
    """Token merging, pruning and reordering: on hidden states and on both rotary tensors alike."""

    def act(model: Any) -> None:
        rows = torch.arange(72)[order] if (order.step or 1) > 0 else torch.arange(72).flip(0)

        model.blocks[1].attn1.register_forward_pre_hook(
            lambda module, args, kwargs: ((args[0][:, rows], *args[1:3], tuple(x[:, rows] for x in args[3])), kwargs),
            with_kwargs=True,
        )
        model.blocks[1].attn1.register_forward_hook(lambda module, args, out: out.repeat(1, 2, 1)[:, :72])

    example = named("wan")
    twin, model = example.build(), example.build()
    act(twin)
    expected = Outcome.of(lambda: run(example, twin))
    with dit_rope.patch(model, exact=exact):
        act(model)
        assert_like(Outcome.of(lambda: run(example, model)), expected, exact)


@MODE
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("ltx2-split", ("query_rotary_emb",)),
        ("ltx2-interleaved", ("query_rotary_emb",)),
        ("longcat-audio", ("audio_rotary_emb",)),
        ("longcat-audio", ("prompt_rotary_emb",)),
    ],
)
def test_one_of_two_tables_that_is_missing(name: str, keys: tuple[str, ...], exact: bool) -> None:
    def act(model: Any) -> None:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            return args, {key: None if key in keys else value for key, value in kwargs.items()}

        for attention in attentions(model):
            attention.register_forward_pre_hook(hook, with_kwargs=True)

    example = named(name)
    twin, model = example.build(), example.build()
    act(twin)
    expected = Outcome.of(lambda: run(example, twin))
    with dit_rope.patch(model, exact=exact):
        act(model)
        assert_like(Outcome.of(lambda: run(example, model)), expected, exact)


def test_tables_kept_from_inference_mode() -> None:
    """LongCat-Audio's rope module keeps what it first built, in inference mode perhaps."""
    example = named("longcat-audio")
    model = example.build()
    with torch.inference_mode():
        expected = tensors(example.forward(model))
    with dit_rope.patch(model):
        for _ in range(2):
            assert all_equal(run(example, model), expected)


@MODE
def test_memory_of_ids_that_is_freed_while_an_entry_lives(exact: bool) -> None:
    example = named("flux")
    twin, model = example.build(), example.build()
    inputs = example.inputs(twin, Noise(torch.float32))
    with dit_rope.patch(model, exact=exact):
        for step in range(4):
            inputs["img_ids"].data = inputs["img_ids"].data.clone() + step
            assert_like(Outcome(run(example, model, inputs), None), Outcome(run(example, twin, inputs), None), exact)
