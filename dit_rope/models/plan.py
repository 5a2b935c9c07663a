"""What a patch will replace in one model: found and checked before anything is replaced, then put in and taken out."""

from __future__ import annotations

import inspect
import itertools
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..scaling import axis_frequencies
from ..spec import Fusion
from .adapter import GridTables, Layout, ModelAdapter, ModelTables, Rotations
from .formats import AxisRows, Format
from .grid_tables import GridSeam, GridSettings, table_mismatch
from .model_tables import ForgetArguments, MemoSeam, MemoSettings, MethodMemo, RememberArguments, forget
from .rebinding import ReboundSeam, ReboundSettings
from .seams import CheckRotation, TakeRotation, TurnSeam, TurnSettings
from .swapping import SETTINGS, Seam, add_hooks, is_bypassed, is_hooked, remove_hooks, restore_class, swap_class


@dataclass(frozen=True)
class Options:
    """How a patched model computes, as :func:`dit_rope.patch` takes it; ``scaling`` may be a function."""

    exact: bool | None = None
    backend: str = "auto"
    scaling: Any = None
    fuse: Fusion = Fusion.NORM_AND_ROTATION


@dataclass(frozen=True)
class TablesFound:
    """A declaration of tables, and the object it is about."""

    tables: GridTables | ModelTables
    target: Any

    @property
    def builder(self) -> str:
        """The class name that the object has without a patch."""
        name: str = getattr(type(self.target), "unpatched", type(self.target)).__name__
        return name


