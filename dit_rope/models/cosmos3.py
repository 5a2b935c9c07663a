"""Cosmos 3: text and other tokens in one packed sequence, each with their own tables and projections.

Pairs are halves. Tables are rounded to the dtype of the model, in which the rotation is computed. Norms are per head,
before the rotation; keys have fewer heads than queries. If the norm ``k_norm_und_for_gen`` exists, the other tokens
attend to keys of the text that this norm has normalized. The processor always rotates, without calling a function, so
the adapter has the same attention without the rotation. Source:
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
    """Cos and sin ``[S, D]`` of the text, then of the other tokens."""
    half = rotary[0].shape[-1] // 2
    cos, sin, other_cos, other_sin = (four_dims(x[..., :half]) for x in rotary)
    return [(cos, sin), (other_cos, other_sin)]


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
    """Attention of text ``[S, C]`` to itself, and of other tokens ``[S', C]`` to all. The norms also rotate."""
    size = (-1, attn.head_dim)
    text_q, text_k, text_v = (to(und_seq).unflatten(-1, size) for to in (attn.to_q, attn.to_k, attn.to_v))
    added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    q, k, v = (to(gen_seq).unflatten(-1, size) for to in added)
    # If this norm exists, norm_k does not normalize, so both get the same projection.
    normed_k = None if attn.k_norm_und_for_gen is None else attn.k_norm_und_for_gen(text_k)
    text_q, text_k = attn.norm_q(text_q), attn.norm_k(text_k)
    q, k = attn.norm_added_q(q), attn.norm_added_k(k)
    text_k_of_others = text_k if normed_k is None else normed_k
    # The model's rotation promotes to the widest dtype of data and tables; dit_rope keeps the dtype of the norms.
    require_fit(len({x.dtype for x in (text_q, text_k, text_v, q, k, v, text_k_of_others, *rotary_emb)}) == 1)

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
    others = attend(q, torch.cat([text_k_of_others, k]), torch.cat([text_v, v]), False)
    return attn.to_out(text), attn.to_add_out(others)


_TEXT_AND_OTHERS = Format(
    "cos and sin of text and of other tokens, each at both halves",
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
            format=_TEXT_AND_OTHERS,
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
