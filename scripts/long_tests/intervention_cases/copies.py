"""Copies, pickles, states that are loaded, functional calls and traces of a model."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from torch.func import functional_call

from .core import TWO_ORDERS, NotApplicable, Subject, intervention
from .parts import parent_of


def _copied(make: Any, unpatch: bool = False) -> Any:
    """What is called is a copy of the model as it is in that moment."""

    def put(subject: Subject) -> None:
        def run(inputs: Any) -> Any:
            other = make(subject.model)
            if unpatch:
                import dit_rope

                dit_rope.unpatch(other)
            with torch.no_grad():
                return subject.example.run(other, inputs)

        subject.run = run

    return put


def _saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


intervention("deep copy")(_copied(copy.deepcopy))
intervention("copy")(_copied(copy.copy))
intervention("pickled")(_copied(lambda model: pickle.loads(pickle.dumps(model))))
intervention("saved and loaded")(_copied(_saved))
intervention("deep copy, unpatched")(_copied(copy.deepcopy, True))
intervention("averaged copy")(_copied(lambda model: torch.optim.swa_utils.AveragedModel(model).module))


@intervention("copy outlives what is done to the original", reversible=False, undo_reaches=False)
def outlives(subject: Subject) -> None:
    """The original's weights are zeroed after the copy was made."""
    subject.callee = copy.deepcopy(subject.model)
    with torch.no_grad():
        for parameter in subject.model.parameters():
            parameter.zero_()


@intervention("one block exchanged for a deep copy of it")
def block_copy(subject: Subject) -> None:
    """Layers that are repeated."""
    block = copy.deepcopy(subject.modules("blocks")[-1])
    parent, name = parent_of(subject.model, subject.parts.blocks[-1])
    subject.assign(parent, name, block)


@intervention("last block shared with the first", changes=True)
def shared_blocks(subject: Subject) -> None:
    """One module at two paths."""
    blocks = subject.modules("blocks")
    if len(blocks) < 2 or type(blocks[0]) is not type(blocks[-1]):
        raise NotApplicable("no two blocks of a class")
    parent, name = parent_of(subject.model, subject.parts.blocks[-1])
    subject.assign(parent, name, blocks[0])


@intervention("weights loaded between steps", changes=True, reversible=False)
def loaded(subject: Subject) -> None:
    """load_state_dict of other weights before step 1."""
    first = {name: value.clone() for name, value in subject.model.state_dict().items()}

    def before_step(number: int) -> None:
        factor = 1.25 if number == 1 else 1
        subject.model.load_state_dict({n: v * factor if v.is_floating_point() else v for n, v in first.items()})

    subject.before_step = before_step


@intervention("weights assigned between steps", changes=True, reversible=False)
def assigned(subject: Subject) -> None:
    """load_state_dict(assign=True)."""
    first = {name: value.clone() for name, value in subject.model.state_dict().items()}

    def before_step(number: int) -> None:
        factor = 1.25 if number == 1 else 1
        state = {n: v * factor if v.is_floating_point() else v for n, v in first.items()}
        subject.model.load_state_dict(state, assign=True)

    subject.before_step = before_step


@intervention("functional_call with other weights", changes=True)
def functional(subject: Subject) -> None:
    """torch.func.functional_call."""

    def run(inputs: Any) -> Any:
        state = {n: p.detach() * 1.25 for n, p in subject.model.named_parameters()}
        with torch.no_grad():
            return subject.example.run(lambda **kwargs: functional_call(subject.model, state, (), kwargs), inputs)

    subject.run = run


class _Traced(torch.nn.Module):
    """A model of tensors alone, which can be traced."""

    def __init__(self, example: Any, model: Any, names: list[str], others: dict[str, Any]) -> None:
        super().__init__()
        self.example, self.model, self.names, self.others = example, model, names, others

    def forward(self, *tensors: torch.Tensor) -> Any:
        """The tensors of the output."""
        output = self.example.run(self.model, {**self.others, **dict(zip(self.names, tensors, strict=True))})
        return tuple(x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, torch.Tensor))


@intervention("jit.trace", orders=TWO_ORDERS, quick=False, halved=True)
def traced(subject: Subject) -> None:
    """The trace is called with the step's inputs, and with others."""

    def run(inputs: Any) -> Any:
        names = [name for name, value in inputs.items() if isinstance(value, torch.Tensor)]
        others = {name: value for name, value in inputs.items() if name not in names}
        with torch.no_grad():
            trace = torch.jit.trace(
                _Traced(subject.example, subject.model, names, others),
                tuple(inputs[n] for n in names),
                check_trace=False,
                strict=False,
            )
            new_inputs = subject.new_inputs(8)
            return trace(*(inputs[n] for n in names)), trace(*(new_inputs[n] for n in names))

    subject.run = run


@intervention("weights swapped", reversible=False, changes=True)
def swapped(subject: Subject) -> None:
    """torch.utils.swap_tensors of every floating point parameter, once."""
    for parameter in subject.model.parameters():
        torch.utils.swap_tensors(parameter, torch.nn.Parameter(parameter.detach() * 1.25))


@intervention("replicas")
def replicas(subject: Subject) -> None:
    """What DataParallel makes of a module: a shallow replica with separate parameters."""

    def run(inputs: Any) -> Any:
        replica = _replica(subject.model, {})
        with torch.no_grad():
            return subject.example.run(replica, inputs)

    subject.run = run


def _replica(module: Any, replicas: dict[int, Any]) -> Any:
    if id(module) in replicas:
        return replicas[id(module)]
    replica = replicas[id(module)] = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else _replica(child, replicas)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            setattr(replica, name, parameter.detach() * 1)
    for name, buffer in module._buffers.items():
        replica._buffers[name] = buffer
    return replica
