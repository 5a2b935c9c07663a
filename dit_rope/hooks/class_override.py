"""Overrides of one method of one object, by a subclass of the object's class.

The object gets a subclass of its class, made on demand, with one method replaced. Its attributes, parameters, buffers,
hooks and path stay what they are. Restoring the class leaves nothing behind.

Offloading puts a wrapper of the forward into the module itself. If the wrapper holds the forward of the class, the
override takes its place there, innermost, as if the patch had come before the wrapper.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

import torch

INSTALLED = "_dit_rope"
# torch itself never uses this id. All models have the same, because torch.compile guards on the ids of hooks.
_HOOK_ID = -1
_override_classes: dict[tuple[type, type, str], type] = {}
# Classes that other libraries derived from an override, and that override. It was removed from their bases since, but
# their methods may call it.
_derived: weakref.WeakKeyDictionary[type, Any] = weakref.WeakKeyDictionary()


class PatchState:
    """One patch of one model: whether it is in force, and weak references to the objects that it changed.

    A copy or a pickle of a patched model gets another state, so undoing one does not undo the other. The state of a
    copy has the same ``origin``.
    """

    def __init__(self, origin: object = None) -> None:
        self.active = True
        self.objects: list[weakref.ref[Any]] = []
        self.origin = object() if origin is None else origin

    def __deepcopy__(self, memo: dict[int, Any]) -> PatchState:
        return PatchState(self.origin)

    def __reduce__(self) -> tuple[type[PatchState], tuple[()]]:
        return PatchState, ()


class Installed:
    """The attribute that patches leave on one object: its settings, and the states of the patches that need them.

    Two models may share an object; it keeps its settings until the patches of both are undone.
    """

    def __init__(self, settings: Any, state: PatchState) -> None:
        self.settings = settings
        self.states = [state]

    @property
    def active(self) -> bool:
        """Whether a patch that needs this object is in force."""
        return any(state.active for state in self.states)


class Override:
    """Base of the subclasses made on demand, in which ``replacement`` takes the place of one method."""

    unpatched: type
    method: str

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles and copies the original class and the override, because the subclass cannot be imported."""
        made = made_class(type(self))
        return _new_override, (made.unpatched, made.__mro__[1], made.method), self.__dict__.copy()

    def replacement(self, *args: Any, **kwargs: Any) -> Any:
        """What runs in place of the method."""
        raise NotImplementedError


def record_of(target: Any) -> Installed | None:
    """The record that patches left on ``target``, in force or not; None without one."""
    record: Installed | None = getattr(target, "__dict__", {}).get(INSTALLED)
    return record


def installed(target: Any) -> Installed | None:
    """The record of patches in force on ``target``; None without one."""
    record = record_of(target)
    return record if record is not None and record.active else None


def install(target: Any, settings: object, state: PatchState) -> bool:
    """Leaves ``settings`` on ``target`` for ``state``; False if it has those of another patch, which serve both."""
    record = installed(target)
    if record is None or state not in record.states:
        state.objects[:] = [*(ref for ref in state.objects if ref() is not None), weakref.ref(target)]
    if record is None:
        release_all(target)
        vars(target)[INSTALLED] = Installed(settings, state)
        return True
    if state not in record.states:
        record.states.append(state)
    return False


def override_method(target: Any, override: type[Override], settings: object, state: PatchState, method: str) -> None:
    """Gives ``target`` the subclass of its class in which ``override`` replaces ``method``.

    Raises:
        TypeError: Python cannot change the class of ``target``, or it has no weak references.
    """
    if not install(target, settings, state):
        return
    wrapped = list(_wrapped_forwards(target)) if method == "forward" else []
    derived = _derived_class(type(target))
    made = None if derived is None else _derived[derived]
    if made is not None and made == override_class(made.unpatched, override, method):
        # Put the override back below the derived class, whose methods may call it. On top of it, it would run twice.
        _exchange_base(derived, made.unpatched, made)
        del _derived[derived]
    else:
        target.__class__ = override_class(type(target), override, method)
    _rebind(target, wrapped)


def release(target: Any, state: PatchState) -> None:
    """Removes from ``target`` what ``state`` left on it, unless another active patch needs it."""
    record = record_of(target)
    if record is not None and state in record.states:
        record.states.remove(state)
        if not record.active:
            release_all(target)


def release_all(target: Any) -> None:
    """Removes from ``target`` everything that patches left: restores its class, removes hooks and settings."""
    if isinstance(target, Override):
        cls: Any = type(target)
        made = made_class(cls)
        wrapped = list(_wrapped_forwards(target)) if made.method == "forward" else []
        if cls is made:
            target.__class__ = made.unpatched
        else:  # another library derived a class from the override, for this object
            derived = next(base for base in cls.__mro__ if made in base.__bases__)
            _exchange_base(derived, made, made.unpatched)
            _derived[derived] = made
        _rebind(target, wrapped)
    if isinstance(target, torch.nn.Module):
        remove_hooks(target)
    vars(target).pop(INSTALLED, None)


