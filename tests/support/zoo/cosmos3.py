"""Small Cosmos 3 transformers with inputs for one forward pass: text, video, sound and actions in one sequence."""

from __future__ import annotations

from typing import Any

import torch

from .example import Example, Noise

_TEXT = 7
_GRID = (3, 2, 5)  # frames, height, width of the token grid: no two alike
_SOUND = _ACTIONS = 4


def _positions(model: Any, frames_first: torch.Tensor) -> torch.Tensor:
    """``[3, tokens]``: text counts up on all axes; what follows starts a margin later, its frames in broken steps."""
    text = torch.arange(_TEXT).expand(3, -1)
    start = _TEXT + model.config.unified_3d_mrope_temporal_modality_margin
    return torch.cat([text, frames_first * torch.tensor([[0.8], [1], [1]]) + torch.tensor([[start], [0], [0]])], dim=1)


def _video_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """A video whose first frame is given. The model packs its tokens by itself, so that there is no batch."""
    config, (frames, height, width) = model.config, _GRID
    patch, area = config.latent_patch_size, height * width
    tokens = torch.arange(_TEXT, _TEXT + frames * area)
    return {
        "input_ids": torch.arange(_TEXT),
        "text_indexes": torch.arange(_TEXT),
        "position_ids": _positions(model, torch.cartesian_prod(*(torch.arange(size) for size in _GRID)).T),
        "und_len": _TEXT,
        "sequence_length": _TEXT + frames * area,
        # One column short of whole patches, which the model pads.
        "vision_tokens": [noise(1, config.latent_channel, frames, height * patch, width * patch - 1)],
        "vision_token_shapes": [_GRID],
        "vision_sequence_indexes": tokens,
        "vision_mse_loss_indexes": tokens[area:],
        "vision_timesteps": torch.full(((frames - 1) * area,), 600.0),
        "vision_noisy_frame_indexes": [torch.arange(1, frames)],
    }


def _line_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Positions ``[tokens]``, which the model takes for all three axes."""
    inputs = _video_inputs(model, noise)
    return {**inputs, "position_ids": torch.arange(inputs["sequence_length"])}


def _omni_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Sound and actions behind the video, which only their frames tell apart."""
    inputs = _video_inputs(model, noise)
    start = inputs["sequence_length"]
    sound = torch.arange(start, start + _SOUND)
    actions = torch.arange(start + _SOUND, start + _SOUND + _ACTIONS)
    video = torch.cartesian_prod(*(torch.arange(size) for size in _GRID)).T
    line = torch.stack([torch.arange(_SOUND), torch.zeros(_SOUND), torch.zeros(_SOUND)])
    return {
        **inputs,
        "position_ids": _positions(model, torch.cat([video, line, line], dim=1)),
        "sequence_length": start + _SOUND + _ACTIONS,
        "sound_tokens": [noise(model.config.sound_dim, _SOUND)],
        "sound_token_shapes": [(_SOUND, 1, 1)],
        "sound_sequence_indexes": sound,
        "sound_mse_loss_indexes": sound,
        "sound_timesteps": torch.full((_SOUND,), 600.0),
        "sound_noisy_frame_indexes": [torch.arange(_SOUND)],
        "action_tokens": [noise(_ACTIONS, model.config.action_dim)],
        "action_token_shapes": [(_ACTIONS, 1, 1)],
        "action_sequence_indexes": actions,
        "action_mse_loss_indexes": actions[1:],
        "action_timesteps": torch.full((_ACTIONS - 1,), 600.0),
        "action_noisy_frame_indexes": [torch.arange(1, _ACTIONS)],
        "action_domain_ids": [torch.tensor(1)],
    }


_COSMOS3 = "diffusers.models.transformers.transformer_cosmos3.Cosmos3OmniTransformer"
# Two heads of keys for four of queries; 16 pairs, of which the axes take 6, 5 and 5 in turn.
_CONFIG = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "rope_axes_dim": [6, 5, 5],
    "latent_channel": 3,
    "latent_patch_size": 2,
    "patch_latent_dim": 12,
    "vocab_size": 16,
}
# Text queries and keys without a norm, but a norm of the keys as the video sees them.
_EDGE = {
    "head_dim": 20,
    "rope_axes_dim": [4, 3, 3],
    "hidden_act": "relu2",
    "qk_norm_for_text": False,
    "use_und_k_norm_for_gen": True,
    "action_gen": True,
    "action_dim": 5,
    "num_embodiment_domains": 3,
    "sound_gen": True,
    "sound_dim": 6,
}
_RELEASED = {
    "hidden_size": 4096,
    "head_dim": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 1,
    "rope_axes_dim": [24, 20, 20],
}

EXAMPLES: tuple[Example, ...] = (
    Example("cosmos3", _COSMOS3, _CONFIG, _video_inputs, _RELEASED),
    Example("cosmos3-line", _COSMOS3, {**_CONFIG, "attention_bias": True}, _line_inputs, _RELEASED),
    Example("cosmos3-edge-omni", _COSMOS3, {**_CONFIG, **_EDGE}, _omni_inputs, _RELEASED),
)
