"""Ideogram 4: text before image, all of it turned by positions of the caller's, half pairing, RMSNorm per head.

The model rounds its tables to its own dtype, and multiplies in what they and the data promote to. The processor rotates
whatever it is given, in its own code, and so gets a call without rotation. Source: ``transformer_ideogram4.py`` of
diffusers 0.42.1.
"""

from __future__ import annotations

from typing import Any

import torch

from ..spec import Pairing
from .adapter import Layout, ModelAdapter, ModelTables, Rotations, Turned
from .formats import HALF, Format, Pair, four_dims
from .seams import in_flight
from .swapping import Seam, unpatched_method


class TurnedAttention(Seam):
    """A processor that attends to queries and keys which the norms have turned."""

    def replacement(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """``hidden_states`` ``[B, S, C]`` after attention; the processor's own code where the norms do not turn."""
        own: Any = unpatched_method(self)
        if torch.compiler.is_compiling() or not in_flight():
            unpatched: torch.Tensor = own(attn, hidden_states, attention_mask, image_rotary_emb)
            return unpatched
        query, key, value = (
            project(hidden_states).unflatten(-1, (attn.num_heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        attend = own.func.__globals__["dispatch_attention_fn"]
        how = {"backend": self._attention_backend, "parallel_config": self._parallel_config}  # type: ignore[attr-defined]
        attended = attend(attn.norm_q(query), attn.norm_k(key), value, attn_mask=attention_mask, **how)
        projected: torch.Tensor = attn.to_out[0](attended.flatten(2))
        return projected


def _split(rotary: Any) -> list[Pair]:
    cos, sin = (four_dims(each).chunk(2, dim=-1)[0] for each in rotary)
    return [(cos, sin)]


_AS_IS = Format("cos and sin, each at both halves, in the model's dtype", Pairing.HALF, _split, HALF.join)
IDEOGRAM4 = ModelAdapter(
    "diffusers.models.transformers.transformer_ideogram4.Ideogram4Transformer2DModel",
    (ModelTables("rotary_emb", "Ideogram4MRoPE"),),
    (
        Rotations(
            attention=r"layers\.\d+\.attention",
            attention_class="Ideogram4Attention",
            format=_AS_IS,
            layout=Layout.BSHD,
            turned={"norm_q": Turned(), "norm_k": Turned()},
            processors=("Ideogram4AttnProcessor",),
            processor=TurnedAttention,
        ),
    ),
)
