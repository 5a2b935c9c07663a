"""The adapters of all transformer classes that dit_rope knows, one file per model family.

A file holds declarations only, and ends in ``ADAPTERS``. It needs no entry anywhere else.
"""

import importlib
import pkgutil

from ..hooks.adapter import ModelAdapter


def _read() -> list[ModelAdapter]:
    files = (importlib.import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__))
    return [adapter for file in files for adapter in file.ADAPTERS]


ADAPTERS: tuple[ModelAdapter, ...] = tuple(sorted(_read(), key=lambda adapter: adapter.model_class))

__all__ = ["ADAPTERS", "ModelAdapter"]
