"""EasyAnimate: text before the image in the joint sequence unrotated, LayerNorm per head.

The first blocks have separate norms for image and text, the last blocks norm the joint sequence. In both, the image at
the end rotates. Queries and keys are transposed before the norm. Pairs are neighbours. The model builds its tables on
the host, and copies them to the device in every rotation. Source: ``transformer_easyanimate.py`` of diffusers 0.42.1.
"""

from __future__ import annotations

from ..hooks.adapter import EVERY, AttentionRotation, Layout, ModelAdapter, ModelTables, NormRotation
from ..hooks.formats import INTERLEAVED
from ..hooks.packed_tables import Align

EASYANIMATE = ModelAdapter(
    "diffusers.models.transformers.transformer_easyanimate.EasyAnimateTransformer3DModel",
    (ModelTables("rope_embedding", "EasyAnimateRotaryPosEmbed", keyed_by_shape=EVERY, to_device=True),),
    (
        AttentionRotation(
            attention=r"transformer_blocks\.\d+\.attn1",
            attention_class="Attention",
            format=INTERLEAVED,
            layout=Layout.BHSD,
            norms={"norm_q": NormRotation(align=Align.END), "norm_k": NormRotation(align=Align.END)},
            processors=("EasyAnimateAttnProcessor2_0",),
        ),
    ),
)

ADAPTERS = (EASYANIMATE,)
