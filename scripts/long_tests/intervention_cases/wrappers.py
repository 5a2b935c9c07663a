"""Blocks, attention modules, norms and forwards that are wrapped or exchanged."""

from __future__ import annotations

import copy
import functools
from types import MethodType
from typing import Any

import torch

from .core import NotApplicable, Subject, intervention
from .parts import changed_arguments, parent_of, scaled, tables_rotated_back


class Wrapper(torch.nn.Module):
    """Holds a module and calls it, as checkpoint and sharding wrappers do; what it lacks is the module's."""

    def __init__(self, module: torch.nn.Module, factor: float = 1, even: bool = False) -> None:
        super().__init__()
        self.wrapped, self.factor, self.even = module, factor, even

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's, scaled."""
        return scaled(self.wrapped(*args, **kwargs), self.factor, self.even)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("wrapped"), name)


def _wrapped(kind: str, only: int | None = None, factor: float = 1) -> Any:
    def put(subject: Subject) -> None:
        modules = subject.modules(kind)
        for path, module in list(zip(getattr(subject.parts, kind), modules, strict=True))[:only]:
            parent, name = parent_of(subject.model, path)
            subject.assign(parent, name, Wrapper(module, factor, kind == "ropes"))

    return put


for _kind in ("blocks", "attentions", "norms", "projections", "ropes"):
    intervention(f"{_kind} wrapped in modules")(_wrapped(_kind))
    intervention(f"one of {_kind} wrapped in a module")(_wrapped(_kind, only=1))
    intervention(f"{_kind} wrapped in modules that scale", changes=True)(_wrapped(_kind, factor=1.5))


def _forward_wrapped(kind: str, factor: float = 1) -> Any:
    def put(subject: Subject) -> None:
        for module in subject.modules(kind):
            real = module.forward

            def forward(*args: Any, real: Any = real, **kwargs: Any) -> Any:
                return scaled(real(*args, **kwargs), factor, kind == "ropes")

            subject.assign(module, "forward", functools.wraps(real)(forward))

    return put


for _kind in ("blocks", "attentions", "norms", "projections", "ropes"):
    intervention(f"forward of {_kind} wrapped")(_forward_wrapped(_kind))
    intervention(f"forward of {_kind} wrapped and scaled", changes=True)(_forward_wrapped(_kind, 1.5))


def _rebound_to_class(kind: str, factor: float = 1) -> Any:
    """How kernel libraries patch instances: a method made of a function, which is called in place of the class's."""

    def put(subject: Subject) -> None:
        for path, module in zip(getattr(subject.parts, kind), subject.modules(kind), strict=True):
            cls = subject.parts.classes[path]

            def forward(self: Any, *args: Any, cls: Any = cls, **kwargs: Any) -> Any:
                return scaled(cls.forward(self, *args, **kwargs), factor)

            subject.assign(module, "forward", MethodType(forward, module))

    return put


for _kind in ("attentions", "norms", "projections"):
    intervention(f"forward of {_kind} replaced by a method")(_rebound_to_class(_kind))
    intervention(f"forward of {_kind} replaced by a method that scales", changes=True)(_rebound_to_class(_kind, 1.5))


def _class_forward(kind: str, factor: float) -> Any:
    """At the class, for every module of it, also of other models."""

    def put(subject: Subject) -> None:
        for cls in subject.classes(kind):
            real = cls.forward
            subject.assign(
                cls,
                "forward",
                functools.wraps(real)(lambda *a, real=real, **k: scaled(real(*a, **k), factor, kind == "ropes")),
            )

    return put


for _kind in ("blocks", "attentions", "norms", "projections", "ropes"):
    intervention(f"forward of the class of {_kind} replaced", changes=True)(_class_forward(_kind, 1.25))


def _subclassed(kind: str, factor: float | None, same_name: bool) -> Any:
    """The module's class becomes a derived one, as FSDP2 and parametrizations do it."""

    def put(subject: Subject) -> None:
        for module in subject.modules(kind):
            before = type(module)
            body: dict[str, Any] = {}
            if factor is not None:
                body["forward"] = lambda self, *a, before=before, **k: scaled(before.forward(self, *a, **k), factor)
            name = before.__name__ if same_name else f"Sharded{before.__name__}"
            module.__class__ = derived = type(name, (before,), body)
            subject.off(_class_back, module, derived)

    return put


def _class_back(module: Any, derived: type) -> None:
    if type(module) is derived:
        module.__class__ = derived.__bases__[0]


for _kind in ("blocks", "attentions", "norms"):
    intervention(f"class of {_kind} derived")(_subclassed(_kind, None, False))
    intervention(f"class of {_kind} derived, of the same name, scales", changes=True)(_subclassed(_kind, 1.5, True))


@intervention("norms exchanged for copies")
def exchanged_norms(subject: Subject) -> None:
    """A copy with other weights, where there are weights."""
    for path, module in zip(subject.parts.norms, subject.modules("norms"), strict=True):
        other = copy.deepcopy(subject.example.build(subject.dtype).get_submodule(path))
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        parent, name = parent_of(subject.model, path)
        del module
        subject.assign(parent, name, other)


