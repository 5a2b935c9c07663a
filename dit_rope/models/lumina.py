"""The Lumina family: complex tables, norms per head in Lumina 2 and across heads in Lumina Next.

Lumina 2 rotates text and image of a sample together. The image follows the text without a gap, so each sample has its
own table. The refiners before the joint blocks rotate text alone and image alone. Its rope module also cuts the latent
into patches. The processor of Lumina Next scales scores differently if keys have no table, so keys must rotate in the
processor. Sources: ``transformer_lumina2.py`` and ``lumina_nextdit2d.py`` of diffusers 0.42.1.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange

from ..hooks.adapter import AttentionRotation, Layout, ModelAdapter, ModelTables, NormRotation
from ..hooks.formats import COMPLEX


class _PatchesAndTables(ModelTables):
    """A rope module that returns the latent as patches, before the tables."""

    def not_cached(
        self, target: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The latent ``[B, C, H, W]`` as patches ``[B, tokens, p * p * C]``."""
        side: int = target.patch_size
        return (rearrange(hidden_states, "b c (h p) (w q) -> b (h w) (p q c)", p=side, q=side),)


LUMINA2 = ModelAdapter(
    "diffusers.models.transformers.transformer_lumina2.Lumina2Transformer2DModel",
    (_PatchesAndTables("rope_embedder", "Lumina2RotaryPosEmbed", keyed_by_shape=("hidden_states",)),),
    (
        AttentionRotation(
            attention=r"(context_refiner|noise_refiner|layers)\.\d+\.attn",
            attention_class="Attention",
            format=COMPLEX,
            layout=Layout.BSHD,
            processors=("Lumina2AttnProcessor2_0",),
        ),
    ),
)
LUMINA_NEXT = ModelAdapter(
    "diffusers.models.transformers.lumina_nextdit2d.LuminaNextDiT2DModel",
    (),
    (
        AttentionRotation(
            attention=r"layers\.\d+\.attn[12]",
            attention_class="Attention",
            format=COMPLEX,
            layout=Layout.BSC,
            norms={"norm_q": NormRotation(projection="to_q")},
            rotary=("query_rotary_emb",),
            processors=("LuminaAttnProcessor2_0",),
        ),
    ),
    not_patched=(
        "tables, which the pipeline builds in every step",
        "rotation of keys: without a table for keys the processor scales its scores differently",
    ),
)

ADAPTERS = (LUMINA2, LUMINA_NEXT)
