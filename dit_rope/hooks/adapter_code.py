"""The code that an adapter depends on, and digests of its source.

``scripts/pages/write_known_code.py`` writes the digests for dit_rope's adapters into ``known_code.json``. Digests for a
registered adapter are computed when it is registered.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from .adapter import ModelAdapter
from .known_code import LIBRARY, Walk, source_digest


class AdapterMethod(NamedTuple):
    """A method that an adapter depends on.

    Attributes:
        class_name: name of its class, as the adapter has it.
        cls: the class; None if no module has a class of that name.
        name: name of the method.
    """

    class_name: str
    cls: type | None
    name: str


class Digests(Walk):
    """Digests of everything that a method runs, of diffusers and of the package that defines the model.

    Attributes:
        digests: by the name under which the caller looks the function up.

    Raises:
        ValueError: a function has no source that Python can read.
    """

    def __init__(self, cls: type, method: str, packages: frozenset[str]) -> None:
        self.digests: dict[str, str] = {}
        self._packages = packages
        super().__init__(cls, method)

    def wants(self, slot: str, value: Any) -> bool:
        """Whether ``value`` is a function of the packages."""
        return isinstance(value, FunctionType) and _top(value.__module__) in self._packages

    def accepts(self, slot: str, value: Any, function: Any) -> bool:
        """Accepts every function, and adds its digest."""
        digest = source_digest(function) if isinstance(function, FunctionType) else None
        if digest is None:
            raise ValueError(f"{slot} must be a function in a file that Python can read, got {value!r}")
        self.digests[slot] = digest
        return True


def packages_of(adapter: ModelAdapter) -> frozenset[str]:
    """The packages whose functions are part of the code of ``adapter``: diffusers, and that of the model's class."""
    return frozenset({LIBRARY, _top(adapter.model)})


def methods_of(adapter: ModelAdapter) -> Iterator[AdapterMethod]:
    """The methods that ``adapter`` depends on: they build tables or attend.

    Raises:
        ModuleNotFoundError: the module of the model does not exist.
    """
    module = importlib.import_module(adapter.model.rpartition(".")[0])
    for tables in adapter.tables:
        for name in tables.builders:
            yield AdapterMethod(name, class_named(name, module), tables.method)
    for rotation in adapter.rotations:
        for name in rotation.processors or (rotation.attention_class,):
            cls = class_named(name, module)
            yield AdapterMethod(name, cls, "__call__" if rotation.processors else "forward")


def class_named(name: str, module: ModuleType) -> type | None:
    """The class called ``name`` in ``module``, in diffusers' general attention code, or in a module beside it."""
    general = (f"{LIBRARY}.models.attention_processor", f"{LIBRARY}.models.attention")
    modules = [module, *map(importlib.import_module, general)]
    # A model may use a class of another file without importing its name.
    packages = (f"{LIBRARY}.models.", f"{_top(module.__name__)}.")
    modules += [loaded for key, loaded in list(sys.modules.items()) if key.startswith(packages)]
    return next((vars(scope)[name] for scope in modules if isinstance(vars(scope).get(name), type)), None)


def _top(name: str) -> str:
    """The package of a dotted name."""
    return name.partition(".")[0]
