"""Ids and tables: too short, too long, written in place, changed inside of the call, by the step, of other forms."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch

from .core import NotApplicable, Subject, intervention
from .parts import tables_rotated_back

_IDS = re.compile(r"ids$|coords$|indices|rope_pos|grid_sizes$")
_NO_POSITIONS = re.compile(r"input_ids|token_id|segment_ids|domain_ids")
_TABLES = re.compile(r"rotary_emb")


def _named(subject: Subject, which: str) -> list[str]:
    """Names of inputs that are positions, or tables, or either."""
    inputs = subject.new_inputs(1)
    ids = [n for n in inputs if _IDS.search(n) and not _NO_POSITIONS.search(n) and _tensors(inputs[n])]
    tables = [n for n in inputs if _TABLES.search(n) and _tensors(inputs[n])]
    names = {"ids": ids, "tables": tables, "either": [*ids, *tables]}[which]
    if not names:
        raise NotApplicable("no ids" if which == "ids" else f"no {which} among the inputs")
    return names


def _tensors(value: Any) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]


def _mapped(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    return torch.utils._pytree.tree_map_only(torch.Tensor, change, value)


def _shifted(x: torch.Tensor, step: int) -> torch.Tensor:
    """Other positions or angles of the same shape: rows in another order."""
    return x.roll(step, _token_dim(x)) if step else x


def _token_dim(x: torch.Tensor) -> int:
    return max(range(x.ndim), key=lambda dim: (x.shape[dim], -dim))


def _in_every_step(which: str, change: Callable[[torch.Tensor, int], torch.Tensor]) -> Any:
    """New tensors in every step."""

    def put(subject: Subject) -> None:
        names = _named(subject, which)
        real = subject.inputs

        def inputs(number: int) -> dict[str, Any]:
            inputs = real(number)
            return {**inputs, **{n: _mapped(lambda x: change(x, number), inputs[n]) for n in names}}

        subject.inputs = inputs

    return put


intervention("other ids in every step", changes=True)(_in_every_step("ids", _shifted))
intervention("other tables in every step", changes=True)(_in_every_step("tables", _shifted))
for _which in ("ids", "tables"):
    for _cut, _slice in (("4 short", lambda x, d: x.narrow(d, 0, max(x.shape[d] - 4, 1))),
                         ("1 short", lambda x, d: x.narrow(d, 0, max(x.shape[d] - 1, 1))),
                         ("first row alone", lambda x, d: x.narrow(d, 0, 1)),
                         ("4 long", lambda x, d: torch.cat([x, x.narrow(d, 0, min(4, x.shape[d]))], d))):  # fmt: skip
        intervention(f"{_which} {_cut}", changes=True)(
            _in_every_step(_which, lambda x, number, cut=_slice: cut(x, _token_dim(x)))
        )
        intervention(f"{_which} {_cut} in step 1 alone", changes=True)(
            _in_every_step(_which, lambda x, number, cut=_slice: cut(x, _token_dim(x)) if number == 1 else x)
        )
intervention("ids and tables not contiguous")(
    _in_every_step("either", lambda x, number: torch.stack([x, x], -1)[..., 0])
)
intervention("tables in float64", changes=False)(
    _in_every_step("tables", lambda x, number: x.double() if not x.is_complex() else x)
)
intervention("tables whose halves differ", changes=True)(
    _in_every_step("tables", lambda x, number: x * torch.linspace(1, 2, x.shape[-1]))
)
intervention("ids in float64")(_in_every_step("ids", lambda x, number: x.double() if x.is_floating_point() else x))


def _rewritten(which: str, write: Callable[[torch.Tensor, torch.Tensor], Any]) -> Any:
    """The same tensors in every step, written to between steps."""

    def put(subject: Subject) -> None:
        names = _named(subject, which)
        first = subject.new_inputs(1)
        values = {n: _mapped(torch.clone, first[n]) for n in names}

        def inputs(number: int) -> dict[str, Any]:
            for name in names:
                for written, real in zip(_tensors(values[name]), _tensors(first[name]), strict=True):
                    with torch.no_grad():
                        write(written, _shifted(real, number).contiguous())
            return {**subject.new_inputs(1), **values}

        subject.inputs = inputs

    return put


def _through_numpy(x: torch.Tensor, y: torch.Tensor) -> None:
    x.resolve_conj().numpy()[...] = y.to(x.dtype).numpy()


def _by_data(x: torch.Tensor, y: torch.Tensor) -> None:
    x.data = y.clone()


intervention("ids and tables written in place", changes=True)(_rewritten("either", lambda x, y: x.copy_(y)))
intervention("ids and tables written through .data", changes=True)(_rewritten("either", lambda x, y: x.data.copy_(y)))
intervention("ids and tables given other .data", changes=True)(_rewritten("either", _by_data))
intervention("ids and tables written through numpy", changes=True)(_rewritten("either", _through_numpy))
intervention("ids and tables set_ to other memory", changes=True)(_rewritten("either", lambda x, y: x.set_(y.clone())))
intervention("ids and tables written by apply_", changes=True)(
    _rewritten("either", lambda x, y: x.map_(y.to(x.dtype), lambda _, b: b) if not x.is_complex() else x.copy_(y))
)


@intervention("new ids and tables over memory that is rewritten", changes=True)
def same_memory(subject: Subject) -> None:
    """torch.from_numpy of an array that stays, in every step."""
    names = _named(subject, "either")
    first = subject.new_inputs(1)
    arrays = {n: [x.clone().numpy() for x in _tensors(first[n])] for n in names}

    def inputs(number: int) -> dict[str, Any]:
        inputs = subject.new_inputs(1)
        for name in names:
            for array, real in zip(arrays[name], _tensors(first[name]), strict=True):
                array[...] = _shifted(real, number).numpy()
            fresh = iter(arrays[name])
            inputs[name] = _mapped(lambda x, fresh=fresh: torch.from_numpy(next(fresh)), inputs[name])
        return inputs

    subject.inputs = inputs


def _shift_call(subject: Subject, told: dict[str, int]) -> Callable[[Any, Any], Any]:
    """What shifts ids and tables of a call by the number of the step."""
    names = _named(subject, "either")

    def shift(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = {n: _mapped(lambda x: _shifted(x, told["step"]), kwargs[n]) for n in names if n in kwargs}
        return args, {**kwargs, **changed}

    return shift


def _told(subject: Subject) -> dict[str, int]:
    told = {"step": 0}
    subject.before_step = lambda number: told.update(step=number)
    return told


def _same_inputs(subject: Subject) -> None:
    inputs = subject.new_inputs(1)
    subject.inputs = lambda number: inputs


@intervention("model.forward shifts ids by the step", changes=True)
def forward_wrapper(subject: Subject) -> None:
    """The same tensors are passed to the model in every step."""
    shift, real = _shift_call(subject, _told(subject)), subject.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = shift(args, kwargs)
        return real(*args, **kwargs)

    _same_inputs(subject)
    subject.assign(subject.model, "forward", functools.wraps(real)(forward))


@intervention("forward of the model's class shifts ids by the step", changes=True)
def class_wrapper(subject: Subject) -> None:
    """TeaCache's way."""
    cls: Any = subject.parts.classes[""]
    shift, real = _shift_call(subject, _told(subject)), cls.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = shift(args, kwargs)
        return real(self, *args, **kwargs)

    _same_inputs(subject)
    subject.assign(cls, "forward", functools.wraps(real)(forward))


