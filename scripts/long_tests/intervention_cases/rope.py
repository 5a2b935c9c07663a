"""What builds tables, replaced or changed: functions, classes, instances, attributes, buffers; by step and at once."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import torch

from .core import NotApplicable, Subject, intervention
from .parts import building_globals, parent_of, rotated_twice, rotating_globals, tables_rotated_back


def _same(value: Any) -> Any:
    return value


def _passing(function: Any) -> Any:
    return functools.wraps(function)(lambda *args, **kwargs: function(*args, **kwargs))


def _tables_changed(function: Any) -> Any:
    return functools.wraps(function)(lambda *args, **kwargs: tables_rotated_back(function(*args, **kwargs)))


def _globals_replaced(which: Any, change: Any, attribute: str) -> Any:
    def put(subject: Subject) -> None:
        if attribute == "ropes":
            subject.modules("ropes")
        functions = list(which(subject.parts))
        if not functions:
            raise NotApplicable("no such functions")
        for space, name, function in functions:
            space[name] = change(function)
            subject.off(space.__setitem__, name, function)

    return put


intervention("functions that rotate wrapped")(_globals_replaced(rotating_globals, _passing, "attentions"))
intervention("functions that rotate replaced", changes=True)(
    _globals_replaced(rotating_globals, rotated_twice, "attentions")
)
intervention("functions that build tables wrapped")(_globals_replaced(building_globals, _passing, ""))
intervention("functions that build tables replaced", changes=True)(
    _globals_replaced(building_globals, _tables_changed, "")
)


@intervention("functions that rotate replaced in step 1 alone", changes=True)
def by_step(subject: Subject) -> None:
    """An ablation that comes and goes between steps."""
    functions = list(rotating_globals(subject.parts))
    if not functions:
        raise NotApplicable("no such functions")

    def before_step(number: int) -> None:
        for space, name, function in functions:
            space[name] = rotated_twice(function) if number == 1 else function

    subject.before_step = before_step
    subject.off(before_step, 0)


def _instances(change: Any) -> Any:
    def put(subject: Subject) -> None:
        for module in subject.modules("ropes"):
            subject.assign(module, "forward", change(module.forward))

    return put


def _classes(change: Any) -> Any:
    def put(subject: Subject) -> None:
        for cls in subject.classes("ropes"):
            subject.assign(cls, "forward", change(cls.forward))

    return put


intervention("rope.forward wrapped")(_instances(_passing))
intervention("rope.forward gives other tables", changes=True)(_instances(_tables_changed))
intervention("forward of the rope class wrapped")(_classes(_passing))
intervention("forward of the rope class gives other tables", changes=True)(_classes(_tables_changed))


def _exchanged(same_name: bool, change: Any) -> Any:
    """RIFLEx' way: a rope module of a derived class in the place of the model's."""

    def put(subject: Subject) -> None:
        subject.modules("ropes")
        other = subject.example.build(subject.dtype)
        for path in subject.parts.ropes:
            cls: Any = subject.parts.classes[path]
            module = other.get_submodule(path)

            def forward(self: Any, *args: Any, cls: Any = cls, **kwargs: Any) -> Any:
                return change(cls.forward(self, *args, **kwargs))

            names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__} if same_name else {}
            name = cls.__name__ if same_name else "MyRope"
            body = {"forward": functools.wraps(cls.forward)(forward), **names}
            module.__class__ = type(name, (cls,), body)
            parent, attribute = parent_of(subject.model, path)
            subject.assign(parent, attribute, module)

    return put


intervention("rope exchanged for a copy")(_exchanged(False, _same))
intervention("rope exchanged for another", changes=True)(_exchanged(False, tables_rotated_back))
intervention("rope exchanged for another of the same name", changes=True)(_exchanged(True, tables_rotated_back))


def _by_timestep(where: str) -> Any:
    """DyPE's way: the tables follow the step; what says which step is where only the code that uses it knows."""

    def put(subject: Subject) -> None:
        modules = subject.modules("ropes")
        told: dict[str, int] = {"step": 0}

        def changed(tables: Any) -> Any:
            return tables_rotated_back(tables) if told["step"] == 1 else tables

        if where == "class":
            for cls in subject.classes("ropes"):
                real = cls.forward
                subject.assign(cls, "forward", lambda *a, real=real, **k: changed(real(*a, **k)))
        else:
            for module in modules:
                real = module.forward
                subject.assign(module, "told", told)
                subject.assign(module, "forward", lambda *a, real=real, **k: changed(real(*a, **k)))
        subject.before_step = lambda number: told.update(step=number)

    return put


