"""Classes that tests define, made known as the code of diffusers is."""

from __future__ import annotations

from typing import Any

from dit_rope.hooks.adapter import ModelTables
from dit_rope.hooks.adapter_code import Digests
from dit_rope.hooks.class_override import PatchState, override_method
from dit_rope.hooks.known_code import register_code
from dit_rope.hooks.rope_modules import RopeOverride, TableSettings


def known(cls: type, method: str = "forward") -> type:
    """``cls``, whose ``method`` is known code from now on, with the methods that it calls."""
    register_code(f"{cls.__module__}.{cls.__qualname__}.{method}", Digests(cls, method, frozenset()).digests)
    return cls


def memoize(target: Any, tables: ModelTables, parameters: tuple[str, ...]) -> PatchState:
    """Memoizes the tables of one object, as a patch does; returns what takes it back."""
    state = PatchState()
    override_method(target, RopeOverride, TableSettings(tables, parameters), state, tables.method)
    return state