@intervention("one block exchanged for another model's", changes=False)
def exchanged_block(subject: Subject) -> None:
    """An unpatched block in the place of the last one."""
    subject.modules("blocks")
    path = subject.parts.blocks[-1]
    parent, name = parent_of(subject.model, path)
    subject.assign(parent, name, subject.example.build(subject.dtype).get_submodule(path))


@intervention("norms exchanged for nn.Identity", changes=True)
def identity_norms(subject: Subject) -> None:
    """As whoever folds norms into weights does."""
    for path, _ in zip(subject.parts.norms, subject.modules("norms"), strict=True):
        parent, name = parent_of(subject.model, path)
        subject.assign(parent, name, torch.nn.Identity())


@intervention("norm of keys is that of queries", reversible=True)
def shared_norm(subject: Subject) -> None:
    """One module at two paths."""
    wrapped = False
    for module in subject.modules("attentions"):
        pairs = [("norm_q", "norm_k"), ("q_norm", "k_norm"), ("q_rms_norm", "k_rms_norm"), ("query_norm", "key_norm")]
        for q, k in pairs:
            if isinstance(getattr(module, q, None), torch.nn.Module) and isinstance(
                getattr(module, k, None), torch.nn.Module
            ):
                subject.assign(module, k, getattr(module, q))
                wrapped = True
    if not wrapped:
        raise NotApplicable("no norms of both")


@intervention("last block left out", changes=True)
def fewer_blocks(subject: Subject) -> None:
    """A pruned model."""
    subject.modules("blocks")
    parent, name = parent_of(subject.model, subject.parts.blocks[-1])
    parent_path, list_name = parent_of(subject.model, subject.parts.blocks[-1].rpartition(".")[0])
    if len(parent) < 2 or not isinstance(parent, torch.nn.ModuleList):
        raise NotApplicable("one block")
    del name
    subject.assign(parent_path, list_name, torch.nn.ModuleList(list(parent)[:-1]))


@intervention("attention.forward called twice")
def twice(subject: Subject) -> None:
    """A wrapper that calls it for two guidance branches, and keeps the second."""
    for module in subject.modules("attentions"):
        real = module.forward
        subject.assign(module, "forward", lambda *a, real=real, **k: (real(*a, **k), real(*a, **k))[1])


def _rotary_changed(change: Any) -> Any:
    def put(subject: Subject) -> None:
        for module in subject.modules("attentions"):
            real = module.forward

            def forward(*args: Any, module: Any = module, real: Any = real, **kwargs: Any) -> Any:
                def changed(name: str, value: Any) -> Any:
                    return change(value) if name in subject.parts.rotary else value

                args, kwargs = changed_arguments(module, args, kwargs, changed)
                return real(*args, **kwargs)

            subject.assign(module, "forward", forward)

    return put


intervention("attention.forward gives other tables", changes=True)(_rotary_changed(tables_rotated_back))
intervention("attention.forward drops the tables", changes=True)(_rotary_changed(lambda value: None))


@intervention("blocks under checkpoint_wrapper")
def checkpoint_wrapper(subject: Subject) -> None:
    """PyTorch's own wrapper, of every other block."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper as wrap

    for path, module in list(zip(subject.parts.blocks, subject.modules("blocks"), strict=True))[::2]:
        parent, name = parent_of(subject.model, path)
        subject.assign(parent, name, wrap(module))


class _Doubled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.5 * x


def _parametrized(kind: str) -> Any:
    def put(subject: Subject) -> None:
        from torch.nn.utils import parametrize

        modules = [
            module
            for module in subject.modules(kind)
            if isinstance(getattr(module, "weight", None), torch.nn.Parameter)
        ]
        if not modules:
            raise NotApplicable(f"no weights in {kind}")
        for module in modules:
            parametrize.register_parametrization(module, "weight", _Doubled())
            subject.off(parametrize.remove_parametrizations, module, "weight", False)

    return put


for _kind in ("norms", "projections"):
    intervention(f"weights of {_kind} parametrized", changes=True)(_parametrized(_kind))


@intervention("scaled_dot_product_attention replaced", changes=True)
def sdpa(subject: Subject) -> None:
    """As libraries put in attention kernels: by the module global of torch."""
    real = torch.nn.functional.scaled_dot_product_attention

    def larger(*args: Any, **kwargs: Any) -> Any:
        return scaled(real(*args, **kwargs))

    subject.assign(torch.nn.functional, "scaled_dot_product_attention", larger)


@intervention("queries and keys read at scaled_dot_product_attention")
def sdpa_read(subject: Subject) -> None:
    """What reaches it must be what reaches it unpatched."""
    real = torch.nn.functional.scaled_dot_product_attention

    def reading(*args: Any, **kwargs: Any) -> Any:
        subject.judged.append((args, dict(kwargs)))
        return real(*args, **kwargs)

    subject.assign(torch.nn.functional, "scaled_dot_product_attention", reading)


@intervention("wrapper of the model that calls it twice")
def guidance(subject: Subject) -> None:
    """Two calls for guidance in each step, with other inputs each."""

    def run(inputs: Any) -> Any:
        return subject.forward(inputs), subject.forward(subject.new_inputs(7))

    subject.run = run
