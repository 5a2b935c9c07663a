"""Which forward pass of a patched model is running.

Tables that a caller passes to a model are packed once per forward pass, because all layers of a pass get the same
table. Between two passes they are packed again: collectives, fused optimizers and other processes write to tensors
without a change of the version counter.
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
    """The tables packed in the pass of this thread; None outside a pass."""
    return None if _current.number is None else _current.packed


def current_pass() -> int | None:
    """The number of the pass of this thread; None outside a pass."""
    return _current.number


@dataclass(frozen=True)
class BeginPass:
    """Forward pre-hook of a patched model; ``prepare`` is called with the model before its pass begins."""

    prepare: Callable[[torch.nn.Module], None]

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begins a pass; the arguments of the call stay as they are."""
        if not torch.compiler.is_compiling():
            self.prepare(module)
            _current.number, _current.packed = next(_numbers), {}


@dataclass(frozen=True)
class EndPass:
    """Forward hook of a patched model, which runs after errors too.

    An interrupt may prevent it from running; this does no harm, because the next pass has a new number.
    """

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Ends the pass."""
        if not torch.compiler.is_compiling():
            _current.number, _current.packed = None, {}
