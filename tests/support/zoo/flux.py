"""Small image transformers whose tables come from position ids, with inputs for one forward pass of each: Flux and kin.

Text ids are not zeros as in most pipelines: a zero angle rotates nothing and would hide a text that is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .example import Example, Noise

_MODELS = "diffusers.models.transformers"
_BATCH, _TEXT = 2, 7
_GRID = (2, 3, 5)  # positions on the image's three axes: no two alike
_TOKENS = 30


def _grid_ids(sizes: Sequence[int] = _GRID, starts: Sequence[float] = (0, 0, 0)) -> torch.Tensor:
    """Coordinates ``[prod(sizes), axes]`` of a grid whose first corner is ``starts``."""
    axes = [start + torch.arange(size) for size, start in zip(sizes, starts, strict=True)]
    return torch.cartesian_prod(*axes)


def _text_ids(tokens: int = _TEXT, axes: int = 3) -> torch.Tensor:
    """Coordinates ``[tokens, axes]``: 1 on the first axis, steps of their own on the others."""
    ids = torch.arange(tokens)[:, None] * torch.arange(axes)[None, :]
    ids[:, 0] = 1
    return ids


def _flux_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """What every model of the family takes; ids are in the model's dtype, as the Flux pipelines pass them."""
    config = model.config
    return {
        "hidden_states": noise(_BATCH, _TOKENS, config.in_channels),
        "encoder_hidden_states": noise(_BATCH, _TEXT, config.joint_attention_dim),
        "timestep": torch.tensor([0.9, 0.3]).to(noise.dtype),
        "img_ids": _grid_ids().to(noise.dtype),
        "txt_ids": _text_ids().to(noise.dtype),
    }


def _pooled_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    pooled = noise(_BATCH, model.config.pooled_projection_dim)
    guidance = torch.tensor([3.5, 2.0]) if model.config.guidance_embeds else None
    return {**_flux_inputs(model, noise), "pooled_projections": pooled, "guidance": guidance}


def _kontext_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """An image to generate and behind it one to edit, which has a 1 on the first axis and a size of its own."""
    image, reference = _grid_ids((1, 3, 5)), _grid_ids((1, 4, 2), (1, 0, 0))
    ids = torch.cat([image, reference]).to(noise.dtype)
    hidden_states = noise(_BATCH, len(ids), model.config.in_channels)
    return {**_pooled_inputs(model, noise), "hidden_states": hidden_states, "img_ids": ids}


def _batched_ids_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Ids with a batch dimension, the deprecated form, and whole numbers, which need not be of the model's dtype."""
    ids = {"img_ids": _grid_ids().repeat(_BATCH, 1, 1), "txt_ids": _text_ids().repeat(_BATCH, 1, 1)}
    return {**_pooled_inputs(model, noise), **ids}


def _controlnet_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    inputs = {**_pooled_inputs(model, noise), "controlnet_cond": noise(_BATCH, _TOKENS, model.config.in_channels)}
    if model.config.num_mode is not None:
        # The model puts the embedding of the mode, with the first text id, before the text.
        inputs["controlnet_mode"] = torch.tensor([[1], [0]])
    return inputs


_FLUX_CONFIG = {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 3,
    "attention_head_dim": 20,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 8,
    "axes_dims_rope": (4, 6, 10),
}
_FLUX_RELEASED = {
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "axes_dims_rope": (16, 56, 56),
}
_FLUX = f"{_MODELS}.transformer_flux.FluxTransformer2DModel"
_CONTROLNET = "diffusers.models.controlnets.controlnet_flux.FluxControlNetModel"
_FLUX_EXAMPLES = (
    Example("flux", _FLUX, _FLUX_CONFIG, _pooled_inputs, _FLUX_RELEASED),
    Example("flux-kontext", _FLUX, {**_FLUX_CONFIG, "guidance_embeds": True}, _kontext_inputs, _FLUX_RELEASED),
    Example("flux-batched-ids", _FLUX, _FLUX_CONFIG, _batched_ids_inputs, _FLUX_RELEASED),
    Example(
        "flux-single-blocks",
        _FLUX,
        {**_FLUX_CONFIG, "num_layers": 0},
        _pooled_inputs,
        {**_FLUX_RELEASED, "num_layers": 0},
    ),
    Example("flux-controlnet", _CONTROLNET, _FLUX_CONFIG, _controlnet_inputs, _FLUX_RELEASED),
    Example("flux-controlnet-union", _CONTROLNET, {**_FLUX_CONFIG, "num_mode": 2}, _controlnet_inputs, _FLUX_RELEASED),
)


