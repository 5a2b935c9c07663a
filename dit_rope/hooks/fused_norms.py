"""The norm modules that kernels can compute, and their parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch.nn.modules import module as torch_modules

from ..rotation_args import NormRounding
from ..spec import NormKind
from .known_code import guard_of


class FusedNorm(NamedTuple):
    """The parameters of one norm: y = (x - mean if ``centred``) / sqrt(mean square + eps) * weight + bias.

    ``keeps_dtype`` tells whether the result of the module has the dtype of the data, as in the kernels, even if the
    weight has another. ``rounding`` is where the module rounds to that dtype.
    """

    centred: bool
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    keeps_dtype: bool = False
    rounding: NormRounding = NormRounding.RESULT

    def kind(self, across_heads: bool) -> NormKind:
        """The kind of norm, across heads or per head."""
        if self.centred:
            return NormKind.LAYER_ACROSS_HEADS if across_heads else NormKind.LAYER_PER_HEAD
        return NormKind.ACROSS_HEADS if across_heads else NormKind.PER_HEAD


def fused_norm(module: Any, dtype: torch.dtype) -> FusedNorm | None:
    """The norm that ``module`` computes on data of ``dtype``; None if the kernels would compute something else.

    For example, the dtype of a weight changes the dtype of the result of most modules, but not that of the kernels.
    """
    cls = type(module)
    read = KNOWN_NORMS.get(f"{cls.__module__}.{cls.__qualname__}")
    if read is None:
        return None
    norm = read(module, dtype)
    tensors = [tensor for tensor in (norm.weight, norm.bias) if tensor is not None]
    decides = not norm.keeps_dtype and any(tensor.dtype != dtype for tensor in tensors)
    if (norm.bias is not None and not norm.centred) or decides or not all(type(x) in _PLAIN_TENSORS for x in tensors):
        return None
    return norm


def makes_fresh_results(module: Any) -> bool:
    """Whether a call of ``module`` runs only known code: it has no hooks, wrappers or compiler.

    Then nobody else holds its result, which may be overwritten, and a kernel may replace the call of a norm.
    """
    state = vars(module)
    if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
        return False
    if state["_backward_hooks"] or state["_backward_pre_hooks"] or state.get("_compiled_call_impl") is not None:
        return False
    if torch_modules._has_any_global_hook():
        return False
    return runs_known_code(type(module))


def runs_known_code(cls: type) -> bool:
    """Whether the forward of this class, and the function of torch that it calls, are known code."""
    if cls.__module__.startswith("torch.nn.modules.") and cls.__name__ in _CALLED:
        for namespace, name, function in _torch_functions.get(cls) or _of_torch(cls) or ((_NOTHING, "", cls),):
            if namespace.get(name) is not function:
                return False
        return True
    name = f"{cls.__module__}.{cls.__qualname__}"
    return name in KNOWN_NORMS and guard_of(cls, "forward").unknown is None


# A trace takes the answer as a constant.
runs_known_code._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _of_torch(cls: type) -> tuple[tuple[Any, str, Any], ...] | None:
    """The forward of a module class of torch and the function that it calls, or None if one of them was replaced."""
    functional = vars(torch.nn.functional)
    functions = tuple(
        (namespace, name, namespace[name])
        for namespace, name in ((vars(cls), "forward"), (functional, _CALLED.get(cls.__name__, "")))
        if name in namespace
    )
    if not all(_is_of(function, name) for _, name, function in functions):
        return None
    _torch_functions[cls] = functions
    return functions


_NOTHING: dict[str, Any] = {}
_torch_functions: dict[type, tuple[tuple[Any, str, Any], ...]] = {}
_CALLED = {"RMSNorm": "rms_norm", "LayerNorm": "layer_norm", "Linear": "linear"}


def _is_of(function: Any, name: str) -> bool:
    """Whether ``function`` is torch's function ``name``: defined in a file of torch, or built in."""
    if not isinstance(function, FunctionType):
        return inspect.isbuiltin(function)
    code = function.__code__
    return code.co_name == name and code.co_filename.startswith(_TORCH_FOLDER)


_TORCH_FOLDER = torch.__file__.rpartition("__init__")[0]
_PLAIN_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})


def _rms_norm(module: Any, dtype: torch.dtype) -> FusedNorm:
    """``torch.nn.RMSNorm``, whose eps may be None: the machine epsilon of the dtype that torch computes in."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    eps = torch.finfo(wide).eps if module.eps is None else module.eps
    return FusedNorm(False, module.weight, getattr(module, "bias", None), eps)


def _diffusers_norm(module: Any, dtype: torch.dtype) -> FusedNorm:
    """RMSNorm of diffusers 0.42.1, by single operations: a 16-bit weight multiplies what is rounded to 16 bits."""
    return _rms_norm(module, dtype)._replace(rounding=NormRounding.EVERY_STEP)


def _wide_rms_norm(module: Any, dtype: torch.dtype) -> FusedNorm:
    """Weights of any dtype take part in float32: ``MochiRMSNorm``, ``transformer_cosmos3.py`` of diffusers 0.42.1."""
    return _rms_norm(module, dtype)._replace(keeps_dtype=True)


def _layer_norm(module: Any, dtype: torch.dtype) -> FusedNorm:
    return FusedNorm(True, module.weight, module.bias, module.eps)


def _wide_layer_norm(module: Any, dtype: torch.dtype) -> FusedNorm:
    """Weights of any dtype take part in float32: ``FP32LayerNorm`` of diffusers 0.42.1."""
    return _layer_norm(module, dtype)._replace(keeps_dtype=True)


def _stable_audio_3_norm(module: Any, dtype: torch.dtype) -> FusedNorm:
    """The weight is called gamma and multiplies in float32: ``transformer_stable_audio3.py`` of diffusers 0.42.1."""
    return FusedNorm(False, module.gamma, None, module.eps, keeps_dtype=True)


def _krea2_norm(module: Any, dtype: torch.dtype) -> FusedNorm:
    """The factor is 1 + weight, in float32 for any dtype of the model: ``transformer_krea2.py`` of diffusers 0.42.1."""
    return FusedNorm(False, module.weight + 1.0, None, module.eps, keeps_dtype=True)


KNOWN_NORMS: dict[str, Callable[[Any, torch.dtype], FusedNorm]] = {
    "torch.nn.modules.normalization.RMSNorm": _rms_norm,
    "torch.nn.modules.normalization.LayerNorm": _layer_norm,
    "diffusers.models.normalization.RMSNorm": _diffusers_norm,
    "diffusers.models.normalization.MochiRMSNorm": _wide_rms_norm,
    "diffusers.models.normalization.FP32LayerNorm": _wide_layer_norm,
    "diffusers.models.transformers.transformer_cosmos3.Cosmos3NemotronRMSNorm": _wide_rms_norm,
    "diffusers.models.transformers.transformer_krea2.Krea2RMSNorm": _krea2_norm,
    "diffusers.models.transformers.transformer_stable_audio3.StableAudio3RMSNorm": _stable_audio_3_norm,
}
"""By the full name of the class, matched exactly: a subclass may compute something else."""
