"""How one method of one object is replaced and given back: by a class of its own, and by hooks.

An object gets a subclass of its class, made on demand, with one method of ours. Its attributes, parameters, buffers,
hooks and path stay what they are; giving the class back leaves nothing behind.

Offloading and context parallelism put a forward of their own into a module, which holds the one that it wraps. Where
that is the class's own, ours takes its place there, innermost, as if the patch had come first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
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
    wrapped = list(_wrapped_forwards(target)) if method == "forward" else []
    vars(target)[SETTINGS] = settings
    target.__class__ = _seam_class(type(target), seam, method)
    _rebind(target, wrapped)


def restore_class(target: Any) -> None:
    """Gives ``target`` its own class back."""
    wrapped = list(_wrapped_forwards(target)) if type(target).method == "forward" else []
    target.__class__ = type(target).unpatched
    del vars(target)[SETTINGS]
    _rebind(target, wrapped)


def is_bypassed(target: Any) -> bool:
    """Whether another library's forward, put into ``target`` itself, would run in place of a seam's."""
    return "forward" in vars(target) and next(_wrapped_forwards(target), None) is None


def _wrapped_forwards(target: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Where the forward of ``target``'s class, or a seam's, is held bound: dictionaries and names in them.

    accelerate keeps it as an attribute of the module, diffusers in a record that its wrapper closes over, and either
    leaves it in the module itself when it is taken out. Wrappers may be wrapped again.
    """
    cls: Any = type(target)
    base = cls.unpatched if isinstance(target, Seam) else cls
    seams: list[Any] = [made for (of, _, method), made in _seam_classes.items() if of is base and method == "forward"]
    own = {base.forward, *(made.forward for made in seams)}
    holders = [vars(target)]
    for holder in holders:  # which grows
        for name in ("forward", "_old_forward", "original_forward"):
            call = holder.get(name)
            if isinstance(call, MethodType) and call.__self__ is target and call.__func__ in own:
                yield holder, name
            for cell in getattr(getattr(call, "func", None), "__closure__", None) or ():
                if type(cell.cell_contents).__name__ == "HookFunctionReference":
                    holders.append(vars(cell.cell_contents))


def _rebind(target: Any, places: list[tuple[dict[str, Any], str]]) -> None:
    for holder, name in places:
        cls: Any = type(target)
        holder[name] = MethodType(cls.forward, target)


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
