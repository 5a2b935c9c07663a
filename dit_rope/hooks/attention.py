"""How queries and keys rotate as the norms of an attention module return them.

The attention processor, or an attention module without one, gets a subclass of its own class, whose call does this:
where all the code it is about to run is known, it runs that code on a stand-in of the attention module, whose norms (or
projections, where there is no norm) rotate what they return, and without the rotary tensors, so that the code does not
rotate. The stand-in lives for one call and shares everything with the module but those names. So nothing is left for
anybody to find or to miss: whatever wraps, hooks, compiles or replaces the module, its norms or its processor sees what
it would see without a patch, and a call that does not get this far is the model's own.

Wherever something is not known, or the tables are not those of these tokens, the model's own code rotates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..torch_state import in_transform
from .adapter import AttentionRotation, CastTo, Layout
from .class_override import INSTALLED, Installed, Override, copy_of, unpatched_class, unpatched_method
from .heads import as_given, as_heads, fits, rotate_heads
from .known_code import Guard, guard_of
from .log import log_not_patched
from .packed_tables import Align, UnfitTable
from .rotating_norms import DTYPES, AttentionSettings, RotatedCall, rotating_modules, why_incomplete

_PROJECTIONS = frozenset({"to_q", "to_k"})


class ProcessorOverride(Override):
    """The call of an attention processor."""

    def replacement(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """What the processor returns; ``attn`` is given to its code as a stand-in where its norms rotate."""
        if torch.compiler.is_compiling() or in_transform():
            return unpatched_method(self, "__call__")(attn, *args, **kwargs)
        record: Installed | None = getattr(attn, "__dict__", {}).get(INSTALLED)
        if record is not None and record.active and isinstance(record.settings, AttentionSettings):
            guard = guard_of(unpatched_class(self), "__call__")
            result = _rotated_call(self, attn, guard, record.settings, args, kwargs)
            if result is not _LEFT:
                return result
        return unpatched_method(self, "__call__")(attn, *args, **kwargs)


class AttentionOverride(Override):
    """The forward of an attention module that attends by itself, without a processor."""

    def replacement(self, *args: Any, **kwargs: Any) -> Any:
        """What the forward returns; it runs on a stand-in of the module where the norms of that rotate."""
        if torch.compiler.is_compiling() or in_transform():
            return unpatched_method(self)(*args, **kwargs)
        record: Installed | None = vars(self).get(INSTALLED)
        if record is not None and record.active:
            guard = guard_of(unpatched_class(self), "forward")
            result = _rotated_call(None, self, guard, record.settings, args, kwargs)
            if result is not _LEFT:
                return result
        return unpatched_method(self)(*args, **kwargs)


_LEFT = object()


def _rotated_call(
    processor: Any, attn: Any, guard: Guard, settings: AttentionSettings, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The call with rotating norms, or with a rotating function; _LEFT where the model's own code has to run."""
    holder = attn if processor is None else processor
    reason = why_unknown(holder, guard, settings.rotations) or why_incomplete(attn, settings.rotations)
    if reason is None:
        run = _with_rotating_norms if settings.rotations.norms else _with_rotating_function
        try:
            return run(processor, attn, guard, settings, args, kwargs)
        except UnfitTable:
            reason = "its tables, dtypes or gradients do not allow it in this call"
    log_not_patched(settings.name, reason, settings.logged)
    return _LEFT


def why_unknown(holder: Any, guard: Guard, declared: AttentionRotation) -> str | None:
    """Why the code of a processor, or of an attention module, is not what ``declared`` was written for."""
    if guard.unknown is not None:
        return guard.unknown
    owner = guard.owner
    if owner not in (declared.processors or (declared.attention_class,)):
        return f"{owner} is not a processor that it knows there"
    name = guard.overridden_in(holder)
    if name is not None and (name != "forward" or "forward" not in guard.slot):
        return f"{owner} holds a {name} of its own"
    return None


