"""AnyFlow: one complex table over the video, neighbours rotate, norms across heads.

The causal model (FAR) caches keys before they rotate, and rotates them in every step. So its norms must not rotate: the
function that rotates is replaced. Text is used in attention modules that do not rotate.
Sources, in diffusers 0.42.1: ``transformer_anyflow.py``, ``transformer_anyflow_far.py``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..hooks.adapter import AttentionRotation, Layout, ModelAdapter, ModelTables, NormRotation, ReplacedFunction
from ..hooks.formats import COMPLEX_BHSD, Format, Pair
from ..spec import Pairing

_TRANSFORMERS = "diffusers.models.transformers"


def _split(rotary: dict[str, torch.Tensor]) -> list[Pair]:
    return [pair for name in ("query", "key") for pair in COMPLEX_BHSD.split(rotary[name])]


def _join(cos: torch.Tensor, sin: torch.Tensor) -> dict[str, Any]:
    numbers = COMPLEX_BHSD.join(cos, sin)
    return {"query": numbers, "key": numbers}


_QUERY_AND_KEY = Format("complex numbers for queries and for keys", Pairing.INTERLEAVED, _split, _join, exact=False)

ANYFLOW = ModelAdapter(
    f"{_TRANSFORMERS}.transformer_anyflow.AnyFlowTransformer3DModel",
    (ModelTables("rope", "AnyFlowRotaryPosEmbed", sets=("_freqs_cache",)),),
    (
        AttentionRotation(
            attention=r"blocks\.\d+\.attn1",
            attention_class="AnyFlowAttention",
            format=_QUERY_AND_KEY,
            layout=Layout.BSC,
            norms={"norm_q": NormRotation(0, projection="to_q"), "norm_k": NormRotation(1, projection="to_k")},
            rotary=("rotary_emb",),
            processors=("AnyFlowAttnProcessor",),
        ),
    ),
)

ANYFLOW_FAR = ModelAdapter(
    f"{_TRANSFORMERS}.transformer_anyflow_far.AnyFlowFARTransformer3DModel",
    (
        ModelTables(
            "rope",
            "AnyFlowCausalRotaryPosEmbed",
            keyed_by_shape=("clean_hidden_states",),
            sets=("_freqs_cache",),
        ),
    ),
    (
        AttentionRotation(
            attention=r"blocks\.\d+\.attn1",
            attention_class="AnyFlowAttention",
            format=replace(COMPLEX_BHSD, formula=None),  # the model multiplies in float64
            layout=Layout.BHSD,
            norms={},
            rotary=(),
            processors=("AnyFlowCausalAttnProcessor",),
            replaced_function=ReplacedFunction("apply_rotary_emb"),
        ),
    ),
    not_patched=("norm_q and norm_k, because what they return is cached before it rotates",),
)

ADAPTERS = (ANYFLOW, ANYFLOW_FAR)
