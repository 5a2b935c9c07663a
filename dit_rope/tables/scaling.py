"""Frequency scaling: the registry of types, what a scaling comes to on an axis, and scalings read from configurations.

The types themselves are in :mod:`dit_rope.tables.scaling_types`; :func:`register_scaling` adds others.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..spec import RopeSpec, Scaling
from ..torch_state import WITHOUT_FLOAT64_OR_COMPLEX, in_mode
from .caches import FREQUENCIES
from .scaling_types import TYPES, AxisFrequencies, ScalingFunction, ScalingType, default

# Keys of transformers' dictionaries that say which type it is, or belong to the rotation and not to its scaling.
_TYPE_KEYS = ("rope_type", "type")
_OTHER_NAMES = {"mrope": "default"}  # Qwen2-VL's: axes of their own, frequencies as trained
_WITHOUT_EFFECT = frozenset({"finetuned"})  # in checkpoints of YaRN's authors; nobody reads it
_OF_THE_SPEC = frozenset({*_TYPE_KEYS, "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved"})
_IN_MODEL_CONFIG = ("rope_parameters", "rope_scaling")
_CONTEXT_OF_MODEL = ("max_position_embeddings", "original_max_position_embeddings")


def register_scaling(name: str, function: ScalingFunction) -> None:
    """Makes ``Scaling.of(name, **options)`` call ``function(dim, theta, dtype, **options)``.

    It returns the :class:`AxisFrequencies` of an axis of ``dim`` channels, and must depend on its arguments alone:
    what it returned is remembered for them. ``torch.compile`` traces it where it traces the building of a table.

    Raises:
        TypeError: for a name that is no string, or something that cannot be called.
        ValueError: for a name that is taken; what was remembered would keep the old meaning.
    """
    if not isinstance(name, str) or not callable(function):
        raise TypeError(f"name must be a string and function callable, got {name!r} and {function!r}")
    if name in TYPES:
        raise ValueError(f"name must not be that of a registered scaling, got {name!r}")
    TYPES[name] = ScalingType(function)


def known_scalings() -> tuple[str, ...]:
    """Names of the registered types, sorted."""
    return tuple(sorted(TYPES))


def axis_frequencies(spec: RopeSpec, axis: int) -> AxisFrequencies:
    """The numbers of one axis of ``spec``, with its scaling in them.

    Raises:
        ValueError: for an unknown type, naming the known ones, or options that it does not take; for a type of the
            frame axis on another.
    """
    scaling = spec.axis_scaling(axis)
    if scaling is not None and axis > 0 and scaling.kind in TYPES and TYPES[scaling.kind].frame_axis_only:
        others = ", None" * (len(spec.dims) - 1)
        raise ValueError(
            f"scaling must have {scaling.kind} on the frame axis alone, got it on axis {axis}; pass "
            f"(Scaling.of({scaling.kind!r}, ...){others})"
        )
    return scaled_frequencies(scaling, spec.dims[axis], spec.theta, spec.frequency_dtype)


def device_frequencies(spec: RopeSpec, axis: int, device: torch.device) -> AxisFrequencies:
    """:func:`axis_frequencies` on ``device``, for angles formed there: float64 where it has that, else float32.

    Copied once, and there for every layer.
    """
    wide = torch.float32 if device.type in WITHOUT_FLOAT64_OR_COMPLEX else torch.float64

    def on_device() -> AxisFrequencies:
        found = axis_frequencies(spec, axis)
        return replace(found, inverse=found.inverse.to(device, wide))

    return FREQUENCIES.get((spec, axis, wide), device, on_device)


def scaled_frequencies(scaling: Scaling | None, dim: int, theta: float, dtype: torch.dtype) -> AxisFrequencies:
    """The numbers of an axis of ``dim`` channels; shared with other callers, not to be written to.

    Raises:
        ValueError: for an unknown type, naming the known ones, or options that it does not take.
    """
    build = functools.partial(_resolve, scaling, dim, theta, dtype)
    return FREQUENCIES.get((scaling, dim, theta, dtype), torch.device("cpu"), build)


def _resolve(scaling: Scaling | None, dim: int, theta: float, dtype: torch.dtype) -> AxisFrequencies:
    if scaling is None:
        return default(dim, theta, dtype)
    options = dict(scaling.parameters)
    function = _function(scaling.kind)
    _check_options(scaling.kind, function, options)
    try:
        found = function(dim, theta, dtype, **options)
    except (ArithmeticError, TypeError) as error:
        raise ValueError(f"scaling must have options that its formula takes, got {scaling}: {error}") from error
    if not isinstance(found, AxisFrequencies):
        raise TypeError(f"{scaling.kind} scaling must return AxisFrequencies, got {type(found).__name__}")
    if found.inverse.shape != (dim // 2,) or found.inverse.device.type != "cpu":
        raise ValueError(
            f"{scaling.kind} scaling must return {dim // 2} frequencies on CPU, "
            f"got {list(found.inverse.shape)} on {found.inverse.device}"
        )
    if not in_mode() and not found.inverse.isfinite().all():
        raise ValueError(f"scaling must give finite frequencies, got {found.inverse.tolist()} from {scaling}")
    return found


def _function(kind: str) -> ScalingFunction:
    if kind not in TYPES:
        raise ValueError(f"scaling must be one of {', '.join(known_scalings())}, got {kind!r}")
    return TYPES[kind].function


def _options_of(function: ScalingFunction) -> tuple[dict[str, inspect.Parameter], bool]:
    """The named options of a type, those after (dim, theta, dtype), and whether it takes others besides."""
    parameters = list(inspect.signature(function).parameters.values())[3:]
    named = {parameter.name: parameter for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    return named, len(named) < len(parameters)


def _check_options(kind: str, function: ScalingFunction, options: Mapping[str, object]) -> None:
    named, takes_others = _options_of(function)
    missing = [name for name, option in named.items() if option.default is option.empty and name not in options]
    if missing:
        raise ValueError(f"{kind} scaling must have {', '.join(missing)}, got {dict(options)}")
    unknown = [name for name in options if name not in named]
    if unknown and not takes_others:
        takes = ", ".join(named) or "no options"
        raise ValueError(f"{kind} scaling must not have {', '.join(unknown)}, got {dict(options)}; it takes {takes}")


def scaling_from_config(config: object, *, layer_type: str | None = None, **context: float | None) -> Scaling | None:
    """The scaling that a configuration asks for, as transformers writes it; None where it asks for none.

    The base and the rotary channels of the spec are read from the same configuration: ``theta=config["rope_theta"]``,
    ``dims=(int(head_dim * config["partial_rotary_factor"]),)``.

    Args:
        config: a ``rope_scaling`` or ``rope_parameters`` dictionary, a dataclass with such fields, a model's
            configuration that holds one of them, or None. As in transformers, ``rope_type`` is read before ``type``,
            and ``mrope`` is ``default``.
        layer_type: which entry of a dictionary with one per layer type, such as ``"full_attention"``.
        context: options that only the caller knows, used where the type takes them and ``config`` has none:
            ``seq_len`` (for dynamic and longrope), ``max_position_embeddings``.

    Raises:
        TypeError: neither a dictionary nor an object with such attributes.
        ValueError: no type given, an unknown one, or options that it lacks or does not take.
    """
    return _from_config(config, layer_type, context)


def _from_config(config: object, layer_type: str | None, context: Mapping[str, float | None]) -> Scaling | None:
    if config is None:
        return None
    given = _as_mapping(config)
    if any(name in given for name in _IN_MODEL_CONFIG):
        inner = next((given[name] for name in _IN_MODEL_CONFIG if given.get(name) is not None), None)
        of_model = {name: given[name] for name in _CONTEXT_OF_MODEL if given.get(name) is not None}
        return _from_config(inner, layer_type, of_model | {n: v for n, v in context.items() if v is not None})
    if given and all(entry is None or isinstance(entry, Mapping) for entry in given.values()):
        if layer_type is None or layer_type not in given:
            raise ValueError(f"layer_type must be one of {', '.join(given)}, got {layer_type!r}")
        return _from_config(given[layer_type], None, context)
    kind = next((given[key] for key in _TYPE_KEYS if given.get(key) is not None), None)
    if kind is None:
        raise ValueError(f"rope_scaling must contain 'rope_type' or 'type', got {dict(given)}")
    return _scaling(kind, given, context)


def _scaling(kind: object, given: Mapping[str, Any], context: Mapping[str, float | None]) -> Scaling | None:
    if not isinstance(kind, str):
        raise TypeError(f"the type in rope_scaling must be a string, got {kind!r}")
    kind = _OTHER_NAMES.get(kind, kind)
    function = _function(kind)
    named, _ = _options_of(function)
    options = {name: value for name, value in context.items() if name in named}
    ignored = _OF_THE_SPEC | _WITHOUT_EFFECT
    options |= {name: value for name, value in given.items() if name in named or name not in ignored}
    options = {name: value for name, value in options.items() if value is not None}
    _check_options(kind, function, options)
    return None if function is default else Scaling.of(kind, **options)


def _as_mapping(config: object) -> Mapping[str, Any]:
    """A dictionary as it is; of an object, its public attributes."""
    if isinstance(config, Mapping):
        return config
    named = (*_IN_MODEL_CONFIG, *_TYPE_KEYS, *_CONTEXT_OF_MODEL)
    # A model's configuration may give these by __getattr__, and a dataclass with slots has no __dict__.
    known = {*named, *getattr(config, "__dict__", ()), *getattr(config, "__dataclass_fields__", ())}
    found = {name: getattr(config, name) for name in known if not name.startswith("_") and hasattr(config, name)}
    if isinstance(config, type) or not any(name in found for name in (*_IN_MODEL_CONFIG, *_TYPE_KEYS)):
        raise TypeError(
            "config must be a rope_scaling dictionary, an object with such attributes, or None, "
            f"got {type(config).__name__}"
        )
    return found
