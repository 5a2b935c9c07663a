"""Ernie-Image: image before text, RMSNorm per head. Its rotary function does not compute a rotation.

The table holds equal angles at neighbouring channels, but the code pairs channels half a head apart. So the two
channels of a pair rotate by different angles. Source: ``transformer_ernie_image.py`` of diffusers 0.42.1.
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
