"""Helios: a video and up to three histories of it in one sequence, one table over all of them, norms across heads.

Pairs are neighbours. The model averages the tables of its coarser histories, so that their rows are no rotations of any
position: what is memoized are the four parts, and the sequence's table is packed once in each forward pass. Text stands
in attention modules that do not rotate. Source: ``transformer_helios.py`` of diffusers 0.42.1.
"""

from __future__ import annotations

from .adapter import Layout, ModelAdapter, ModelTables, Rotations
from .formats import STACKED

_HISTORIES = ("latents_history_short", "latents_history_mid", "latents_history_long")

HELIOS = ModelAdapter(
    "diffusers.models.transformers.transformer_helios.HeliosTransformer3DModel",
    (
        ModelTables(
            "rope",
            "HeliosRotaryPosEmbed",
            by_shape=("frame_indices",),
            # Which histories there are decides which one is the second that the rope module is called for.
            sources=("indices_hidden_states", *(f"indices_{history}" for history in _HISTORIES)),
            source_shapes=("hidden_states", *_HISTORIES),
        ),
    ),
    (
        Rotations(
            attention=r"blocks\.\d+\.attn1",
            attention_class="HeliosAttention",
            format=STACKED,
            layout=Layout.BSC,
            rotary=("rotary_emb",),
            processors=("HeliosAttnProcessor",),
        ),
    ),
)
