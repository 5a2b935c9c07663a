"""Flux 2 and Flux 3: separate tables of text, image and references, which the model joins; RMSNorm per head.

Pairs are neighbours, on four axes. The rope module gets the position ids, or a view of their first row, so its tables
are keyed on the ids. The joined tables are new in every forward pass, and packed once in it.

Flux 2 has text before the image in its joint sequence, and separate norms for it in the double blocks. The processors
that cache keys of reference images store them rotated. Flux 3 has blocks for the text, for the image and for reference
images alone, each with its own table, and then joint blocks in this order; its norms take and return float32, and so
does the rotation. Sources: ``transformer_flux2.py`` and ``transformer_flux3.py`` of diffusers 0.42.1.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..hooks.adapter import QK, AttentionRotation, Layout, ModelAdapter, ModelTables, NormRotation
from ..hooks.formats import INTERLEAVED
from .flux import TEXT_AND_IMAGE, TEXT_THEN_IMAGE


def _rotations(blocks: str, attention: str, norms: Mapping[str, NormRotation], *processors: str) -> AttentionRotation:
    return AttentionRotation(
        attention=rf"{blocks}\.\d+\.attn",
        attention_class=attention,
        format=INTERLEAVED,
        layout=Layout.BSHD,
        norms=norms,
        covers=TEXT_AND_IMAGE,
        processors=processors,
    )


FLUX2 = ModelAdapter(
    "diffusers.models.transformers.transformer_flux2.Flux2Transformer2DModel",
    (ModelTables("pos_embed", "Flux2PosEmbed"),),
    (
        _rotations(
            "transformer_blocks", "Flux2Attention", TEXT_THEN_IMAGE, "Flux2AttnProcessor", "Flux2KVAttnProcessor"
        ),
        _rotations(
            "single_transformer_blocks",
            "Flux2ParallelSelfAttention",
            QK,
            "Flux2ParallelSelfAttnProcessor",
            "Flux2KVParallelSelfAttnProcessor",
        ),
    ),
)
FLUX3 = ModelAdapter(
    "diffusers.models.transformers.transformer_flux3.Flux3Transformer2DModel",
    (ModelTables("pos_embed", "Flux3PosEmbed"),),
    (
        _rotations(
            r"(txt_mode_blocks|mode_blocks\.(image|image_cond)|single_transformer_blocks)",
            "Flux3Attention",
            QK,
            "Flux3AttnProcessor",
        ),
    ),
)

ADAPTERS = (FLUX2, FLUX3)
