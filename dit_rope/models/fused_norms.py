"""Which norm modules our kernels compute, and with what numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..spec import NormKind


class FusedNorm(NamedTuple):
    """A norm as the kernels take it: y = (x - mean if ``centred``) / sqrt(... + eps) * weight + bias.

    ``keeps_dtype``: the result has the dtype of the data, whatever the weight's, as it has in the kernels.
    """

    centred: bool
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    keeps_dtype: bool = False

    def kind(self, across_heads: bool) -> NormKind:
        """The norm's name among the kinds of :class:`~dit_rope.NormKind`."""
        if self.centred:
            return NormKind.LAYER_ACROSS_HEADS if across_heads else NormKind.LAYER_PER_HEAD
        return NormKind.ACROSS_HEADS if across_heads else NormKind.PER_HEAD


def fused_norm(module: Any, dtype: torch.dtype) -> FusedNorm | None:
    """What ``module`` computes on data of ``dtype``; None for a norm, weight or dtype that is left to its own code.

    A weight of another dtype decides the dtype of most results upstream, which the kernels do not do.
    """
    cls = getattr(type(module), "unpatched", type(module))
    read = _KNOWN.get(f"{cls.__module__}.{cls.__qualname__}")
    if read is None:
        return None
    norm = read(module, dtype)
    given = [tensor for tensor in (norm.weight, norm.bias) if tensor is not None]
    decides = not norm.keeps_dtype and any(tensor.dtype != dtype for tensor in given)
    if (norm.bias is not None and not norm.centred) or decides:
        return None
    return norm


def _rms_norm(module: Any, dtype: torch.dtype) -> FusedNorm:
    """``torch.nn.RMSNorm``, whose eps may be None: the machine epsilon of the dtype that torch computes in."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    eps = torch.finfo(wide).eps if module.eps is None else module.eps
    return FusedNorm(False, module.weight, getattr(module, "bias", None), eps)


def _layer_norm(module: Any, dtype: torch.dtype) -> FusedNorm:
    return FusedNorm(True, module.weight, module.bias, module.eps)


def _stable_audio_3_norm(module: Any, dtype: torch.dtype) -> FusedNorm:
    """The weight is called gamma, and takes part in float32: ``transformer_stable_audio3.py`` of diffusers 0.42.1."""
    return FusedNorm(False, module.gamma, None, module.eps, keeps_dtype=True)


def _krea2_norm(module: Any, dtype: torch.dtype) -> FusedNorm:
    """Weights around zero, in float32 whatever the model's dtype: ``transformer_krea2.py`` of diffusers 0.42.1."""
    return FusedNorm(False, module.weight + 1.0, None, module.eps, keeps_dtype=True)


_KNOWN: dict[str, Callable[[Any, torch.dtype], FusedNorm]] = {
    "torch.nn.modules.normalization.RMSNorm": _rms_norm,
    "torch.nn.modules.normalization.LayerNorm": _layer_norm,
    "diffusers.models.normalization.RMSNorm": _rms_norm,
    "diffusers.models.normalization.MochiRMSNorm": _rms_norm,
    "diffusers.models.normalization.FP32LayerNorm": _layer_norm,
    "diffusers.models.transformers.transformer_cosmos3.Cosmos3NemotronRMSNorm": _rms_norm,
    "diffusers.models.transformers.transformer_krea2.Krea2RMSNorm": _krea2_norm,
    "diffusers.models.transformers.transformer_stable_audio3.StableAudio3RMSNorm": _stable_audio_3_norm,
}
"""By the full name of the class, matched exactly: a subclass may compute something else."""
