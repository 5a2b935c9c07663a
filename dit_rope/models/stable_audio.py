"""Stable Audio: half pairing within the first half of a head's channels.

The first model gets tables from its pipeline and has no norm. Stable Audio 3 builds angles, and its attention computes
cos and sin in every call. Its RMSNorm per head is called for both queries and both keys of differential attention, one
after another. Its processor always rotates, by a function of its module. Sources:
``stable_audio_transformer.py`` and ``transformer_stable_audio3.py`` of diffusers 0.42.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..hooks.adapter import AttentionRotation, Layout, ModelAdapter, ModelTables, NormRotation, ReplacedFunction, Tokens
from ..hooks.formats import HALF, Format, Pair, four_dims
from ..hooks.packed_tables import Align
from ..spec import Pairing


def _head_dim(attention: Any) -> int:
    head_dim: int = attention.inner_dim // attention.heads
    return head_dim


def _split_angles(rotary: Any) -> list[Pair]:
    """Cos and sin of the angles, computed like in the model. The second half of the angles repeats the first."""
    angles = rotary.float()
    cos, sin = (four_dims(x)[..., : angles.shape[-1] // 2] for x in (angles.cos(), angles.sin()))
    return [(cos, sin)]


def _join_angles(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    angles = torch.atan2(sin, cos)[0, :, 0]
    return torch.cat((angles, angles), dim=-1)


def _halves(rotary: Any) -> list[Pair]:
    first, second = rotary.chunk(2, dim=-1)
    return [(first, second)]


class _LastTokens(Tokens):
    """The last tokens of a longer table."""

    def fit(self, arguments: Mapping[str, Any], dim: int, rows: int) -> bool:
        """Whether a table of ``rows`` rows is long enough."""
        return 0 < self.count(arguments, dim) <= rows


_ANGLES = Format("angles, each at both halves", Pairing.HALF, _split_angles, _join_angles, doubled=_halves)
STABLE_AUDIO = ModelAdapter(
    "diffusers.models.transformers.stable_audio_transformer.StableAudioDiTModel",
    (),
    (
        AttentionRotation(
            attention=r"transformer_blocks\.\d+\.attn1",
            attention_class="Attention",
            format=HALF,
            layout=Layout.BSC,
            rotary=("rotary_emb",),
            processors=("StableAudioAttnProcessor2_0",),
            head_dim=_head_dim,
            partial=True,
        ),
    ),
    not_patched=("tables, which the pipeline builds once for all steps",),
)
STABLE_AUDIO_3 = ModelAdapter(
    "diffusers.models.transformers.transformer_stable_audio3.StableAudio3DiTModel",
    (ModelTables("rotary_pos_emb", "StableAudio3RotaryEmbedding"),),
    (
        AttentionRotation(
            attention=r"transformer_blocks\.\d+\.self_attn",
            attention_class="StableAudio3SelfAttention",
            format=_ANGLES,
            layout=Layout.BSHD,
            norms={name: NormRotation(align=Align.END, repeats=True) for name in ("q_norm", "k_norm")},
            rotary=("rope",),
            processors=("StableAudio3SelfAttnProcessor",),
            replaced_function=ReplacedFunction("_apply_rotary_partial"),
            covers=(_LastTokens(),),
            partial=True,
        ),
    ),
)

ADAPTERS = (STABLE_AUDIO, STABLE_AUDIO_3)