def _chroma_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """As the pipeline, which adds a mask of ones and zeros to the attention scores rather than masking with it."""
    mask = torch.ones(_BATCH, _TEXT + _TOKENS)
    mask[-1, _TEXT - 2 : _TEXT] = 0
    return {**_flux_inputs(model, noise), "attention_mask": mask.to(noise.dtype)}


_CHROMA_CONFIG = {
    **{name: value for name, value in _FLUX_CONFIG.items() if name != "pooled_projection_dim"},
    "approximator_num_channels": 8,
    "approximator_hidden_dim": 16,
    "approximator_layers": 1,
}
_CHROMA_EXAMPLES = (
    Example(
        "chroma",
        f"{_MODELS}.transformer_chroma.ChromaTransformer2DModel",
        _CHROMA_CONFIG,
        _chroma_inputs,
        _FLUX_RELEASED,
    ),
)


def _flux2_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Four axes, time, height, width and text position; whole numbers with a batch dimension, as in the pipelines."""
    image, text = _grid_ids((*_GRID, 1), (0, 0, 0, 0)), _text_ids(axes=4)
    inputs = {
        **_flux_inputs(model, noise),
        "img_ids": image.repeat(_BATCH, 1, 1),
        "txt_ids": text.repeat(_BATCH, 1, 1),
    }
    return {**inputs, "guidance": torch.tensor([3.5, 2.0]) if model.config.guidance_embeds else None}


def _flux2_reference_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Two reference images behind the image, at times 10 and 20, each of a size of its own; unbatched float ids."""
    images = [_grid_ids((1, 3, 5, 1), (0, 0, 0, 0)), _grid_ids((1, 4, 2, 1), (10, 0, 0, 0))]
    ids = torch.cat([*images, _grid_ids((1, 2, 3, 1), (20, 0, 0, 0))]).to(noise.dtype)
    hidden_states = noise(_BATCH, len(ids), model.config.in_channels)
    text = _text_ids(axes=4).to(noise.dtype)
    return {**_flux2_inputs(model, noise), "hidden_states": hidden_states, "img_ids": ids, "txt_ids": text}


_FLUX2 = f"{_MODELS}.transformer_flux2.Flux2Transformer2DModel"
_FLUX2_CONFIG = {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 3,
    "attention_head_dim": 20,
    "joint_attention_dim": 12,
    "timestep_guidance_channels": 16,
    "mlp_ratio": 1.0,
    "axes_dims_rope": (4, 6, 8, 2),
}
_FLUX2_RELEASED = {
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 48,
    "attention_head_dim": 128,
    "axes_dims_rope": (32, 32, 32, 32),
}
_FLUX2_EXAMPLES = (
    Example("flux2", _FLUX2, _FLUX2_CONFIG, _flux2_inputs, _FLUX2_RELEASED),
    Example(
        "flux2-klein",
        _FLUX2,
        {**_FLUX2_CONFIG, "guidance_embeds": False},
        _flux2_reference_inputs,
        {**_FLUX2_RELEASED, "num_attention_heads": 24},
    ),
)


def _flux3_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Positions need not be whole: the blocks around the model scale those of the image."""
    image = _grid_ids((*_GRID, 1), (0, 0, 0, 0)) * torch.tensor([1.0, 0.75, 0.75, 1.0])
    inputs = {**_flux_inputs(model, noise), "img_ids": image, "txt_ids": _text_ids(axes=4).float()}
    if model.config.flow_map:
        inputs["target_timestep"] = torch.tensor([0.7, 0.2]).to(noise.dtype)
    return inputs


def _flux3_reference_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Two reference images, which have the positions -1 and -2 on the fourth axis."""
    ids = torch.cat([_grid_ids((1, 4, 2, 1), (0, 0, 0, -1)), _grid_ids((1, 1, 3, 1), (0, 0, 0, -2))]).float()
    return {
        **_flux3_inputs(model, noise),
        "image_cond_hidden_states": noise(_BATCH, len(ids), model.config.cond_in_channels),
        "image_cond_ids": ids,
    }


