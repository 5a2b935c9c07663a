"""Helios: a video and up to three histories of it in one sequence with one table, norms across heads.

Pairs are neighbours. The model averages the tables of its coarser histories, so their rows are not rotations of any
position. The tables of the four parts are memoized, and the table of the sequence is packed once in each forward pass.
Text is used in attention modules that do not rotate. Source: ``transformer_helios.py`` of diffusers 0.42.1.
"""

from __future__ import annotations

from ..hooks.adapter import AttentionRotation, Layout, ModelAdapter, ModelTables
from ..hooks.formats import STACKED

HELIOS = ModelAdapter(
    "diffusers.models.transformers.transformer_helios.HeliosTransformer3DModel",
    (
        ModelTables(
            "rope",
            "HeliosRotaryPosEmbed",
        ),
    ),
    (
        AttentionRotation(
            attention=r"blocks\.\d+\.attn1",
            attention_class="HeliosAttention",
            format=STACKED,
            layout=Layout.BSC,
            rotary=("rotary_emb",),
            processors=("HeliosAttnProcessor",),
        ),
    ),
)

ADAPTERS = (HELIOS,)
