"""LTX-Video and LTX-2: each head rotates by different angles, norms across heads.

LTX-2 rotates video and audio, in self-attention and in both cross-modal attentions, in which queries and keys have the
tables of their modality. Text is used in attention modules that do not rotate. Pairs are neighbours if ``rope_type`` is
"interleaved", and the halves of a head if it is "split".

Sources, in diffusers 0.42.1: ``transformer_ltx.py``, ``transformer_ltx2.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from ..hooks.adapter import AttentionRotation, Layout, ModelAdapter, ModelTables, NormRotation, Tokens
from ..hooks.formats import CHANNELS, HEAD_HALVES

LTX = ModelAdapter(
    "diffusers.models.transformers.transformer_ltx.LTXVideoTransformer3DModel",
    (ModelTables("rope", "LTXVideoRotaryPosEmbed", keyed_by_shape=("hidden_states",)),),
    (
        AttentionRotation(
            attention=r"transformer_blocks\.\d+\.attn1",
            attention_class="LTXAttention",
            format=CHANNELS,
            layout=Layout.BSC,
            processors=("LTXVideoAttnProcessor",),
        ),
    ),
)


def is_interleaved(model: Any, attention: Any) -> bool:
    """Whether an attention module of LTX-2 is of ``rope_type`` "interleaved"."""
    return bool(attention.rope_type == "interleaved")


def is_split(model: Any, attention: Any) -> bool:
    """Whether an attention module of LTX-2 is of ``rope_type`` "split"."""
    return bool(attention.rope_type == "split")


class _CrossModalRotation(AttentionRotation):
    """Queries and keys with a table each; keys without one share the table of the queries."""

    def rotary_tensors(self, arguments: Mapping[str, Any]) -> list[Any]:
        """The table of the queries, and that of the keys if there is one."""
        if arguments.get("query_rotary_emb") is not None and arguments.get("key_rotary_emb") is None:
            return [arguments["query_rotary_emb"]]
        return super().rotary_tensors(arguments)

    def check_called(self, attention: Any, rotating: Set[str], not_called: Set[str]) -> None:
        """Raises RuntimeError if a call left out some norms; perturbed attention needs neither queries nor keys."""
        if not_called != rotating:
            super().check_called(attention, rotating, not_called)


_ROPE_CLASS = "LTX2AudioVideoRotaryPosEmbed"
LTX2 = ModelAdapter(
    "diffusers.models.transformers.transformer_ltx2.LTX2VideoTransformer3DModel",
    (
        ModelTables("rope", _ROPE_CLASS),
        ModelTables("cross_attn_rope", _ROPE_CLASS),
        ModelTables("audio_rope", _ROPE_CLASS),
        ModelTables("cross_attn_audio_rope", _ROPE_CLASS),
    ),
    tuple(
        _CrossModalRotation(
            attention=r"transformer_blocks\.\d+\.(attn1|audio_attn1|audio_to_video_attn|video_to_audio_attn)",
            attention_class="LTX2Attention",
            format=form,
            layout=Layout.BSC,
            norms={"norm_q": NormRotation(table=0), "norm_k": NormRotation(table=1)},
            rotary=("query_rotary_emb", "key_rotary_emb"),
            covers=(Tokens(), Tokens(("encoder_hidden_states", "hidden_states"), first_of=True)),
            processors=("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor"),
            when=when,
        )
        for form, when in ((CHANNELS, is_interleaved), (HEAD_HALVES, is_split))
    ),
)

ADAPTERS = (LTX, LTX2)
