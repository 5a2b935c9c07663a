"""Qwen-Image, its ControlNet, Qwen-Image 2.1 and Nucleus: tables of complex numbers, RMSNorm per head.

Pairs are neighbours. Qwen-Image and Nucleus build one table from the sizes of the images and one from the length of the
text, and rotate image and text before they join the sequences. So the norms of the text rotate by the second table.
Nucleus has no queries of text, so that norm is never called; its keys of text may come from a cache, already rotated.
Qwen-Image 2.1 has one table and one set of norms for the whole sequence. It caches rotated keys, and a step that reads
them uses the end of the table. Sources, all in diffusers 0.42.1:
``transformer_qwenimage.py``, ``controlnet_qwenimage.py``, ``transformer_qwenimage21.py``,
``transformer_nucleusmoe_image.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..hooks.adapter import QK, AttentionRotation, Layout, ModelAdapter, ModelTables, NormRotation, Tokens
from ..hooks.formats import COMPLEX

_TEXT_SEPARATE = {
    "norm_q": NormRotation(table=0),
    "norm_k": NormRotation(table=0),
    "norm_added_q": NormRotation(table=1),
    "norm_added_k": NormRotation(table=1),
}
_TEXT_KEYS_SEPARATE = {
    "norm_q": NormRotation(table=0),
    "norm_k": NormRotation(table=0),
    "norm_added_k": NormRotation(table=1, repeats=True),
}


class _CachedText(Tokens):
    """The text. Its keys may come from a cache, already rotated."""

    def fit(self, arguments: Mapping[str, Any], dim: int, rows: int) -> bool:
        """Whether a table of ``rows`` rows has one row for each token; without text every table fits."""
        return all(arguments.get(name) is None for name in self.names) or super().fit(arguments, dim, rows)


_IMAGE_AND_TEXT = (Tokens(), Tokens(("encoder_hidden_states",)))


def _rotations(
    attention: str,
    norms: Mapping[str, NormRotation],
    *processors: str,
    rotary: str = "image_rotary_emb",
    covers: tuple[Tokens, ...] = _IMAGE_AND_TEXT,
) -> AttentionRotation:
    return AttentionRotation(
        attention=r"transformer_blocks\.\d+\.attn",
        attention_class=attention,
        format=COMPLEX,
        layout=Layout.BSHD,
        norms=norms,
        rotary=(rotary,),
        covers=covers,
        processors=processors,
    )


_QWEN_ROTATIONS = (_rotations("Attention", _TEXT_SEPARATE, "QwenDoubleStreamAttnProcessor2_0"),)
QWEN_IMAGE = ModelAdapter(
    "diffusers.models.transformers.transformer_qwenimage.QwenImageTransformer2DModel",
    (ModelTables("pos_embed", ("QwenEmbedRope", "QwenEmbedLayer3DRope")),),
    _QWEN_ROTATIONS,
)
QWEN_IMAGE_CONTROLNET = ModelAdapter(
    "diffusers.models.controlnets.controlnet_qwenimage.QwenImageControlNetModel",
    (ModelTables("pos_embed", "QwenEmbedRope"),),
    _QWEN_ROTATIONS,
)
QWEN_IMAGE_21 = ModelAdapter(
    "diffusers.models.transformers.transformer_qwenimage21.QwenImage21Transformer2DModel",
    (ModelTables("pos_embed", "QwenImage21Rope", sets=("freqs",)),),
    (
        _rotations(
            "QwenImage21Attention",
            QK,
            "QwenImage21AttnProcessor",
            "QwenImage21FlexAttnProcessor",
            rotary="rotary_emb",
            covers=(Tokens(),),
        ),
    ),
)
NUCLEUS = ModelAdapter(
    "diffusers.models.transformers.transformer_nucleusmoe_image.NucleusMoEImageTransformer2DModel",
    (ModelTables("pos_embed", "NucleusMoEEmbedRope"),),
    (
        _rotations(
            "Attention",
            _TEXT_KEYS_SEPARATE,
            "NucleusMoEAttnProcessor2_0",
            covers=(Tokens(), _CachedText(("encoder_hidden_states",))),
        ),
    ),
)

ADAPTERS = (QWEN_IMAGE, QWEN_IMAGE_CONTROLNET, QWEN_IMAGE_21, NUCLEUS)
