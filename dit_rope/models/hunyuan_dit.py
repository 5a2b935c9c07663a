"""HunyuanDiT and its control network: the pipeline's table for the image, LayerNorm with bias per head.

The sequence holds the image alone. Queries rotate in the attention to the text as well, keys do not. Sources:
``hunyuan_transformer_2d.py`` and ``controlnet_hunyuan.py`` of diffusers 0.42.1.
"""

from __future__ import annotations

from ..hooks.adapter import AttentionRotation, Layout, ModelAdapter, NormRotation
from ..hooks.formats import INTERLEAVED

# Guidance by perturbed attention computes part of the batch without queries and keys; tables have no batch dimension.
_PROCESSORS = (
    "HunyuanAttnProcessor2_0",
    "FusedHunyuanAttnProcessor2_0",
    "PAGHunyuanAttnProcessor2_0",
    "PAGCFGHunyuanAttnProcessor2_0",
)


def _rotations(attention: str, *norms: str) -> AttentionRotation:
    return AttentionRotation(
        attention=rf"blocks\.\d+\.{attention}",
        attention_class="Attention",
        format=INTERLEAVED,
        layout=Layout.BHSD,
        norms={norm: NormRotation() for norm in norms},
        processors=_PROCESSORS,
    )


def _adapter(model: str) -> ModelAdapter:
    return ModelAdapter(
        f"diffusers.models.{model}",
        (),
        (_rotations("attn1", "norm_q", "norm_k"), _rotations("attn2", "norm_q")),
        not_patched=("tables, which the pipeline builds once for all steps",),
    )


HUNYUAN_DIT = _adapter("transformers.hunyuan_transformer_2d.HunyuanDiT2DModel")
HUNYUAN_DIT_CONTROLNET = _adapter("controlnets.controlnet_hunyuan.HunyuanDiT2DControlNetModel")

ADAPTERS = (HUNYUAN_DIT, HUNYUAN_DIT_CONTROLNET)
