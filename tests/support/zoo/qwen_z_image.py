"""Small image transformers whose tables are complex: Qwen Image, Nucleus, Z-Image and Bria Fibo 2, with inputs.

Heads have 32 channels, because a CPU multiplies four or eight complex numbers at a time, and rounds as real arithmetic
does only where none are left over; at released widths none are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .example import Example, Noise

_MODELS = "diffusers.models.transformers"
_BATCH, _TEXT = 2, 7
_GRID = (2, 3, 5)  # frames, height, width: no two alike
_OTHER_GRID = (1, 4, 2)  # of a second image


def _count(grids: list[tuple[int, int, int]]) -> int:
    return sum(frames * height * width for frames, height, width in grids)


def _timestep() -> torch.Tensor:
    return torch.tensor([0.9, 0.3])


def _text_mask() -> torch.Tensor:
    """True ``[B, L]``, but for the last two tokens of the last prompt."""
    mask = torch.ones(_BATCH, _TEXT, dtype=torch.bool)
    mask[-1, -2:] = False
    return mask


def _qwen_images(model: Any, noise: Noise, grids: list[tuple[int, int, int]]) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": noise(_BATCH, _count(grids), config.in_channels),
        "encoder_hidden_states": noise(_BATCH, _TEXT, config.joint_attention_dim),
        "encoder_hidden_states_mask": _text_mask(),
        "timestep": _timestep(),
        "img_shapes": [grids] * _BATCH,
    }


def _qwen_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    return _qwen_images(model, noise, [_GRID])


def _qwen_edit_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """The image to generate and two to edit."""
    return _qwen_images(model, noise, [(1, 3, 5), _OTHER_GRID, (1, 2, 3)])


def _qwen_layered_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Two layers of one size and, last, the image to take apart, which is on layer -1."""
    inputs = _qwen_images(model, noise, [(1, 3, 5), (1, 3, 5), _OTHER_GRID])
    return {**inputs, "additional_t_cond": torch.tensor([0, 1])}


def _qwen_controlnet_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    channels = model.config.in_channels + model.config.extra_condition_channels
    return {**_qwen_inputs(model, noise), "controlnet_cond": noise(_BATCH, _count([_GRID]), channels)}


_QWEN = f"{_MODELS}.transformer_qwenimage.QwenImageTransformer2DModel"
_QWEN_CONTROLNET = "diffusers.models.controlnets.controlnet_qwenimage.QwenImageControlNetModel"
_QWEN_CONFIG = {
    "in_channels": 4,
    "out_channels": 2,
    "num_layers": 2,
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "joint_attention_dim": 12,
    "axes_dims_rope": (6, 10, 16),
}
_QWEN_RELEASED = {
    "num_layers": 1,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "axes_dims_rope": (16, 56, 56),
}
_LAYERED = {"use_layer3d_rope": True, "use_additional_t_cond": True}
_QWEN_EXAMPLES = (
    Example("qwen-image", _QWEN, _QWEN_CONFIG, _qwen_inputs, _QWEN_RELEASED),
    Example("qwen-image-edit", _QWEN, {**_QWEN_CONFIG, "zero_cond_t": True}, _qwen_edit_inputs, _QWEN_RELEASED),
    Example("qwen-image-layered", _QWEN, {**_QWEN_CONFIG, **_LAYERED}, _qwen_layered_inputs, _QWEN_RELEASED),
    Example(
        "qwen-image-controlnet",
        _QWEN_CONTROLNET,
        {**_QWEN_CONFIG, "extra_condition_channels": 2},
        _qwen_controlnet_inputs,
        _QWEN_RELEASED,
    ),
)


# Text, a condition image, text, two condition images with no text between them, text, and the target image.
_LAYOUT: tuple[int | tuple[int, int, int], ...] = (3, (1, 2, 6), 2, (1, 4, 2), (1, 2, 2), 2, (1, 6, 4))


