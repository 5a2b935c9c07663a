"""Adapters, processors and quantized layers that come and go while a model is patched: the unpatched model's bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dit_rope
from dit_rope.hooks.class_override import Override
from tolerance import all_equal
from zoo import Noise, named, tensors

# Rotates in norms, in projections, by a replaced function, and by a processor of dit_rope.
NORMS, PROJECTIONS, REBOUND, PROCESSOR = "wan", "hunyuan-video-no-norm", "hidream", "ideogram4"
KINDS = ("wan", "flux", "hunyuan-video", "hunyuan-video-no-norm", "hidream", "ideogram4", "allegro", "qwen-image")
BY_KIND = pytest.mark.parametrize("name", KINDS)
LINEARS = {"hidream": ["to_q", "to_k", "to_v"], "ideogram4": ["qkv"]}


pytestmark = pytest.mark.usefixtures("one_thread")


def run(name: str, model: torch.nn.Module, **changes: Any) -> list[torch.Tensor]:
    """One forward pass without gradients."""
    example = named(name)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    with torch.no_grad():
        return tensors(example.run(model, {**example.inputs(model, Noise(dtype)), **changes}))


Step = Callable[[Any], Any]


def _add_lora(name: str) -> Step:
    from peft import LoraConfig

    targets = LINEARS.get(name, ["to_q", "to_k", "to_v"])

    def add(model: Any, adapter: str = "default") -> None:
        torch.manual_seed(len(adapter))
        # No zeros, which would hide the adapter.
        model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), adapter_name=adapter)

    return add


def _lora_steps(name: str) -> dict[str, Step]:
    """What a user does with LoRA, in an order in which all of it works."""
    add = _add_lora(name)
    return {
        "load": add,
        "scale": lambda model: model.set_adapters(["default"], [0.5]),
        "load another": lambda model: add(model, "other"),
        "mix": lambda model: model.set_adapters(["default", "other"], [0.7, 0.3]),
        "fuse": lambda model: model.fuse_lora(adapter_names=["default"]),
        "unfuse": lambda model: model.unfuse_lora(),
        "disable": lambda model: model.disable_lora(),
        "enable": lambda model: model.enable_lora(),
        "delete one": lambda model: model.delete_adapters("other"),
        "unload": lambda model: model.unload_lora(),
    }


@pytest.mark.parametrize("name", [NORMS, PROJECTIONS, REBOUND, "flux"])
def test_lora_comes_and_goes_while_patched(name: str) -> None:
    """At every step the same bits as a model that was never patched; the adapters are seen, and so is their end."""
    steps = _lora_steps(name)
    plain, patched = named(name).build(), named(name).build()
    before = run(name, plain)
    outputs = []
    with dit_rope.patch(patched, exact=True):
        for title, step in steps.items():
            for model in (plain, patched):
                step(model)
            outputs.append(run(name, plain))
            assert all_equal(run(name, patched), outputs[-1]), title
    assert not all_equal(outputs[0], before)
    assert all_equal(run(name, patched), run(name, plain))
    torch.testing.assert_close(outputs[-1], before)  # weights that were fused are rounded when it is taken out of them
    assert not any(isinstance(module, Override) for module in patched.modules())


@pytest.mark.parametrize("name", [NORMS, PROJECTIONS])
@pytest.mark.parametrize("last", ["undo", "unload"])
def test_lora_loaded_before_the_patch_is_undone_in_any_order(name: str, last: str) -> None:
    steps = _lora_steps(name)
    model, plain = named(name).build(), named(name).build()
    before = run(name, plain)
    for target in (model, plain):
        steps["load"](target)
    handle = dit_rope.patch(model, exact=True)
    assert all_equal(run(name, model), run(name, plain))
    ways = [steps["unload"], lambda _: handle.undo()]
    for step in ways if last == "undo" else reversed(ways):
        step(model)
    assert all_equal(run(name, model), before)
    assert not any(isinstance(module, Override) for module in model.modules())


def attentions(model: Any) -> list[tuple[torch.nn.Module, Any]]:
    """Attention modules and the processors they had before a patch."""
    return [(module, module.processor) for module in model.modules() if hasattr(module, "processor")]


def unpatched_class(processor: Any) -> type:
    cls: type = type(processor).unpatched if isinstance(processor, Override) else type(processor)
    return cls


@BY_KIND
def test_processor_of_the_same_class_put_in_while_patched(name: str) -> None:
    """It is known or not, but what it is given is what it rotates by."""
    model = named(name).build()
    expected = run(name, model)
    with dit_rope.patch(model, exact=True):
        for attention, processor in attentions(model):
            fresh = copy.copy(processor)
            fresh.__class__ = unpatched_class(processor)
            vars(fresh).pop("_dit_rope", None)
            attention.processor = fresh
        assert all_equal(run(name, model), expected)
    assert all_equal(run(name, model), expected)
    assert not any(isinstance(processor, Override) for _, processor in attentions(model))


@BY_KIND
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_processor_of_other_code_put_in_while_patched_rotates_by_itself(name: str, exact: bool) -> None:
    """Code that nobody knows gets the model's own queries, keys and tables, in fast mode too."""

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        return type(self).__mro__[1].__call__(self, *args, **kwargs)

    model = named(name).build()
    plain = run(name, model)
    handle = dit_rope.patch(model, exact=exact)
    for attention, processor in attentions(model):
        base = unpatched_class(processor)
        another = copy.copy(processor)
        called.__wrapped__ = base.__call__  # whose signature attention modules look at
        another.__class__ = type("Another", (base,), {"__module__": __name__, "__call__": called})
        vars(another).pop("_dit_rope", None)
        attention.processor = another
    assert all_equal(run(name, model), plain)
    handle.undo()
    assert all_equal(run(name, model), plain)


