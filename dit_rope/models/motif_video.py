"""Motif-Video: as HunyuanVideo, text behind the image unrotated, and text cross-attention that rotates queries only.

In the last single blocks, image tokens take the place of text and do not rotate either. Pairs are neighbours, norms are
per head. Source: ``transformer_motif_video.py`` of diffusers 0.42.1.
"""

from __future__ import annotations

from ..hooks.adapter import EVERY, AttentionRotation, Layout, ModelAdapter, ModelTables, NormRotation
from ..hooks.formats import INTERLEAVED

MOTIF_VIDEO = ModelAdapter(
    "diffusers.models.transformers.transformer_motif_video.MotifVideoTransformer3DModel",
    (ModelTables("rope", "MotifVideoRotaryPosEmbed", keyed_by_shape=EVERY),),
    (
        AttentionRotation(
            attention=r"(single_)?transformer_blocks\.\d+\.attn",
            attention_class="MotifVideoAttention",
            format=INTERLEAVED,
            layout=Layout.BSHD,
            processors=("MotifVideoAttnProcessor2_0",),
        ),
        AttentionRotation(
            attention=r"(single_)?transformer_blocks\.\d+\.cross_attn",
            attention_class="MotifVideoCrossAttention",
            format=INTERLEAVED,
            layout=Layout.BSHD,
            norms={"norm_q": NormRotation(projection="to_q")},
            processors=("MotifVideoCrossAttnProcessor2_0",),
        ),
    ),
)

ADAPTERS = (MOTIF_VIDEO,)
