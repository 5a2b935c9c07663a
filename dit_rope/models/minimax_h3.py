"""MiniMax H3: text, images, sound and video packed into one sequence with one table, RMSNorm per head.

The pairs are the halves of the leading channels of a head; the others do not rotate. Everything is computed in the
dtype of the data, to which cos and sin are rounded. Source: ``transformer_minimax_h3.py`` of diffusers 0.42.1.
"""

from __future__ import annotations

from ..hooks.adapter import AttentionRotation, Layout, ModelAdapter, ModelTables
from ..hooks.formats import HALF_NARROWED

MINIMAX_H3 = ModelAdapter(
    "diffusers.models.transformers.transformer_minimax_h3.MiniMaxH3Transformer3DModel",
    (ModelTables("rope", "MiniMaxH3RotaryPosEmbed"),),
    (
        AttentionRotation(
            attention=r"transformer_blocks\.\d+\.attn",
            attention_class="MiniMaxH3Attention",
            format=HALF_NARROWED,
            layout=Layout.BSHD,
            rotary=("rotary_emb",),
            processors=("MiniMaxH3AttnProcessor",),
            partial=True,
        ),
    ),
)

ADAPTERS = (MINIMAX_H3,)
