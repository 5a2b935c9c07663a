"""Kandinsky 5 and 6: text and video in separate blocks, each with its table, RMSNorm per head.

Pairs are neighbours, rotated by 2 x 2 matrices. Cross-attention to text does not rotate; that of Kandinsky 6 between
video and audio does, with a table for queries and one for keys. Sources, in diffusers 0.42.1:
``transformer_kandinsky.py``, ``transformer_kandinsky6.py``, ``transformer_kandinsky6_sr.py``.
"""

from __future__ import annotations

import torch

from ..hooks.adapter import (
    AttentionRotation,
    CastTo,
    Layout,
    ModelAdapter,
    ModelTables,
    NormRotation,
    ReplacedFunction,
    ResultRotation,
    Tokens,
)
from ..hooks.formats import MATRICES

_TRANSFORMERS = "diffusers.models.transformers"
_QK = {"query_norm": NormRotation(table=0), "key_norm": NormRotation(table=1)}


class _BFloat16Rotation(AttentionRotation):
    """Rotates in float32 and rounds to bfloat16, whatever the dtype of the model."""

    def keeps_dtype(self, dtype: torch.dtype) -> bool:
        """Of bfloat16 alone."""
        return dtype is torch.bfloat16

    def rotate_result(self, y: torch.Tensor, rotation: ResultRotation) -> torch.Tensor:
        """With these roundings; in fast mode in the dtype of ``y``."""
        if not rotation.rounds_as_model:
            return rotation.rotate(y)
        return rotation.rotate(y.float()).to(torch.bfloat16)


KANDINSKY5 = ModelAdapter(
    f"{_TRANSFORMERS}.transformer_kandinsky.Kandinsky5Transformer3DModel",
    (
        ModelTables("text_rope_embeddings", "Kandinsky5RoPE1D"),
        ModelTables("visual_rope_embeddings", "Kandinsky5RoPE3D"),
    ),
    (
        _BFloat16Rotation(
            attention=r"(text|visual)_transformer_blocks\.\d+\.self_attention",
            attention_class="Kandinsky5Attention",
            format=MATRICES,
            layout=Layout.BSHD,
            norms=_QK,
            rotary=("rotary_emb",),
            processors=("Kandinsky5AttnProcessor",),
            cast_to=CastTo.PROJECTION,
        ),
    ),
)

KANDINSKY6 = ModelAdapter(
    f"{_TRANSFORMERS}.transformer_kandinsky6.Kandinsky6Transformer3DModel",
    (
        ModelTables("video_text_rope_embeddings", "Kandinsky6RoPE1D"),
        ModelTables("audio_text_rope_embeddings", "Kandinsky6RoPE1D"),
        ModelTables("audio_rope_embeddings", "Kandinsky6RoPE1D"),
        ModelTables("visual_rope_embeddings", "Kandinsky6RoPE3D"),
    ),
    (
        AttentionRotation(
            attention=(
                r"(video|audio)_text_transformer_blocks\.\d+\.attn"
                r"|visual_transformer_blocks\.\d+\."
                r"((video|audio)_dec_block\.self_attention|(va|av)_cross_attention)"
            ),
            attention_class="Kandinsky6Attention",
            format=MATRICES,
            layout=Layout.BSHD,
            norms=_QK,
            rotary=("rotary_emb", "rotary_emb_kv"),
            covers=(Tokens(), Tokens(("encoder_hidden_states", "hidden_states"), first_of=True)),
            processors=("Kandinsky6AttnProcessor",),
        ),
    ),
)

KANDINSKY6_SR = ModelAdapter(
    f"{_TRANSFORMERS}.transformer_kandinsky6_sr.Kandinsky6SRTransformer3DModel",
    (ModelTables("visual_rope_embeddings", "Kandinsky6SRRoPE3D"),),
    (
        AttentionRotation(
            attention=r"visual_transformer_blocks\.\d+\.self_attention",
            attention_class="Kandinsky6SRAttention",
            format=MATRICES,
            layout=Layout.BSHD,
            norms=_QK,
            rotary=("rotary_emb",),
            processors=("Kandinsky6SRAttnProcessor",),
            replaced_function=ReplacedFunction("apply_rotary"),
            cast_to=CastTo.PROJECTION,
        ),
    ),
)

ADAPTERS = (KANDINSKY5, KANDINSKY6, KANDINSKY6_SR)
