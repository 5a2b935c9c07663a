"""Patches diffusers models, and removes patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch

from .adapters import UnsupportedModelError, adapter_of, supported_models, unsupported
from .hooks.adapter import ModelAdapter
from .hooks.options import Fusion, Options
from .hooks.plan import PatchPlan, make_plan, restore
from .hooks.report import describe
from .rotation.choice import check_backend
from .rotation.rounding import Rounding, rounding_of
from .scalars import check_flags
from .spec import Scalings


@dataclass
class Patch:
    """A patch of a model or pipeline. As a context manager it undoes itself at the end."""

    _plans: list[PatchPlan]
    _options: Options

    @property
    def active(self) -> bool:
        """Whether the patch is in force: not undone, by :meth:`undo` or by :func:`unpatch`."""
        return any(plan.state.active for plan in self._plans)

    def report(self) -> str:
        """A text: what is replaced at this moment, the arithmetic and backend, and what is not patched and why."""
        return "\n".join(describe(plan, self._options) for plan in self._plans)

    def undo(self) -> None:
        """Restores the class of every patched object and removes the hooks, even if objects were moved since.

        A second call does nothing. Other patches of the same model stay.
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
    rounding: Rounding | None = None,
    backend: str = "auto",
    scaling: Scalings | Callable[[], Scalings] = None,
    fuse: Fusion = Fusion.NORM_AND_ROTATION,
    compiled: bool = False,
) -> Patch:
    """Replaces table building and rotation in a diffusers pipeline or transformer, in place, on these objects only.

    Args:
        target: a pipeline, whose supported transformers are all patched, or one transformer.
        exact: the same as ``rounding=Rounding.EXACT`` (True) or ``Rounding.FAST`` (False).
        rounding: ``Rounding.EXACT`` for the same bits as the unpatched model in eager mode; ``Rounding.MODEL`` for norm
            and rotation in one pass that rounds where the model does; ``Rounding.FAST`` for one pass in float32,
            rounded once. None for exact on a CPU, where it costs little, and the model's elsewhere.
        backend: ``"auto"``, ``"cuda"``, ``"triton"`` or ``"eager"``.
        scaling: what the model's frequencies are scaled by: a Scaling for all axes, or a tuple of one Scaling or None
            for frame, height and width. Or a function without arguments that returns one of these, called once in
            every forward pass of the model, for scalings that follow the timestep. Each returned value makes two
            entries in the table cache, which drops the oldest entries; ``torch.compile`` breaks its graph there. Scaled
            tables may be longer than the model's own.
        fuse: what dit_rope computes for queries and keys: norm and rotation, the rotation alone, or nothing, which
            leaves memoized tables. Smaller values show the gain of each part. A model that cannot have the value gets
            the next smaller one, and the report says so.
        compiled: True puts the operators of dit_rope into graphs of ``torch.compile`` and ``torch.export``; False
            leaves those to the model's own code, which the compiler fuses. Which is faster has not been measured.

    Returns:
        A handle with ``report()`` and ``undo()``, also a context manager.

    Raises:
        UnsupportedModelError: nothing in ``target`` can be patched; the message names the supported models.
        TypeError: an argument has another type.
        ValueError: the backend is unknown, ``target`` is patched already, its axes cannot have the scaling, or its
            tables are built by unknown code, which a scaling would replace. ``target`` is unchanged after an error.
            Without a scaling, unknown code is not an error: it runs as it is, and the report names it.

    Example:
        >>> import dit_rope
        >>> from diffusers import LTXVideoTransformer3DModel
        >>> config = dict(num_attention_heads=2, attention_head_dim=24, cross_attention_dim=48, caption_channels=16)
        >>> model = LTXVideoTransformer3DModel(in_channels=4, out_channels=4, num_layers=2, **config)
        >>> with dit_rope.patch(model) as handle:
        ...     for line in handle.report().splitlines()[:3]:
        ...         print(line)
        model: LTXVideoTransformer3DModel
          rope: LTXVideoRotaryPosEmbed, tables memoized
          transformer_blocks.*.attn1 (2 modules): norm_q, norm_k norm and rotate
    """
    rounding = _rounding_of(exact, rounding)
    check_backend(backend)
    check_flags(compiled=compiled)
    if not isinstance(fuse, Fusion):
        raise TypeError(f"fuse must be a Fusion, got {fuse!r}")
    options = Options(rounding, backend, scaling, fuse, compiled)
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


