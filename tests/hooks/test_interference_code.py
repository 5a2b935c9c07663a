"""Whatever somebody wraps, compiles, hooks or replaces around a patched model runs, as it does without the patch."""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import dit_rope
from dit_rope.hooks.class_override import unpatched_class
from tolerance import all_equal
from twins import BEFORE_AND_AFTER, Act, Outcome, assert_like, attentions, check, run
from zoo import Noise, named

WHEN = pytest.mark.parametrize("when", BEFORE_AND_AFTER)
MODE = pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
# With norms per head and across heads; layer norms; projections; a replaced function; a rotation inside the processor.
KINDS = ("flux", "wan", "cogvideox-1.0", "allegro", "hidream", "ideogram4")
KIND = pytest.mark.parametrize("name", KINDS)


@pytest.fixture(autouse=True)
def _quiet(one_thread: None) -> Iterator[None]:
    yield
    torch._dynamo.reset()


def norms_of(attention: Any) -> list[tuple[str, Any]]:
    """Norms of queries and keys, or projections where there are none."""
    names = [name for name, module in attention.named_children() if "norm" in name and module is not None]
    names = [name for name in names if any(letter in name.split("_") for letter in "qk")]
    return [(name, getattr(attention, name)) for name in names or ["to_q", "to_k"]]


def compile_forwards(model: Any, fullgraph: bool = False) -> None:
    for attention in attentions(model):
        attention.forward = torch.compile(attention.forward, backend="eager", fullgraph=fullgraph)


def compile_modules(model: Any) -> None:
    for attention in attentions(model):
        attention.compile(backend="eager")


def compile_norms(model: Any) -> None:
    for attention in attentions(model):
        for _, norm in norms_of(attention):
            norm.compile(backend="eager")


def compile_forwards_of_norms(model: Any) -> None:
    for attention in attentions(model):
        for _, norm in norms_of(attention):
            norm.forward = torch.compile(norm.forward, backend="eager")


@WHEN
@MODE
@pytest.mark.parametrize("act", [compile_forwards, compile_modules, compile_norms, compile_forwards_of_norms])
@pytest.mark.parametrize("name", ["flux", "hidream", "omnigen"])
def test_what_is_compiled_in_part_rotates(name: str, act: Act, exact: bool, when: str) -> None:
    """xDiT#241: the rotation was handed over outside of what is compiled, and nobody took it inside."""
    check(name, act, when, exact, changes=False)


def other_forwards(model: Any) -> None:
    """As Liger-Kernel replaces those of instances."""
    for attention in attentions(model):
        for _, norm in norms_of(attention):
            original = norm.forward
            norm.forward = types.MethodType(lambda self, x, original=original: original(x) * 1.25, norm)


def blurred(model: Any) -> None:
    """Smoothed energy guidance wraps the projection of queries: diffusers#11311."""
    for attention in attentions(model):
        projection = getattr(attention, "to_q", None) or getattr(attention, "to_query", None)
        original = projection.forward
        projection.forward = lambda x, original=original: (original(x) + original(x).roll(1, dims=1)) / 2


def hooked(model: Any) -> None:
    for attention in attentions(model):
        for _, norm in norms_of(attention):
            norm.register_forward_hook(lambda module, args, output: output.flip(-1))


