"""JoyImage Edit and Edit Plus: RMSNorm per head, image before text in the joint sequence, each with their own norms.

Pairs are neighbours. Text rotates in JoyImage Edit only, if its configuration says so. A method of the model builds the
tables on the host; Edit Plus calls it for every image of a sample and joins the results. Sources:
``transformer_joyimage.py`` and ``transformer_joyimage_edit_plus.py`` of diffusers 0.42.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..hooks.adapter import AttentionRotation, Layout, ModelAdapter, ModelTables, NormRotation, Tokens
from ..hooks.formats import INTERLEAVED, Format, Pair
from ..spec import Pairing


class _ImageAlone(Format):
    """A pair: a table of the image, and None instead of a table of the text."""

    def accepts(self, rotary: Any) -> bool:
        """Whether ``rotary`` is such a pair."""
        return isinstance(rotary, tuple) and INTERLEAVED.accepts(rotary[0]) and rotary[1:] == (None,)


def _split_image(rotary: Any) -> Sequence[Pair]:
    return INTERLEAVED.split(rotary[0])


def _join_image(cos: torch.Tensor, sin: torch.Tensor) -> tuple[Any, None]:
    return INTERLEAVED.join(cos, sin), None


def _split_both(rotary: Any) -> list[Pair]:
    return [pair for table in rotary for pair in INTERLEAVED.split(table)]


def _join_both(cos: torch.Tensor, sin: torch.Tensor) -> tuple[Any, Any]:
    return INTERLEAVED.join(cos, sin), INTERLEAVED.join(cos, sin)


_IMAGE_ALONE = _ImageAlone("a table of the image", Pairing.INTERLEAVED, _split_image, _join_image)
_IMAGE_AND_TEXT = Format("a table of the image and one of the text", Pairing.INTERLEAVED, _split_both, _join_both)
_IMAGE = {"img_attn_q_norm": NormRotation(), "img_attn_k_norm": NormRotation()}
_TEXT = {"txt_attn_q_norm": NormRotation(table=1), "txt_attn_k_norm": NormRotation(table=1)}


def _rotates_text(model: Any, attention: Any) -> bool:
    return bool(model.rope_type == "mrope")


def _rotates_image_alone(model: Any, attention: Any) -> bool:
    return not _rotates_text(model, attention)


def _tables(model: str, method: str) -> ModelTables:
    return ModelTables("", model, method, to_device=True)


JOYIMAGE_EDIT = ModelAdapter(
    "diffusers.models.transformers.transformer_joyimage.JoyImageEditTransformer3DModel",
    (_tables("JoyImageEditTransformer3DModel", "get_rotary_pos_embed"),),
    tuple(
        AttentionRotation(
            attention=r"double_blocks\.\d+\.attn",
            attention_class="JoyImageAttention",
            format=form,
            layout=Layout.BSHD,
            norms=norms,
            covers=(Tokens(), Tokens(("encoder_hidden_states",))),
            processors=("JoyImageAttnProcessor",),
            when=when,
        )
        for form, norms, when in (
            (_IMAGE_ALONE, _IMAGE, _rotates_image_alone),
            (_IMAGE_AND_TEXT, {**_IMAGE, **_TEXT}, _rotates_text),
        )
    ),
)
JOYIMAGE_EDIT_PLUS = ModelAdapter(
    "diffusers.models.transformers.transformer_joyimage_edit_plus.JoyImageEditPlusTransformer3DModel",
    (_tables("JoyImageEditPlusTransformer3DModel", "_get_rotary_pos_embed_for_range"),),
    (
        AttentionRotation(
            attention=r"double_blocks\.\d+\.attn",
            attention_class="JoyImageEditPlusAttention",
            format=INTERLEAVED,
            layout=Layout.BSHD,
            norms=_IMAGE,
            processors=("JoyImageEditPlusAttnProcessor",),
        ),
    ),
    not_patched=("joining the tables of a sample's images, which the model's forward does once for all layers",),
)

ADAPTERS = (JOYIMAGE_EDIT, JOYIMAGE_EDIT_PLUS)