def test_processor_that_norms_twice_rotates_by_itself() -> None:
    model = named(NORMS).build()
    attention = model.blocks[0].attn1
    original = type(attention.processor)

    class Twice(original):
        def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            attn.norm_q(attn.to_q(hidden_states))
            return super().__call__(attn, hidden_states, *args, **kwargs)

    Twice.__name__ = original.__name__
    expected = run(NORMS, model)
    with dit_rope.patch(model, exact=False):
        attention.processor = Twice()
        unfused = run(NORMS, model)
        attention.processor = original()
        fast = run(NORMS, model)
    with dit_rope.patch(model):
        attention.processor = Twice()
        assert all_equal(run(NORMS, model), expected)
    for outputs in (unfused, fast):
        torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


@BY_KIND
def test_processors_taken_out_and_put_back_while_patched(name: str) -> None:
    """As diffusers does around fused projections and with ``attn_processors``."""
    model = named(name).build()
    expected = run(name, model)
    with dit_rope.patch(model, exact=True):
        modules = attentions(model)
        for attention, processor in modules:
            attention.processor = unpatched_class(processor).__new__(unpatched_class(processor))
            vars(attention.processor).update({k: v for k, v in vars(processor).items() if k != "_dit_rope"})
        assert all_equal(run(name, model), expected)
        for attention, processor in modules:
            attention.processor = processor
        assert all_equal(run(name, model), expected)
    assert all_equal(run(name, model), expected)
    assert not any(isinstance(processor, Override) for _, processor in attentions(model))


def _with_image(model: Any) -> None:
    """Gives the joint blocks an IP adapter with weights of its own."""
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    width = model.config.num_attention_heads * model.config.attention_head_dim
    torch.manual_seed(3)
    for block in model.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(width, 8, num_tokens=(4,), scale=0.7))


def _without_image(model: Any) -> None:
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    for block in model.transformer_blocks:
        block.attn.set_processor(FluxAttnProcessor())


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_ip_adapter_comes_and_goes_while_flux_is_patched(patch_first: bool, exact: bool) -> None:
    """Its processor attends to the image with unrotated queries; a rotated one would be another answer."""
    model, plain = named("flux").build(), named("flux").build()
    image = {"joint_attention_kwargs": {"ip_hidden_states": [Noise(torch.float32)(2, 4, 8)]}}
    _with_image(plain)
    expected = run("flux", plain, **image)
    _without_image(plain)
    before = run("flux", plain)
    assert not all_equal(expected, before)
    if not patch_first:
        _with_image(model)
    with dit_rope.patch(model, exact=exact):
        if patch_first:
            _with_image(model)
        actual = run("flux", model, **image)
        if exact:
            assert all_equal(actual, expected)
        else:  # the single blocks have no adapter, and rotate in their norms
            torch.testing.assert_close(actual, expected)
        _without_image(model)
        torch.testing.assert_close(run("flux", model), before, **({"rtol": 0, "atol": 0} if exact else {}))
    assert all_equal(run("flux", model), before)