def _qwen21_inputs(
    model: Any, noise: Noise, layout: tuple[int | tuple[int, int, int], ...] = _LAYOUT
) -> dict[str, Any]:
    """Each image of h by w tokens has h w / 4 slots in the text; those of the target image follow the text."""
    grids = [size for size in layout if isinstance(size, tuple)]
    slots = [
        slot
        for size in layout
        for slot in ([False] * size if isinstance(size, int) else [True] * (_count([size]) // 4))
    ]
    text = len(slots) - _count(grids[-1:]) // 4
    valid = torch.ones(_BATCH, text, dtype=torch.bool)
    valid[-1, text - 1] = False
    return {
        "hidden_states": noise(_BATCH, _count(grids), model.config.in_channels),
        "encoder_hidden_states": noise(_BATCH, text, model.config.context_in_dim),
        "timestep": _timestep(),
        "img_shapes": [grids] * _BATCH,
        "img_mask": torch.tensor([slots] * _BATCH),
        "encoder_hidden_states_mask": valid,
    }


def _qwen21_text_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    return _qwen21_inputs(model, noise, (_TEXT, (1, 6, 4)))


def _qwen21_extract_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """The first step, which stores rotated keys of text and condition images."""
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    cache = QwenImage21KVCache(model.config.num_layers)
    return {**_qwen21_inputs(model, noise), "kv_cache": cache, "kv_cache_mode": "extract"}


def _qwen21_cached_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """A later step, which computes and rotates the target image only."""
    inputs = {**_qwen21_extract_inputs(model, noise), "kv_cache_mode": "cached"}
    prefix = int((~inputs["img_mask"][0]).sum()) + _count(inputs["img_shapes"][0][:-1])
    for layer in inputs["kv_cache"].layer_caches:
        shape = (_BATCH, prefix, model.config.num_attention_heads, model.config.attention_head_dim)
        layer.store(noise(*shape), noise(*shape))
    return inputs


_QWEN21 = f"{_MODELS}.transformer_qwenimage21.QwenImage21Transformer2DModel"
_QWEN21_CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "context_in_dim": 12,
    "axes_dims_rope": (6, 10, 16),
}
_QWEN21_RELEASED = {**_QWEN_RELEASED, "num_attention_heads": 32}
_QWEN21_EXAMPLES = (
    Example("qwen-image-21", _QWEN21, _QWEN21_CONFIG, _qwen21_inputs, _QWEN21_RELEASED),
    Example(
        "qwen-image-21-text",
        _QWEN21,
        {**_QWEN21_CONFIG, "causal_condition": False},
        _qwen21_text_inputs,
        _QWEN21_RELEASED,
    ),
    Example("qwen-image-21-extract", _QWEN21, _QWEN21_CONFIG, _qwen21_extract_inputs, _QWEN21_RELEASED),
    Example("qwen-image-21-cached", _QWEN21, _QWEN21_CONFIG, _qwen21_cached_inputs, _QWEN21_RELEASED),
)


def _nucleus_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """One grid for each image of the batch, not a list of grids as Qwen Image takes."""
    return {**_qwen_images(model, noise, [_GRID]), "img_shapes": [_GRID] * _BATCH}


def _nucleus_two_images_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Text begins behind the last image alone, however large the first."""
    return _qwen_images(model, noise, [_GRID, _OTHER_GRID])


def _nucleus_cached_text_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Keys and values of the text made, and rotated, before the model's forward."""
    config = model.config
    shape = (_BATCH, _TEXT, config.num_key_value_heads, config.attention_head_dim)
    cached = {"cached_txt_key": noise(*shape), "cached_txt_value": noise(*shape)}
    return {**_nucleus_inputs(model, noise), "attention_kwargs": cached}


_NUCLEUS = f"{_MODELS}.transformer_nucleusmoe_image.NucleusMoEImageTransformer2DModel"
_NUCLEUS_CONFIG = {
    **_QWEN_CONFIG,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_enabled": False,  # the experts' weights begin as uninitialized memory
}
_NUCLEUS_RELEASED = {**_QWEN_RELEASED, "num_attention_heads": 16, "num_key_value_heads": 4}
_NUCLEUS_EXAMPLES = (
    Example("nucleus", _NUCLEUS, _NUCLEUS_CONFIG, _nucleus_inputs, _NUCLEUS_RELEASED),
    Example("nucleus-two-images", _NUCLEUS, _NUCLEUS_CONFIG, _nucleus_two_images_inputs, _NUCLEUS_RELEASED),
    Example("nucleus-cached-text", _NUCLEUS, _NUCLEUS_CONFIG, _nucleus_cached_text_inputs, _NUCLEUS_RELEASED),
)


def _z_image_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Two images and two captions, each of a length of its own on either side of a padded length of 32 tokens."""
    channels, width = model.config.in_channels, model.config.cap_feat_dim
    return {
        "x": [noise(channels, 2, 6, 10), noise(channels, 1, 14, 10)],
        "t": _timestep().to(noise.dtype),
        "cap_feats": [noise(_TEXT, width), noise(33, width)],
    }


def _z_image_omni_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Images to edit, their features and the image to generate; the second prompt has one image to edit, without it."""
    channels, width, features = model.config.in_channels, model.config.cap_feat_dim, model.config.siglip_feat_dim
    return {
        "x": [
            [noise(channels, 1, 4, 6), noise(channels, 1, 6, 8), noise(channels, 1, 6, 10)],
            [None, noise(channels, 1, 10, 6)],
        ],
        "t": _timestep().to(noise.dtype),
        "cap_feats": [[noise(length, width) for length in (5, 3, 4)], [noise(_TEXT, width), noise(2, width)]],
        "siglip_feats": [[noise(2, 3, features), noise(3, 4, features), None], [noise(4, 2, features), None]],
        "image_noise_mask": [[0, 0, 1], [0, 1]],
    }


def _z_image_controlnet_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    channels, control = model.all_x_embedder["2-1"].in_features // 4, model.config.control_in_dim
    width = model.cap_embedder[1].in_features
    return {
        "x": [noise(channels, 1, 6, 10), noise(channels, 1, 14, 10)],
        "t": _timestep().to(noise.dtype),
        "cap_feats": [noise(_TEXT, width), noise(33, width)],
        "control_context": [noise(control, 1, 6, 10), noise(control, 1, 14, 10)],
    }


_Z_IMAGE = f"{_MODELS}.transformer_z_image.ZImageTransformer2DModel"
_Z_IMAGE_CONFIG = {
    "in_channels": 4,
    "dim": 96,
    "n_layers": 2,
    "n_refiner_layers": 2,
    "n_heads": 3,
    "n_kv_heads": 3,
    "cap_feat_dim": 12,
    "axes_dims": [6, 10, 16],
    "axes_lens": [128, 16, 16],
}
_Z_IMAGE_RELEASED = {
    "dim": 3840,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 30,
    "n_kv_heads": 30,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1024, 512, 512],
}
# An image that is left out has 64 channels in each patch whatever the model's number of channels, hence 16 of those.
_OMNI = {"in_channels": 16, "siglip_feat_dim": 8}
_Z_IMAGE_EXAMPLE = Example("z-image", _Z_IMAGE, _Z_IMAGE_CONFIG, _z_image_inputs, _Z_IMAGE_RELEASED)


