"""LoRA and its kin, and quantized layers of every library that is installed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .core import NotApplicable, Subject, intervention
from .parts import parent_of

lasting = functools.partial(intervention, reversible=False)


def _targets(subject: Subject, kind: str = "projections") -> list[str]:
    modules = zip(getattr(subject.parts, kind), subject.modules(kind), strict=True)
    paths = [path for path, module in modules if kind == "norms" or isinstance(module, torch.nn.Linear)]
    if not paths:
        raise NotApplicable(f"no linear {kind}")
    return paths


def _injected(config_of: Callable[[list[str]], Any], then: Any = None, kind: str = "projections") -> Any:
    def put(subject: Subject) -> None:
        import peft

        torch.manual_seed(5)
        config = config_of(_targets(subject, kind))
        if then is None or not hasattr(subject.model, "add_adapter"):
            peft.inject_adapter_in_model(config, subject.model)
        else:
            subject.model.add_adapter(config, adapter_name="first")
        generator = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for name, parameter in subject.model.named_parameters():
                if any(part in name for part in ("lora_", "hada_", "lokr_", "oft_", "vera_", "ia3_", "ln_tuning")):
                    parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1)
        subject.model.eval()
        if then is not None:
            then(subject)

    return put


def _lora(targets: list[str], **options: Any) -> Any:
    import peft

    return peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)


def _of(name: str, **options: Any) -> Callable[[list[str]], Any]:
    def make(targets: list[str]) -> Any:
        import peft

        return getattr(peft, name)(target_modules=targets, **options)

    return make


lasting("LoRA", changes=True)(_injected(_lora))
lasting("LoRA with DoRA", changes=True)(_injected(functools.partial(_lora, use_dora=True)))
lasting("LoRA and whole norms saved")(_injected(functools.partial(_lora, modules_to_save=["norm_q", "norm_k"])))
lasting("LoHa", changes=True)(_injected(_of("LoHaConfig", r=2, init_weights=False)))
lasting("LoKr", changes=True)(_injected(_of("LoKrConfig", r=2, init_weights=False)))
lasting("OFT")(_injected(_of("OFTConfig", oft_block_size=2, r=0, init_weights=False)))
lasting("IA3", changes=True)(_injected(_of("IA3Config", feedforward_modules=[], init_ia3_weights=False)))
lasting("tuned norms")(_injected(_of("LNTuningConfig"), kind="norms"))


def _dropout(subject: Subject) -> None:
    subject.model.train()


lasting("LoRA with dropout in train mode", changes=True)(
    _injected(functools.partial(_lora, lora_dropout=0.3), _dropout)
)


def _steps(subject: Subject) -> None:
    """Scaled, disabled, and at full strength again, by the step."""
    if not hasattr(subject.model, "set_adapters"):
        raise NotApplicable("no set_adapters")

    def before_step(number: int) -> None:
        if number == 1:
            subject.model.disable_lora()
        else:
            subject.model.enable_lora()
            subject.model.set_adapters(["first"], [1.0 if number == 0 else 0.5])

    subject.before_step = before_step


def _fused(subject: Subject) -> None:
    """Fused into the weights in step 1, and out of them again."""
    if not hasattr(subject.model, "fuse_lora"):
        raise NotApplicable("no fuse_lora")
    state = {"fused": False}

    def before_step(number: int) -> None:
        if (number == 1) is not state["fused"]:
            state["fused"] = number == 1
            subject.model.fuse_lora() if number == 1 else subject.model.unfuse_lora()

    subject.before_step = before_step


def _swapped(subject: Subject) -> None:
    """Other weights in place, as hotswapping writes them."""
    copies = [(p, p.detach().clone()) for n, p in subject.model.named_parameters() if "lora_B" in n]

    def before_step(number: int) -> None:
        with torch.no_grad():
            for parameter, first in copies:
                parameter.copy_(first * (3 if number == 1 else 1))

    subject.before_step = before_step


def _unloaded(subject: Subject) -> None:
    """Gone in step 1 for good."""
    if not hasattr(subject.model, "unload_lora"):
        raise NotApplicable("no unload_lora")

    def before_step(number: int) -> None:
        if number == 1 and hasattr(subject.model, "peft_config"):
            subject.model.unload_lora()

    subject.before_step = before_step


lasting("LoRA scaled and disabled by the step", changes=True)(_injected(_lora, _steps))
lasting("LoRA fused and unfused by the step", changes=True)(_injected(_lora, _fused))
lasting("LoRA hot-swapped by the step", changes=True)(_injected(_lora, _swapped))
lasting("LoRA unloaded in step 1", changes=True)(_injected(_lora, _unloaded))


# Gradients of adapters are small sums of large terms: the unpatched float32 model is up to 200 roundings off float64.
@lasting("LoRA trained", roundings=512)
def trained(subject: Subject) -> None:
    """Gradients of the adapter alone."""
    if not subject.example.trains:
        raise NotApplicable("does not train")
    subject.model.requires_grad_(False)
    _injected(_lora)(subject)

    def run(inputs: Any) -> Any:
        subject.model.zero_grad()
        output = subject.example.run(subject.model, inputs)
        outputs = [
            x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, torch.Tensor) and x.requires_grad
        ]
        sum(x.square().sum() for x in outputs).backward()
        return output, [p.grad for p in subject.model.parameters() if p.grad is not None]

    subject.run = run


class Rounded(torch.nn.Linear):
    """Holds its weight in 8 bits with a scale per row, as quantized layers of many repositories do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The linear map of the rounded weight."""
        scale = self.weight.abs().amax(1, keepdim=True) / 127
        return torch.nn.functional.linear(x, (self.weight / scale).round() * scale, self.bias)


def _exchanged(make: Callable[[torch.nn.Linear], torch.nn.Module]) -> Any:
    def put(subject: Subject) -> None:
        for path in _targets(subject):
            parent, name = parent_of(subject.model, path)
            setattr(parent, name, make(subject.model.get_submodule(path)))

    return put


def _rounded(linear: torch.nn.Linear) -> torch.nn.Module:
    layer = Rounded(linear.in_features, linear.out_features, linear.bias is not None)
    layer.weight, layer.bias = linear.weight, linear.bias
    return layer


def _class_of(linear: torch.nn.Linear) -> torch.nn.Module:
    linear.__class__ = type(linear.__class__.__name__, (linear.__class__,), {"forward": Rounded.forward})
    return linear


lasting("projections exchanged for 8-bit ones", changes=True)(_exchanged(_rounded))
lasting("projections given an 8-bit class", changes=True)(_exchanged(_class_of))


@lasting("quantize_dynamic of torch", changes=True)
def dynamic(subject: Subject) -> None:
    """int8 linear layers, which are found by their exact type."""
    if "onednn" not in torch.backends.quantized.supported_engines:
        raise NotApplicable("no engine")
    subject.enter(_engine("onednn"))
    torch.ao.quantization.quantize_dynamic(subject.model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)


class _engine:
    def __init__(self, name: str) -> None:
        self.name, self.before = name, torch.backends.quantized.engine

    def __enter__(self) -> None:
        torch.backends.quantized.engine = self.name

    def __exit__(self, *_: Any) -> None:
        torch.backends.quantized.engine = self.before


def _imported(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except Exception as error:
        raise NotApplicable(f"{name.partition('.')[0]} is not installed") from error


def _quanto(kind: str) -> Any:
    def put(subject: Subject) -> None:
        quanto = _imported("optimum.quanto")
        quanto.quantize(subject.model, weights=getattr(quanto, kind))
        quanto.freeze(subject.model)

    return put


lasting("quanto int8", changes=True)(_quanto("qint8"))
lasting("quanto float8", changes=True)(_quanto("qfloat8"))


def _torchao(config: str) -> Any:
    def put(subject: Subject) -> None:
        quantization = _imported("torchao.quantization")
        targets = set(_targets(subject))
        quantization.quantize_(
            subject.model, getattr(quantization, config)(), filter_fn=lambda m, path: path in targets
        )

    return put


lasting("torchao int8", changes=True)(_torchao("Int8WeightOnlyConfig"))
lasting("torchao float8", changes=True)(_torchao("Float8WeightOnlyConfig"))


@lasting("GGUF linear layers", changes=True)
def gguf(subject: Subject) -> None:
    """Diffusers' own GGUFLinear with Q8_0 weights."""
    library = _imported("gguf")
    utils = _imported("diffusers.quantizers.gguf.utils")
    for path in _targets(subject):
        linear: Any = subject.model.get_submodule(path)
        if linear.in_features % 32:
            raise NotApplicable("widths that Q8_0 does not divide")
        kind = library.GGMLQuantizationType.Q8_0
        data = torch.from_numpy(library.quantize(linear.weight.detach().numpy(), kind))
        layer = utils.GGUFLinear(linear.in_features, linear.out_features, linear.bias is not None, torch.float32)
        layer.weight, layer.bias = utils.GGUFParameter(data, quant_type=kind), linear.bias
        parent, name = parent_of(subject.model, path)
        setattr(parent, name, layer)


def _bitsandbytes(linear: torch.nn.Linear) -> torch.nn.Module:
    library = _imported("bitsandbytes")
    layer = library.nn.Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None)
    layer.weight = library.nn.Params4bit(linear.weight.detach(), requires_grad=False)
    layer.bias = linear.bias
    return layer.to("cpu")


lasting("bitsandbytes 4 bits", changes=True)(_exchanged(_bitsandbytes))
