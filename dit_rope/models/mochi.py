"""Mochi: different angles for every head, from frequencies that are a parameter of the model.

Image and text have separate norms per head. Text does not rotate. Pairs are neighbours. While the frequencies are
trained, tables are built in every pass, because the backward pass needs them, and the model rotates. Source:
``transformer_mochi.py`` and ``attention_processor.py`` of diffusers 0.42.1.
"""

from __future__ import annotations

from ..hooks.adapter import AttentionRotation, Layout, ModelAdapter, ModelTables
from ..hooks.formats import HEAD_PAIRS

MOCHI = ModelAdapter(
    "diffusers.models.transformers.transformer_mochi.MochiTransformer3DModel",
    (ModelTables("rope", "MochiRoPE"),),
    (
        AttentionRotation(
            attention=r"transformer_blocks\.\d+\.attn1",
            attention_class="MochiAttention",
            format=HEAD_PAIRS,
            layout=Layout.BSHD,
            processors=("MochiAttnProcessor2_0",),
        ),
    ),
    ("tables and rotation of passes that need the gradient of pos_frequencies, which dit_rope does not compute",),
)

ADAPTERS = (MOCHI,)
