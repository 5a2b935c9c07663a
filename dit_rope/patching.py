"""Puts dit_rope into diffusers models, and takes it out again."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from .backend_choice import check_backend, explain_backends
from .models import ADAPTERS, ModelAdapter
from .models.seams import (
    CheckRotation,
    NormSeam,
    NormSettings,
    RopeSeam,
    RopeSettings,
    Seam,
    TakeRotation,
    dense_tables,
    frame_positions,
    remove_hooks,
    restore_class,
    swap_class,
)
from .scaling import axis_frequencies
from .spec import Grid, Scaling, Scalings
from .tables import build_positions, build_table


class UnsupportedModelError(ValueError):
    """Nothing in what was given can be patched; the message names what can."""


@dataclass(frozen=True)
class _Plan:
    """Everything one model's patch will replace, checked before anything is."""

    name: str
    model: torch.nn.Module
    adapter: ModelAdapter
    rope: torch.nn.Module
    attentions: list[tuple[str, torch.nn.Module]]


@dataclass(frozen=True)
class _Options:
    """How a patched model computes, as :func:`patch` takes it."""

    exact: bool | None = None
    backend: str = "auto"
    scaling: Scalings | Callable[[], Scalings] = None

    def __post_init__(self) -> None:
        if self.exact is not None and not isinstance(self.exact, bool):
            raise TypeError(f"exact must be True, False or None, got {self.exact!r}")
        check_backend(self.backend)

    def rope_settings(self, plan: _Plan) -> RopeSettings:
        """What the rope module of ``plan`` is to build.

        Raises:
            TypeError, ValueError: for a scaling that the model's axes cannot have.
        """
        spec = plan.adapter.spec(plan.rope)
        if callable(self.scaling):
            return RopeSettings(spec, plan.adapter.frames, self.scaling)
        spec = spec.with_scaling(self.scaling)
        for axis in range(len(spec.dims)):
            axis_frequencies(spec, axis)
        return RopeSettings(spec, plan.adapter.frames)


@dataclass
class Patch:
    """A patch in place: what it replaced, and the way back. As a context manager it undoes itself at the end."""

    _plans: list[_Plan]
    _options: _Options
    active: bool = field(default=True, init=False)

    def report(self) -> str:
        """Every replaced object, the arithmetic and backend, and what was left alone and why."""
        state = "" if self.active else " (undone)"
        return "\n".join(f"{_describe(plan, self._options)}{state}" for plan in self._plans)

    def undo(self) -> None:
        """Gives every module its own class back and removes the hooks; a second call does nothing."""
        if self.active:
            for plan in self._plans:
                _restore(plan.model)
            self.active = False

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def patch(
    target: Any,
    *,
    exact: bool | None = None,
    backend: str = "auto",
    scaling: Scalings | Callable[[], Scalings] = None,
) -> Patch:
    """Replaces table building and rotation in a diffusers pipeline or transformer, in place, on these objects only.

    Args:
        target: a pipeline, whose supported transformers are all patched, or one transformer.
        exact: True for the same bits as the unpatched model in eager mode; False for float32 arithmetic rounded once,
            with norm and rotation in one pass; None for exact on CPU, where it costs little, and fast elsewhere.
        backend: ``"auto"``, ``"cuda"``, ``"triton"`` or ``"eager"``.
        scaling: what the model's frequencies are scaled by: a Scaling for all axes, or a tuple of one Scaling or None
            for frame, height and width. Or a function without arguments that returns one of these, called once in
            every forward pass of the model, for scalings that follow the timestep: it closes over what it looks at.
            Each value it returns is an entry of the table cache, which drops the oldest; ``torch.compile`` breaks its
            graph there. Scaled tables may be longer than the model's own.

    Returns:
        A handle with ``report()`` and ``undo()``, also a context manager.

    Raises:
        UnsupportedModelError: nothing in ``target`` can be patched; names the supported models.
        ValueError: it is patched already, its modules are not what this version knows, or the scaling is not one that
            its axes can have; nothing is changed then.
    """
    options = _Options(exact, backend, scaling)
    plans = _plans(target)
    settings = [options.rope_settings(plan) for plan in plans]
    try:
        for plan, rope_settings in zip(plans, settings, strict=True):
            _apply(plan, rope_settings, options)
    except BaseException:
        for plan in plans:
            _restore(plan.model)
        raise
    return Patch(plans, options)


def unpatch(target: Any) -> None:
    """Takes a patch out of a pipeline or transformer without its handle, such as out of a copy of a patched model."""
    for _, model in _modules(target):
        _restore(model)


def inspect(target: Any) -> str:
    """What :func:`patch` would do to ``target``, which is left as it is.

    Raises:
        UnsupportedModelError, ValueError: as :func:`patch`.
    """
    return "\n".join(_describe(plan, _Options()) for plan in _plans(target))


def _modules(target: Any) -> list[tuple[str, torch.nn.Module]]:
    """The modules of a pipeline by their names, or the one module given; compiled modules are unwrapped."""
    if isinstance(target, torch.nn.Module):
        found = [("model", target)]
    elif isinstance(components := getattr(target, "components", None), dict):
        found = [(name, part) for name, part in components.items() if isinstance(part, torch.nn.Module)]
    else:
        raise UnsupportedModelError(
            f"target must be a diffusers pipeline or transformer, got {type(target).__name__}; {_supported()}"
        )
    return [(name, getattr(module, "_orig_mod", module)) for name, module in found]


def _supported() -> str:
    return "supported models: " + ", ".join(adapter.model_class for adapter in ADAPTERS)


