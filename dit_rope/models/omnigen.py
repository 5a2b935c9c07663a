"""OmniGen: one sequence of text and images, half pairing, no norm of queries and keys.

Positions are the caller's, those of the first sample for the whole batch; cos and sin are scaled beyond 1. The rope
module overwrites its own frequencies in every forward pass, which decide nothing. Source: ``transformer_omnigen.py`` of
diffusers 0.42.1.
"""

from __future__ import annotations

from ..hooks.adapter import Layout, ModelAdapter, ModelTables, Rotations
from ..hooks.formats import HALF

OMNIGEN = ModelAdapter(
    "diffusers.models.transformers.transformer_omnigen.OmniGenTransformer2DModel",
    (
        ModelTables(
            "rope",
            "OmniGenSuScaledRotaryEmbedding",
            by_shape=("hidden_states",),
            writes=("inv_freq",),
        ),
    ),
    (
        Rotations(
            attention=r"layers\.\d+\.self_attn",
            attention_class="Attention",
            format=HALF,
            layout=Layout.BSC,
            processors=("OmniGenAttnProcessor2_0",),
        ),
    ),
)
