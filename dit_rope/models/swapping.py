"""How one method of one object is replaced and given back: by a class of its own, and by hooks.

An object gets a subclass of its class, made on demand, with one method of ours. Its attributes, parameters, buffers,
hooks and path stay what they are; giving the class back leaves nothing behind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

SETTINGS = "_dit_rope"
# The same on every module, and none that torch gives out: torch.compile guards on the ids of hooks, and would compile
# each of a model's equal blocks anew.
_HOOK_ID = -1
_seam_classes: dict[tuple[type, type, str], type] = {}


class Seam:
    """A subclass, made on demand, of an object's class, in which ``replacement`` stands for one method."""

    unpatched: type
    method: str

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles and copies as the object's class and the seam, because the subclass cannot be imported."""
        return _new_seam, (type(self).unpatched, type(self).__mro__[1], type(self).method), self.__dict__.copy()

    def replacement(self, *args: Any, **kwargs: Any) -> Any:
        """What runs in place of the method."""
        raise NotImplementedError


def swap_class(target: Any, seam: type[Seam], settings: object, method: str = "forward") -> None:
    """Gives ``target`` the subclass of its class in which ``seam`` replaces ``method``."""
    vars(target)[SETTINGS] = settings
    target.__class__ = _seam_class(type(target), seam, method)


def restore_class(target: Any) -> None:
    """Gives ``target`` its own class back."""
    target.__class__ = type(target).unpatched
    del vars(target)[SETTINGS]


def add_hooks(module: torch.nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> None:
    """Puts a forward pre-hook with keywords, and a forward hook that also runs after errors, on one module."""
    module._forward_pre_hooks[_HOOK_ID], module._forward_hooks[_HOOK_ID] = before, after
    module._forward_pre_hooks_with_kwargs[_HOOK_ID] = module._forward_hooks_always_called[_HOOK_ID] = True


def remove_hooks(module: torch.nn.Module) -> None:
    """Removes what :func:`add_hooks` put on one module."""
    for registered in (
        module._forward_pre_hooks,
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks,
        module._forward_hooks_always_called,
    ):
        registered.pop(_HOOK_ID, None)


def is_hooked(module: torch.nn.Module) -> bool:
    """Whether :func:`add_hooks` was called on one module."""
    return _HOOK_ID in module._forward_pre_hooks


def _seam_class(base: type, seam: type[Seam], method: str) -> type:
    made = _seam_classes.get((base, seam, method))
    if made is None:
        replacement: Any = copy_of(seam.replacement, seam.replacement.__globals__)
        # Attention modules pass on only those arguments that the signature of their processor shows.
        replacement.__wrapped__ = getattr(base, method)
        body = {"unpatched": base, "method": method, method: replacement, "__module__": base.__module__}
        made = _seam_classes.setdefault(
            (base, seam, method), type(f"{seam.__name__}{base.__name__}", (seam, base), body)
        )
    return made


def copy_of(function: Any, scope: dict[str, Any]) -> FunctionType:
    """A function of the same code, with ``scope`` as its global names."""
    copied = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _new_seam(base: type, seam: type[Seam], method: str) -> Any:
    return object.__new__(_seam_class(base, seam, method))


def unpatched_method(target: Any) -> functools.partial[Any]:
    """The method that a seam replaced; a seam's may outlive its undo in the wrapper of another library.

    Where torch.compile breaks its graph in it, it is called again by what it is: a bound method by its name, which is
    the seam's own.
    """
    cls = type(target)
    base, name = (cls.unpatched, cls.method) if isinstance(target, Seam) else (cls, "forward")
    return functools.partial(getattr(base, name), target)
