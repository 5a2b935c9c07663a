"""torch's hooks of every kind, on the model and every part of it: that read, change, drop, raise and clear."""

from __future__ import annotations

from typing import Any

import torch

from .core import NotApplicable, Stopped, Subject, intervention
from .parts import changed_arguments, scaled, tables_rotated_back

KINDS = ("blocks", "attentions", "norms", "projections", "ropes")


def _reading(kind: str, when: str) -> Any:
    def put(subject: Subject) -> None:
        modules = [subject.model] if kind == "model" else subject.modules(kind)
        for module in modules:
            calls: list[int] = []
            if when == "before":
                handle = module.register_forward_pre_hook(
                    lambda m, a, k, calls=calls: calls.append(1), with_kwargs=True
                )
            else:
                handle = module.register_forward_hook(lambda m, a, o, calls=calls: calls.append(1))
            subject.off(handle.remove)
            before = subject.run

            def run(inputs: Any, before: Any = before, calls: list[int] = calls) -> Any:
                calls.clear()
                output = before(inputs)
                return output, torch.tensor(len(calls))

            subject.run = run

    return put


for _kind in ("model", *KINDS):
    intervention(f"pre-hook on {_kind} counts")(_reading(_kind, "before"))
    intervention(f"hook on {_kind} counts")(_reading(_kind, "after"))


def _changing(kind: str) -> Any:
    def put(subject: Subject) -> None:
        for module in [subject.model] if kind == "model" else subject.modules(kind):
            subject.off(module.register_forward_hook(lambda m, a, o: scaled(o, even=kind == "ropes")).remove)

    return put


def _input_changing(kind: str) -> Any:
    def put(subject: Subject) -> None:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (scaled(args[0]), *args[1:]), kwargs
            first = next(iter(kwargs), None)
            return (args, {**kwargs, first: scaled(kwargs[first])}) if first else None

        for module in subject.modules(kind):
            subject.off(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    return put


for _kind in KINDS:
    intervention(f"hook on {_kind} scales", changes=True)(_changing(_kind))
    intervention(f"pre-hook on {_kind} scales", changes=True)(_input_changing(_kind))


def _rotary_hook(kind: str, change: Any, **options: Any) -> Any:
    def put(subject: Subject) -> None:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            def changed(name: str, value: Any) -> Any:
                named = name in subject.parts.rotary or "rot" in name or "rope" in name or "freqs" in name
                return change(value) if named else value

            return changed_arguments(module, args, kwargs, changed)

        for module in subject.modules(kind):
            subject.off(module.register_forward_pre_hook(hook, with_kwargs=True, **options).remove)

    return put


def _first_output(value: Any) -> Any:
    return value


for _kind in ("attentions", "blocks"):
    intervention(f"pre-hook on {_kind} gives other tables", changes=True)(_rotary_hook(_kind, tables_rotated_back))
    intervention(f"pre-hook on {_kind} gives the same tables anew")(
        _rotary_hook(_kind, lambda value: torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, value))
    )
    intervention(f"pre-hook on {_kind} drops the tables", changes=True)(_rotary_hook(_kind, lambda value: None))
intervention("first pre-hook on attentions gives other tables", changes=True)(
    _rotary_hook("attentions", tables_rotated_back, prepend=True)
)