_FLUX3 = f"{_MODELS}.transformer_flux3.Flux3Transformer2DModel"
_FLUX3_CONFIG = {
    **{name: value for name, value in _FLUX2_CONFIG.items() if name != "timestep_guidance_channels"},
    "cond_in_channels": 6,
    "timestep_channels": 16,
}
_FLUX3_RELEASED = {**_FLUX2_RELEASED, "num_attention_heads": 24}
_FLUX3_EXAMPLES = (
    Example("flux3", _FLUX3, _FLUX3_CONFIG, _flux3_inputs, _FLUX3_RELEASED),
    Example("flux3-references", _FLUX3, {**_FLUX3_CONFIG, "flow_map": True}, _flux3_reference_inputs, _FLUX3_RELEASED),
)


def _bria_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Ids with a batch dimension, in float32 whatever the model's dtype."""
    ids = {"img_ids": _grid_ids().float().repeat(_BATCH, 1, 1), "txt_ids": _text_ids().float().repeat(_BATCH, 1, 1)}
    return {**_flux_inputs(model, noise), **ids}


def _fibo_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    config = model.config
    layers = config.num_layers + config.num_single_layers
    texts = [noise(_BATCH, _TEXT, config.text_encoder_dim) for _ in range(layers)]
    inputs = {**_flux_inputs(model, noise), "text_encoder_layers": texts}
    return {**inputs, "guidance": torch.tensor([3.5, 2.0]) if config.guidance_embeds else None}


def _krea2_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """One tensor of ids for text and image; the second prompt is padded."""
    config = model.config
    mask = torch.ones(_BATCH, _TEXT, dtype=torch.bool)
    mask[-1, -2:] = False
    return {
        "hidden_states": noise(_BATCH, _TOKENS, config.in_channels),
        "encoder_hidden_states": noise(_BATCH, _TEXT, config.num_text_layers, config.text_hidden_dim),
        "timestep": torch.tensor([0.9, 0.3]),
        "position_ids": torch.cat([_text_ids(), _grid_ids()]).float(),
        "encoder_attention_mask": mask,
    }


_KREA2_CONFIG = {
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 20,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "timestep_embed_dim": 16,
    "text_hidden_dim": 12,
    "num_text_layers": 3,
    "text_num_attention_heads": 2,
    "text_num_key_value_heads": 1,
    "text_intermediate_size": 16,
    "num_layerwise_text_blocks": 1,
    "num_refiner_text_blocks": 1,
    "axes_dims_rope": (4, 6, 10),
}
_KREA2_RELEASED = {
    "num_layers": 1,
    "attention_head_dim": 128,
    "num_attention_heads": 48,
    "num_key_value_heads": 12,
    "axes_dims_rope": (32, 48, 48),
}
_KIN_EXAMPLES = (
    Example(
        "bria",
        f"{_MODELS}.transformer_bria.BriaTransformer2DModel",
        {**_FLUX_CONFIG, "rope_theta": 5000},
        _bria_inputs,
        _FLUX_RELEASED,
    ),
    Example(
        "bria-fibo",
        f"{_MODELS}.transformer_bria_fibo.BriaFiboTransformer2DModel",
        {**_FLUX_CONFIG, "text_encoder_dim": 8, "guidance_embeds": True},
        _fibo_inputs,
        _FLUX_RELEASED,
    ),
    Example(
        "longcat-image",
        f"{_MODELS}.transformer_longcat_image.LongCatImageTransformer2DModel",
        _FLUX_CONFIG,
        _flux_inputs,
        _FLUX_RELEASED,
    ),
    Example(
        "ovis-image",
        f"{_MODELS}.transformer_ovis_image.OvisImageTransformer2DModel",
        {**{name: value for name, value in _FLUX_CONFIG.items() if name != "pooled_projection_dim"}, "out_channels": 4},
        _flux_inputs,
        _FLUX_RELEASED,
    ),
    Example(
        "krea2",
        f"{_MODELS}.transformer_krea2.Krea2Transformer2DModel",
        _KREA2_CONFIG,
        _krea2_inputs,
        _KREA2_RELEASED,
    ),
)

EXAMPLES: tuple[Example, ...] = (
    *_FLUX_EXAMPLES,
    *_CHROMA_EXAMPLES,
    *_FLUX2_EXAMPLES,
    *_FLUX3_EXAMPLES,
    *_KIN_EXAMPLES,
)
