"""Foreign attention processors: of the same name and not, derived, wrapped, and at the class."""

from __future__ import annotations

import copy
import functools
import inspect
from types import FunctionType
from typing import Any

from .core import NotApplicable, Subject, intervention
from .parts import rotated_twice, rotating_globals, scaled, tables_rotated_back


def _call_changed(real: Any, change: Any, rotary: tuple[str, ...], output: Any = None) -> Any:
    """``__call__`` that changes rotary arguments, and the output."""
    names = list(inspect.signature(real).parameters)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        changed = [change(a) if n in rotary else a for n, a in zip(names[1:], args, strict=False)]
        kwargs = {name: change(value) if name in rotary else value for name, value in kwargs.items()}
        result = real(self, *changed, *args[len(changed) :], **kwargs)
        return result if output is None else output(result)

    return functools.wraps(real)(call)


def _same(value: Any) -> Any:
    return value


def _derived(rename: str | None, whole: bool, change: Any = _same, output: Any = None) -> Any:
    """Processors of a derived class: of the same name, or of a module of the same name too."""

    def put(subject: Subject) -> None:
        for path, module in zip(subject.parts.attentions, subject.modules("attentions"), strict=True):
            cls = subject.parts.processors.get(path)
            if cls is None:
                continue
            body: dict[str, Any] = {"__call__": _call_changed(cls.__call__, change, subject.parts.rotary, output)}
            if whole:
                body |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
            subject.assign(module, "processor", _new(type(rename or cls.__name__, (cls,), body), module.processor))
        subject.processed()

    return put


def _new(cls: type, before: Any) -> Any:
    copied = cls.__new__(cls)
    copied.__dict__.update({name: value for name, value in vars(before).items() if name != "_dit_rope"})
    return copied


intervention("other processors that do the same")(_derived("Mine", False))
intervention("other processors that scale", changes=True)(_derived("Mine", False, output=scaled))
intervention("other processors that turn back", changes=True)(_derived("Mine", False, change=tables_rotated_back))
intervention("processors of the same name that scale", changes=True)(_derived(None, False, output=scaled))
intervention("processors of the same name that turn back", changes=True)(
    _derived(None, False, change=tables_rotated_back)
)
intervention("processors of the same name and module that turn back", changes=True)(
    _derived(None, True, change=tables_rotated_back)
)
intervention("processors of the same name and module that drop the tables", changes=True)(
    _derived(None, True, change=lambda value: None)
)


def _copied(subject: Subject, change: Any) -> None:
    """Classes made of the same source, of the same name and module, in which functions that rotate are others."""
    for path, module in zip(subject.parts.attentions, subject.modules("attentions"), strict=True):
        cls = subject.parts.processors.get(path)
        call = cls and next(vars(c)["__call__"] for c in cls.__mro__ if "__call__" in vars(c))
        if not isinstance(call, FunctionType):
            continue
        space = {**call.__globals__, **{name: change(f) for _, name, f in rotating_globals(subject.parts)}}
        function = FunctionType(call.__code__, space, call.__name__, call.__defaults__, call.__closure__)
        function.__kwdefaults__ = call.__kwdefaults__
        body = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")} | {"__call__": function}
        subject.assign(module, "processor", _new(type(cls.__name__, cls.__bases__, body), module.processor))
    subject.processed()


@intervention("copies of processors")
def copied(subject: Subject) -> None:
    """Code that was copied out of diffusers."""
    _copied(subject, _same)


@intervention("copies of processors that turn twice as far", changes=True)
def copied_twice(subject: Subject) -> None:
    """The copy rotates by another function."""
    _copied(subject, rotated_twice)


@intervention("fresh default processors")
def fresh(subject: Subject) -> None:
    """What set_default_attn_processor does."""
    for path, module in zip(subject.parts.attentions, subject.modules("attentions"), strict=True):
        if path in subject.parts.processors:
            subject.assign(module, "processor", copy.copy(_unpatched(subject, path)))
    subject.processed()


def _unpatched(subject: Subject, path: str) -> Any:
    return subject.example.build(subject.dtype).get_submodule(path).processor