@dataclass(frozen=True)
class _ZImageControlNet(Example):
    """A ControlNet, which runs with parts of a transformer that its pipeline hands to it, and returns a dictionary."""

    def build(self, dtype: torch.dtype = torch.float32, released: bool = False) -> torch.nn.Module:
        """The ControlNet together with what it needs of the model of :data:`_Z_IMAGE_EXAMPLE`."""
        model: Any = super().build(dtype, released)
        joined: torch.nn.Module = model.from_transformer(model, _Z_IMAGE_EXAMPLE.build(dtype, released))
        return joined

    def run(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """One forward pass, which is without the choice of what to return."""
        return model(**inputs)


_CONTROL = {
    **{name: _Z_IMAGE_CONFIG[name] for name in ("dim", "n_refiner_layers", "n_heads", "n_kv_heads")},
    "control_in_dim": 6,
    "control_layers_places": [0, 1],
    "control_refiner_layers_places": [0, 1],
}
_CONTROL_RELEASED = {
    **{name: _Z_IMAGE_RELEASED[name] for name in ("dim", "n_refiner_layers", "n_heads", "n_kv_heads")},
    "control_layers_places": [0],
    "control_refiner_layers_places": [0],
}
_Z_IMAGE_EXAMPLES = (
    _Z_IMAGE_EXAMPLE,
    Example("z-image-omni", _Z_IMAGE, {**_Z_IMAGE_CONFIG, **_OMNI}, _z_image_omni_inputs, _Z_IMAGE_RELEASED),
    Example("z-image-no-norm", _Z_IMAGE, {**_Z_IMAGE_CONFIG, "qk_norm": False}, _z_image_inputs, _Z_IMAGE_RELEASED),
    *(
        _ZImageControlNet(
            f"z-image-controlnet{suffix}",
            "diffusers.models.controlnets.controlnet_z_image.ZImageControlNetModel",
            {**_CONTROL, "add_control_noise_refiner": refiner},
            _z_image_controlnet_inputs,
            _CONTROL_RELEASED,
            trains=False,  # the class lacks an attribute that its forward reads wherever gradients are enabled
        )
        for suffix, refiner in (("", None), ("-layers", "control_layers"), ("-refiner", "control_noise_refiner"))
    ),
)


def _fibo2_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Prompts of unequal length, for which the model makes unequal numbers of text tokens and puts them last."""
    config = model.config
    mask = torch.ones(_BATCH, 9, dtype=torch.bool)
    mask[-1, 4:] = False
    return {
        "hidden_states": noise(_BATCH, config.in_channels, 6, 10),
        "timestep": _timestep().to(noise.dtype),
        "encoder_hidden_states": noise(_BATCH, 1 + len(config.injection_layer_ids), 9, config.cap_feat_dim),
        "encoder_attention_mask": mask,
    }


def _fibo2_edit_inputs(model: Any, noise: Noise) -> dict[str, Any]:
    """Two images to edit, and prompts of one length, whose tokens come first."""
    channels = model.config.in_channels
    contexts = [noise(_BATCH, channels, 4, 8), noise(_BATCH, channels, 8, 2)]
    return {**_fibo2_inputs(model, noise), "encoder_attention_mask": None, "context_latents": contexts}


_FIBO2 = f"{_MODELS}.transformer_bria_fibo2.BriaFibo2Transformer2DModel"
_FIBO2_CONFIG = {
    "in_channels": 4,
    "dim": 96,
    "n_layers": 2,
    "n_refiner_layers": 2,
    "n_heads": 3,
    "cap_feat_dim": 12,
    "injection_layer_ids": (1,),
    "perceiver_num_layers": 1,
    "min_num_gist_tokens": 5,
    "max_num_gist_tokens": 11,
    "gist_step": 2,
    "gist_min_text_len": 2,
    "gist_max_text_len": 10,
    "axes_dims": (6, 10, 16),
    "axes_lens": (32, 16, 16),
}
_FIBO2_RELEASED = {
    "dim": 3584,
    "n_layers": 2,  # the second of which also reads the text
    "n_refiner_layers": 1,
    "n_heads": 28,
    "axes_dims": (32, 48, 48),
    "axes_lens": (2048, 512, 512),
}
_FIBO2_EXAMPLES = (
    Example("bria-fibo2", _FIBO2, _FIBO2_CONFIG, _fibo2_inputs, _FIBO2_RELEASED),
    Example("bria-fibo2-edit", _FIBO2, _FIBO2_CONFIG, _fibo2_edit_inputs, _FIBO2_RELEASED),
)

EXAMPLES: tuple[Example, ...] = (
    *_QWEN_EXAMPLES,
    *_QWEN21_EXAMPLES,
    *_NUCLEUS_EXAMPLES,
    *_Z_IMAGE_EXAMPLES,
    *_FIBO2_EXAMPLES,
)
