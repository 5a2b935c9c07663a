"""Flux and the models built on its attention: tables from position ids, joint text and image, norms per head.

Text comes first in the joint sequence, and has its own norms in the double blocks. These norms rotate by the start of
the table, and the norms of the image by its end. Source: ``transformer_flux.py`` of diffusers 0.42.1.
"""

from __future__ import annotations

from ..hooks.adapter import AttentionRotation, Layout, ModelAdapter, ModelTables, NormRotation, Tokens
from ..hooks.formats import INTERLEAVED
from ..hooks.packed_tables import Align

TEXT_THEN_IMAGE = {
    "norm_q": NormRotation(align=Align.END),
    "norm_k": NormRotation(align=Align.END),
    "norm_added_q": NormRotation(align=Align.START, only_with="add_q_proj"),
    "norm_added_k": NormRotation(align=Align.START, only_with="add_k_proj"),
}
_POS_EMBED = ModelTables("pos_embed", "FluxPosEmbed")
# Single blocks are given both in one sequence.
TEXT_AND_IMAGE = (Tokens(("encoder_hidden_states", "hidden_states")),)
_ROTATIONS = AttentionRotation(
    attention=r"(single_)?transformer_blocks\.\d+\.attn",
    attention_class="FluxAttention",
    format=INTERLEAVED,
    layout=Layout.BSHD,
    norms=TEXT_THEN_IMAGE,
    covers=TEXT_AND_IMAGE,
    processors=("FluxAttnProcessor",),
)


_IP_ADAPTER = (
    "rotation in blocks with an IP adapter: FluxIPAdapterAttnProcessor also attends with the normed query before it "
    "rotates"
)


def _adapter(model: str, *not_patched: str) -> ModelAdapter:
    return ModelAdapter(f"diffusers.models.{model}", (_POS_EMBED,), (_ROTATIONS,), not_patched)


FLUX = _adapter("transformers.transformer_flux.FluxTransformer2DModel", _IP_ADAPTER)
FLUX_CONTROLNET = _adapter("controlnets.controlnet_flux.FluxControlNetModel")
CHROMA = _adapter("transformers.transformer_chroma.ChromaTransformer2DModel", _IP_ADAPTER)

ADAPTERS = (FLUX, FLUX_CONTROLNET, CHROMA)