def _plans(target: Any) -> list[_Plan]:
    modules = _modules(target)
    found = [(name, module, adapter) for name, module in modules for adapter in ADAPTERS if adapter.matches(module)]
    if not found:
        got = ", ".join(f"{name}: {type(module).__name__}" for name, module in modules) or type(target).__name__
        raise UnsupportedModelError(f"target must hold a supported model, got {got}; {_supported()}")
    return [_plan(name, module, adapter) for name, module, adapter in found]


def _plan(name: str, model: torch.nn.Module, adapter: ModelAdapter) -> _Plan:
    if any(isinstance(module, Seam) for module in model.modules()):
        raise ValueError(
            f"{name} must not be patched already; undo its patch, or call dit_rope.unpatch on a copy of one"
        )
    rope = model.get_submodule(adapter.rope)
    attentions = list(adapter.attentions(model))
    _check_class(adapter.rope, rope, adapter.rope_class)
    for path, attention in attentions:
        _check_class(path, attention, adapter.attention_class)
    replaced = [path for path, module in [(adapter.rope, rope), *_norm_paths(attentions)] if "forward" in vars(module)]
    if replaced:
        raise ValueError(
            f"{name} must be patched before another library replaces the forward of its modules, got a replaced "
            f"forward in {', '.join(replaced[:3])}; patch first, then enable offloading or parallelism"
        )
    mismatch = _table_mismatch(rope, adapter)
    if mismatch:
        raise ValueError(f"{name} must build the tables that dit_rope knows for {adapter.model_class}, {mismatch}")
    return _Plan(name, model, adapter, rope, attentions)


def _norm_paths(attentions: list[tuple[str, torch.nn.Module]]) -> list[tuple[str, torch.nn.Module]]:
    return [
        (f"{path}.{norm}", getattr(attention, norm)) for path, attention in attentions for norm in ("norm_q", "norm_k")
    ]


def _check_class(path: str, module: torch.nn.Module, expected: str) -> None:
    if type(module).__name__ != expected:
        raise ValueError(
            f"{path} must be a {expected}, got {type(module).__name__}; this version of the model is not known"
        )


def _table_mismatch(rope: torch.nn.Module, adapter: ModelAdapter) -> str | None:
    """Where the rope module's tables and ours differ in a bit, if they do; a meta module has none to compare."""
    buffer = next(rope.buffers())
    if buffer.is_meta:
        return None
    spec = adapter.spec(rope)
    for latent in adapter.probes(rope, buffer.device):
        here = adapter.frames(rope, latent)
        table = build_table(spec, Grid(*here.grid), device=buffer.device, dtype=buffer.dtype)
        ours = dense_tables(spec, frame_positions(build_positions(table), here), table.rows)
        theirs = rope(latent)
        if not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
            return f"got other values on a grid of {here.grid}; were its buffers changed?"
    return None


def _apply(plan: _Plan, rope_settings: RopeSettings, options: _Options) -> None:
    adapter, spec = plan.adapter, rope_settings.spec
    swap_class(plan.rope, RopeSeam, rope_settings)
    settings = NormSettings(spec, adapter.norm, spec.rotary_dim, options.exact, options.backend)
    for _, norm in _norm_paths(plan.attentions):
        swap_class(norm, NormSeam, settings)
    for _, attention in plan.attentions:
        attention.register_forward_pre_hook(TakeRotation(spec, *adapter.rotary_argument), with_kwargs=True)
        attention.register_forward_hook(CheckRotation(), always_call=True)


def _restore(model: torch.nn.Module) -> None:
    """Takes out whatever a patch put in, and nothing else."""
    for module in model.modules():
        if isinstance(module, Seam):
            restore_class(module)
        remove_hooks(module)


def _scaling_of(scaling: Scalings | Callable[[], Scalings]) -> str:
    if callable(scaling):
        name = getattr(scaling, "__qualname__", type(scaling).__name__)
        return f"what {name} returns, asked once in every forward pass"
    if scaling is None or isinstance(scaling, Scaling):
        return f"{scaling or 'none'} on every axis"
    return ", ".join(f"{one or 'none'} on axis {axis}" for axis, one in enumerate(scaling))


def _describe(plan: _Plan, options: _Options) -> str:
    same = "bitwise equal to unpatched" if options.scaling is None else "rounded as unpatched"
    exact, fast = f"exact ({same})", "fast (float32, rounded once)"
    if options.exact is None:
        arithmetic = f"exact on CPU ({same}), fast elsewhere (float32, rounded once)"
    else:
        arithmetic = exact if options.exact else fast
    device = next(plan.model.parameters()).device
    if device.type == "meta":  # a model without weights, which would be loaded to where this machine computes
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    automatic = next(name for name, why in explain_backends(device) if why == "chosen")
    under_compile = "all of it" if options.scaling is None else "all but the scaled tables"
    cross = sum(1 for module in plan.model.modules() if type(module).__name__ == plan.adapter.attention_class)
    replaced = Counter(re.sub(r"\.\d+\.", ".*.", path) for path, _ in plan.attentions)
    lines = [
        f"{plan.name}: {plan.adapter.model_class}",
        f"  {plan.adapter.rope}: {plan.adapter.rope_class}, tables memoized, axis tables in place of dense ones",
        *(f"  {stem}.norm_q and .norm_k, {count} of each: norm and rotate" for stem, count in replaced.items()),
        *(f"  {stem}, {count}: two hooks, so that its processor does not rotate" for stem, count in replaced.items()),
        f"  arithmetic: {arithmetic}",
        f"  backend on {device}: {automatic if options.backend == 'auto' else options.backend}",
        *([] if options.scaling is None else [f"  frequencies scaled: {_scaling_of(options.scaling)}"]),
        f"  left alone under torch.compile: {under_compile}, because the compiler fuses the model's own code",
        f"  left alone: {cross - len(plan.attentions)} attention modules, which do not rotate",
    ]
    return "\n".join(lines)
