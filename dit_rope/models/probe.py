"""One tiny run of each kind of attention module, unpatched and patched: do queries and keys come out the same?

A version of diffusers whose processors do something else under the same names would pass every check of names and
signatures. So the first patch of a kind in a process runs its own module on a few tokens, and compares what reaches
scaled dot product attention before and after. Attention itself is not computed, hooks of others do not run, and no
other rank is asked for its part of the sequence: ranks need not be patched at the same time.

The call is made up from the module: hidden states of its input width, text where it has projections for text, a table
of random angles in the module's own form. A module that cannot be called so, or has no plain weights, is not probed.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .formats import AxisRows, Format
from .grid_tables import GridSettings
from .plan import Plan, RotationFound, form_of
from .seams import TakeRotation, end_flight

_IMAGE, _TEXT = 5, 3
# Some roundings of a value, in units of the machine epsilon and of the largest value.
_BOUND = 8


class _Reached(Exception):
    """Queries and keys came to attention."""


class _AtAttention(TorchFunctionMode):
    """Keeps what scaled dot product attention is given, and ends the call there."""

    given: tuple[torch.Tensor, ...] = ()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            named = {**dict(zip(("query", "key"), args, strict=False)), **(kwargs or {})}
            self.given = named["query"].clone(), named["key"].clone()
            raise _Reached
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Inputs:
    """One call: hidden states, other tensors by name, and the rotary arguments in the model's form and in ours."""

    hidden: torch.Tensor
    named: dict[str, torch.Tensor]
    own: dict[str, Any]
    ours: dict[str, Any]


@dataclass(frozen=True)
class Probe:
    """What one attention module gave to attention before it was patched."""

    found: RotationFound
    kind: Hashable
    inputs: _Inputs
    expected: tuple[torch.Tensor, ...]

    def check(self) -> None:
        """Runs the module again, patched, and remembers its kind as right.

        Raises:
            ValueError: its queries or keys are others, or are float64 and turned in float32 by its own code.
        """
        attention, given = self.found.attention, {**self.inputs.named, **self.inputs.ours}
        take = next(hook for hook in attention._forward_pre_hooks.values() if isinstance(hook, TakeRotation))
        # What is in question is the module's code, which every backend serves alike.
        taken = replace(take, backend="eager")(attention, (self.inputs.hidden,), given)
        args, kwargs = ((self.inputs.hidden,), given) if taken is None else taken
        try:
            actual = _at_attention(attention, args, kwargs)
        finally:
            end_flight()
        rounded = self.found.rotations.result or actual[0].dtype if actual else torch.float32
        if not self._as_expected(actual, rounded):
            if rounded is torch.float64 and self._as_expected(actual, torch.float32):
                raise ValueError(
                    f"{self.found.path} must have weights of 16 or 32 bits, got {rounded}, in which dit_rope would "
                    f"turn what {type(attention).__name__} turns in float32; patch the model in another dtype"
                )
            raise ValueError(
                f"{self.found.path} must turn its queries and keys as the {type(attention).__name__} that dit_rope "
                "knows, got others once it was patched; this version of the model is not known"
            )
        _right.add(self.kind)

    def _as_expected(self, actual: tuple[torch.Tensor, ...], rounded: torch.dtype) -> bool:
        return bool(actual) and all(_close(*pair, rounded) for pair in zip(actual, self.expected, strict=True))


_right: set[Hashable] = set()


def probes(plan: Plan, settings: GridSettings | None) -> list[Probe]:
    """One probe of each kind of attention module in ``plan`` not found right before; nothing is patched yet."""
    made: dict[Hashable, Probe] = {}
    for found in plan.rotations:
        if not found.turned:
            continue
        form = form_of(found, settings)
        attention: Any = found.attention
        weight = next(attention.parameters(), None)
        where = None if weight is None else (weight.dtype, weight.device.type)
        processor = type(getattr(attention, "processor", None))
        kind = (type(attention), processor, tuple(found.turned), plan.adapter.model, where, form.pairing)
        if kind in _right or kind in made:
            continue
        probe = _probe(found, kind, form)
        if probe is not None:
            made[kind] = probe
    return list(made.values())