class Scaled(torch.nn.Linear):
    """A stand-in for quantized layers: a subclass of Linear that holds integers and a scale."""

    @classmethod
    def of(cls, linear: torch.nn.Linear) -> Scaled:
        replacement = cls(linear.in_features, linear.out_features, linear.bias is not None)
        with torch.no_grad():
            scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
            replacement.weight = torch.nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
            replacement.register_buffer("scale", scale)
            replacement.bias = linear.bias
        return replacement

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def of_bitsandbytes(layer: str) -> Callable[[torch.nn.Linear], torch.nn.Module]:
    """Makes one of its layers of a Linear, quantized as a model loaded with its configuration is."""

    def of(linear: torch.nn.Linear) -> torch.nn.Module:
        bitsandbytes = pytest.importorskip("bitsandbytes", exc_type=ImportError)
        options = {"has_fp16_weights": False} if layer == "Linear8bitLt" else {"compute_dtype": linear.weight.dtype}
        replacement = getattr(bitsandbytes.nn, layer)(
            linear.in_features, linear.out_features, bias=linear.bias is not None, **options
        )
        replacement.load_state_dict(linear.state_dict())
        quantized: torch.nn.Module = replacement.to("cpu")
        return quantized

    return of


def quantize(model: torch.nn.Module, of: Callable[[torch.nn.Linear], torch.nn.Module]) -> None:
    """Replaces every projection of queries, keys and values."""
    for module in list(model.modules()):
        for name in ("to_q", "to_k", "to_v", "to_qkv"):
            linear = getattr(module, name, None)
            if isinstance(linear, torch.nn.Linear):
                setattr(module, name, of(linear))


@pytest.mark.parametrize("name", [NORMS, PROJECTIONS, "flux", "qwen-image"])
@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize(
    "of",
    [Scaled.of, of_bitsandbytes("Linear8bitLt"), of_bitsandbytes("Linear4bit")],
    ids=["scaled", "bitsandbytes-8", "bitsandbytes-4"],
)
def test_quantized_projections_stay_bitwise_equal(
    name: str, patch_first: bool, of: Callable[[torch.nn.Linear], torch.nn.Module]
) -> None:
    model, plain = named(name).build(), named(name).build()
    before = run(name, plain)
    quantize(plain, of)
    expected = run(name, plain)
    assert not all_equal(expected, before)
    if not patch_first:
        quantize(model, of)
    with dit_rope.patch(model, exact=True):
        if patch_first:
            quantize(model, of)
        assert all_equal(run(name, model), expected)
    assert all_equal(run(name, model), expected)
    assert not any(isinstance(module, Override) for module in model.modules())


@pytest.mark.parametrize("name", [NORMS, PROJECTIONS, "flux"])
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_weights_quantized_by_torchao_while_patched(name: str, config: str, exact: bool) -> None:
    """Its weights are tensor subclasses, in Linears that stay what they were.

    Activations are rounded to integers by one of the two, where one bit more or less becomes a step of 1 in 127: fast
    mode is to stay within what quantization itself does to the output.
    """
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    model, plain = named(name).build(), named(name).build()
    before = run(name, plain)
    handle = dit_rope.patch(model, exact=exact)
    for target in (model, plain):
        quantization.quantize_(target, getattr(quantization, config)())
    expected = run(name, plain)
    for actual, expected_output, unquantized in zip(run(name, model), expected, before, strict=True):
        allowed = 0.0 if exact else (expected_output - unquantized).abs().max()
        assert (actual - expected_output).abs().max() <= allowed
    handle.undo()
    assert all_equal(run(name, model), expected)
    with dit_rope.patch(model, exact=True):
        assert all_equal(run(name, model), expected)
