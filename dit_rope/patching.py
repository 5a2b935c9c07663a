"""Puts dit_rope into diffusers models, and takes it out again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch

from .adapters import UnsupportedModelError, adapter_of, supported_models, unsupported
from .hooks.adapter import ModelAdapter
from .hooks.plan import Options, PatchPlan, make_plan, restore
from .hooks.report import describe
from .rotation.choice import check_backend
from .spec import Fusion, Scalings


@dataclass
class Patch:
    """A patch in place: what it replaced, and the way back. As a context manager it undoes itself at the end."""

    _plans: list[PatchPlan]
    _options: Options

    @property
    def active(self) -> bool:
        """Whether the patch is in force: not undone, by :meth:`undo` or by :func:`unpatch`."""
        return any(plan.state.active for plan in self._plans)

    def report(self) -> str:
        """What is replaced at this moment, the arithmetic and backend, and what is left alone and why."""
        return "\n".join(describe(plan, self._options) for plan in self._plans)

    def undo(self) -> None:
        """Gives every object its own class back and removes the hooks, wherever it is by now.

        A second call does nothing, and neither does one after another patch of the same model.
        """
        for plan in self._plans:
            plan.restore()

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
    fuse: Fusion = Fusion.NORM_AND_ROTATION,
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
            Each value it returns is two entries of the table cache, which drops the oldest; ``torch.compile`` breaks
            its graph there. Scaled tables may be longer than the model's own.
        fuse: how much of what happens to queries and keys is taken over: norm and rotation, the rotation, or nothing,
            which leaves memoized tables. Smaller values show what each part gains. The report says where
            a model cannot have what was asked for, and has the next smaller instead.

    Returns:
        A handle with ``report()`` and ``undo()``, also a context manager.

    Raises:
        UnsupportedModelError: nothing in ``target`` can be patched; names the supported models.
        TypeError: an argument of another type.
        ValueError: an unknown backend, ``target`` is patched already, or a scaling that its axes cannot have, or whose
            tables would replace those of code that is not known. Nothing is changed then. A module that is not what
            this version knows is no error otherwise: it is left to its own code, and the report names it.
    """
    if exact is not None and not isinstance(exact, bool):
        raise TypeError(f"exact must be True, False or None, got {exact!r}")
    check_backend(backend)
    if not isinstance(fuse, Fusion):
        raise TypeError(f"fuse must be a Fusion, got {fuse!r}")
    options = Options(exact, backend, scaling, fuse)
    plans = _plans(target, fuse)
    scaled = [plan.scaled_spec(options) for plan in plans]
    try:
        for plan, spec in zip(plans, scaled, strict=True):
            plan.apply(spec, options)
    except BaseException:
        for plan in plans:
            plan.restore()
        raise
    return Patch(plans, options)


def unpatch(target: Any) -> None:
    """Takes a patch out of a pipeline or transformer without its handle, such as out of a copy of a patched model.

    Raises:
        UnsupportedModelError: ``target`` is neither; a model without a patch is left as it is.
    """
    for _, model in _modules(target):
        restore(model)


def inspect(target: Any) -> str:
    """What :func:`patch` would do to ``target``, which is left as it is.

    Raises:
        UnsupportedModelError, ValueError: as :func:`patch`.
    """
    return "\n".join(describe(plan, Options()) for plan in _plans(target, Fusion.NORM_AND_ROTATION))


def _modules(target: Any) -> list[tuple[str, torch.nn.Module]]:
    """The modules of a pipeline by their names, or the one module given; compiled modules are unwrapped."""
    if isinstance(target, torch.nn.Module):
        found = [("model", target)]
    elif isinstance(components := getattr(target, "components", None), dict):
        found = [(name, part) for name, part in components.items() if isinstance(part, torch.nn.Module)]
    else:
        raise UnsupportedModelError(
            f"target must be a diffusers pipeline or transformer, got {type(target).__name__}; {supported_models()}"
        )
    return [(name, getattr(module, "_orig_mod", module)) for name, module in found]


def _plans(target: Any, fuse: Fusion) -> list[PatchPlan]:
    modules = _modules(target)
    found = [each for name, module in modules for each in _supported_in(name, module)]
    if not found:
        raise unsupported(modules)
    if fuse is Fusion.NOTHING:
        found = [(name, module, replace(adapter, rotations=())) for name, module, adapter in found]
    return [make_plan(*each) for each in found]


def _supported_in(name: str, module: torch.nn.Module) -> list[tuple[str, torch.nn.Module, ModelAdapter]]:
    """``module`` itself, or the supported models that it wraps, as a multiple ControlNet does."""
    adapter = adapter_of(module)
    if adapter is not None:
        return [(name, module, adapter)]
    return [found for path, part in module.named_children() for found in _supported_in(f"{name}.{path}", part)]