@intervention("model.forward is a partial with ids of its own", changes=True)
def partial(subject: Subject) -> None:
    """functools.partial fixes them."""
    names = _named(subject, "either")
    inputs = subject.new_inputs(1)
    fixed = {n: _mapped(lambda x: _shifted(x, 1), inputs[n]) for n in names}
    subject.assign(subject.model, "forward", functools.partial(subject.model.forward, **fixed))
    subject.inputs = lambda number: {n: v for n, v in subject.new_inputs(1).items() if n not in names}


@intervention("pre-hook on the model shifts ids by the step", changes=True)
def model_hook(subject: Subject) -> None:
    """A hook of torch's."""
    shift = _shift_call(subject, _told(subject))
    _same_inputs(subject)
    subject.off(subject.model.register_forward_pre_hook(lambda m, a, k: shift(a, k), with_kwargs=True).remove)


@intervention("ModelHook shifts ids by the step", changes=True, reversible=False)
def diffusers_hook(subject: Subject) -> None:
    """Diffusers' hook, which replaces the forward."""
    from diffusers.hooks import HookRegistry, ModelHook

    shift = _shift_call(subject, _told(subject))

    class Shift(ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            return shift(args, kwargs)

    _same_inputs(subject)
    registry = HookRegistry.check_if_exists_or_initialize(subject.model)
    registry.register_hook(Shift(), "shift")
    subject.off(registry.remove_hook, "shift")


def _inside(change: Callable[[Any, int], Any], kind: str) -> Any:
    """Tables that change between the rope module and the attention modules, by the step."""

    def put(subject: Subject) -> None:
        told = _told(subject)
        for module in subject.modules(kind):
            real = module.forward
            names = list(inspect.signature(real).parameters)

            def forward(*args: Any, real: Any = real, names: list[str] = names, **kwargs: Any) -> Any:
                changed = [change(a, told["step"]) if _rotary(n) else a for n, a in zip(names, args, strict=False)]
                kwargs = {n: change(v, told["step"]) if _rotary(n) else v for n, v in kwargs.items()}
                return real(*changed, *args[len(changed) :], **kwargs)

            subject.assign(module, "forward", functools.wraps(real)(forward))

    return put


def _rotary(name: str) -> bool:
    return re.search(r"rot|rope|freqs_cis", name) is not None


def _rotated_back_in_step_1(value: Any, step: int) -> Any:
    return tables_rotated_back(value) if step == 1 else value


intervention("blocks give other tables in step 1 alone", changes=True)(_inside(_rotated_back_in_step_1, "blocks"))
intervention("last block gives other tables in step 1 alone", changes=True)(
    lambda subject: _inside(_rotated_back_in_step_1, "blocks")(_LastBlock(subject))
)


class _LastBlock:
    """A subject that has one block."""

    def __init__(self, subject: Subject) -> None:
        self.__dict__["subject"] = subject

    def __getattr__(self, name: str) -> Any:
        return getattr(self.subject, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.subject, name, value)

    def modules(self, kind: str) -> Any:
        return self.subject.modules(kind)[-1:]


@intervention("inputs of other sizes in every step")
def sizes(subject: Subject) -> None:
    """One sample, then the whole batch, then one again."""

    def inputs(number: int) -> dict[str, Any]:
        inputs = subject.new_inputs(1 + number)
        if number == 1:
            return inputs
        batch = {len(v) for n, v in inputs.items() if n == "hidden_states" and isinstance(v, torch.Tensor)}
        size = next(iter(batch), 1)
        return {n: v[:1] if isinstance(v, torch.Tensor) and v.ndim and len(v) == size > 1 and n not in _LONG else v
                for n, v in inputs.items()}  # fmt: skip

    subject.inputs = inputs


_LONG = ("img_ids", "txt_ids")


@intervention("float inputs want gradients")
def gradients(subject: Subject) -> None:
    """Gradients of the inputs themselves, as guidance by a loss takes them."""
    if not subject.example.trains:
        raise NotApplicable("does not train")

    def run(inputs: Any) -> Any:
        leaves = {n: v.clone().requires_grad_() for n, v in inputs.items()
                  if isinstance(v, torch.Tensor) and v.is_floating_point() and not _IDS.search(n)}  # fmt: skip
        output = subject.example.run(subject.model, {**inputs, **leaves})
        outputs = [x for x in _tensors(output) if x.requires_grad]
        gradients = torch.autograd.grad(
            sum(x.square().sum() for x in outputs), list(leaves.values()), allow_unused=True
        )
        return output, [g for g in gradients if g is not None]

    subject.run = run
