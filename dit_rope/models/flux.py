"""Flux and the models built on its attention: tables from position ids, joint text and image, norms per head.

Text comes first in the joint sequence, and has norms of its own in the double blocks: what the norms of the image
rotate is the end of the table, what those of the text rotate its start. Source: ``transformer_flux.py`` of diffusers
0.42.1.
"""

from __future__ import annotations

from ..hooks.adapter import Layout, ModelAdapter, ModelTables, Rotated, Rotations, Tokens
from ..hooks.formats import INTERLEAVED
from ..hooks.packed_tables import Align

TEXT_THEN_IMAGE = {
    "norm_q": Rotated(align=Align.END),
    "norm_k": Rotated(align=Align.END),
    "norm_added_q": Rotated(align=Align.START, only_with="add_q_proj"),
    "norm_added_k": Rotated(align=Align.START, only_with="add_k_proj"),
}
_POS_EMBED = ModelTables("pos_embed", "FluxPosEmbed")
# Single blocks are given both in one sequence.
TEXT_AND_IMAGE = (Tokens(("encoder_hidden_states", "hidden_states")),)
_ROTATIONS = Rotations(
    attention=r"(single_)?transformer_blocks\.\d+\.attn",
    attention_class="FluxAttention",
    format=INTERLEAVED,
    layout=Layout.BSHD,
    rotated=TEXT_THEN_IMAGE,
    covers=TEXT_AND_IMAGE,
    processors=("FluxAttnProcessor",),
)


_IP_ADAPTER = (
    "rotation in blocks with an IP adapter: FluxIPAdapterAttnProcessor also attends with the normed query before it "
    "rotates"
)


def _adapter(model: str, *left_alone: str) -> ModelAdapter:
    return ModelAdapter(f"diffusers.models.{model}", (_POS_EMBED,), (_ROTATIONS,), left_alone)


FLUX = _adapter("transformers.transformer_flux.FluxTransformer2DModel", _IP_ADAPTER)
FLUX_CONTROLNET = _adapter("controlnets.controlnet_flux.FluxControlNetModel")
CHROMA = _adapter("transformers.transformer_chroma.ChromaTransformer2DModel", _IP_ADAPTER)