intervention("rope class follows the timestep", changes=True)(_by_timestep("class"))
intervention("rope instance follows the timestep", changes=True)(_by_timestep("instance"))


_NUMBERS = re.compile(r"theta|base|fps|scale|max_position_embeddings|offset")


@intervention("attributes of ropes change from step to step", changes=True)
def attributes(subject: Subject) -> None:
    """Every number that a rope module keeps, in step 1 alone."""
    tensors = [
        (module, name, value)
        for module in subject.modules("ropes")
        for name, value in vars(module).items()
        if _NUMBERS.search(name) and isinstance(value, int | float) and not isinstance(value, bool)
    ]
    if not tensors:
        raise NotApplicable("no numbers in ropes")

    def before_step(number: int) -> None:
        for module, name, value in tensors:
            setattr(module, name, type(value)(value * 2) if number == 1 else value)

    subject.before_step = before_step
    subject.off(before_step, 0)


def _tensors_of(subject: Subject) -> list[tuple[torch.nn.Module, str, torch.Tensor]]:
    tensors = [
        (module, name, value)
        for module in subject.modules("ropes")
        for name, value in {**module._buffers, **vars(module)}.items()
        if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
    ]
    if not tensors:
        raise NotApplicable("no tensors in ropes")
    return tensors


@intervention("tensors of ropes written in step 1 alone", changes=True)
def written(subject: Subject) -> None:
    """In place, by torch, and back."""
    tensors = [(value, value.clone()) for _, _, value in _tensors_of(subject)]

    def before_step(number: int) -> None:
        for value, first in tensors:
            value.copy_(first * 1.5 if number == 1 else first)

    subject.before_step = before_step
    subject.off(before_step, 0)


@intervention("tensors of ropes replaced in step 1 alone", changes=True)
def replaced(subject: Subject) -> None:
    """Other tensors under the same names."""
    tensors = _tensors_of(subject)

    def before_step(number: int) -> None:
        for module, name, value in tensors:
            setattr(module, name, value * 1.5 if number == 1 else value)

    subject.before_step = before_step
    subject.off(before_step, 0)


@intervention("tensors of ropes replaced for good", changes=True)
def replaced_for_good(subject: Subject) -> None:
    """Position interpolation by replaced buffers."""
    for module, name, value in _tensors_of(subject):
        setattr(module, name, value * 0.5)
        subject.off(setattr, module, name, value)


@intervention("ropes exchanged and put back between steps")
def put_back(subject: Subject) -> None:
    """Step 1 runs with a copy, step 2 with the first again."""
    first = subject.modules("ropes")
    others = [copy.deepcopy(subject.example.build(subject.dtype).get_submodule(path)) for path in subject.parts.ropes]

    def before_step(number: int) -> None:
        for path, first_rope, other in zip(subject.parts.ropes, first, others, strict=True):
            parent, name = parent_of(subject.model, path)
            setattr(parent, name, other if number == 1 else first_rope)

    subject.before_step = before_step
    subject.off(before_step, 0)


@intervention("methods of the model that build tables replaced", changes=True)
def methods(subject: Subject) -> None:
    """At the model's class."""
    cls = subject.parts.classes[""]
    names = [n for n, f in vars(cls).items() if callable(f) and ("rot" in n or "rope" in n) and not n.startswith("__")]
    if not names:
        raise NotApplicable("no such methods")
    for name in names:
        real = vars(cls)[name]
        if isinstance(real, staticmethod | classmethod):
            continue
        subject.assign(cls, name, _tables_changed(real))


def _objects(by_step: bool) -> Any:
    """Rope objects that are not modules: ``__call__`` of their class."""

    def put(subject: Subject) -> None:
        classes = {
            type(value) for name, value in vars(subject.model).items() if "rope" in name.lower() and callable(value)
        }
        if not classes:
            raise NotApplicable("no rope objects beside modules")
        told = {"step": 1}
        for cls in classes:
            real: Any = vars(cls)["__call__"]

            def call(*args: Any, real: Any = real, **kwargs: Any) -> Any:
                tables = real(*args, **kwargs)
                return tables_rotated_back(tables) if told["step"] == 1 else tables

            subject.assign(cls, "__call__", functools.wraps(real)(call))
        if by_step:
            subject.before_step = lambda number: told.update(step=number)

    return put


intervention("class of rope objects gives other tables", changes=True)(_objects(False))
intervention("class of rope objects follows the timestep", changes=True)(_objects(True))
