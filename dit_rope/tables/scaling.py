"""Frequency scaling: the registry of types, the frequencies of a scaled axis, and scalings read from configurations.

:mod:`dit_rope.tables.scaling_types` has the types that come with the package; :func:`register_scaling` adds others.
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

# Keys of transformers' dictionaries: those that name the type, then those that are ignored.
_TYPE_KEYS = ("rope_type", "type")
_OTHER_NAMES = {"mrope": "default"}  # Qwen2-VL: several axes, frequencies as trained
_WITHOUT_EFFECT = frozenset({"finetuned"})  # in checkpoints of YaRN's authors; no code reads it
_OF_THE_SPEC = frozenset({*_TYPE_KEYS, "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved"})
_IN_MODEL_CONFIG = ("rope_parameters", "rope_scaling")
_CONTEXT_OF_MODEL = ("max_position_embeddings", "original_max_position_embeddings")


def register_scaling(name: str, function: ScalingFunction) -> None:
    """Makes ``Scaling.of(name, **options)`` call ``function(dim, theta, dtype, **options)``.

    The function returns the :class:`AxisFrequencies` of an axis of ``dim`` channels. It must depend on its arguments
    alone, because its result is cached for them. ``torch.compile`` traces it where it traces the building of a table.

    Raises:
        TypeError: a name that is not a string, or a function that cannot be called.
        ValueError: a registered name; cached frequencies would keep its old meaning.

    Example:
        >>> import torch
        >>> from dit_rope import AxisFrequencies, Grid, RopeSpec, Scaling, register_scaling, rope_table
        >>> def slower(dim, theta, dtype, *, factor):
        ...     return AxisFrequencies(theta ** -(torch.arange(0, dim, 2).to(dtype) / dim) / factor)
        >>> register_scaling("slower", slower)
        >>> table = rope_table(RopeSpec((8,), scaling=Scaling.of("slower", factor=2.0)), Grid(16))
    """
    if not isinstance(name, str) or not callable(function):
        raise TypeError(f"name must be a string and function callable, got {name!r} and {function!r}")
    if name in TYPES:
        raise ValueError(f"name must not be that of a registered scaling, got {name!r}")
    TYPES[name] = ScalingType(function)


def known_scalings() -> tuple[str, ...]:
    """Names of the registered types, sorted.

    Example:
        >>> from dit_rope import known_scalings
        >>> "yarn" in known_scalings()
        True
    """
    return tuple(sorted(TYPES))


def axis_frequencies(spec: RopeSpec, axis: int) -> AxisFrequencies:
    """The frequencies of one axis of ``spec``, with its scaling.

    Raises:
        ValueError: an unknown type, options that it does not take, or a type for the frame axis on another axis.
    """
    scaling = spec.axis_scaling(axis)
    if scaling is not None and axis > 0 and scaling.kind in TYPES and TYPES[scaling.kind].frame_axis_only:
        unscaled = ", None" * (len(spec.dims) - 1)
        raise ValueError(
            f"scaling must have {scaling.kind} on the frame axis alone, got it on axis {axis}; pass "
            f"(Scaling.of({scaling.kind!r}, ...){unscaled})"
        )
    return scaled_frequencies(scaling, spec.dims[axis], spec.theta, spec.frequency_dtype)


def device_frequencies(spec: RopeSpec, axis: int, device: torch.device) -> AxisFrequencies:
    """:func:`axis_frequencies` on ``device``, for angles computed there: float64, or float32 without float64.

    Copied once to the device, and cached for every layer.
    """
    wide = torch.float32 if device.type in WITHOUT_FLOAT64_OR_COMPLEX else torch.float64

    def on_device() -> AxisFrequencies:
        frequencies = axis_frequencies(spec, axis)
        return replace(frequencies, inverse=frequencies.inverse.to(device, wide))

    return FREQUENCIES.get((spec, axis, wide), device, on_device)


def scaled_frequencies(scaling: Scaling | None, dim: int, theta: float, dtype: torch.dtype) -> AxisFrequencies:
    """The frequencies of an axis of ``dim`` channels; shared with other callers, so do not write to them.

    Raises:
        ValueError: an unknown type, naming the known ones, or options that it does not take.
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
        frequencies = function(dim, theta, dtype, **options)
    except (ArithmeticError, TypeError) as error:
        raise ValueError(f"scaling must have options that its formula takes, got {scaling}: {error}") from error
    if not isinstance(frequencies, AxisFrequencies):
        raise TypeError(f"{scaling.kind} scaling must return AxisFrequencies, got {type(frequencies).__name__}")
    inverse = frequencies.inverse
    if inverse.shape != (dim // 2,) or inverse.device.type != "cpu":
        raise ValueError(
            f"{scaling.kind} scaling must return {dim // 2} frequencies on CPU, "
            f"got {list(inverse.shape)} on {inverse.device}"
        )
    if not in_mode() and not inverse.isfinite().all():
        raise ValueError(f"scaling must give finite frequencies, got {inverse.tolist()} from {scaling}")
    return frequencies


def _function(kind: str) -> ScalingFunction:
    if kind not in TYPES:
        raise ValueError(f"scaling must be one of {', '.join(known_scalings())}, got {kind!r}")
    return TYPES[kind].function


def _options_of(function: ScalingFunction) -> tuple[dict[str, inspect.Parameter], bool]:
    """The named options of a type, after (dim, theta, dtype), and whether it takes any other option."""
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
    """Reads the scaling of a configuration as transformers writes it; None if the configuration has no scaling.

    The base and the rotary channels of the spec are read from the same configuration: ``theta=config["rope_theta"]``,
    ``dims=(int(head_dim * config["partial_rotary_factor"]),)``.

    Args:
        config: a ``rope_scaling`` or ``rope_parameters`` dictionary, a dataclass with such fields, a model's
            configuration that holds one of them, or None. As in transformers, ``rope_type`` is read before ``type``,
            and ``mrope`` is ``default``.
        layer_type: the entry to read of a dictionary with one entry per layer type, such as ``"full_attention"``.
        context: options that only the caller knows: ``seq_len`` (for dynamic and longrope) and
            ``max_position_embeddings``. Used if the type takes them and ``config`` does not have them.

    Raises:
        TypeError: neither a dictionary nor an object with such attributes.
        ValueError: a missing or unknown type, or options that it lacks or does not take.

    Example:
        >>> from dit_rope import scaling_from_config
        >>> print(scaling_from_config({"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}))
        linear(factor=4.0)
    """
    return _from_config(config, layer_type, context)


def _from_config(config: object, layer_type: str | None, context: Mapping[str, float | None]) -> Scaling | None:
    if config is None:
        return None
    entries = _as_mapping(config)
    if any(name in entries for name in _IN_MODEL_CONFIG):
        inner = next((entries[name] for name in _IN_MODEL_CONFIG if entries.get(name) is not None), None)
        of_model = {name: entries[name] for name in _CONTEXT_OF_MODEL if entries.get(name) is not None}
        return _from_config(inner, layer_type, of_model | {n: v for n, v in context.items() if v is not None})
    if entries and all(value is None or isinstance(value, Mapping) for value in entries.values()):
        if layer_type is None or layer_type not in entries:
            raise ValueError(f"layer_type must be one of {', '.join(entries)}, got {layer_type!r}")
        return _from_config(entries[layer_type], None, context)
    kind = next((entries[key] for key in _TYPE_KEYS if entries.get(key) is not None), None)
    if kind is None:
        raise ValueError(f"rope_scaling must contain 'rope_type' or 'type', got {dict(entries)}")
    return _scaling(kind, entries, context)


def _scaling(kind: object, entries: Mapping[str, Any], context: Mapping[str, float | None]) -> Scaling | None:
    if not isinstance(kind, str):
        raise TypeError(f"the type in rope_scaling must be a string, got {kind!r}")
    kind = _OTHER_NAMES.get(kind, kind)
    function = _function(kind)
    named, _ = _options_of(function)
    options = {name: value for name, value in context.items() if name in named}
    ignored = _OF_THE_SPEC | _WITHOUT_EFFECT
    options |= {name: value for name, value in entries.items() if name in named or name not in ignored}
    options = {name: value for name, value in options.items() if value is not None}
    _check_options(kind, function, options)
    return None if function is default else Scaling.of(kind, **options)


def _as_mapping(config: object) -> Mapping[str, Any]:
    """A dictionary unchanged; for another object, its public attributes."""
    if isinstance(config, Mapping):
        return config
    named = (*_IN_MODEL_CONFIG, *_TYPE_KEYS, *_CONTEXT_OF_MODEL)
    # A model's configuration may have these through __getattr__ alone, and a dataclass with slots has no __dict__.
    names = {*named, *getattr(config, "__dict__", ()), *getattr(config, "__dataclass_fields__", ())}
    attributes = {name: getattr(config, name) for name in names if not name.startswith("_") and hasattr(config, name)}
    if isinstance(config, type) or not any(name in attributes for name in (*_IN_MODEL_CONFIG, *_TYPE_KEYS)):
        raise TypeError(
            "config must be a rope_scaling dictionary, an object with such attributes, or None, "
            f"got {type(config).__name__}"
        )
    return attributes
