"""torch.compile and export, of a model and of every part of it."""

from __future__ import annotations

import functools
from typing import Any

import torch

from zoo import Noise

from .core import TWO_ORDERS, NotApplicable, Subject, intervention
from .parts import parent_of

_EAGER = {"backend": "eager"}
slow = functools.partial(intervention, orders=TWO_ORDERS, quick=False, halved=True)


def _started(subject: Subject) -> None:
    torch._dynamo.reset()
    subject.off(torch._dynamo.reset)


@slow("model compiled")
def model(subject: Subject) -> None:
    """torch.compile(model)."""
    _started(subject)
    subject.callee = torch.compile(subject.model, **_EAGER)


@slow("model compiled by aot_eager")
def model_aot(subject: Subject) -> None:
    """Through functionalization and decompositions."""
    _started(subject)
    subject.callee = torch.compile(subject.model, backend="aot_eager")


@slow("model compiled, fullgraph")
def model_fullgraph(subject: Subject) -> None:
    """The same error where the unpatched model has a graph break."""
    _started(subject)
    subject.callee = torch.compile(subject.model, fullgraph=True, **_EAGER)


@slow("model.compile()", reversible=False)
def model_in_place(subject: Subject) -> None:
    """The method, which keeps the module."""
    _started(subject)
    subject.model.compile(**_EAGER)


@slow("compiled under force_eager")
def force_eager(subject: Subject) -> None:
    """A compiled model that is told not to compile."""
    _started(subject)
    subject.callee = torch.compile(subject.model, **_EAGER)
    subject.enter(torch.compiler.set_stance("force_eager"))


@slow("repeated blocks compiled", reversible=False)
def repeated(subject: Subject) -> None:
    """Diffusers' regional compilation."""
    if not getattr(subject.model, "_repeated_blocks", None):
        raise NotApplicable("no _repeated_blocks")
    _started(subject)
    subject.model.compile_repeated_blocks(**_EAGER)


@slow("one block exchanged for its compiled one")
def one_block(subject: Subject) -> None:
    """The first block becomes an OptimizedModule."""
    _started(subject)
    block = subject.modules("blocks")[0]
    parent, name = parent_of(subject.model, subject.parts.blocks[0])
    subject.assign(parent, name, torch.compile(block, **_EAGER))


@slow("all blocks exchanged for compiled ones")
def all_blocks(subject: Subject) -> None:
    """As trainers do in a loop."""
    _started(subject)
    for path, block in zip(subject.parts.blocks, subject.modules("blocks"), strict=True):
        parent, name = parent_of(subject.model, path)
        subject.assign(parent, name, torch.compile(block, **_EAGER))


def _forwards(kind: str, *, only: int | None = None, **options: Any) -> Any:
    def put(subject: Subject) -> None:
        _started(subject)
        for module in subject.modules(kind)[:only]:
            subject.assign(module, "forward", torch.compile(module.forward, **(options or _EAGER)))

    return put


def _methods(kind: str) -> Any:
    def put(subject: Subject) -> None:
        _started(subject)
        for module in subject.modules(kind):
            subject.assign(module, "_compiled_call_impl", torch.compile(module._call_impl, **_EAGER))

    return put


for _name in ("block", "attention", "norm", "projection", "rope"):
    _kind = f"{_name}s"
    slow(f"{_name}.forward compiled")(_forwards(_kind))
    slow(f"{_name}.compile()")(_methods(_kind))
slow("attention.forward compiled, fullgraph")(_forwards("attentions", backend="eager", fullgraph=True))
slow("attention.forward compiled by aot_eager")(_forwards("attentions", backend="aot_eager"))
slow("one attention.forward compiled")(_forwards("attentions", only=1))
slow("attention.forward not to be compiled")(
    lambda subject: [
        _started(subject),
        [subject.assign(m, "forward", torch._dynamo.disable(m.forward)) for m in subject.modules("attentions")],
        setattr(subject, "callee", torch.compile(subject.model, **_EAGER)),
    ][0]
)


def _classes(subject: Subject, fullgraph: bool) -> None:
    """One compiled function for all modules: a patched and an unpatched processor are two variants of each."""
    _started(subject)
    subject.enter(torch._dynamo.config.patch(recompile_limit=64))
    subject.processed()
    for cls in set(subject.parts.processors.values()):
        subject.assign(cls, "__call__", torch.compile(cls.__call__, fullgraph=fullgraph, **_EAGER))


slow("processor class compiled")(functools.partial(_classes, fullgraph=False))
slow("processor class compiled, fullgraph")(functools.partial(_classes, fullgraph=True))


@slow("processor instance compiled")
def instance(subject: Subject) -> None:
    """The attribute becomes a compiled function."""
    _started(subject)
    for module in subject.processed():
        subject.assign(module, "processor", torch.compile(module.processor.__call__, **_EAGER))


@slow("blocks exported ahead of time")
def exported(subject: Subject) -> None:
    """torch.export programs of each block in place of its forward, made of the unpatched model's."""
    other = subject.example.build(subject.dtype)
    calls: dict[str, tuple[Any, Any]] = {}
    blocks = {path: other.get_submodule(path) for path in subject.parts.blocks}
    if not blocks:
        raise NotApplicable("no blocks")
    handles = [
        block.register_forward_pre_hook(
            lambda m, a, k, path=path: calls.setdefault(path, (a, k)) and None, with_kwargs=True
        )
        for path, block in blocks.items()
    ]
    with torch.no_grad():
        subject.example.run(other, subject.example.inputs(other, Noise(subject.dtype, 1)))
    for handle in handles:
        handle.remove()
    for path in calls:
        with torch.no_grad():
            program = torch.export.export(blocks[path], *calls[path], strict=False)
        subject.assign(subject.model.get_submodule(path), "forward", program.module())


@slow("model exported")
def whole(subject: Subject) -> None:
    """torch.export of the model, and calls of the program."""

    def program(**inputs: Any) -> Any:
        return torch.export.export(subject.model, (), inputs, strict=False).module()(**inputs)

    def run(inputs: Any) -> Any:
        with torch.no_grad():
            return subject.example.run(program, inputs)

    subject.run = run
