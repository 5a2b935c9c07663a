"""PRX: rotation matrices, RMSNorm per head; text is keys and values only, before the image, and does not rotate.

Source: ``transformer_prx.py`` of diffusers 0.42.1.
"""

from __future__ import annotations

from ..hooks.adapter import Layout, ModelAdapter, ModelTables, Rotated, Rotations
from ..hooks.formats import MATRICES

PRX = ModelAdapter(
    "diffusers.models.transformers.transformer_prx.PRXTransformer2DModel",
    (ModelTables("pe_embedder", "PRXEmbedND"),),
    (
        Rotations(
            attention=r"blocks\.\d+\.attention",
            attention_class="PRXAttention",
            format=MATRICES,
            layout=Layout.BHSD,
            rotated={"norm_q": Rotated(), "norm_k": Rotated()},
            processors=("PRXAttnProcessor2_0",),
        ),
    ),
)
