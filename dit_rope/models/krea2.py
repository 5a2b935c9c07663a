"""Krea 2: one table for text and image in one sequence, queries in groups, RMSNorm per head with weights around zero.

Neighbouring channels rotate. The attention of the text fusion before the blocks is of the same class and does not
rotate. Source: ``transformer_krea2.py`` of diffusers 0.42.1.
"""

from __future__ import annotations

from ..hooks.adapter import AttentionRotation, Layout, ModelAdapter, ModelTables
from ..hooks.formats import INTERLEAVED

KREA2 = ModelAdapter(
    "diffusers.models.transformers.transformer_krea2.Krea2Transformer2DModel",
    (ModelTables("rotary_emb", "Krea2RotaryPosEmbed"),),
    (
        AttentionRotation(
            attention=r"transformer_blocks\.\d+\.attn",
            attention_class="Krea2Attention",
            format=INTERLEAVED,
            layout=Layout.BSHD,
            processors=("Krea2AttnProcessor",),
        ),
    ),
)

ADAPTERS = (KREA2,)
