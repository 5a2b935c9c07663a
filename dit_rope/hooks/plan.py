"""What a patch replaces in one model, and what it does not patch. Every report looks it up again."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..spec import RopeSpec
from ..tables.scaling import axis_frequencies
from .adapter import AttentionRotation, ModelAdapter, ModelTables
from .attention import AttentionOverride, ProcessorOverride, why_unknown
from .class_override import (
    Installed,
    Override,
    PatchState,
    add_hooks,
    install,
    installed,
    is_bypassed,
    override_method,
    record_of,
    refresh_signature,
    release,
    release_all,
    unpatched_class,
)
from .forward_pass import BeginPass, EndPass
from .known_code import guard_of
from .log import log_not_patched
from .options import Fusion, Options
from .rope_modules import MemoizedMethod, RopeOverride, TableSettings, why_not_memoized
from .rotating_norms import AttentionSettings, rotating_modules, why_incomplete
from .traced import traced_code

# Names under which wrappers hold the module that they wrap: torch.compile, activation checkpointing, FSDP and DDP.
_WRAPPED = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})

_BYPASSED = "another library has replaced its forward"


@dataclass(frozen=True)
class TablesPlan:
    """An object that builds tables, and its entry in the adapter."""

    tables: ModelTables
    target: Any

    @property
    def builder(self) -> str:
        """The class name that the object has without a patch."""
        return unpatched_class(self.target).__name__

    def why_not_patched(self, patched: bool = False) -> str | None:
        """Why the object's own code builds its tables in every forward pass; None where they are memoized.

        ``patched`` tells whether an override should be in place.
        """
        if patched and self.tables.path and not isinstance(self.target, Override):
            return f"{self.tables.path} was replaced after the patch; undo it and patch again"
        if self.tables.path and self.tables.method == "forward" and is_bypassed(self.target):
            return f"another library has replaced the forward of {self.tables.path}"
        return why_not_memoized(self.target, self.tables)


@dataclass(frozen=True)
class RotationPlan:
    """One attention module, and its entry in the adapter."""

    rotation: AttentionRotation
    path: str
    attention: torch.nn.Module

    @property
    def holder(self) -> Any:
        """What holds the code that attends: the processor, or the module itself."""
        return getattr(self.attention, "processor", None) if self.rotation.processors else self.attention

    @property
    def method(self) -> str:
        """The method of :attr:`holder` that attends."""
        return "__call__" if self.rotation.processors else "forward"

    @property
    def names(self) -> list[str]:
        """The norms and projections of the module that rotate."""
        return [name for name, _ in rotating_modules(self.attention, self.rotation)]

    def modules(self) -> list[tuple[str, torch.nn.Module]]:
        """Names and modules of the norms and projections that rotate."""
        return [(name, getattr(self.attention, name)) for name in self.names]

    def why_not_patched(self, patched: bool) -> str | None:
        """Why the model's own code rotates here; ``patched`` tells whether an override should be in place."""
        rotation, holder = self.rotation, self.holder
        if holder is None:
            return "it has no processor"
        reason = why_unknown(holder, guard_of(unpatched_class(holder), self.method), rotation)
        if reason is not None:
            return reason
        reason = why_incomplete(self.attention, rotation)
        if reason is not None:
            return reason
        if not rotation.processors and is_bypassed(holder):
            return _BYPASSED
        if patched and not installed(self.attention):
            return "it was replaced after the patch; undo it and patch again"
        if patched and not isinstance(holder, Override):
            return "its processor was replaced, and is patched before the next forward pass"
        weight = next((x for x in self.attention.parameters() if x.is_floating_point()), None)
        if weight is not None and weight.dtype is torch.float64:
            return "its weights are float64, in which it rotates by itself"
        return None


