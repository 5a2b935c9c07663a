"""The transformer classes that can be patched: those of diffusers that dit_rope knows, and those that users register.

The names in ``__all__`` are what an adapter is written with.
"""

from __future__ import annotations

import difflib
import importlib
import re
from typing import Any

import torch

from .hooks.adapter import (
    EVERY,
    QK,
    AttentionRotation,
    AxisTables,
    CastTo,
    ForwardGrid,
    Layout,
    ModelAdapter,
    ModelTables,
    NormRotation,
    ReplacedFunction,
    Tokens,
)
from .hooks.adapter_code import Digests, methods_of, packages_of
from .hooks.formats import (
    AXES,
    CHANNELS,
    COMPLEX,
    COMPLEX_BHSD,
    HALF,
    HALF_NARROWED,
    HEAD_HALVES,
    HEAD_PAIRS,
    INTERLEAVED,
    MATRICES,
    STACKED,
    Format,
)
from .hooks.known_code import register_code, unregister_code
from .hooks.packed_tables import Align
from .models import ADAPTERS

__all__ = [
    "AXES",
    "CHANNELS",
    "COMPLEX",
    "COMPLEX_BHSD",
    "EVERY",
    "HALF",
    "HALF_NARROWED",
    "HEAD_HALVES",
    "HEAD_PAIRS",
    "INTERLEAVED",
    "MATRICES",
    "QK",
    "STACKED",
    "Align",
    "AttentionRotation",
    "AxisTables",
    "CastTo",
    "Format",
    "ForwardGrid",
    "Layout",
    "ModelAdapter",
    "ModelTables",
    "NormRotation",
    "ReplacedFunction",
    "Tokens",
    "register_adapter",
    "unregister_adapter",
]

_BUILT_IN = frozenset(adapter.model for adapter in ADAPTERS)
_BY_MODEL = {adapter.model: adapter for adapter in ADAPTERS}


class UnsupportedModelError(ValueError):
    """Nothing in the target can be patched; the message names the supported models."""


def register_adapter(adapter: ModelAdapter) -> None:
    """Lets :func:`dit_rope.patch` know a transformer class that dit_rope does not know.

    The code that the adapter names must be importable: its rope modules, its processors, and the functions that these
    call in the package of the model. Digests of its source are computed now. Code that changes afterwards is unknown,
    and runs as it is. Registration is for this process only. Do not register while another thread runs a patched model.

    Args:
        adapter: describes the class. :mod:`dit_rope.adapters` has the vocabulary.

    Raises:
        TypeError: ``adapter`` is not a ModelAdapter, or its tables or rotations are not tuples of the right type.
        ValueError: the class has an adapter already; ``adapter`` names a class that does not exist; a path is not a
            regular expression; or a function has no source.

    Example:
        >>> from dit_rope.adapters import ModelAdapter, register_adapter
        >>> register_adapter(ModelAdapter("diffusers.FluxTransformer2DModel"))
        Traceback (most recent call last):
        ...
        ValueError: adapter.tables and adapter.rotations must not both be empty

        ``docs/models.md`` has a whole adapter.
    """
    _check_types(adapter)
    if adapter.model in _BY_MODEL:
        raise ValueError(f"adapter must be of a class that has no adapter, got {adapter.model}")
    _check_class(adapter.model)
    register_code(adapter.model, _digests(adapter))
    _BY_MODEL[adapter.model] = adapter


def unregister_adapter(adapter: ModelAdapter) -> None:
    """Undoes :func:`register_adapter`. Patched models of this class run their own code from now on.

    Raises:
        ValueError: ``adapter`` is not registered.
    """
    model = getattr(adapter, "model", None)
    if model is None or model in _BUILT_IN or _BY_MODEL.get(str(model)) is not adapter:
        raise ValueError(f"adapter must be one that register_adapter was given, got {adapter!r}")
    del _BY_MODEL[adapter.model]
    unregister_code(adapter.model)


