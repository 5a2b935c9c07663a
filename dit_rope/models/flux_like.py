"""Models of Flux's design with other classes: Bria 3.2, Bria Fibo, LongCat-Image and Ovis-Image.

As in Flux, tables of neighbouring pairs come from position ids, text stands before the image, and the norms are
RMSNorm per head: in double blocks those of the image rotate the end of the table and those of the text its start, in
single blocks one pair rotates all of it. Bria Fibo's single blocks have diffusers' general attention with the processor
of Bria 3.2. Sources, all in diffusers 0.42.1: ``transformer_bria.py``, ``transformer_bria_fibo.py``,
``transformer_longcat_image.py``, ``transformer_ovis_image.py``.
"""

from __future__ import annotations

from ..hooks.adapter import AttentionRotation, Layout, ModelAdapter, ModelTables
from ..hooks.formats import INTERLEAVED
from .flux import TEXT_AND_IMAGE, TEXT_THEN_IMAGE


def _rotations(blocks: str, attention: str, processor: str) -> AttentionRotation:
    return AttentionRotation(
        attention=rf"{blocks}\.\d+\.attn",
        attention_class=attention,
        format=INTERLEAVED,
        layout=Layout.BSHD,
        norms=TEXT_THEN_IMAGE,
        covers=TEXT_AND_IMAGE,
        processors=(processor,),
    )


def _adapter(model: str, pos_embed: str, *rotations: AttentionRotation) -> ModelAdapter:
    return ModelAdapter(f"diffusers.models.transformers.{model}", (ModelTables("pos_embed", pos_embed),), rotations)


_ALL = "(single_)?transformer_blocks"
BRIA = _adapter(
    "transformer_bria.BriaTransformer2DModel", "BriaEmbedND", _rotations(_ALL, "BriaAttention", "BriaAttnProcessor")
)
BRIA_FIBO = _adapter(
    "transformer_bria_fibo.BriaFiboTransformer2DModel",
    "BriaFiboEmbedND",
    _rotations("transformer_blocks", "BriaFiboAttention", "BriaFiboAttnProcessor"),
    _rotations("single_transformer_blocks", "Attention", "BriaAttnProcessor"),
)
LONGCAT_IMAGE = _adapter(
    "transformer_longcat_image.LongCatImageTransformer2DModel",
    "LongCatImagePosEmbed",
    _rotations(_ALL, "LongCatImageAttention", "LongCatImageAttnProcessor"),
)
OVIS_IMAGE = _adapter(
    "transformer_ovis_image.OvisImageTransformer2DModel",
    "OvisImagePosEmbed",
    _rotations(_ALL, "OvisImageAttention", "OvisImageAttnProcessor"),
)

ADAPTERS = (BRIA, BRIA_FIBO, LONGCAT_IMAGE, OVIS_IMAGE)