@intervention("tables read by a pre-hook on attentions")
def read(subject: Subject) -> None:
    """What a hook is given must be what it is given unpatched."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        subject.judged.append((args, dict(kwargs)))

    for module in subject.modules("attentions"):
        subject.off(module.register_forward_pre_hook(hook, with_kwargs=True).remove)


@intervention("tables read by a hook on ropes")
def read_ropes(subject: Subject) -> None:
    """The same of what a rope module returns."""
    for module in subject.modules("ropes"):
        subject.off(module.register_forward_hook(lambda m, a, o: subject.judged.append(o)).remove)


@intervention("hook on ropes gives other tables", changes=True)
def other_tables(subject: Subject) -> None:
    """As position interpolation in a hook."""
    for module in subject.modules("ropes"):
        subject.off(module.register_forward_hook(lambda m, a, o: tables_rotated_back(o)).remove)


@intervention("hook on ropes gives other tables in step 1 alone", changes=True)
def other_tables_once(subject: Subject) -> None:
    """The hook stays, and what it does changes."""
    told = {"step": 0}
    for module in subject.modules("ropes"):
        hook = module.register_forward_hook(lambda m, a, o: tables_rotated_back(o) if told["step"] == 1 else o)
        subject.off(hook.remove)
    subject.before_step = lambda number: told.update(step=number)


@intervention("hook on every module of the process scales norms", changes=True)
def everywhere(subject: Subject) -> None:
    """Torch's global hook."""
    norms = {id(module) for module in subject.modules("norms")}
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, a, o: scaled(o) if id(m) in norms else None)
    subject.off(handle.remove)


@intervention("pre-hook on every module of the process counts")
def counts_everywhere(subject: Subject) -> None:
    """A profiler's."""
    subject.off(torch.nn.modules.module.register_module_forward_pre_hook(lambda m, a: None).remove)


@intervention("every hook cleared", orders=("after",), reversible=False)
def cleared(subject: Subject) -> None:
    """Libraries that remove their hooks by emptying the dictionaries."""
    for module in subject.model.modules():
        for name in ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs",
                     "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):  # fmt: skip
            getattr(module, name).clear()


def _raising(kind: str, error: type[BaseException], inside: bool) -> Any:
    """In step 1 alone: what follows must not notice."""

    def put(subject: Subject) -> None:
        told = {"step": 0}

        def raise_in_step_1(*_: Any) -> None:
            if told["step"] == 1:
                raise error("from a hook")

        module = subject.modules(kind)[-1]
        if inside:
            subject.off(module.register_forward_hook(raise_in_step_1).remove)
        else:
            subject.off(module.register_forward_pre_hook(raise_in_step_1).remove)
        subject.before_step = lambda number: told.update(step=number)

    return put


for _kind in KINDS:
    intervention(f"hook on {_kind} raises in step 1", changes=True)(_raising(_kind, ArithmeticError, True))
    intervention(f"pre-hook on {_kind} is interrupted in step 1", changes=True)(_raising(_kind, Stopped, False))


def _calling_another(kind: str) -> Any:
    """A hook that runs another model, patched as the first is where that is patched."""

    def put(subject: Subject) -> None:
        import dit_rope

        other = subject.example.build(subject.dtype)
        dit_rope.patch(other, exact=True)
        subject.off(dit_rope.unpatch, other)
        busy = {"now": False}

        def hook(*_: Any) -> None:
            if not busy["now"]:
                busy["now"] = True
                try:
                    with torch.no_grad():
                        subject.example.run(other, subject.new_inputs(5))
                finally:
                    busy["now"] = False

        subject.off(subject.modules(kind)[0].register_forward_pre_hook(hook).remove)

    return put


for _kind in ("norms", "projections", "attentions"):
    intervention(f"another model runs inside of {_kind}")(_calling_another(_kind))


@intervention("backward hooks on every part")
def backward(subject: Subject) -> None:
    """Gradients that are read and scaled on their way."""
    if not subject.example.trains:
        raise NotApplicable("does not train")
    for kind in ("attentions", "blocks"):
        for module in subject.modules(kind):
            subject.off(module.register_full_backward_hook(lambda m, i, o: scaled(i, 1.25)).remove)

    def run(inputs: Any) -> Any:
        subject.model.zero_grad()
        output = subject.example.run(subject.model, inputs)
        outputs = [
            x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, torch.Tensor) and x.requires_grad
        ]
        sum(x.square().sum() for x in outputs).backward()
        gradients = [p.grad for p in subject.model.parameters() if p.grad is not None]
        return output, gradients

    subject.run = run
    subject.off(subject.model.zero_grad)
