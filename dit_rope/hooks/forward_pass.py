"""Which forward pass of a patched model is running: what a caller hands over is packed once in each.

A table that somebody else made may be written to between two passes by code that no version counter sees: collectives,
fused optimizers, another process. Within one pass all layers are given the same one.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_numbers = itertools.count(1)


class _Current(threading.local):
    def __init__(self) -> None:
        self.number: int | None = None
        self.packed: dict[Any, Any] = {}


_current = _Current()


def packed_in_this_pass() -> dict[Any, Any] | None:
    """What was packed in the pass that runs in this thread; None outside of one."""
    return None if _current.number is None else _current.packed


def current_pass() -> int | None:
    """The number of the pass that runs in this thread; None outside of one, where nothing may be taken for granted."""
    return _current.number


@dataclass(frozen=True)
class BeginPass:
    """Forward pre-hook of a patched model; ``prepare`` is called with the model before its pass begins."""

    prepare: Callable[[torch.nn.Module], None]

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begins a pass; changes nothing of the call."""
        if not torch.compiler.is_compiling():
            self.prepare(module)
            _current.number, _current.packed = next(_numbers), {}


@dataclass(frozen=True)
class EndPass:
    """Forward hook of a patched model, run after errors too.

    One that an interrupt prevents from running does no harm: the next pass has a number of its own.
    """

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Ends the pass."""
        if not torch.compiler.is_compiling():
            _current.number, _current.packed = None, {}
