"""One intervention, the model it is put onto, and the list of all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from zoo import Noise

from .parts import Parts

EVERY_ORDER = ("before", "after", "taken off first", "again")
"""Whether an intervention is put on before or after the patch; after it and taken off before ``undo()``; or after a
patch that was undone, and before the next one."""
TWO_ORDERS = ("before", "after")


class NotApplicable(Exception):
    """The intervention has nothing to act on in this example; the message names what is missing."""


class Stopped(KeyboardInterrupt):
    """An interrupt that only these cases raise."""


@dataclass
class Subject:
    """One model under an intervention, which may replace ``run``, ``inputs`` and ``before_step``.

    Attributes:
        example: what it was built from.
        model: unpatched or patched.
        parts: where its attention modules, norms and the like are.
        run: one forward pass with these inputs, as tensors, a nest of them, or an error.
        inputs: those of a step, by its number; by default the same objects in steps 0 and 1, and others in step 2.
        before_step: called with the number of a step before its inputs are made.
        callee: what is called in place of the model.
        patching: makes a context for the patch alone.
        judged: what is told of a difference, such as what hooks saw: added to the results of each step.
    """

    example: Any
    model: Any
    parts: Parts
    dtype: torch.dtype
    run: Callable[[Mapping[str, Any]], Any] = field(init=False)
    inputs: Callable[[int], dict[str, Any]] = field(init=False)
    before_step: Callable[[int], None] = field(init=False)
    callee: Any = field(init=False)
    patching: Callable[[], Any] = field(init=False)
    judged: list[Any] = field(default_factory=list)
    _repeated: dict[str, Any] | None = None
    _off: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __post_init__(self) -> None:
        self.plain()

    def plain(self) -> None:
        """Calls as nobody intervenes in them."""
        self.run, self.inputs, self.callee = self.forward, self.default_inputs, self.model
        self.before_step, self.patching = (lambda number: None), contextlib.nullcontext

    def forward(self, inputs: Mapping[str, Any]) -> Any:
        """One forward pass without gradients."""
        with torch.no_grad():
            return self.example.run(self.callee, inputs)

    def new_inputs(self, seed: int) -> dict[str, Any]:
        """New inputs."""
        return self.example.inputs(self.model, Noise(self.dtype, seed))

    def default_inputs(self, number: int) -> dict[str, Any]:
        """Steps 0 and 1 get the same objects, step 2 new ones with other noise."""
        if number == 0 or self._repeated is None:
            self._repeated = self.new_inputs(1)
        return self._repeated if number < 2 else self.new_inputs(3)

    def off(self, undo: Callable[..., Any], *args: Any) -> None:
        """Says how to take off what was just put on; the last one goes first."""
        self._off.callback(undo, *args)

    def enter(self, context: Any) -> Any:
        """Enters a context that is left when the intervention is taken off."""
        return self._off.enter_context(context)

    def assign(self, owner: Any, name: str, value: Any) -> None:
        """Sets ``owner.name``; taking the intervention off restores the owner's attribute, or its absence."""
        attributes = vars(owner) if not isinstance(owner, torch.nn.Module) else {**vars(owner), **owner._modules}
        before = attributes.get(name, _MISSING)
        setattr(owner, name, value)
        self.off(_put_back, owner, name, before)

    def take_off(self) -> None:
        """Takes the intervention off."""
        self._off.close()
        self.plain()

    def modules(self, kind: str) -> list[torch.nn.Module]:
        """The attention modules, blocks, norms, projections or rope modules.

        Raises:
            NotApplicable: there are none.
        """
        modules = [self.model.get_submodule(path) for path in getattr(self.parts, kind)]
        if not modules:
            raise NotApplicable(f"no {kind}")
        return modules

    def classes(self, kind: str) -> set[type]:
        """The unpatched classes of these modules.

        Raises:
            NotApplicable: there are none.
        """
        self.modules(kind)
        return {self.parts.classes[path] for path in getattr(self.parts, kind)}

    def processed(self) -> list[torch.nn.Module]:
        """Attention modules that rotate and have a processor.

        Raises:
            NotApplicable: there are none.
        """
        modules = [module for module in self.modules("attentions") if getattr(module, "processor", None) is not None]
        if not modules:
            raise NotApplicable("attention modules without processors")
        return modules


_MISSING: Any = object()


def _put_back(owner: Any, name: str, before: Any) -> None:
    if before is _MISSING:
        delattr(owner, name)
    else:
        setattr(owner, name, before)


@dataclass(frozen=True)
class Intervention:
    """A change of a model, or of its calls, besides the patch.

    Attributes:
        name, group: as tables say it.
        put: puts it onto a subject. Raises :class:`NotApplicable` where there is nothing to put it onto.
        orders: relative to the patch.
        changes: results must differ from those of a model that is left alone, at least on one example.
        dtype: of the weights and inputs.
        rounded: the coarsest dtype that results are rounded to, where it is not ``dtype``.
        roundings: how many of them results may be off.
        reversible: it can be taken off again, and leaves every object as it was.
        undo_reaches: what is called after ``undo()`` is what was patched, no copy of it, and holds nothing that was
            computed while it was.
        halved: each order in one mode, which alternate from example to example: where a case takes seconds.
        quick: part of the quick run.
        ranks: processes that run it together.
    """

    name: str
    group: str
    put: Callable[[Subject], None]
    orders: tuple[str, ...] = EVERY_ORDER
    changes: bool = False
    dtype: torch.dtype = torch.float32
    rounded: torch.dtype | None = None
    roundings: int = 64
    reversible: bool = True
    undo_reaches: bool = True
    halved: bool = False
    quick: bool = True
    ranks: int = 1


INTERVENTIONS: list[Intervention] = []


def intervention(name: str, **options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function that puts an intervention onto a subject; its group is the module it is in."""

    def register(put: Callable[..., None]) -> Callable[..., None]:
        if any(registered.name == name for registered in INTERVENTIONS):
            raise ValueError(f"name must be new, got {name}")
        home = getattr(put, "func", put).__module__  # of what a partial is of
        INTERVENTIONS.append(Intervention(name, home.rpartition(".")[2], put, **options))
        return put

    return register