def _check_types(adapter: Any) -> None:
    if not isinstance(adapter, ModelAdapter):
        raise TypeError(f"adapter must be a ModelAdapter, got {adapter!r}")
    for name, kind in (("tables", ModelTables), ("rotations", AttentionRotation)):
        value = getattr(adapter, name)
        if not (isinstance(value, tuple) and all(isinstance(item, kind) for item in value)):
            raise TypeError(f"adapter.{name} must be a tuple of {kind.__name__}, got {value!r}")
    if not (adapter.tables or adapter.rotations):
        raise ValueError("adapter.tables and adapter.rotations must not both be empty")
    for rotation in adapter.rotations:
        if not (rotation.norms or rotation.replaced_function):
            raise ValueError(f"norms or replaced_function must be there, got neither for {rotation.attention!r}")
        try:
            re.compile(rotation.attention)
        except re.error as error:
            raise ValueError(f"attention must be a regular expression, got {rotation.attention!r}: {error}") from error


def _check_class(model: str) -> None:
    """Raises ValueError unless ``model`` is the name under which a module class is defined."""
    module, _, name = model.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name, None) if module else None
    except ImportError as error:
        raise ValueError(f"adapter.model must be in a module that can be imported, got {model!r}: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        raise ValueError(f"adapter.model must be the dotted name of a class of torch modules, got {model!r}")
    defined = f"{cls.__module__}.{cls.__qualname__}"
    if defined != model:
        raise ValueError(f"adapter.model must name the class where it is defined, got {model!r}; use {defined!r}")


def _digests(adapter: ModelAdapter) -> dict[str, str]:
    packages = packages_of(adapter)
    digests: dict[str, str] = {}
    for class_name, cls, method in methods_of(adapter):
        if cls is None or not hasattr(cls, method):
            raise ValueError(
                f"adapter must name classes with the method {method}, got {class_name!r}; import it into "
                f"{adapter.model.rpartition('.')[0]}"
            )
        digests |= Digests(cls, method, packages).digests
    return digests


def adapter_of(model: torch.nn.Module) -> ModelAdapter | None:
    """The adapter of the class of ``model``, or of the nearest class that it derives from."""
    for cls in type(model).__mro__:
        adapter = _BY_MODEL.get(f"{cls.__module__}.{cls.__qualname__}")
        if adapter is not None:
            return adapter
    return None


def adapter_named(name: str) -> ModelAdapter:
    """The adapter of the class called ``name``.

    Raises:
        UnsupportedModelError: no adapter has this name; the message has similar names.
    """
    for adapter in _BY_MODEL.values():
        if name == adapter.model_class:
            return adapter
    raise UnsupportedModelError(
        f"target must be a supported model, got {name}{_suggestion([name])}; {supported_models()}"
    )


def unsupported(modules: list[tuple[str, torch.nn.Module]]) -> UnsupportedModelError:
    """The error for a target whose modules, by name, have no adapter."""
    got = ", ".join(f"{name}: {_class_name(type(module))}" for name, module in modules) or "nothing of torch's"
    suggestion = _suggestion([type(module).__name__ for _, module in modules])
    return UnsupportedModelError(f"target must hold a supported model, got {got}{suggestion}; {supported_models()}")


def supported_models() -> str:
    """The names of all supported classes, for error messages."""
    return "supported models: " + ", ".join(adapter.model_class for adapter in _BY_MODEL.values())


def _class_name(cls: type) -> str:
    """The name of a class that is not supported, in full if a supported class has the same name."""
    if all(cls.__name__ != adapter.model_class for adapter in _BY_MODEL.values()):
        return cls.__name__
    return f"{cls.__module__}.{cls.__qualname__}, another class than that of diffusers"


def _suggestion(names: list[str]) -> str:
    supported = [adapter.model_class for adapter in _BY_MODEL.values() if adapter.model_class not in names]
    near = {near for name in names for near in difflib.get_close_matches(name, supported, 3, 0.75)}
    return f"; did you mean {' or '.join(sorted(near))}?" if near else ""