@intervention("processors that are functions")
def functions(subject: Subject) -> None:
    """A plain function that calls the processor."""
    for module in subject.processed():
        real = module.processor
        subject.assign(
            module, "processor", functools.wraps(type(real).__call__)(lambda *a, real=real, **k: real(*a, **k))
        )


class _Delegate:
    """Holds a processor, records, and calls it: how attention maps are collected."""

    def __init__(self, real: Any, results: list[Any]) -> None:
        self.real, self.results = real, results

    def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        result = self.real(attn, hidden_states, *args, **kwargs)
        self.results.append(result)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["real"], name)


def _delegating(subject: Subject, path: str, cls: type) -> type:
    call = functools.wraps(cls.__call__)(lambda self, *a, **k: _Delegate.__call__(self, *a, **k))
    return type(cls.__name__ if path else "Delegate", (_Delegate,), {"__call__": call})


@intervention("processors that delegate")
def delegates(subject: Subject) -> None:
    """An object of another class around each processor; what it saw is judged too."""
    for path, module in zip(subject.parts.attentions, subject.modules("attentions"), strict=True):
        if (cls := subject.parts.processors.get(path)) is not None:
            subject.assign(module, "processor", _delegating(subject, "", cls)(module.processor, subject.judged))
    subject.processed()


@intervention("processors of the same name that delegate")
def same_named_delegates(subject: Subject) -> None:
    """The same under the name of the processor."""
    for path, module in zip(subject.parts.attentions, subject.modules("attentions"), strict=True):
        if (cls := subject.parts.processors.get(path)) is not None:
            subject.assign(module, "processor", _delegating(subject, path, cls)(module.processor, subject.judged))
    subject.processed()


def _at_class(change: Any = _same, output: Any = None) -> Any:
    """``__call__`` of the class of processors itself."""

    def put(subject: Subject) -> None:
        subject.processed()
        for cls in set(subject.parts.processors.values()):
            subject.assign(cls, "__call__", _call_changed(cls.__call__, change, subject.parts.rotary, output))

    return put


intervention("processor class wrapped")(_at_class())
intervention("processor class wrapped and scales", changes=True)(_at_class(output=scaled))
intervention("processor class wrapped and turns back", changes=True)(_at_class(tables_rotated_back))
intervention("processor class wrapped and drops the tables", changes=True)(_at_class(lambda value: None))


@intervention("processors that change from step to step", changes=True)
def alternating(subject: Subject) -> None:
    """Another one in step 1, the first one again in step 2."""
    modules = subject.processed()
    first = [module.processor for module in modules]
    others = []
    for path, module in zip(subject.parts.attentions, subject.modules("attentions"), strict=True):
        if (cls := subject.parts.processors.get(path)) is not None:
            call = _call_changed(cls.__call__, tables_rotated_back, subject.parts.rotary)
            others.append(_new(type(cls.__name__, (cls,), {"__call__": call}), module.processor))

    def before_step(number: int) -> None:
        for module, first_processor, other in zip(modules, first, others, strict=True):
            module.processor = other if number == 1 else first_processor

    subject.before_step = before_step
    subject.off(before_step, 0)


@intervention("processors without the norm of keys", changes=True)
def half_normed(subject: Subject) -> None:
    """A processor that leaves one norm out, as when it is fused elsewhere: the norm is None."""
    switched = False
    for module in subject.modules("attentions"):
        for name in ("norm_k", "k_norm", "key_norm", "k_rms_norm"):
            if getattr(module, name, None) is not None:
                subject.assign(module, name, None)
                switched = True
    if not switched:
        raise NotApplicable("no norms of keys")


@intervention("projections fused")
def fused(subject: Subject) -> None:
    """Diffusers' own fuse_qkv_projections."""
    if not hasattr(subject.model, "fuse_qkv_projections"):
        raise NotApplicable("no fuse_qkv_projections")
    subject.model.fuse_qkv_projections()
    subject.off(subject.model.unfuse_qkv_projections)


def _backend(name: str) -> Any:
    def put(subject: Subject) -> None:
        if not any(hasattr(cls, "_attention_backend") for cls in subject.parts.processors.values()):
            raise NotApplicable("no processor with an attention backend")
        from diffusers.models.attention_dispatch import attention_backend

        subject.enter(attention_backend(name))

    return put


intervention("attention backend _native_math")(_backend("_native_math"))