@dataclass(frozen=True)
class RotationFound:
    """One attention module: its path, the seams it gets, and where its rotary arguments stand."""

    rotations: Rotations
    path: str
    attention: torch.nn.Module
    turned: Mapping[str, TurnSettings]
    rotary: tuple[tuple[str, int | None], ...]

    @property
    def owner(self) -> Any:
        """What holds the code that rotates, where a name in it is bound to something else."""
        rebound = self.rotations.rebound
        assert rebound is not None
        return getattr(self.attention, rebound.owner) if rebound.owner else self.attention

    def seams(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """Attribute names and modules of the norms or projections that turn."""
        return ((name, getattr(self.attention, name)) for name in self.turned)


@dataclass(frozen=True)
class Plan:
    """Everything one model's patch will replace, checked before anything is."""

    name: str
    model: torch.nn.Module
    adapter: ModelAdapter
    tables: tuple[TablesFound, ...]
    rotations: tuple[RotationFound, ...]

    @property
    def grid(self) -> TablesFound | None:
        """The rope module that gets axis tables of ours."""
        return next((found for found in self.tables if isinstance(found.tables, GridTables)), None)

    def grid_settings(self, options: Options) -> GridSettings | None:
        """What the rope module is to build; None where the model keeps its own tables.

        Raises:
            TypeError, ValueError: for a scaling that the model's axes cannot have.
        """
        found = self.grid
        if found is None:
            if options.scaling is not None:
                raise ValueError(
                    f"scaling must be None for {self.adapter.model_class}, which builds its own tables, "
                    f"got {options.scaling!r}"
                )
            return None
        assert isinstance(found.tables, GridTables)
        spec = found.tables.spec(found.target)
        dense = not self.rotations  # and nobody else reads rows of axis tables
        if callable(options.scaling):
            return GridSettings(spec, found.tables.frames, options.scaling, dense)
        spec = spec.with_scaling(options.scaling)
        for axis in range(len(spec.dims)):
            axis_frequencies(spec, axis)
        return GridSettings(spec, found.tables.frames, dense=dense)

    def apply(self, settings: GridSettings | None, options: Options) -> None:
        """Replaces what the plan names; ``settings`` are :meth:`grid_settings` of ``options``."""
        remembers = False
        for found in self.tables:
            tables = found.tables
            if isinstance(found.target, Seam):
                continue  # two models of a pipeline may share a rope module
            if isinstance(tables, GridTables):
                swap_class(found.target, GridSeam, settings)
                continue
            parameters = tuple(inspect.signature(getattr(found.target, tables.method)).parameters)
            memo = MemoSettings(tables, parameters)
            if tables.path:
                swap_class(found.target, MemoSeam, memo, tables.method)
            else:
                vars(self.model)[tables.method] = MethodMemo(self.model, tables.method, memo)
            # A model's own method is told sizes, and not where the model computes.
            remembers = remembers or bool(tables.sources or tables.source_shapes or not tables.path)
        if remembers:
            names = tuple(inspect.signature(type(self.model).forward).parameters)[1:]
            add_hooks(self.model, RememberArguments(names), ForgetArguments())
        for rotation in self.rotations:
            _apply_rotation(rotation, form_of(rotation, settings), options)

    def restore(self) -> None:
        """Takes out whatever a patch put in, and nothing else."""
        restore(self.model)


def form_of(found: RotationFound, settings: GridSettings | None) -> Format | AxisRows:
    """The form of the rotary tensors that an attention module is given once it is patched."""
    if found.rotations.format is not None:
        return found.rotations.format
    assert settings is not None, "an adapter without formats has GridTables"
    return AxisRows(settings.spec)


def _apply_rotation(found: RotationFound, form: Format | AxisRows, options: Options) -> None:
    declared, attention = found.rotations, found.attention
    if declared.rebound is not None:
        assert isinstance(form, Format)
        settings = ReboundSettings(
            declared.rebound, form, declared.layout, bool(found.turned), options.exact, options.backend
        )
        known = not declared.processors or type(found.owner).__name__ in declared.processors
        if known and not isinstance(found.owner, Seam):  # attention modules may share a processor
            swap_class(found.owner, ReboundSeam, settings, declared.rebound.method)
    if declared.processor is not None and not isinstance(attention.processor, Seam):
        swap_class(attention.processor, declared.processor, declared, "__call__")
    if not found.turned or is_hooked(attention):
        return  # two models of a pipeline may share attention modules
    for name, module in found.seams():
        swap_class(module, declared.seam or TurnSeam, found.turned[name])
    once = frozenset(name for name, turned in found.turned.items() if not turned.repeats)
    take = TakeRotation(
        form,
        found.rotary,
        frozenset(found.turned),
        once,
        frozenset(declared.processors),
        declared.rebound is not None or declared.processor is not None,
        options.exact,
        options.backend,
        options.fuse is Fusion.NORM_AND_ROTATION,
    )
    add_hooks(attention, take, CheckRotation(len(once)))


def restore(model: torch.nn.Module) -> None:
    """Takes out of ``model`` whatever a patch put in, and nothing else."""
    for module in model.modules():
        for target in _swappable(module):
            if isinstance(target, Seam):
                settings = vars(target)[SETTINGS]
                if isinstance(settings, MemoSettings):
                    forget(settings.token)
                restore_class(target)
        for memo in [value for value in vars(module).values() if isinstance(value, MethodMemo)]:
            forget(memo.settings.token)
            del vars(module)[memo.method]
        remove_hooks(module)


def is_patched(model: torch.nn.Module) -> bool:
    """Whether something of a patch is in ``model``."""
    return any(
        is_hooked(module) or any(isinstance(target, (Seam, MethodMemo)) for target in _swappable(module))
        for module in model.modules()
    )


def _swappable(module: torch.nn.Module) -> Iterator[object]:
    """What of ``module`` may have a class of ours: itself, and what hangs on it without being a module."""
    return itertools.chain((module,), vars(module).values())


def make_plan(name: str, model: torch.nn.Module, adapter: ModelAdapter) -> Plan:
    """Finds in ``model`` everything that ``adapter`` declares.

    Raises:
        ValueError: it is patched already, or its modules are not what this version knows.
    """
    if is_patched(model):
        raise ValueError(
            f"{name} must not be patched already; undo its patch, or call dit_rope.unpatch on a copy of one"
        )
    tables = tuple(found for declared in adapter.tables if (found := _find_tables(name, model, declared)) is not None)
    rotations = tuple(found for declared in adapter.rotations for found in _find_rotations(name, model, declared))
    plan = Plan(name, model, adapter, tables, rotations)
    _check_forwards(plan)
    grid = plan.grid
    if grid is not None:
        assert isinstance(grid.tables, GridTables)
        mismatch = table_mismatch(grid.target, grid.tables)
        if mismatch:
            raise ValueError(f"{name} must build the tables that dit_rope knows for {adapter.model_class}, {mismatch}")
    return plan


def _find_tables(name: str, model: torch.nn.Module, declared: GridTables | ModelTables) -> TablesFound | None:
    try:
        target = operator.attrgetter(declared.path)(model) if declared.path else model
    except AttributeError:
        target = None
    if isinstance(declared, GridTables):
        _check_class(declared.path, target, declared.builder)
        return TablesFound(declared, target)
    if target is None and declared.optional:
        return None
    if declared.path:  # a model's own class has been matched, and may be derived from it
        _check_class(declared.path, target, declared.builder)
    if not callable(getattr(target, declared.method, None)):
        raise ValueError(f"{declared.path or name} must have a method {declared.method}, got {type(target).__name__}")
    parameters = inspect.signature(type(model).forward).parameters
    missing = [source for source in (*declared.sources, *declared.source_shapes) if source not in parameters]
    if missing:
        raise ValueError(
            f"{name} must take {', '.join(missing)}, from which {declared.path or declared.method} builds its tables, "
            f"got {type(model).__name__}.forward({', '.join(parameters)})"
        )
    return TablesFound(declared, target)


def _find_rotations(name: str, model: torch.nn.Module, declared: Rotations) -> Iterator[RotationFound]:
    pattern = re.compile(declared.attention)
    for path, module in model.named_modules():
        if not pattern.fullmatch(path):
            continue
        if declared.when is not None and not declared.when(model, module):
            continue
        _check_class(path, module, declared.attention_class)
        turned = {settings.name: settings for settings in _turned(module, declared)}
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
        names = [parameter.name for parameter in parameters]
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        unknown = [argument for argument in declared.rotary if argument not in names and not takes_any]
        if unknown or (declared.turned and not turned):
            what = f"take {', '.join(unknown)}" if unknown else f"have {' or '.join(declared.turned)}"
            raise ValueError(
                f"{path} of {name} must {what}, got {type(module).__name__}({', '.join(names)}); "
                "this version of the model is not known"
            )
        places = ((argument, names.index(argument) if argument in names else None) for argument in declared.rotary)
        yield RotationFound(declared, path, module, turned, tuple(places))


def _turned(attention: torch.nn.Module, declared: Rotations) -> Iterator[TurnSettings]:
    """What turns in ``attention``: the norms that it has, and projections for those it lacks."""
    for name, turned in declared.turned.items():
        if isinstance(getattr(attention, name, None), torch.nn.Module):
            layout, part = declared.layout, name
        elif turned.projection is not None and isinstance(getattr(attention, turned.projection, None), torch.nn.Module):
            layout, part = Layout.BSC, turned.projection
        else:
            continue
        head_dim = None if declared.head_dim is None else declared.head_dim(attention)
        how = (layout, head_dim, turned.repeats, turned.still, declared.rounds, declared.result)
        yield TurnSettings(part, turned.table, turned.align, *how)


def _check_class(path: str, target: object, expected: str | tuple[str, ...]) -> None:
    names = (expected,) if isinstance(expected, str) else expected
    if type(target).__name__ not in names:
        raise ValueError(
            f"{path} must be a {' or '.join(names)}, got {type(target).__name__}; "
            "this version of the model is not known"
        )


def _check_forwards(plan: Plan) -> None:
    """Another library's forward, put into a module itself, would run in place of ours, unless we know how it wraps."""
    ours = {
        **{found.tables.path: found.target for found in plan.tables if found.tables.path},
        **{f"{found.path}.{name}": module for found in plan.rotations for name, module in found.seams()},
    }
    replaced = [path for path, target in ours.items() if is_bypassed(target)]
    if replaced:
        raise ValueError(
            f"{plan.name} must be patched before another library replaces the forward of its modules, got a replaced "
            f"forward in {', '.join(replaced[:3])}; patch first, then enable offloading or parallelism"
        )
