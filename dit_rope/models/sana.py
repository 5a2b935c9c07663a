"""Sana's video models: linear attention that also uses unrotated queries and keys, norms across heads.

Sana-WM's refiner is an LTX-2 without audio. Text is used in attention modules that do not rotate. Sources, in diffusers
0.42.1: ``transformer_sana_video.py``, ``transformer_sana_wm.py``, ``transformer_sana_wm_refiner.py``.
"""

from __future__ import annotations

import functools
from typing import Any

from ..hooks.adapter import EVERY, AttentionRotation, Layout, ModelAdapter, ModelTables, ReplacedFunction
from ..hooks.class_override import unpatched_class
from ..hooks.formats import CHANNELS, COMPLEX_BHSD, HEAD_HALVES
from .ltx import is_interleaved, is_split

_TRANSFORMERS = "diffusers.models.transformers"

SANA_VIDEO = ModelAdapter(
    f"{_TRANSFORMERS}.transformer_sana_video.SanaVideoTransformer3DModel",
    (ModelTables("rope", "WanRotaryPosEmbed", keyed_by_shape=EVERY),),
    not_patched=(
        "rotation in SanaLinearAttnProcessor3_0: it also uses unrotated queries and keys, and rotates by a function "
        "that it defines in every call",
    ),
)


def _is_a(attention_class: str, model: Any, attention: Any) -> bool:
    return unpatched_class(attention).__name__ == attention_class


def _rotates_inside(attention_class: str) -> AttentionRotation:
    """The inner attention module of a block, which has no parameters and gets normed queries and keys."""
    return AttentionRotation(
        attention=r"blocks\.\d+\.attn\.attn",
        attention_class=attention_class,
        format=COMPLEX_BHSD,
        layout=Layout.BHDS,
        norms={},
        rotary=("rotary_emb",),
        replaced_function=ReplacedFunction("_apply_rotary_emb"),
        when=functools.partial(_is_a, attention_class),
    )


SANA_WM = ModelAdapter(
    f"{_TRANSFORMERS}.transformer_sana_wm.SanaWMTransformer3DModel",
    (ModelTables("rope", "SanaWMRotaryPosEmbed"),),
    (_rotates_inside("SanaWMSoftmaxAttention"), _rotates_inside("SanaWMBidirectionalGDNAttention")),
    not_patched=(
        "q_norm and k_norm, because linear attention also uses unrotated queries and keys, and the softmax attention "
        "of the camera branch may need the table",
        "rotation of the camera branch: it is one half of a transform whose other half is a matrix of each token",
    ),
)


SANA_WM_REFINER = ModelAdapter(
    f"{_TRANSFORMERS}.transformer_sana_wm_refiner.SanaWMLTX2RefinerTransformer3DModel",
    # In every step the pipeline asks the rope module for tables, and passes them to the forward.
    (ModelTables("rope", "SanaWMLTX2AudioVideoRotaryPosEmbed"),),
    tuple(
        AttentionRotation(
            attention=r"transformer_blocks\.\d+\.attn1",
            attention_class="SanaWMLTX2Attention",
            format=form,
            layout=Layout.BSC,
            norms={},
            rotary=(),
            processors=("SanaWMLTX2RefinerAttnProcessor",),
            replaced_function=ReplacedFunction(function),
            when=when,
        )
        for form, function, when in (
            (CHANNELS, "apply_interleaved_rotary_emb", is_interleaved),
            (HEAD_HALVES, "apply_split_rotary_emb", is_split),
        )
    ),
    not_patched=("norm_q and norm_k, because keys are cached before they rotate",),
)

ADAPTERS = (SANA_VIDEO, SANA_WM, SANA_WM_REFINER)
