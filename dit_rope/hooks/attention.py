"""Rotation of queries and keys in the norms of an attention module.

The attention processor gets a subclass of its own class; so does an attention module without a processor. If all the
code of its call is known, the call runs this code on a proxy of the attention module, without the rotary tensors, so
that the code does not rotate. The norms of the proxy rotate their results; if it has no norms, its projections do. The
proxy lives for one call and shares everything else with the module. So wrappers, hooks, compilers and replacements of
the module, its norms or its processor see what they would see without a patch.

If some code is unknown, or the tables do not fit the tokens, the model's own code rotates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..rotation import Rounding
from ..torch_state import in_transform
from .adapter import AttentionRotation, CastTo, Layout
from .class_override import INSTALLED, Installed, Override, copy_of, derived_with, unpatched_class, unpatched_method
from .heads import as_heads, fits, from_heads, rotate_heads
from .known_code import Guard, guard_of
from .log import log_not_patched
from .packed_tables import Align, UnfitTable
from .rotating_norms import (
    DTYPES,
    PROJECTIONS,
    AttentionSettings,
    RotatedCall,
    computed_dtype,
    rotating_modules,
    wants_gradients,
    why_incomplete,
)
from .traced import traced_call


class ProcessorOverride(Override):
    """The call of an attention processor."""

    def replacement(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """The result of the processor, whose code gets a proxy of ``attn`` if the norms rotate."""
        record: Installed | None = getattr(attn, "__dict__", {}).get(INSTALLED)
        compiling = torch.compiler.is_compiling()
        if compiling:
            result = traced_call(self, attn, record, args, kwargs)
            if result is not None:
                return result
        if compiling or in_transform():
            return unpatched_method(self, "__call__")(attn, *args, **kwargs)
        if record is not None and record.active and isinstance(record.settings, AttentionSettings):
            guard = guard_of(unpatched_class(self), "__call__")
            result = _rotated_call(self, attn, guard, record.settings, args, kwargs)
            if result is not _NOT_ROTATED:
                return result
        return unpatched_method(self, "__call__")(attn, *args, **kwargs)


class AttentionOverride(Override):
    """The forward of an attention module that attends by itself, without a processor."""

    def replacement(self, *args: Any, **kwargs: Any) -> Any:
        """The result of the forward, which runs on a proxy of the module if its norms rotate."""
        record: Installed | None = self.__dict__.get(INSTALLED)
        compiling = torch.compiler.is_compiling()
        if compiling:
            result = traced_call(None, self, record, args, kwargs)
            if result is not None:
                return result
        if compiling or in_transform():
            return unpatched_method(self)(*args, **kwargs)
        if record is not None and record.active:
            guard = guard_of(unpatched_class(self), "forward")
            result = _rotated_call(None, self, guard, record.settings, args, kwargs)
            if result is not _NOT_ROTATED:
                return result
        return unpatched_method(self)(*args, **kwargs)


_NOT_ROTATED = object()


def _rotated_call(
    processor: Any, attn: Any, guard: Guard, settings: AttentionSettings, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The call with rotating norms, or with a rotating function; _NOT_ROTATED if the model's own code must run."""
    holder = attn if processor is None else processor
    reason = why_unknown(holder, guard, settings.rotation) or why_incomplete(attn, settings.rotation)
    if reason is None:
        run = _with_rotating_norms if settings.rotation.norms else _with_rotating_function
        try:
            return run(processor, attn, guard, settings, args, kwargs)
        except UnfitTable:
            reason = "its tables, dtypes or gradients do not allow it in this call"
    log_not_patched(settings.name, reason, settings.logged)
    return _NOT_ROTATED


def why_unknown(holder: Any, guard: Guard, rotation: AttentionRotation) -> str | None:
    """Why ``rotation`` was not written for the code of a processor or attention module; None if it was."""
    if guard.unknown is not None:
        return guard.unknown
    owner = guard.owner
    if owner not in (rotation.processors or (rotation.attention_class,)):
        return f"{owner} is not the class that dit_rope knows there"
    name = guard.overridden_in(holder)
    if name is not None and (name != "forward" or "forward" not in guard.slot):
        return f"its {name} was replaced on the instance"
    derived = derived_with(holder, guard.slot.rpartition(".")[2])
    return None if derived is None else f"{derived.__qualname__} was derived from the patched class"


