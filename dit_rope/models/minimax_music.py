"""MiniMax Music 3: half pairing within the first channels of a head, no norm of queries and keys.

Cos and sin are rounded to the dtype of what they rotate. The processor always rotates, by a function of its module.
Source: ``transformer_minimax_music3.py`` of diffusers 0.42.1.
"""

from __future__ import annotations

from typing import Any

from ..hooks.adapter import AttentionRotation, Layout, ModelAdapter, ReplacedFunction
from ..hooks.formats import HALF_NARROWED


def _head_dim(attention: Any) -> int:
    head_dim: int = attention.head_dim
    return head_dim


MINIMAX_MUSIC_3 = ModelAdapter(
    "diffusers.models.transformers.transformer_minimax_music3.MiniMaxMusic3Transformer1DModel",
    (),
    (
        AttentionRotation(
            attention=r"transformer_blocks\.\d+\.attn",
            attention_class="MiniMaxMusic3Attention",
            format=HALF_NARROWED,
            layout=Layout.BSC,
            rotary=("rotary_emb",),
            processors=("MiniMaxMusic3AttnProcessor",),
            replaced_function=ReplacedFunction("_apply_partial_rotary_emb"),
            head_dim=_head_dim,
            partial=True,
        ),
    ),
    not_patched=("tables, which the rope module keeps itself",),
)

ADAPTERS = (MINIMAX_MUSIC_3,)