def _probe(found: RotationFound, kind: Hashable, form: Format | AxisRows) -> Probe | None:
    attention = found.attention
    if not all(
        type(p) is torch.nn.Parameter and p.is_floating_point() and not p.is_meta for p in attention.parameters()
    ):
        return None
    names = tuple(name for name, _ in found.rotary)
    for inputs in _inputs(attention, form, names):
        with contextlib.suppress(Exception):  # not a call that suits this module
            turned = _at_attention(attention, (inputs.hidden,), {**inputs.named, **inputs.own})
            # Weights that are not loaded yet may be anything, and what comes of them too.
            if turned and all(bool(x.isfinite().all()) for x in turned):
                return Probe(found, kind, inputs, turned)
    return None


def _close(ours: torch.Tensor, theirs: torch.Tensor, rounded: torch.dtype) -> bool:
    """Whether both are the same but for some roundings to ``rounded``."""
    bound = _BOUND * torch.finfo(rounded).eps * theirs.abs().max()
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= bound)


def _at_attention(
    attention: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    """What reaches attention in one call of the module's own forward: queries and keys, or nothing."""
    mode = _AtAttention()
    kind = next(attention.parameters()).device.type
    autocast = torch.autocast(kind, enabled=False)
    with torch.no_grad(), autocast, _alone(attention), mode, contextlib.suppress(_Reached):
        type(attention).forward(attention, *args, **kwargs)
    return mode.given


@contextlib.contextmanager
def _alone(attention: torch.nn.Module) -> Iterator[None]:
    """Attention as on a single rank."""
    state = vars(getattr(attention, "processor", attention))
    name = "_parallel_config"
    config = state.get(name)
    if config is not None:
        state[name] = None
    try:
        yield
    finally:
        if config is not None:
            state[name] = config


def _inputs(attention: Any, form: Format | AxisRows, rotary: tuple[str, ...]) -> Iterator[_Inputs]:
    """Calls that may suit the module: whose tokens a table covers, and in how many tables, depends on the model."""
    weight = next(attention.parameters())
    projections = [part for part in attention.modules() if isinstance(part, torch.nn.Linear)]
    heads = next((getattr(attention, name) for name in ("heads", "num_heads") if hasattr(attention, name)), None)
    if not projections or heads is None:
        return
    pairs = int(getattr(attention, "head_dim", projections[0].out_features // heads)) // 2
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(weight.device, weight.dtype)

    def table(tokens: int, count: int = 1) -> tuple[Any, Any]:
        if isinstance(form, Format):
            angles = (torch.rand((1, tokens, count, pairs), generator=generator, dtype=torch.float32) * 6).to(
                weight.device
            )
            joined = form.join(angles.cos(), angles.sin())
            return joined, joined
        rows = (torch.rand((tokens, max(form.spec.pairs)), generator=generator, dtype=torch.float32) * 6).to(
            weight.device
        )
        positions = torch.arange(tokens, dtype=torch.int32, device=weight.device)
        ours = (
            positions[None, :, None, None].repeat(1, 1, 1, len(form.spec.pairs)),
            torch.stack((rows.cos(), rows.sin())),
        )
        return form.traceable(ours), ours

    width = projections[0].in_features
    hidden = noise(1, _IMAGE, width)
    text = getattr(attention, "add_q_proj", None) or getattr(attention, "to_k", None)
    texts = noise(1, _TEXT, getattr(text, "in_features", width))
    mask = torch.ones(1, _TEXT, dtype=torch.bool, device=weight.device)
    # With text first: a module that takes text and is called without may pass by a part of its code.
    named: list[dict[str, torch.Tensor]] = [
        {"encoder_hidden_states": texts},
        {"encoder_hidden_states": texts, "attention_mask": mask},
        {"encoder_hidden_states": hidden},
        {},
    ]
    taken = inspect.signature(type(attention).forward).parameters.keys()
    makers: tuple[Callable[[], tuple[Any, Any]], ...] = (
        lambda: table(_IMAGE),
        lambda: table(_IMAGE + _TEXT),
        lambda: ((table(_IMAGE)[0], table(_TEXT)[0]),) * 2,
        lambda: table(_IMAGE, heads),
    )
    for others, make, batched in itertools.product(named, makers, (False, True)):
        if not others.keys() <= taken:
            continue
        own, ours = make()
        if batched:
            own, ours = pytree.tree_map_only(torch.Tensor, lambda x: x[None], (own, ours))
        yield _Inputs(hidden, others, dict.fromkeys(rotary, own), dict.fromkeys(rotary, ours))
