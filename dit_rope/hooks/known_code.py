"""Known code: the code that an adapter was written for, and whether a model runs it.

A patch takes over a rotation or a table only from code that it knows: the method of an attention processor or of a
rope module, the functions and methods that it calls, and the norms. ``known_code.json`` holds a digest of the source of
each of them, under the name by which its caller looks it up; ``scripts/pages/write_known_code.py`` writes the file.
Names and classes prove nothing: people write processors of the same name, wrap and compile functions, and assign to
modules and classes at any time. So every call compares the objects under these names again, at the cost of one
dictionary lookup each.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import importlib
import importlib.resources
import importlib.util
import inspect
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

import torch

LIBRARY = "diffusers"
"""Where the models come from, and the general code that they use."""
# These run before queries and keys exist or after they are rotated, so a patch replaces nothing in them.
_NOT_FOLLOWED = frozenset({"dispatch_attention_fn", "deprecate", "is_torch_npu_available", "is_torch_xla_available"})


class Walk:
    """Follows everything that one method of a class runs, as far as an adapter depends on it.

    A slot is the dotted name of a place that holds a function: module, class if any, and name.

    Attributes:
        function: the method, unwrapped; None if the class has none.
        slot: the slot of the method.
        methods: names of the methods of its object that it calls, itself included.
        checks: for each place: namespace, name, the object there, its function and its code.
    """

    def __init__(self, cls: type, method: str) -> None:
        self.function: Any = None
        self.slot = ""
        self.methods: set[str] = set()
        self.checks: list[tuple[Mapping[str, Any], str, Any, Any, CodeType | None]] = []
        self._follow_method(cls, method)

    def wants(self, slot: str, value: Any) -> bool:
        """Whether ``value``, which code looks up in ``slot``, must be known code."""
        raise NotImplementedError

    def accepts(self, slot: str, value: Any, function: Any) -> bool:
        """Whether ``function`` is known code of ``slot``. If so, the functions that it calls are followed too."""
        raise NotImplementedError

    def _follow_method(self, cls: type, name: str) -> None:
        if name in self.methods:
            return
        self.methods.add(name)
        owner = next((base for base in cls.__mro__ if name in vars(base)), cls)
        # Somebody may later add the method to a class between these two, and it would run instead.
        self.checks += [(vars(base), name, None, None, None) for base in cls.__mro__[: cls.__mro__.index(owner)]]
        slot = f"{owner.__module__}.{owner.__qualname__}.{name}"
        function = self._check(vars(owner), name, slot)
        if not self.slot:
            self.slot, self.function = slot, function
        if function is not None:
            for called in _names(function.__code__):
                if isinstance(_static(cls, called), (FunctionType, functools._lru_cache_wrapper, staticmethod)):
                    self._follow_method(cls, called)
            self._follow_globals(function)

    def _follow_globals(self, function: FunctionType) -> None:
        for namespace, name in references(function):
            slot = f"{namespace.get('__name__')}.{name}"
            checked = any(scope is namespace and called == name for scope, called, *_ in self.checks)
            if not checked and self.wants(slot, namespace.get(name)):
                called = self._check(namespace, name, slot)
                if called is not None:
                    self._follow_globals(called)

    def _check(self, namespace: Mapping[str, Any], name: str, slot: str) -> FunctionType | None:
        """Adds the object under ``name`` to the checks; returns its function if that is known code."""
        value = namespace.get(name)
        function = underlying(value)
        code = function.__code__ if isinstance(function, FunctionType) else None
        self.checks.append((namespace, name, value, None if code is None else function, code))
        accepted: bool = self.accepts(slot, value, function)
        return function if accepted else None


class Guard(Walk):
    """Whether all code of a method is known, and whether it has changed since.

    Attributes:
        unknown: the first unknown function, in words; None if all code is known.
        owner: name of the class that defines the method.
        parameters: names of the method's parameters, the object itself first.
    """

    def __init__(self, cls: type, method: str) -> None:
        self.unknown: str | None = None
        super().__init__(cls, method)
        self.owner = self.slot.rpartition(".")[0].rpartition(".")[2]
        self.parameters = () if self.function is None else tuple(inspect.signature(self.function).parameters)

    def wants(self, slot: str, value: Any) -> bool:
        """Whether known code looks up a function in ``slot``."""
        return slot in known_digests()

    def accepts(self, slot: str, value: Any, function: Any) -> bool:
        """Whether the source of ``function`` is known for ``slot``."""
        if isinstance(function, FunctionType) and source_digest(function) in known_digests().get(slot, ()):
            return True
        self.unknown = self.unknown or f"{slot} is {_described(value, slot)}"
        return False

    def holds(self) -> bool:
        """Whether nothing has changed since."""
        for namespace, name, value, function, code in self.checks:
            if namespace.get(name) is not value or (function is not None and function.__code__ is not code):
                return False
        return True

    def overridden_in(self, target: Any) -> str | None:
        """Name of a method that an attribute of ``target`` replaces; None if there is none."""
        attributes = vars(target)
        if self.methods.isdisjoint(attributes):
            return None
        return next(name for name in self.methods if name in attributes)


def guard_of(cls: type, method: str) -> Guard:
    """The guard of a method, made once, and again if something that it checked has changed."""
    guard = _guards.get((cls, method))
    if guard is None or not guard.holds():
        if len(_guards) >= _MAX_GUARDS:
            _guards.clear()
        guard = _guards[cls, method] = Guard(cls, method)
    return guard


_guards: dict[tuple[type, str], Guard] = {}
_MAX_GUARDS = 4096


_registered: dict[str, Mapping[str, str]] = {}
"""Digests of the code of registered adapters, by the dotted name of the model."""


@functools.cache
def known_digests() -> dict[str, frozenset[str]]:
    """Digests of the known sources, by slot."""
    text = importlib.resources.files(__package__).joinpath("known_code.json").read_text(encoding="utf-8")
    built_in = {slot: frozenset[str](digests) for slot, digests in json.loads(text).items()}
    added: dict[str, frozenset[str]] = {}
    for digests in _registered.values():
        for slot, digest in digests.items():
            # A registered digest must not make changed code known for the adapters of dit_rope.
            if slot not in built_in:
                added[slot] = added.get(slot, frozenset()) | {digest}
    return built_in | added


def register_code(model: str, digests: Mapping[str, str]) -> None:
    """Makes code known for the adapter of ``model``."""
    _registered[model] = digests
    _forget_guards()


def unregister_code(model: str) -> None:
    """Undoes :func:`register_code`: code that only this adapter needs is unknown from the next call on."""
    del _registered[model]
    _forget_guards()


def _forget_guards() -> None:
    known_digests.cache_clear()
    _guards.clear()


def source_digest(function: FunctionType) -> str | None:
    """A digest of the source of ``function`` and of the name of its module; None if it has no source.

    The module counts because the same source in another module may call other functions.
    """
    module = sys.modules.get(function.__globals__.get("__name__", ""))
    if module is None or vars(module) is not function.__globals__:
        return None
    code = function.__code__
    entry = _sources.get(id(code))
    if entry is None or entry[0] is not code:
        entry = _sources[id(code)] = (code, _source(code))
    if entry[1] is None:
        return None
    defaults = (function.__defaults__, function.__kwdefaults__)
    return hashlib.sha256(f"{module.__name__}\n{defaults}\n{entry[1]}".encode()).hexdigest()[:16]


_sources: dict[int, tuple[CodeType, str | None]] = {}


def _source(code: CodeType) -> str | None:
    try:
        lines = textwrap.dedent(inspect.getsource(code)).splitlines()
    except (OSError, TypeError, SyntaxError, IndentationError):
        return None
    return "\n".join(line.rstrip() for line in lines if line.strip())


def underlying(value: Any) -> Any:
    """The function that ``value`` runs: unwraps descriptors, caches, and torch's context decorators."""
    if isinstance(value, (staticmethod, classmethod)):
        return underlying(value.__func__)
    if type(value) is functools._lru_cache_wrapper:
        return underlying(value.__wrapped__)
    if isinstance(value, FunctionType) and hasattr(value, "__wrapped__") and _is_context_decorator(value):
        return underlying(value.__wrapped__)
    return value