def parametrized(model: Any) -> None:
    class Doubled(torch.nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    for attention in attentions(model):
        for _, norm in norms_of(attention):
            if getattr(norm, "weight", None) is not None:
                torch.nn.utils.parametrize.register_parametrization(norm, "weight", Doubled())


def quantized(model: Any) -> None:
    """Dynamically, by the exact type of modules."""
    from torch.ao.quantization import quantize_dynamic

    quantize_dynamic(model, {torch.nn.Linear}, inplace=True)


@WHEN
@MODE
@pytest.mark.parametrize("act", [other_forwards, blurred, hooked, parametrized])
@KIND
def test_changed_norms_and_projections_are_what_runs(name: str, act: Act, exact: bool, when: str) -> None:
    check(name, act, when, exact)


@WHEN
@MODE
@pytest.mark.parametrize("name", ["omnigen", "stable-audio", "allegro", "longcat-audio-no-norm", "flux"])
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_quantized_projections_are_what_runs(name: str, exact: bool, when: str) -> None:
    check(name, quantized, when, exact)


@MODE
def test_norm_shared_by_queries_and_keys_and_by_blocks(exact: bool) -> None:
    def shared(model: Any) -> None:
        first = attentions(model)[0].norm_q
        for attention in attentions(model):
            attention.norm_q = attention.norm_k = first

    for when in BEFORE_AND_AFTER:
        check("flux", shared, when, exact)


def drop(name: str) -> Act:
    """A hook that takes the rotary tensors away."""

    def act(model: Any) -> None:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            return tuple(None if isinstance(x, tuple) else x for x in args), {
                **kwargs,
                **({name: None} if name in kwargs else {}),
            }

        attentions(model)[0].register_forward_pre_hook(hook, with_kwargs=True)

    return act


def halved(name: str) -> Act:
    """A hook that gives tables of its own."""

    def act(model: Any) -> None:
        def change(rotary: Any) -> Any:
            cos, sin = rotary
            return cos.roll(1, dims=-2), sin.roll(1, dims=-2)

        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            args = tuple(change(x) if isinstance(x, tuple) else x for x in args)
            return args, {**kwargs, **({name: change(kwargs[name])} if kwargs.get(name) is not None else {})}

        for attention in attentions(model):
            attention.register_forward_pre_hook(hook, with_kwargs=True)

    return act


@WHEN
@MODE
@pytest.mark.parametrize("act", [drop, halved])
@pytest.mark.parametrize("name", ["flux", "hunyuan-video", "cogvideox-1.0"])
def test_hooks_on_attention_change_what_its_processor_is_given(
    name: str, act: Callable[[str], Act], exact: bool, when: str
) -> None:
    check(name, act("image_rotary_emb"), when, exact)


def test_hook_on_attention_that_reads_sees_the_tables() -> None:
    example = named("wan")
    model = example.build()
    tables: list[Any] = []
    for attention in attentions(model):
        attention.register_forward_pre_hook(lambda module, args, kwargs: tables.append(args[3]), with_kwargs=True)
    run(example, model)
    with dit_rope.patch(model):
        run(example, model)
    half = len(tables) // 2
    for unpatched, patched in zip(tables[:half], tables[half:], strict=True):
        assert all_equal(unpatched, patched)


def processors(change: str) -> Act:
    """Processors of a class of the same name and module as diffusers', whose code is another."""

    def act(model: Any) -> None:
        for attention in attentions(model):
            base = unpatched_class(attention.processor)

            def call(self: Any, attn: Any, hidden_states: Any, *args: Any, base: Any = base, **kwargs: Any) -> Any:
                if change == "input":
                    hidden_states = hidden_states.roll(1, dims=-1)
                kwargs = {k: _negated(v) if change == "table" and "rotary" in k else v for k, v in kwargs.items()}
                args = tuple(_negated(x) if change == "table" and isinstance(x, tuple) else x for x in args)
                return base.__call__(self, attn, hidden_states, *args, **kwargs)

            functools.update_wrapper(call, base.__call__)
            body = {"__call__": call, "__module__": base.__module__, "__qualname__": base.__qualname__}
            another = type(base.__name__, (base,), body)()
            attention.processor = another

    return act


def _negated(rotary: Any) -> Any:
    return (rotary[0], -rotary[1]) if isinstance(rotary, tuple) else rotary


@WHEN
@MODE
@pytest.mark.parametrize("change", ["input", "table"])
@pytest.mark.parametrize("name", ["flux", "hunyuan-video", "cogvideox-1.0", "ltx-coords"])
def test_processors_of_the_same_name_are_what_runs(name: str, change: str, exact: bool, when: str) -> None:
    check(name, processors(change), when, exact)


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


_TRANSFORMERS = "diffusers.models.transformers."
FUNCTIONS = {
    "flux": (_TRANSFORMERS + "transformer_flux", "apply_rotary_emb"),
    "hunyuan-video": ("diffusers.models.embeddings", "apply_rotary_emb"),
    "cogvideox-1.0": ("diffusers.models.embeddings", "apply_rotary_emb"),
    "qwen-image": (_TRANSFORMERS + "transformer_qwenimage", "apply_rotary_emb_qwen"),
    "hidream": (_TRANSFORMERS + "transformer_hidream_image", "apply_rope"),
    "ltx-coords": (_TRANSFORMERS + "transformer_ltx", "apply_rotary_emb"),
    "helios-plain": (_TRANSFORMERS + "transformer_helios", "apply_rotary_emb_transposed"),
}


@MODE
@pytest.mark.parametrize("order", ["before", "after", "again"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_replaced_functions_are_what_rotates(name: str, order: str, exact: bool) -> None:
    """As ports to other hardware, and cache-dit, assign to modules of diffusers; ``again``: patched once before."""
    module, function = FUNCTIONS[name]
    example = named(name)
    model, twin = example.build(), example.build()

    def scaled(original: Any) -> Any:
        return lambda *args, **kwargs: torch.utils._pytree.tree_map(lambda x: 1.5 * x, original(*args, **kwargs))

    plain = run(example, twin)
    with replaced(importlib.import_module(module), function, scaled):
        expected = run(example, twin)
    assert not all_equal(plain, expected)
    if order == "again":
        with dit_rope.patch(model, exact=exact):
            run(example, model)
    handle = dit_rope.patch(model, exact=exact) if order == "after" else None
    with replaced(importlib.import_module(module), function, scaled):
        if handle is None:
            handle = dit_rope.patch(model, exact=exact)
        else:
            run(example, model)
        assert_like(Outcome(run(example, model), None), Outcome(expected, None), exact=exact)
        assert f"{function} is " in handle.report()
        handle.undo()


@MODE
@pytest.mark.parametrize("order", ["before", "after"])
def test_replaced_methods_of_classes_are_what_runs(order: str, exact: bool) -> None:
    from diffusers.models.transformers import transformer_flux, transformer_wan

    cases: list[tuple[str, Any, str, Callable[[Any], Any]]] = [
        ("flux", transformer_flux.FluxAttnProcessor, "__call__", _louder),
        ("flux", transformer_flux.FluxPosEmbed, "forward", _louder),
        ("wan", transformer_wan.WanRotaryPosEmbed, "forward", _louder),
        ("flux", torch.nn.RMSNorm, "forward", _louder),
        ("flux", torch.nn.functional, "rms_norm", _louder),
    ]
    for name, owner, method, make in cases:
        example = named(name)
        model, twin = example.build(), example.build()
        plain = run(example, twin)
        with replaced(owner, method, make):
            expected = run(example, twin)
        assert not all_equal(plain, expected), method
        handle = None
        if order == "after":
            handle = dit_rope.patch(model, exact=exact)
            run(example, model)
        with replaced(owner, method, make):
            handle = handle or dit_rope.patch(model, exact=exact)
            assert_like(Outcome(run(example, model), None), Outcome(expected, None), exact)
        assert_like(Outcome(run(example, model), None), Outcome(plain, None), exact)
        handle.undo()


def _louder(original: Any) -> Any:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: 1.125 * x, original(*args, **kwargs))

    return call


@pytest.mark.parametrize("name", ["wan", "flux", "ltx-coords", "cogvideox-1.0", "qwen-image"])
@MODE
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated.*")
def test_traced_models_rotate(name: str, exact: bool) -> None:
    """By torch.jit.trace, where the unpatched model can be traced."""
    example = named(name)
    model = example.build()
    inputs = {key: value for key, value in example.inputs(model, Noise(torch.float32)).items() if value is not None}
    inputs["return_dict"] = False

    def traced(module: Any) -> list[torch.Tensor]:
        tensor_names = [key for key, value in inputs.items() if isinstance(value, torch.Tensor)]
        constants = {key: value for key, value in inputs.items() if key not in tensor_names}

        class Wrapped(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.module = module

            def forward(self, *args: torch.Tensor) -> Any:
                return self.module(**dict(zip(tensor_names, args, strict=True)), **constants)[0]

        traced_inputs = tuple(inputs[key] for key in tensor_names)
        with torch.no_grad():
            return [torch.jit.trace(Wrapped(), traced_inputs, check_trace=False)(*traced_inputs)]

    expected = Outcome.of(lambda: traced(model))
    with dit_rope.patch(model, exact=exact):
        run(example, model)
        assert_like(Outcome.of(lambda: traced(model)), expected, exact=True)


@MODE
def test_attention_that_is_called_piece_by_piece(exact: bool) -> None:
    """A wrapper that calls one attention module for each sample."""

    def by_sample(model: Any) -> None:
        for attention in attentions(model):
            original = attention.forward

            def call(hidden: torch.Tensor, *args: Any, original: Any = original, **kwargs: Any) -> Any:
                parts = [original(hidden[i : i + 1], *args, **kwargs) for i in range(hidden.shape[0])]
                return torch.cat(parts)

            attention.forward = call

    for when in BEFORE_AND_AFTER:
        check("cosmos-1.0", by_sample, when, exact, changes=False)


def test_model_inside_an_attention_module_of_another_leaves_its_rotation() -> None:
    example = named("flux")
    inner = example.build()
    dit_rope.patch(inner)

    def nested(model: Any) -> None:
        for attention in attentions(model):
            for _, norm in norms_of(attention):
                norm.register_forward_pre_hook(lambda module, args: run(example, inner) and None)

    for exact in (True, False):
        check("flux", nested, "after", exact, changes=False)
