"""Classes of tests, whose code a patch takes for known as it does that of diffusers."""

from __future__ import annotations

from types import FunctionType
from typing import Any

from dit_rope.hooks import known_code
from dit_rope.hooks.adapter import ModelTables
from dit_rope.hooks.class_override import PatchState, override_method
from dit_rope.hooks.rope_modules import RopeOverride, TableSettings


class _Own(known_code.Walk):
    """The methods of a class that one of them runs."""

    def wants(self, slot: str, value: Any) -> bool:
        """Functions of modules are not looked at."""
        return False

    def accepts(self, slot: str, value: Any, function: Any) -> bool:
        """Adds the source of every method to the known ones."""
        if not isinstance(function, FunctionType):
            return False
        digest = known_code.source_digest(function)
        assert digest is not None
        known_code.known_digests()[slot] = frozenset({digest})
        return True


def known(cls: type, method: str = "forward") -> type:
    """``cls``, whose ``method`` is known code from now on."""
    _Own(cls, method)
    known_code._guards.clear()
    return cls


def memoize(target: Any, tables: ModelTables, parameters: tuple[str, ...]) -> PatchState:
    """Memoizes the tables of one object, as a patch does; returns what takes it back."""
    state = PatchState()
    override_method(target, RopeOverride, TableSettings(tables, parameters), state, tables.method)
    return state
