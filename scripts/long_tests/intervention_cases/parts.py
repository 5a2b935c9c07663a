"""Where the parts of a model are that interventions act on, found by running it, and what they do to tables."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch

_ROTARY = re.compile(r"rot|rope|freqs_cis")
_ATTENTION = re.compile(r"Attention|attn", re.IGNORECASE)
_ROPE = re.compile(r"Rotary|Ro[Pp]E|Rope|EmbedND|(Flux|Flux2|Flux3|Image)PosEmbed$")
_NORM = re.compile(r"norm")
_OF_QUERY_OR_KEY = re.compile(r"(^|_)(q|k|query|key)(_|$)")
_PROJECTION = re.compile(r"(^|_)(q|k|query|key|qkv|kv)(_|$)")
_TURNS = re.compile(r"^_?(apply|rotate)_?.*(rot|rope)")
_BUILDS = re.compile(r"^(?!_?apply|_?rotate).*(rotary|rope|freqs)")


@dataclass(frozen=True)
class Parts:
    """Paths in a model.

    Attributes:
        attentions: attention modules that are given rotary tensors.
        rotary: names of the arguments that they are given them as.
        blocks: members of module lists that hold one.
        norms, projections: of queries and keys, in these attention modules.
        ropes: modules that build tables.
        classes: of the modules at all of these paths, unpatched, and of the processors of attention modules.
    """

    attentions: tuple[str, ...]
    rotary: tuple[str, ...]
    blocks: tuple[str, ...]
    norms: tuple[str, ...]
    projections: tuple[str, ...]
    ropes: tuple[str, ...]
    classes: Mapping[str, type]
    processors: Mapping[str, type]


def find_parts(model: torch.nn.Module, forward: Callable[[], Any]) -> Parts:
    """The parts of ``model``, of which ``forward`` runs once."""
    rotary: dict[str, set[str]] = {}
    ropes = [path for path, module in model.named_modules() if _ROPE.search(type(module).__name__)]
    handles = []
    for path, module in model.named_modules():
        if getattr(module, "processor", None) is not None or _ATTENTION.search(type(module).__name__):
            handles.append(module.register_forward_pre_hook(_noting(rotary, path), with_kwargs=True))
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    attentions = [path for path in rotary if not any(other.startswith(f"{path}.") for other in rotary)]
    lists = [path for path, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    children = [(path, name) for path in attentions for name, _ in model.get_submodule(path).named_children()]
    return Parts(
        tuple(attentions),
        tuple(sorted({name for path in attentions for name in rotary[path]})),
        tuple(dict.fromkeys(block for path in attentions if (block := _block(path, lists)) is not None)),
        tuple(f"{p}.{n}" for p, n in children if _NORM.search(n) and _OF_QUERY_OR_KEY.search(n)),
        tuple(f"{p}.{n}" for p, n in children if not _NORM.search(n) and _PROJECTION.search(n)),
        tuple(sorted(ropes)),
        {path: type(module) for path, module in model.named_modules()},
        {
            p: type(processor)
            for p in attentions
            if (processor := getattr(model.get_submodule(p), "processor", None)) is not None
        },
    )


def _noting(rotary: dict[str, set[str]], path: str) -> Callable[..., None]:
    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name, value in named_arguments(module, args, kwargs).items():
            if _ROTARY.search(name) and value is not None:
                rotary.setdefault(path, set()).add(name)

    return note


def named_arguments(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of ``module`` by name."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def changed_arguments(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[str, Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with ``change(name, value)`` for each argument."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    named = [change(name, value) for name, value in zip(names, args, strict=False)]
    return (*named, *args[len(named) :]), {name: change(name, value) for name, value in kwargs.items()}


def _block(path: str, lists: list[str]) -> str | None:
    around = [value for value in lists if path.startswith(f"{value}.")]
    if not around:
        return None
    outer = min(around, key=len)
    return f"{outer}.{path[len(outer) + 1 :].partition('.')[0]}"


def parent_of(model: torch.nn.Module, path: str) -> tuple[torch.nn.Module, str]:
    """The module that holds the one at ``path``, and the name there."""
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def tables_rotated_back(tables: Any) -> Any:
    """Tables that rotate the other way: a negated sine, the conjugate; other forms are made larger."""
    if isinstance(tables, dict):
        return {name: tables_rotated_back(value) for name, value in tables.items()}
    if isinstance(tables, tuple | list):
        if len(tables) == 2 and all(isinstance(x, torch.Tensor) and not x.is_complex() for x in tables):
            return type(tables)((tables[0], -tables[1]))
        return type(tables)(tables_rotated_back(value) for value in tables)
    if not isinstance(tables, torch.Tensor):
        return tables
    return tables.conj() if tables.is_complex() else tables * 1.5


def scaled(output: Any, factor: float = 1.5, even: bool = False) -> Any:
    """Every floating point tensor of ``output`` times factors from 1 to ``factor`` along the last dim.

    Uneven factors show whether they came before or after a rotation; ``even`` ones keep tables what they are.
    """

    def change(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not (x.is_floating_point() or x.is_complex()) or factor == 1:
            return x
        if even or not x.ndim:
            return x * factor
        return x * torch.linspace(1, factor, x.shape[-1], device=x.device).to(x.real.dtype)

    return torch.utils._pytree.tree_map(change, output)


def rotated_twice(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which returns its first arguments rotated, done twice."""

    def twice(*args: Any, **kwargs: Any) -> Any:
        once = function(*args, **kwargs)
        if isinstance(once, torch.Tensor):
            return function(once, *args[1:], **kwargs) if args else once * 1.5
        return function(*once, *args[len(once) :], **kwargs)

    twice.__name__, twice.__qualname__ = function.__name__, function.__qualname__
    return twice


def rotating_globals(parts: Parts) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """The functions that rotate, as globals of the modules that processors and attention modules are defined in."""
    classes = [parts.classes[path] for path in ("", *parts.attentions)]
    yield from _globals([*classes, *parts.processors.values()], _TURNS)


def building_globals(parts: Parts) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """The functions that build tables, as globals of the modules that rope modules and the model are defined in."""
    yield from _globals([parts.classes[path] for path in ("", *parts.ropes)], _BUILDS)


def _globals(classes: Iterable[type], pattern: re.Pattern[str]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    # Some import what rotates inside of functions.
    homes = {cls.__module__ for of in classes for cls in of.__mro__ if cls.__module__.startswith("diffusers")}
    for home in sorted({*homes, "diffusers.models.embeddings"} & sys.modules.keys()):
        space = vars(sys.modules[home])
        for name, value in list(space.items()):
            if isinstance(value, FunctionType) and pattern.search(name) and not name.startswith("__"):
                yield space, name, value
