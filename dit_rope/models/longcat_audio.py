"""LongCat-Audio: half pairing, RMSNorm across heads or none.

In the attention to the prompt, queries rotate by the positions of the sound and keys by those of the prompt. Source:
``transformer_longcat_audio_dit.py`` of diffusers 0.42.1.
"""

from __future__ import annotations

from ..hooks.adapter import AttentionRotation, Layout, ModelAdapter, ModelTables, NormRotation, Tokens
from ..hooks.formats import HALF


def _rotations(attention: str, processor: str, *rotary: str) -> AttentionRotation:
    """Keys rotate by the last of the ``rotary`` arguments."""
    return AttentionRotation(
        attention=rf"blocks\.\d+\.{attention}",
        attention_class="AudioDiTAttention",
        format=HALF,
        layout=Layout.BSC,
        norms={
            "q_norm": NormRotation(projection="to_q"),
            "k_norm": NormRotation(table=len(rotary) - 1, projection="to_k"),
        },
        rotary=rotary,
        covers=(Tokens(), Tokens(("encoder_hidden_states",))),
        processors=(processor,),
    )


LONGCAT_AUDIO = ModelAdapter(
    "diffusers.models.transformers.transformer_longcat_audio_dit.LongCatAudioDiTTransformer",
    (ModelTables("rotary_embed", "AudioDiTRotaryEmbedding", keyed_by_shape=("hidden_states",)),),
    (
        _rotations("self_attn", "AudioDiTSelfAttnProcessor", "audio_rotary_emb"),
        _rotations("cross_attn", "AudioDiTCrossAttnProcessor", "audio_rotary_emb", "prompt_rotary_emb"),
    ),
)

ADAPTERS = (LONGCAT_AUDIO,)