@dataclass(frozen=True)
class PatchPlan:
    """Everything that a patch of one model concerns."""

    name: str
    model: torch.nn.Module
    adapter: ModelAdapter
    tables: tuple[TablesPlan, ...]
    rotations: tuple[RotationPlan, ...]
    state: PatchState = field(default_factory=PatchState, compare=False)

    def now(self) -> PatchPlan:
        """The plan of the model at this moment: its modules may have been replaced."""
        return replace(
            self, tables=_all_tables(self.model, self.adapter), rotations=_all_rotations(self.model, self.adapter)
        )

    def scaled_spec(self, options: Options) -> RopeSpec | None:
        """The spec with the scaling of ``options``; None without a scaling, or if a function chooses it.

        Raises:
            TypeError, ValueError: the model's axes cannot have the scaling.
        """
        if options.scaling is None:
            return None
        plan = next((plan for plan in self.tables if plan.tables.axes is not None), None)
        if plan is None or plan.tables.axes is None:
            raise ValueError(
                f"scaling must be None for {self.adapter.model_class}, which builds its own tables, "
                f"got {options.scaling!r}"
            )
        reason = plan.why_not_patched()
        if reason is not None:
            raise ValueError(
                f"scaling must be None where dit_rope does not know the code that builds tables, got "
                f"{options.scaling!r} for {plan.tables.path} of {self.name}: {reason}"
            )
        spec = plan.tables.axes.spec(plan.target)
        if callable(options.scaling):
            return None
        spec = spec.with_scaling(options.scaling)
        for axis in range(len(spec.dims)):
            axis_frequencies(spec, axis)
        return spec

    def apply(self, scaled: RopeSpec | None, options: Options) -> None:
        """Replaces what the plan names; ``scaled`` is :meth:`scaled_spec` of ``options``."""
        for plan in self.tables:
            self._apply_tables(plan, scaled, options)
        fuses_norm = options.fuse is Fusion.NORM_AND_ROTATION
        for rotation in self.rotations:
            path = f"{self.name}.{plain_path(rotation.path)}"
            traced = None
            if options.compiled and rotation.holder is not None:
                override = ProcessorOverride if rotation.rotation.processors else AttentionOverride
                traced = traced_code(rotation.holder, override, rotation.attention, rotation.rotation)
            settings = AttentionSettings(
                rotation.rotation, options.rounding, options.backend, fuses_norm, path, traced=traced
            )
            install_rotation(rotation.attention, settings, self.state)
        install(self.model, None, self.state)
        add_hooks(self.model, BeginPass(prepare_attention), EndPass())

    def _apply_tables(self, plan: TablesPlan, scaled: RopeSpec | None, options: Options) -> None:
        tables, target = plan.tables, plan.target
        path = f"{self.name}.{tables.path or tables.method}"
        reason = plan.why_not_patched()
        if reason is not None:
            log_not_patched(path, reason, set())
            return
        parameters = tuple(inspect.signature(getattr(target, tables.method)).parameters)
        axes = tables.axes
        spec = None if axes is None else axes.spec(target)
        choose = options.scaling if axes is not None and callable(options.scaling) else None
        settings = TableSettings(tables, parameters, spec, scaled if axes is not None else None, choose, name=path)
        if tables.path:
            _override(target, RopeOverride, settings, self.state, tables.method)
        elif tables.method not in vars(target):
            vars(target)[tables.method] = MemoizedMethod(target, tables.method, Installed(settings, self.state))

    def restore(self) -> None:
        """Removes what this plan installed and nothing else, also from objects that were moved since."""
        self.state.active = False
        for ref in self.state.objects:
            target = ref()
            if target is not None:
                release(target, self.state)
        # A block may have been replaced by a copy of itself. The copy is patched too, and the references above miss it.
        for module in self.model.modules():
            for target in list(_changeable(module)):
                record = record_of(target)
                for state in [] if record is None else list(record.states):
                    if state.origin is self.state.origin:
                        state.active = False
                        release(target, state)
        for name, value in list(vars(self.model).items()):
            if isinstance(value, MemoizedMethod) and self.state in value.record.states:
                del vars(self.model)[name]


def install_rotation(attention: Any, settings: AttentionSettings, state: PatchState) -> None:
    """Patches one attention module: its processor, if the adapter knows it, or its own forward."""
    if settings.rotation.processors:
        install(attention, settings, state)
        adopt_processor(attention)
    elif is_bypassed(attention):
        log_not_patched(settings.name, _BYPASSED, settings.logged)
    else:
        _override(attention, AttentionOverride, settings, state, "forward")


def adopt_processor(attention: Any) -> None:
    """Overrides the call of the current processor of a patched attention module, if its code is known."""
    record = installed(attention)
    processor = getattr(attention, "processor", None)
    if record is None or processor is None or not isinstance(record.settings, AttentionSettings):
        return
    cls = unpatched_class(processor)
    reason = why_unknown(processor, guard_of(cls, "__call__"), record.settings.rotation)
    if reason is not None:
        log_not_patched(record.settings.name, reason, record.settings.logged)
    else:
        for state in record.states:
            _override(processor, ProcessorOverride, None, state, "__call__")
        _register(type(processor), cls)


