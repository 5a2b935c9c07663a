"""Small models of every class that a patch knows."""

from __future__ import annotations

import importlib
import pkgutil

from .example import Example, Noise

EXAMPLES: tuple[Example, ...] = tuple(
    example
    for found in pkgutil.iter_modules(__path__)
    if found.name != "example"
    for example in importlib.import_module(f"{__name__}.{found.name}").EXAMPLES
)

__all__ = ["EXAMPLES", "Example", "Noise"]
