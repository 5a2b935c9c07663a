"""Cosmos 3: text and everything else in one packed sequence, each with tables and projections of its own.

Halves rotate, in the dtype of the model, to which the tables are rounded; norms are per head, before the rotation, of
fewer heads of keys than of queries. Video sees the keys of the text under a norm of their own where text has none. The
processor always rotates, in its own code, so the adapter has the same attention without a rotation. Source:
``transformer_cosmos3.py`` of diffusers 0.42.1.
"""

from __future__ import annotations

from typing import Any

import torch

from ..hooks.adapter import AttentionRotation, Layout, ModelAdapter, ModelTables, NormRotation, Tokens
from ..hooks.formats import Format, Pair, four_dims, halves, repeat
from ..hooks.packed_tables import require_fit
from ..spec import Pairing


def _split(rotary: Any) -> list[Pair]:
    """Cos and sin ``[S, D]`` of the text, then of the rest."""
    half = rotary[0].shape[-1] // 2
    cos, sin, rest_cos, rest_sin = (four_dims(part[..., :half]) for part in rotary)
    return [(cos, sin), (rest_cos, rest_sin)]


def _join(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (repeat(cos[0, :, 0], Pairing.HALF), repeat(sin[0, :, 0], Pairing.HALF)) * 2


def _attend_unrotated(
    processor: Any,
    attn: Any,
    call: Any,
    und_seq: torch.Tensor,
    gen_seq: torch.Tensor,
    rotary_emb: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of text ``[S, C]`` to itself, and of the rest ``[S', C]`` to all, whose norms have rotated both."""
    size = (-1, attn.head_dim)
    text_q, text_k, text_v = (to(und_seq).unflatten(-1, size) for to in (attn.to_q, attn.to_k, attn.to_v))
    added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    q, k, v = (to(gen_seq).unflatten(-1, size) for to in added)
    # Where this norm exists the one of the text does nothing, so that both see the same projection.
    seen_k = None if attn.k_norm_und_for_gen is None else attn.k_norm_und_for_gen(text_k)
    text_q, text_k = attn.norm_q(text_q), attn.norm_k(text_k)
    q, k = attn.norm_added_q(q), attn.norm_added_k(k)
    seen = text_k if seen_k is None else seen_k
    # The model's rotation promotes to the widest dtype of data and tables; dit_rope keeps the dtype of the norms.
    require_fit(len({x.dtype for x in (text_q, text_k, text_v, q, k, v, seen, *rotary_emb)}) == 1)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        out: torch.Tensor = call.__globals__["dispatch_attention_fn"](
            *(x.unsqueeze(0) for x in (q, k, v)),
            is_causal=causal,
            enable_gqa=True,
            backend=processor._attention_backend,
            parallel_config=processor._parallel_config,
        )
        return out.squeeze(0).flatten(1)

    text = attend(text_q, text_k, text_v, True)
    rest = attend(q, torch.cat([seen, k]), torch.cat([text_v, v]), False)
    return attn.to_out(text), attn.to_add_out(rest)


_TEXT_AND_REST = Format(
    "cos and sin of text and the rest, each at both halves",
    Pairing.HALF,
    _split,
    _join,
    doubled=halves,
)
COSMOS3 = ModelAdapter(
    "diffusers.models.transformers.transformer_cosmos3.Cosmos3OmniTransformer",
    (ModelTables("rotary_emb", "Cosmos3VLTextRotaryEmbedding"),),
    (
        AttentionRotation(
            attention=r"layers\.\d+\.self_attn",
            attention_class="Cosmos3PackedMoTAttention",
            format=_TEXT_AND_REST,
            layout=Layout.SHD,
            norms={
                "norm_q": NormRotation(0),
                "norm_k": NormRotation(0),
                "k_norm_und_for_gen": NormRotation(0, only_with="k_norm_und_for_gen"),
                "norm_added_q": NormRotation(1),
                "norm_added_k": NormRotation(1),
            },
            rotary=("rotary_emb",),
            processors=("Cosmos3AttnProcessor",),
            covers=(Tokens(("und_seq",)), Tokens(("gen_seq",))),
            unrotated=_attend_unrotated,
        ),
    ),
)

ADAPTERS = (COSMOS3,)
