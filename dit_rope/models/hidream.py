"""HiDream: image before text, rotation matrices, RMSNorm across heads.

Text is at position 0 of every axis and never rotates, so its norms in the double blocks do not rotate either. If the
axes have only half the channels of a head, the first half rotates. The processor always rotates, by a function of its
module. Source: ``transformer_hidream_image.py`` of diffusers 0.42.1.
"""

from __future__ import annotations

from typing import Any

import torch

from ..hooks.adapter import (
    AttentionRotation,
    CastTo,
    Layout,
    ModelAdapter,
    ModelTables,
    NormRotation,
    ReplacedFunction,
    Tokens,
)
from ..hooks.formats import MATRICES
from ..hooks.packed_tables import PackedTable


def _head_dim(attention: Any) -> int:
    head_dim: int = attention.inner_dim // attention.heads
    return head_dim


class _ImageRotation(NormRotation):
    """A norm of the image, or of image and text, by the table of both. No other norm rotates the text."""

    def fits(self, table: PackedTable, tokens: int) -> bool:
        """Whether the rows after the first ``tokens`` are the identity."""
        return table.rest_is_identity(tokens)


class _ApplyRope(ReplacedFunction):
    """``apply_rope(query, key, rotary)``, which returns both rotated."""

    def tensors(self, args: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        """Query and key."""
        return args[:2]

    def rotary(self, args: tuple[Any, ...]) -> Any:
        """The matrices."""
        return args[2] if len(args) == 3 else None


HIDREAM = ModelAdapter(
    "diffusers.models.transformers.transformer_hidream_image.HiDreamImageTransformer2DModel",
    (
        ModelTables(
            "pe_embedder",
            "HiDreamImageEmbedND",
        ),
    ),
    (
        AttentionRotation(
            attention=r"(double|single)_stream_blocks\.\d+\.block\.attn1",
            attention_class="HiDreamAttention",
            format=MATRICES,
            layout=Layout.BSC,
            norms={"q_rms_norm": _ImageRotation(), "k_rms_norm": _ImageRotation()},
            processors=("HiDreamAttnProcessor",),
            replaced_function=_ApplyRope("apply_rope"),
            head_dim=_head_dim,
            partial=True,
            covers=(Tokens(("encoder_hidden_states", "hidden_states")),),
            cast_to=CastTo.INPUT,
        ),
    ),
)

ADAPTERS = (HIDREAM,)
