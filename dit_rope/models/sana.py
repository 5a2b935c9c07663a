"""Sana's video models: linear attention of queries and keys that are also used unturned, norms across heads.

Sana-WM's refiner is an LTX-2 without audio. Text stands in attention modules that do not rotate. Sources, in diffusers
0.42.1: ``transformer_sana_video.py``, ``transformer_sana_wm.py``, ``transformer_sana_wm_refiner.py``.
"""

from __future__ import annotations

from typing import Any

from .adapter import EVERY, Layout, ModelAdapter, ModelTables, Rebound, Rotations, Turned
from .formats import CHANNELS, COMPLEX_BHSD, HEAD_HALVES
from .ltx import turns_halves, turns_neighbours

_TRANSFORMERS = "diffusers.models.transformers"

SANA_VIDEO = ModelAdapter(
    f"{_TRANSFORMERS}.transformer_sana_video.SanaVideoTransformer3DModel",
    (ModelTables("rope", "WanRotaryPosEmbed", by_shape=EVERY),),
    left_alone=(
        "rotation in SanaLinearAttnProcessor3_0: it also needs queries and keys unturned, and rotates by a function "
        "that it defines in every call",
    ),
)


def _is_linear(model: Any, attention: Any) -> bool:
    """Whether the inner attention module of a block of Sana-WM goes through the video in chunks."""
    return hasattr(attention, "chunk_size")


def _attends_by_softmax(model: Any, attention: Any) -> bool:
    return not _is_linear(model, attention.attn)


SANA_WM = ModelAdapter(
    f"{_TRANSFORMERS}.transformer_sana_wm.SanaWMTransformer3DModel",
    (ModelTables("rope", "SanaWMRotaryPosEmbed", optional=True),),
    (
        Rotations(
            attention=r"blocks\.\d+\.attn",
            attention_class="_SoftmaxUCPESinglePathLiteLA",
            format=COMPLEX_BHSD,
            layout=Layout.BSC,
            turned={"q_norm": Turned(), "k_norm": Turned()},
            rotary=("rotary_emb",),
            when=_attends_by_softmax,
        ),
        Rotations(
            attention=r"blocks\.\d+\.attn\.attn",
            attention_class="SanaWMBidirectionalGDNAttention",
            format=COMPLEX_BHSD,
            layout=Layout.BHDS,
            turned={},
            rotary=(),
            rebound=Rebound("_apply_rotary_emb", owner="", method="forward"),
            when=_is_linear,
        ),
    ),
    left_alone=(
        "q_norm and k_norm of linear attention, because queries and keys are also needed unturned",
        "rotation of the camera branch: it is one half of a transform whose other half is a matrix of each token",
    ),
)

SANA_WM_REFINER = ModelAdapter(
    f"{_TRANSFORMERS}.transformer_sana_wm_refiner.SanaWMLTX2RefinerTransformer3DModel",
    # The pipeline asks for them in every step, before the forward that it gives them to.
    (ModelTables("", "SanaWMLTX2RefinerTransformer3DModel", "build_rotary_emb_for_absolute_positions"),),
    tuple(
        Rotations(
            attention=r"transformer_blocks\.\d+\.attn1",
            attention_class="SanaWMLTX2Attention",
            format=form,
            layout=Layout.BSC,
            turned={},
            rotary=(),
            processors=("SanaWMLTX2RefinerAttnProcessor",),
            rebound=Rebound(function),
            when=when,
        )
        for form, function, when in (
            (CHANNELS, "apply_interleaved_rotary_emb", turns_neighbours),
            (HEAD_HALVES, "apply_split_rotary_emb", turns_halves),
        )
    ),
    left_alone=("norm_q and norm_k, because keys are cached before they turn",),
)
