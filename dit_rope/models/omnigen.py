"""OmniGen: one sequence of text and images, half pairing, no norm of queries and keys.

The caller passes positions; those of the first sample are for the whole batch. Cos and sin are scaled beyond 1. The
rope module overwrites its frequencies in every forward pass before it reads them. Source: ``transformer_omnigen.py`` of
diffusers 0.42.1.
"""

from __future__ import annotations

from ..hooks.adapter import AttentionRotation, Layout, ModelAdapter, ModelTables
from ..hooks.formats import HALF

OMNIGEN = ModelAdapter(
    "diffusers.models.transformers.transformer_omnigen.OmniGenTransformer2DModel",
    (
        ModelTables(
            "rope",
            "OmniGenSuScaledRotaryEmbedding",
            keyed_by_shape=("hidden_states",),
            sets=("inv_freq",),
        ),
    ),
    (
        AttentionRotation(
            attention=r"layers\.\d+\.self_attn",
            attention_class="Attention",
            format=HALF,
            layout=Layout.BSC,
            processors=("OmniGenAttnProcessor2_0",),
        ),
    ),
)

ADAPTERS = (OMNIGEN,)