def _with_rotating_function(
    processor: Any, attn: Any, guard: Guard, settings: AttentionSettings, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Runs code that calls a rotating function of its module, with another function under that name."""
    replaced_function = settings.rotation.replaced_function
    assert replaced_function is not None
    scope = guard.function.__globals__
    rotate = functools.partial(_rotate_instead, settings, scope[replaced_function.name])
    objects = (attn,) if processor is None else (processor, attn)
    return copy_of(guard.function, {**scope, replaced_function.name: rotate})(*objects, *args, **kwargs)


def _rotate_instead(settings: AttentionSettings, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs in place of ``original``, a function that rotates tensors."""
    rotation, replaced = settings.rotation, settings.rotation.replaced_function
    assert replaced is not None
    xs, rotary = replaced.tensors(args), replaced.rotary(args)
    if rotary is None or kwargs or any(x.dtype not in DTYPES or x.numel() == 0 for x in xs):
        return original(*args, **kwargs)
    rounding = settings.rounding_on(xs[0].device)
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in xs)
    if rounding is Rounding.EXACT and grad:
        return original(*args, **kwargs)
    form = rotation.format
    try:
        (table,) = form.pack(rotary, xs[0].device, rounding is Rounding.EXACT)
    except UnfitTable:
        return original(*args, **kwargs)
    if form.narrows and rounding is not Rounding.FAST:
        table = table.narrowed(xs[0].dtype)
    try:
        heads = [as_heads(x, rotation.layout, table.head_dim) for x in xs]
    except RuntimeError:  # channels that do not split into heads of this width
        return original(*args, **kwargs)
    if not all(x.ndim == 4 and fits(x, table, rotation) and x.shape[1] == table.tokens for x in heads):
        return original(*args, **kwargs)
    try:
        rotations = [settings.rotation_of(x, table, Align.START, rounding) for x in heads]
    except UnfitTable:
        return original(*args, **kwargs)
    first = rotations[0]
    if first is None or any(other is not first for other in rotations):
        return original(*args, **kwargs)
    rotated = [from_heads(x, rotation.layout) for x in rotate_heads(heads, first, settings.backend, inplace=False)]
    return rotated[0] if len(rotated) == 1 else tuple(rotated)


def _with_rotating_norms(
    processor: Any, attn: Any, guard: Guard, settings: AttentionSettings, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Runs the known code of a processor or module on a proxy whose norms rotate."""
    rotation = settings.rotation
    names = guard.parameters[1 if processor is None else 2 :]
    arguments = dict(zip(names, args, strict=False))
    arguments.update(kwargs)
    call = _prepared(attn, settings, arguments)
    proxy = call.proxy(attn)
    objects = (proxy,) if processor is None else (processor, proxy)
    if rotation.unrotated is not None:
        result = rotation.unrotated(*objects, guard.function, **arguments)
    elif rotation.replaced_function is not None:
        scope = {**guard.function.__globals__, rotation.replaced_function.name: functools.partial(_unchanged, rotation)}
        result = copy_of(guard.function, scope)(*objects, *args, **kwargs)
    else:
        for name in rotation.rotary:
            if name in kwargs:
                kwargs = {**kwargs, name: None}
            elif name in names[: len(args)]:
                index = names.index(name)
                args = (*args[:index], None, *args[index + 1 :])
        result = guard.function(*objects, *args, **kwargs)
    call.check(attn)
    return result


def _unchanged(rotation: AttentionRotation, *args: Any, **kwargs: Any) -> Any:
    """Runs in place of a function that rotates, if the norms have rotated: returns the tensors unchanged."""
    assert rotation.replaced_function is not None
    xs = rotation.replaced_function.tensors(args)
    return xs[0] if len(xs) == 1 else xs


def _prepared(attn: Any, settings: AttentionSettings, arguments: Mapping[str, Any]) -> RotatedCall:
    """The rotation of one call, whose ``arguments`` are by name.

    Raises:
        UnfitTable: rotary tensors are missing, or do not fit the tokens.
    """
    rotation = settings.rotation
    form = rotation.format
    rotary = rotation.rotary_tensors(arguments)
    hidden = arguments.get(rotation.covers[0].names[-1])
    if not isinstance(hidden, torch.Tensor) or hidden.dtype not in DTYPES or hidden.numel() == 0:
        raise UnfitTable
    rounding = settings.rounding_on(hidden.device)
    exact = rounding is Rounding.EXACT
    kind = (hidden.shape, hidden.dtype, hidden.device, torch.get_num_threads())
    if exact and (kind in settings.without_bits or wants_gradients(attn, arguments)):
        raise UnfitTable
    if vars(attn).get("fused_projections") and any(name in PROJECTIONS for name, _ in rotating_modules(attn, rotation)):
        raise UnfitTable
    tables = form.pack(rotary[0], hidden.device, exact)
    if len(rotary) > 1:
        tables = [table for argument in rotary for table in form.pack(argument, hidden.device, exact)]
    dim = 0 if rotation.layout is Layout.SHD else 1
    for index, table in enumerate(tables):
        if not rotation.covers[min(index, len(rotation.covers) - 1)].fit(arguments, dim, table.tokens):
            raise UnfitTable
    dtypes = {CastTo.INPUT: hidden.dtype, CastTo.PROJECTION: computed_dtype(hidden)}
    if form.narrows and rounding is not Rounding.FAST:
        tables = [table.narrowed(dtypes[CastTo.PROJECTION]) for table in tables]
    return RotatedCall(settings, tables, rounding, dtypes, kind)