def _rounding_of(exact: bool | None, rounding: Rounding | None) -> Rounding | None:
    """The rounding that a caller asks for; None for the default of the device."""
    if exact is not None and not isinstance(exact, bool):
        raise TypeError(f"exact must be True, False or None, got {exact!r}")
    if exact is not None and rounding is not None:
        raise ValueError(f"rounding must be None with exact={exact!r}, got {rounding!r}; leave exact out")
    return None if exact is None and rounding is None else rounding_of(bool(exact), rounding)


def unpatch(target: Any) -> None:
    """Removes all patches from a pipeline or transformer without their handles, such as from a copy of a patched model.

    A model without a patch stays as it is.

    Raises:
        UnsupportedModelError: ``target`` is neither a pipeline nor a transformer.

    Example:
        >>> import copy, dit_rope
        >>> from diffusers import LTXVideoTransformer3DModel
        >>> model = LTXVideoTransformer3DModel(num_layers=1, num_attention_heads=1, attention_head_dim=24)
        >>> handle = dit_rope.patch(model)
        >>> dit_rope.unpatch(copy.deepcopy(model))
        >>> handle.active
        True
        >>> dit_rope.unpatch(model)
        >>> handle.active
        False
    """
    for _, model in _modules(target):
        restore(model)


def inspect(target: Any) -> str:
    """The report of :func:`patch` for ``target``, which is not changed.

    Raises:
        UnsupportedModelError, ValueError: as :func:`patch`.

    Example:
        >>> import dit_rope.patching
        >>> from diffusers import LTXVideoTransformer3DModel
        >>> model = LTXVideoTransformer3DModel(num_layers=1, num_attention_heads=1, attention_head_dim=24)
        >>> print(dit_rope.patching.inspect(model).splitlines()[1])
          rope: LTXVideoRotaryPosEmbed, tables memoized
    """
    return "\n".join(describe(plan, Options()) for plan in _plans(target, Fusion.NORM_AND_ROTATION))


def _modules(target: Any) -> list[tuple[str, torch.nn.Module]]:
    """The modules of a pipeline by name, or ``target`` itself; compiled modules are unwrapped."""
    if isinstance(target, torch.nn.Module):
        modules = [("model", target)]
    elif isinstance(components := getattr(target, "components", None), dict):
        modules = [(name, value) for name, value in components.items() if isinstance(value, torch.nn.Module)]
    else:
        raise UnsupportedModelError(
            f"target must be a diffusers pipeline or transformer, got {type(target).__name__}; {supported_models()}"
        )
    return [(name, getattr(module, "_orig_mod", module)) for name, module in modules]


def _plans(target: Any, fuse: Fusion) -> list[PatchPlan]:
    modules = _modules(target)
    supported = [model for name, module in modules for model in _supported_in(name, module)]
    if not supported:
        raise unsupported(modules)
    if fuse is Fusion.NOTHING:
        supported = [(name, module, replace(adapter, rotations=())) for name, module, adapter in supported]
    return [make_plan(*model) for model in supported]


def _supported_in(name: str, module: torch.nn.Module) -> list[tuple[str, torch.nn.Module, ModelAdapter]]:
    """``module`` itself, or the supported models in it: a multiple ControlNet holds several."""
    adapter = adapter_of(module)
    if adapter is not None:
        return [(name, module, adapter)]
    return [model for path, child in module.named_children() for model in _supported_in(f"{name}.{path}", child)]
