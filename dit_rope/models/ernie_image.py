"""Ernie-Image: image before text, RMSNorm per head, and a rotate that is no rotation.

The angles of neighbours are equal, but what rotates together is halves: the two channels of a pair rotate by different
angles. Source: ``transformer_ernie_image.py`` of diffusers 0.42.1.
"""

from __future__ import annotations

from ..hooks.adapter import ModelAdapter, ModelTables

ERNIE_IMAGE = ModelAdapter(
    "diffusers.models.transformers.transformer_ernie_image.ErnieImageTransformer2DModel",
    (
        ModelTables(
            "pos_embed",
            "ErnieImageEmbedND3",
        ),
    ),
    not_patched=("rotation in ErnieImageAttention: the two channels of a pair rotate by different angles",),
)

ADAPTERS = (ERNIE_IMAGE,)