def _is_context_decorator(function: FunctionType) -> bool:
    """Whether ``function`` is the wrapper that ``torch.no_grad()``, ``torch.autocast()`` or the like makes."""
    return function.__code__.co_filename in (torch.utils._contextlib.__file__, torch.amp.autocast_mode.__file__)


def references(function: FunctionType) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Namespaces and names that ``function`` looks up: its globals, and the names that it imports when it runs."""
    for code in _codes(function.__code__):
        for name in code.co_names:
            if name in function.__globals__ and name not in _NOT_FOLLOWED:
                yield function.__globals__, name
        yield from _imports(code, function.__globals__.get("__package__") or "")


def _imports(code: CodeType, package: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    instructions = list(dis.get_instructions(code))
    for index, instruction in enumerate(instructions):
        if instruction.opname != "IMPORT_NAME":
            continue
        level, names = instructions[index - 2].argval, instructions[index - 1].argval
        name = importlib.util.resolve_name("." * level + instruction.argval, package) if level else instruction.argval
        if name.partition(".")[0] not in (LIBRARY, package.partition(".")[0]):
            continue
        module = sys.modules.get(name) or importlib.import_module(name)
        yield from ((vars(module), imported) for imported in names or () if imported not in _NOT_FOLLOWED)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _names(code: CodeType) -> set[str]:
    return {name for inner in _codes(code) for name in inner.co_names}


def _static(cls: type, name: str) -> Any:
    """The attribute of a class without a call of its descriptor; None if torch or Python defines it."""
    for base in cls.__mro__:
        if name in vars(base):
            return None if base.__module__.partition(".")[0] in ("torch", "builtins") else vars(base)[name]
    return None


def _described(value: Any, slot: str) -> str:
    """The object ``value`` in ``slot``, which is not known code, in words."""
    if isinstance(value, FunctionType):
        name = f"{value.__module__}.{value.__qualname__}"
        return "not the code that dit_rope knows" if name == slot else name
    return f"a {type(value).__name__}" if value is not None else "not there"
