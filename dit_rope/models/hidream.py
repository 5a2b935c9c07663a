"""HiDream: image before text, rotation matrices, RMSNorm across heads.

Text is at position 0 of every axis and never turns, so that its own norms in the double blocks stay as they are. Where
the axes have half the channels of a head, the first half of them turns. The processor rotates whatever it is given,
through a function of its module. Source: ``transformer_hidream_image.py`` of diffusers 0.42.1.
"""

from __future__ import annotations

from typing import Any

from .adapter import EVERY, Layout, ModelAdapter, ModelTables, Rebound, Rotations, Rounds, Turned
from .formats import MATRICES


def _head_dim(attention: Any) -> int:
    head_dim: int = attention.inner_dim // attention.heads
    return head_dim


HIDREAM = ModelAdapter(
    "diffusers.models.transformers.transformer_hidream_image.HiDreamImageTransformer2DModel",
    (
        ModelTables(
            "pe_embedder",
            "HiDreamImageEmbedND",
            by_shape=EVERY,
            sources=("img_ids",),
            source_shapes=("hidden_states",),
        ),
    ),
    (
        Rotations(
            attention=r"(double|single)_stream_blocks\.\d+\.block\.attn1",
            attention_class="HiDreamAttention",
            format=MATRICES,
            layout=Layout.BSC,
            turned={"q_rms_norm": Turned(still=True), "k_rms_norm": Turned(still=True)},
            processors=("HiDreamAttnProcessor",),
            rebound=Rebound("apply_rope", returns=2),
            head_dim=_head_dim,
            rounds=Rounds.INPUT,
        ),
    ),
)
