"""Flux and the models built on its attention: tables from position ids, joint text and image, norms per head.

Text comes first in the joint sequence, and has norms of its own in the double blocks: what the norms of the image turn
is the end of the table, what those of the text turn its start. Source: ``transformer_flux.py`` of diffusers 0.42.1.
"""

from __future__ import annotations

from .adapter import EVERY, Layout, ModelAdapter, ModelTables, Rotations, Turned
from .formats import INTERLEAVED, Align

TEXT_THEN_IMAGE = {
    "norm_q": Turned(align=Align.END),
    "norm_k": Turned(align=Align.END),
    "norm_added_q": Turned(align=Align.START),
    "norm_added_k": Turned(align=Align.START),
}
_POS_EMBED = ModelTables("pos_embed", "FluxPosEmbed", by_shape=EVERY, sources=("img_ids", "txt_ids"))
_ROTATIONS = Rotations(
    attention=r"(single_)?transformer_blocks\.\d+\.attn",
    attention_class="FluxAttention",
    format=INTERLEAVED,
    layout=Layout.BSHD,
    turned=TEXT_THEN_IMAGE,
    processors=("FluxAttnProcessor",),
)


_IP_ADAPTER = (
    "rotation in blocks with an IP adapter: FluxIPAdapterAttnProcessor also attends with the normed query before it "
    "turns"
)


def _adapter(model: str, *left_alone: str) -> ModelAdapter:
    return ModelAdapter(f"diffusers.models.{model}", (_POS_EMBED,), (_ROTATIONS,), left_alone)


FLUX = _adapter("transformers.transformer_flux.FluxTransformer2DModel", _IP_ADAPTER)
FLUX_CONTROLNET = _adapter("controlnets.controlnet_flux.FluxControlNetModel")
CHROMA = _adapter("transformers.transformer_chroma.ChromaTransformer2DModel", _IP_ADAPTER)
