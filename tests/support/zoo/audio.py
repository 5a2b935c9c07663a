"""Small audio transformers with inputs for one forward pass of each."""

from __future__ import annotations

from typing import Any

import torch

from .example import Example, Noise

_MODELS = "diffusers.models.transformers"
_BATCH, _TEXT, _LENGTH = 2, 5, 13
_TIMES = (0.7, 0.3)


def _text_mask() -> torch.Tensor:
    """``[2, text]``: whether a token is text; only the second sample has padding."""
    return torch.arange(_TEXT) < torch.tensor([_TEXT, 3])[:, None]


def _ace_step_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Longer than two windows of the sliding attention, and not a multiple of the patch, so that the model pads."""
    config = model.config
    length, channels = 2 * _LENGTH - 1, config.audio_acoustic_hidden_dim
    return {
        "hidden_states": noise(_BATCH, length, channels),
        "timestep": torch.tensor(_TIMES).to(noise.dtype),
        "timestep_r": torch.tensor(_TIMES).to(noise.dtype),
        "encoder_hidden_states": noise(_BATCH, _TEXT, config.encoder_hidden_size),
        "context_latents": noise(_BATCH, length, config.in_channels - channels),
    }


_ACE_STEP = f"{_MODELS}.ace_step_transformer.AceStepTransformer1DModel"
_ACE_STEP_CONFIG = {
    "hidden_size": 40,
    "intermediate_size": 24,
    "num_hidden_layers": 2,  # one with sliding attention, one with full
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "in_channels": 12,
    "audio_acoustic_hidden_dim": 4,
    "sliding_window": 4,
    "encoder_hidden_size": 10,
}
_ACE_STEP_RELEASED = {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}


def _stable_audio_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """The table as the pipeline makes it: half of a head's channels, one row more than the latent for its duration."""
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    config = model.config
    return {
        "hidden_states": noise(_BATCH, config.in_channels, _LENGTH),
        "timestep": torch.tensor(_TIMES).to(noise.dtype),
        "encoder_hidden_states": noise(_BATCH, _TEXT, config.cross_attention_input_dim),
        "global_hidden_states": noise(_BATCH, 1, config.global_states_input_dim),
        "rotary_embedding": get_1d_rotary_pos_embed(
            config.attention_head_dim // 2, _LENGTH + 1, use_real=True, repeat_interleave_real=False
        ),
    }


_STABLE_AUDIO = f"{_MODELS}.stable_audio_transformer.StableAudioDiTModel"
_STABLE_AUDIO_CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 20,
    "num_attention_heads": 4,
    "num_key_value_attention_heads": 2,  # of the attention to the text
    "cross_attention_dim": 40,
    "time_proj_dim": 16,
    "global_states_input_dim": 10,
    "cross_attention_input_dim": 12,
}
_STABLE_AUDIO_RELEASED = {
    "num_layers": 1,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "num_key_value_attention_heads": 12,
    "cross_attention_dim": 768,
}


def _stable_audio_3_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Inpainting: what is kept of the sound goes into every block beside the latent."""
    config = model.config
    return {
        "hidden_states": noise(_BATCH, config.io_channels, _LENGTH),
        "timestep": torch.tensor(_TIMES),
        "encoder_hidden_states": noise(_BATCH, _TEXT, config.cond_token_dim),
        "global_hidden_states": noise(_BATCH, config.global_cond_dim),
        "encoder_attention_mask": _text_mask(),
        "local_add_cond": noise(_BATCH, config.local_add_cond_dim, _LENGTH),
    }


_STABLE_AUDIO_3 = f"{_MODELS}.transformer_stable_audio3.StableAudio3DiTModel"
_STABLE_AUDIO_3_CONFIG = {
    "io_channels": 4,
    "embed_dim": 72,
    "depth": 2,
    "num_heads": 3,
    "cond_token_dim": 12,
    "global_cond_dim": 10,
    "local_add_cond_dim": 5,
    "timestep_features_dim": 16,
    "ff_mult": 1.5,
    "num_memory_tokens": 4,
}
_STABLE_AUDIO_3_RELEASED = {"embed_dim": 1536, "depth": 1, "num_heads": 24}


def _longcat_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """A prompt's positions are its own: in the attention to it, queries and keys are rotated by different tables."""
    config = model.config
    return {
        "hidden_states": noise(_BATCH, _LENGTH, config.latent_dim),
        "encoder_hidden_states": noise(_BATCH, _TEXT, config.dit_text_dim),
        "encoder_attention_mask": _text_mask(),
        "timestep": torch.tensor(_TIMES).to(noise.dtype),
        "latent_cond": noise(_BATCH, _LENGTH, config.latent_dim),
    }


_LONGCAT = f"{_MODELS}.transformer_longcat_audio_dit.LongCatAudioDiTTransformer"
_LONGCAT_CONFIG = {
    "dit_dim": 72,
    "dit_depth": 2,
    "dit_heads": 3,
    "dit_text_dim": 12,
    "latent_dim": 4,
    "ff_mult": 1.5,
}
_LONGCAT_RELEASED = {"dit_dim": 1536, "dit_depth": 1, "dit_heads": 24}


def _minimax_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": noise(_BATCH, config.in_channels, _LENGTH),
        "timestep": torch.tensor(_TIMES).to(noise.dtype),
        "encoder_hidden_states": noise(_BATCH, _LENGTH, config.condition_dim),
    }


_MINIMAX = f"{_MODELS}.transformer_minimax_music3.MiniMaxMusic3Transformer1DModel"
_MINIMAX_CONFIG = {
    "in_channels": 4,
    "condition_dim": 6,
    "num_layers": 2,
    "num_attention_heads": 3,
    "attention_head_dim": 24,
    "ff_inner_dim": 40,
    "rotary_dim": 10,
    "fourier_embedding_dim": 16,
}
_MINIMAX_RELEASED = {"num_layers": 1, "num_attention_heads": 32, "attention_head_dim": 64, "rotary_dim": 32}

EXAMPLES: tuple[Example, ...] = (
    Example("ace-step", _ACE_STEP, _ACE_STEP_CONFIG, _ace_step_inputs, _ACE_STEP_RELEASED),
    Example("stable-audio", _STABLE_AUDIO, _STABLE_AUDIO_CONFIG, _stable_audio_inputs, _STABLE_AUDIO_RELEASED),
    Example(
        "stable-audio-3", _STABLE_AUDIO_3, _STABLE_AUDIO_3_CONFIG, _stable_audio_3_inputs, _STABLE_AUDIO_3_RELEASED
    ),
    Example(
        "stable-audio-3-plain",
        _STABLE_AUDIO_3,
        {**_STABLE_AUDIO_3_CONFIG, "use_differential_attention": False},
        _stable_audio_3_inputs,
        _STABLE_AUDIO_3_RELEASED,
    ),
    Example("longcat-audio", _LONGCAT, _LONGCAT_CONFIG, _longcat_inputs, _LONGCAT_RELEASED),
    Example("longcat-audio-no-norm", _LONGCAT, {**_LONGCAT_CONFIG, "qk_norm": False}, _longcat_inputs),
    Example("minimax-music-3", _MINIMAX, _MINIMAX_CONFIG, _minimax_inputs, _MINIMAX_RELEASED),
)