def _register(override: type, cls: type) -> None:
    """Registers ``override`` like ``cls`` in diffusers' registry of processors, in which layer skipping looks it up."""
    try:
        from diffusers.hooks._helpers import AttentionProcessorRegistry as Registry
    except ImportError:  # older versions of diffusers have no registry
        return
    with contextlib.suppress(ValueError):  # cls is not registered
        Registry.register(override, Registry.get(cls))


def _override(target: Any, override: type[Override], settings: object, state: PatchState, method: str) -> None:
    """As :func:`override_method`, but leaves an object alone if Python cannot change its class."""
    try:
        override_method(target, override, settings, state, method)
    except TypeError:
        release(target, state)


def prepare_attention(model: torch.nn.Module) -> None:
    """Before each forward pass: patches processors that were set since the patch, if their code is known."""
    record = installed(model)
    for state in record.states if record is not None else ():
        for ref in list(state.objects):
            target = ref()
            if isinstance(target, torch.nn.Module) and "processor" in vars(target):
                processor = vars(target)["processor"]
                if isinstance(processor, Override):
                    refresh_signature(processor)
                if installed(processor) is None:
                    adopt_processor(target)


def restore(model: torch.nn.Module) -> None:
    """Removes from ``model`` what any patch installed, and nothing else."""
    for module in model.modules():
        for target in list(_changeable(module)):
            record = record_of(target)
            if record is not None and target is model:
                for state in record.states:
                    state.active = False
            if record is not None or isinstance(target, Override):
                release_all(target)
        for name, value in list(vars(module).items()):
            if isinstance(value, MemoizedMethod):
                del vars(module)[name]


def is_patched(model: torch.nn.Module) -> bool:
    """Whether a patch of ``model``, or of the model that it is a copy of, is in force."""
    return installed(model) is not None


def _changeable(module: torch.nn.Module) -> Iterator[object]:
    """The objects that a patch may have changed: ``module`` and its attributes, such as its processor."""
    return itertools.chain((module,), vars(module).values())


def make_plan(name: str, model: torch.nn.Module, adapter: ModelAdapter) -> PatchPlan:
    """Finds in ``model`` everything that ``adapter`` describes.

    Raises:
        ValueError: it is patched already.
    """
    if is_patched(model):
        raise ValueError(
            f"{name} must not be patched already; undo its patch, or call dit_rope.unpatch on a copy of one"
        )
    return PatchPlan(name, model, adapter, _all_tables(model, adapter), _all_rotations(model, adapter))


def _all_tables(model: torch.nn.Module, adapter: ModelAdapter) -> tuple[TablesPlan, ...]:
    return tuple(plan for tables in adapter.tables if (plan := _find_tables(model, tables)) is not None)


def _all_rotations(model: torch.nn.Module, adapter: ModelAdapter) -> tuple[RotationPlan, ...]:
    return tuple(plan for rotation in adapter.rotations for plan in _find_rotations(model, rotation))


def _find_tables(model: torch.nn.Module, tables: ModelTables) -> TablesPlan | None:
    try:
        target = operator.attrgetter(tables.path)(model) if tables.path else model
    except AttributeError:
        return None
    return None if target is None else TablesPlan(tables, target)


def _find_rotations(model: torch.nn.Module, rotation: AttentionRotation) -> Iterator[RotationPlan]:
    pattern = re.compile(rotation.attention)
    for path, module in model.named_modules():
        inner = path.rpartition(".")[2]
        if inner not in _WRAPPED and getattr(module, "_orig_mod", None) is not None:
            continue  # a compiled module; the module inside comes next
        if pattern.fullmatch(plain_path(path)) and (rotation.when is None or _is_selected(rotation, model, module)):
            yield RotationPlan(rotation, path, module)


def _is_selected(rotation: AttentionRotation, model: torch.nn.Module, attention: torch.nn.Module) -> bool:
    assert rotation.when is not None
    try:
        return rotation.when(model, attention)
    except AttributeError:  # a module of another kind stands there
        return False


def plain_path(path: str) -> str:
    """``path`` without the names under which wrappers hold the module that they wrap."""
    return ".".join(name for name in path.split(".") if name not in _WRAPPED)