def _with_rotating_function(
    processor: Any, attn: Any, guard: Guard, settings: AttentionSettings, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Runs code that rotates through a function of its module, with ours under that function's name."""
    replaced_function = settings.rotations.replaced_function
    assert replaced_function is not None
    scope = guard.function.__globals__
    stand_in = functools.partial(_rotate_instead, settings, scope[replaced_function.name])
    given = (attn,) if processor is None else (processor, attn)
    return copy_of(guard.function, {**scope, replaced_function.name: stand_in})(*given, *args, **kwargs)


def _rotate_instead(settings: AttentionSettings, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs in place of ``own``, a function that rotates tensors."""
    declared, replaced = settings.rotations, settings.rotations.replaced_function
    assert replaced is not None
    xs, rotary = replaced.tensors(args), replaced.rotary(args)
    if rotary is None or kwargs or any(x.dtype not in DTYPES or x.numel() == 0 for x in xs):
        return own(*args, **kwargs)
    exact = settings.is_exact(xs[0].device)
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in xs)
    if exact and grad:
        return own(*args, **kwargs)
    form = declared.format
    try:
        (table,) = form.pack(rotary, xs[0].device, exact)
    except UnfitTable:
        return own(*args, **kwargs)
    if exact and form.narrows:
        table = table.narrowed(xs[0].dtype)
    try:
        heads = [as_heads(x, declared.layout, table.head_dim) for x in xs]
    except RuntimeError:  # channels that are no heads of this width
        return own(*args, **kwargs)
    if not all(x.ndim == 4 and fits(x, table, declared) and x.shape[1] == table.tokens for x in heads):
        return own(*args, **kwargs)
    args_of = table.args(table.tokens, Align.START, exact)
    rotated = [as_given(x, declared.layout) for x in rotate_heads(heads, args_of, settings.backend, inplace=False)]
    return rotated[0] if len(rotated) == 1 else tuple(rotated)


def _with_rotating_norms(
    processor: Any, attn: Any, guard: Guard, settings: AttentionSettings, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Runs the known code of a processor, or of a module, on a stand-in whose norms rotate what they return."""
    declared = settings.rotations
    names = guard.parameters[1 if processor is None else 2 :]
    arguments = dict(zip(names, args, strict=False))
    arguments.update(kwargs)
    call = _prepared(attn, settings, arguments)
    stand_in = call.stand_in(attn)
    given = (stand_in,) if processor is None else (processor, stand_in)
    if declared.unrotated is not None:
        result = declared.unrotated(*given, guard.function, **arguments)
    elif declared.replaced_function is not None:
        scope = {**guard.function.__globals__, declared.replaced_function.name: functools.partial(_pass_on, declared)}
        result = copy_of(guard.function, scope)(*given, *args, **kwargs)
    else:
        for name in declared.rotary:
            if name in kwargs:
                kwargs = {**kwargs, name: None}
            elif name in names[: len(args)]:
                index = names.index(name)
                args = (*args[:index], None, *args[index + 1 :])
        result = guard.function(*given, *args, **kwargs)
    call.check(attn)
    return result


def _pass_on(declared: AttentionRotation, *args: Any, **kwargs: Any) -> Any:
    """Stands in for a function that rotates, where the norms have done so."""
    assert declared.replaced_function is not None
    xs = declared.replaced_function.tensors(args)
    return xs[0] if len(xs) == 1 else xs


def _prepared(attn: Any, settings: AttentionSettings, arguments: Mapping[str, Any]) -> RotatedCall:
    """The rotation of one call, whose ``arguments`` are by name.

    Raises:
        UnfitTable: there is nothing to rotate by, or the tables are not those of these tokens.
    """
    declared = settings.rotations
    form = declared.format
    rotary = declared.rotary_tensors(arguments)
    hidden = arguments.get(declared.covers[0].names[-1])
    if not isinstance(hidden, torch.Tensor) or hidden.dtype not in DTYPES or hidden.numel() == 0:
        raise UnfitTable
    exact = settings.is_exact(hidden.device)
    if exact and _wants_gradients(attn, arguments):
        raise UnfitTable
    if vars(attn).get("fused_projections") and any(
        name in _PROJECTIONS for name, _ in rotating_modules(attn, declared)
    ):
        raise UnfitTable
    tables = form.pack(rotary[0], hidden.device, exact)
    if len(rotary) > 1:
        tables = [table for each in rotary for table in form.pack(each, hidden.device, exact)]
    dim = 0 if declared.layout is Layout.SHD else 1
    for index, table in enumerate(tables):
        if not declared.covers[min(index, len(declared.covers) - 1)].fit(arguments, dim, table.tokens):
            raise UnfitTable
    dtypes = {CastTo.INPUT: hidden.dtype, CastTo.PROJECTION: _computed_dtype(hidden)}
    if exact and form.narrows:
        tables = [table.narrowed(dtypes[CastTo.PROJECTION]) for table in tables]
    return RotatedCall(settings, tables, exact, dtypes)


def _wants_gradients(attn: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether a backward pass may follow, whose bits depend on more than ours can say: the memory layout of every part.

    In exact mode it is the model's own.
    """
    if not torch.is_grad_enabled():
        return False
    inputs = (x.requires_grad for x in arguments.values() if isinstance(x, torch.Tensor))
    return any(inputs) or any(parameter.requires_grad for parameter in attn.parameters())


def _computed_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype of queries and keys that are projected from ``hidden``."""
    kind = hidden.device.type
    # There is no autocast on the meta device, not even to ask about.
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else hidden.dtype