def _exchange_base(cls: Any, old: type, new: type) -> None:
    cls.__bases__ = tuple(new if base is old else base for base in cls.__bases__)


def _derived_class(cls: type) -> Any:
    """The class in ``_derived`` that ``cls`` is or derives from; None without one."""
    return next((base for base in cls.__mro__ if base in _derived), None) if _derived else None


def derived_with(target: Any, method: str) -> type | None:
    """A class that another library derived from the override of ``target``, and whose ``method`` runs instead."""
    if isinstance(target, Override):
        for cls in type(target).__mro__:
            if "unpatched" in vars(cls):
                return None
            if method in vars(cls):
                return cls
    return None


def made_class(cls: Any) -> Any:
    """The subclass made by :func:`override_method`, among the bases of ``cls`` or ``cls`` itself."""
    return next(base for base in cls.__mro__ if "unpatched" in vars(base))


def unpatched_class(target: Any) -> type:
    """The class that ``target`` has without a patch."""
    cls: Any = type(target)
    unpatched: type = cls.unpatched if isinstance(target, Override) else cls
    return unpatched


def is_bypassed(target: Any) -> bool:
    """Whether ``target`` holds a forward of another library that would run in place of an override."""
    return "forward" in vars(target) and next(_wrapped_forwards(target), None) is None


def _wrapped_forwards(target: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Dictionaries and keys that hold the bound forward of the class of ``target``, or of an override of it.

    accelerate keeps the forward that it wraps as an attribute of the module. diffusers keeps it in a record in the
    closure of its wrapper, which may be nested. Both write it back into the module when they are removed, so a forward
    that was not rebound here would bypass the patch from then on.
    """
    base: Any = unpatched_class(target)
    made = [cls for (key, _, method), cls in _override_classes.items() if key is base and method == "forward"]
    forwards = {cls.forward for cls in (base, *made)}
    holders = [vars(target)]
    for holder in holders:  # the loop appends to this list
        for name in ("forward", "_old_forward", "original_forward"):
            call = holder.get(name)
            if isinstance(call, MethodType) and call.__self__ is target and call.__func__ in forwards:
                yield holder, name
            for cell in getattr(getattr(call, "func", None), "__closure__", None) or ():
                if type(cell.cell_contents).__name__ == "HookFunctionReference":
                    holders.append(vars(cell.cell_contents))


def _rebind(target: Any, places: list[tuple[dict[str, Any], str]]) -> None:
    for holder, name in places:
        cls: Any = type(target)
        holder[name] = MethodType(cls.forward, target)


def add_hooks(module: torch.nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> None:
    """Registers a forward pre-hook with keywords, and a forward hook that also runs after errors, on one module."""
    module._forward_pre_hooks[_HOOK_ID], module._forward_hooks[_HOOK_ID] = before, after
    module._forward_pre_hooks_with_kwargs[_HOOK_ID] = module._forward_hooks_always_called[_HOOK_ID] = True


def remove_hooks(module: torch.nn.Module) -> None:
    """Removes the hooks of :func:`add_hooks` from one module."""
    for registered in (
        module._forward_pre_hooks,
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks,
        module._forward_hooks_always_called,
    ):
        registered.pop(_HOOK_ID, None)


def override_class(base: type, override: type[Override], method: str) -> type:
    """The subclass of ``base`` in which ``override`` replaces ``method``, made once."""
    made = _override_classes.get((base, override, method))
    if made is None:
        replacement: Any = copy_of(override.replacement, override.replacement.__globals__)
        # Attention modules pass on only those arguments that the signature of their processor shows.
        replacement.__wrapped__ = getattr(base, method)
        body = {"unpatched": base, "method": method, method: replacement, "__module__": base.__module__}
        made = _override_classes.setdefault(
            (base, override, method), type(f"{override.__name__}{base.__name__}", (override, base), body)
        )
    return made


def copy_of(function: Any, scope: dict[str, Any]) -> FunctionType:
    """A function of the same code, with ``scope`` as its global names."""
    copied = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _new_override(base: type, override: type[Override], method: str) -> Any:
    return object.__new__(override_class(base, override, method))


def unpatched_method(target: Any, method: str = "forward") -> functools.partial[Any]:
    """``method`` as the class has it without a patch. A wrapper may call an override after its patch was undone.

    Returns a partial instead of a bound method: after a graph break torch.compile looks a bound method up again by its
    name, and would find the override.
    """
    cls = type(target)
    if isinstance(target, Override):
        base = cls.unpatched
    else:
        derived = _derived_class(cls)
        base = cls if derived is None else _derived[derived].unpatched
    return functools.partial(getattr(base, method), target)


def refresh_signature(target: Override) -> None:
    """Updates the signature of an overridden method, if the method of its class was replaced since."""
    made = made_class(type(target))
    original, replacement = getattr(made.unpatched, made.method), vars(made)[made.method]
    if replacement.__wrapped__ is not original:
        replacement.__wrapped__ = original
