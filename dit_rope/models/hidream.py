"""HiDream: image before text, rotation matrices, RMSNorm across heads.

Text is at position 0 of every axis and never rotates, so that its own norms in the double blocks stay as they are.
Where the axes have half the channels of a head, the first half of them rotates. The processor rotates whatever it is
given, through a function of its module. Source: ``transformer_hidream_image.py`` of diffusers 0.42.1.
"""

from __future__ import annotations

from typing import Any

from ..hooks.adapter import (
    AttentionRotation,
    CastTo,
    Layout,
    ModelAdapter,
    ModelTables,
    NormRotation,
    ReplacedFunction,
    Tokens,
)
from ..hooks.formats import MATRICES


def _head_dim(attention: Any) -> int:
    head_dim: int = attention.inner_dim // attention.heads
    return head_dim


HIDREAM = ModelAdapter(
    "diffusers.models.transformers.transformer_hidream_image.HiDreamImageTransformer2DModel",
    (
        ModelTables(
            "pe_embedder",
            "HiDreamImageEmbedND",
        ),
    ),
    (
        AttentionRotation(
            attention=r"(double|single)_stream_blocks\.\d+\.block\.attn1",
            attention_class="HiDreamAttention",
            format=MATRICES,
            layout=Layout.BSC,
            norms={
                "q_rms_norm": NormRotation(rest_is_identity=True),
                "k_rms_norm": NormRotation(rest_is_identity=True),
            },
            processors=("HiDreamAttnProcessor",),
            replaced_function=ReplacedFunction("apply_rope", returns=2),
            head_dim=_head_dim,
            partial=True,
            covers=(Tokens(("encoder_hidden_states", "hidden_states")),),
            cast_to=CastTo.INPUT,
        ),
    ),
)
