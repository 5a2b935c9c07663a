"""PRX: rotation matrices, RMSNorm per head; text is keys and values only, before the image, and does not rotate.

Source: ``transformer_prx.py`` of diffusers 0.42.1.
"""

from __future__ import annotations

from ..hooks.adapter import AttentionRotation, Layout, ModelAdapter, ModelTables, NormRotation
from ..hooks.formats import MATRICES

PRX = ModelAdapter(
    "diffusers.models.transformers.transformer_prx.PRXTransformer2DModel",
    (ModelTables("pe_embedder", "PRXEmbedND"),),
    (
        AttentionRotation(
            attention=r"blocks\.\d+\.attention",
            attention_class="PRXAttention",
            format=MATRICES,
            layout=Layout.BHSD,
            norms={"norm_q": NormRotation(), "norm_k": NormRotation()},
            processors=("PRXAttnProcessor2_0",),
        ),
    ),
)

ADAPTERS = (PRX,)
