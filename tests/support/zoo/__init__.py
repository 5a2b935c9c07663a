"""Small models of every class that a patch knows."""

from __future__ import annotations

import importlib
import pkgutil

from .example import Example, Noise, tensors

EXAMPLES: tuple[Example, ...] = tuple(
    example
    for module in pkgutil.iter_modules(__path__)
    if module.name != "example"
    for example in importlib.import_module(f"{__name__}.{module.name}").EXAMPLES
)


def named(name: str) -> Example:
    """The example of that name."""
    return next(example for example in EXAMPLES if example.name == name)


__all__ = ["EXAMPLES", "Example", "Noise", "named", "tensors"]
