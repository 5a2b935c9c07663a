"""Ideogram 4: text before image, both rotated by positions that the caller passes, half pairing, RMSNorm per head.

The model rounds its tables to its dtype, and multiplies in the dtype that tables and data promote to. The processor
always rotates, without calling a function, so the adapter has the same attention without a rotation. Source:
``transformer_ideogram4.py`` of diffusers 0.42.1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..hooks.adapter import AttentionRotation, Layout, ModelAdapter, ModelTables, NormRotation
from ..hooks.formats import HALF, Pair, four_dims
from ..hooks.packed_tables import require_fit


def _attend_unrotated(
    processor: Any,
    attn: Any,
    call: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Attention over ``hidden_states`` ``[B, S, C]``. The norms also rotate queries and keys."""
    query, key, value = (
        project(hidden_states).unflatten(-1, (attn.num_heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
    )
    query, key = attn.norm_q(query), attn.norm_k(key)
    # The model's rotation promotes to the widest dtype of data and tables; dit_rope keeps the dtype of the norms.
    promoted = torch.promote_types(query.dtype, image_rotary_emb[0].dtype)
    require_fit(query.dtype == key.dtype == value.dtype == promoted)
    attended = call.__globals__["dispatch_attention_fn"](
        query,
        key,
        value,
        attn_mask=attention_mask,
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config,
    )
    projected: torch.Tensor = attn.to_out[0](attended.flatten(2))
    return projected


def _split(rotary: Any) -> list[Pair]:
    cos, sin = (four_dims(x).chunk(2, dim=-1)[0] for x in rotary)
    return [(cos, sin)]


_IN_MODEL_DTYPE = replace(HALF, name=f"{HALF.name}, in the model's dtype", split=_split)
IDEOGRAM4 = ModelAdapter(
    "diffusers.models.transformers.transformer_ideogram4.Ideogram4Transformer2DModel",
    (ModelTables("rotary_emb", "Ideogram4MRoPE"),),
    (
        AttentionRotation(
            attention=r"layers\.\d+\.attention",
            attention_class="Ideogram4Attention",
            format=_IN_MODEL_DTYPE,
            layout=Layout.BSHD,
            norms={"norm_q": NormRotation(), "norm_k": NormRotation()},
            processors=("Ideogram4AttnProcessor",),
            unrotated=_attend_unrotated,
        ),
    ),
)

ADAPTERS = (IDEOGRAM4,)
