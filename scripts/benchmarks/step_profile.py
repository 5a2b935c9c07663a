"""Where the time of a denoising step goes: the share of each kind of work, from torch's profiler."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dit_rope.hooks.plan import PatchPlan

KINDS = ("attention", "matrix products", "tables", "rotation", "q and k norms", "other norms", "elementwise", "rest")
"""The shares, in order. ``rotation`` is whatever is computed element by element between the norms of queries and keys
and their product, such as the joining of text and image; ``rest`` is Python, and what is none of the others."""
ROPE = ("tables", "rotation", "q and k norms")
"""What a patch can work on."""

_STEP, _TABLES, _MODULE, _QK_NORM, _NORM = (f"dit_rope {name}" for name in ("step", "tables", "attn", "qk", "norm"))
_PRODUCTS = frozenset(f"aten::{name}" for name in ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "convolution"))
_NORMS = frozenset(f"aten::{name}" for name in ("layer_norm", "rms_norm", "group_norm"))


def shares(plans: Iterable[PatchPlan], step: Callable[[], object], device: str, calls: int = 3) -> dict[str, float]:
    """The share of each of :data:`KINDS` in ``calls`` of ``step``, which runs the models of ``plans``, unpatched.

    Shares add up to 1. On a GPU they are of the time that its kernels run, elsewhere of the call.
    """
    cuda = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with contextlib.ExitStack() as stack:
        for place in {(id(target), method): (target, method, name) for target, method, name in _places(plans)}.values():
            stack.enter_context(_marked(*place))
        step()
        with profile(activities=activities) as profiled, record_function(_STEP):
            for _ in range(calls):
                step()
            if cuda:
                torch.cuda.synchronize()
    return _summed(profiled.events(), "self_device_time_total" if cuda else "self_cpu_time_total")


def _places(plans: Iterable[PatchPlan]) -> Iterator[tuple[Any, str, str]]:
    """Objects, their methods and what these do."""
    for plan in plans:
        for table in plan.tables:
            yield table.target, table.tables.method, _TABLES
        rotated = set()
        for rotation in plan.rotations:
            yield rotation.attention, "forward", _MODULE
            for name, module in rotation.modules():
                rotated.add(id(module))
                if "norm" in name:
                    yield module, "forward", _QK_NORM
        for module in plan.model.modules():
            if "Norm" in type(module).__name__ and id(module) not in rotated and not list(module.children()):
                yield module, "forward", _NORM


@contextlib.contextmanager
def _marked(target: Any, method: str, name: str) -> Iterator[None]:
    """Calls of ``method`` show in profiles under ``name``."""
    original = getattr(target, method)
    before = vars(target).get(method)

    @functools.wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return original(*args, **kwargs)

    vars(target)[method] = run
    try:
        yield
    finally:
        if before is None:
            del vars(target)[method]
        else:
            vars(target)[method] = before


def _summed(events: Iterable[Any], time: str) -> dict[str, float]:
    """Shares of the own times of all events within the step."""
    host = [event for event in events if event.device_type.name == "CPU"]
    chains = [chain for event in host if (chain := list(_chain(event)))[-1].name == _STEP]
    products: dict[int, float] = {}  # when the attention product of each call of an attention module begins
    for event, *above in chains:
        if _is_attention(event.name):
            for outer in above:
                if outer.name == _MODULE:
                    start = event.time_range.start
                    products[id(outer)] = min(start, products.get(id(outer), start))
    totals = dict.fromkeys(KINDS, 0.0)
    for chain in chains:
        totals[_kind(chain, products)] += getattr(chain[0], time)
    whole = sum(totals.values())
    return {kind: total / whole for kind, total in totals.items()}


def _chain(event: Any) -> Iterator[Any]:
    """An event and whatever called it."""
    while event is not None:
        yield event
        event = event.cpu_parent


def _kind(chain: list[Any], products: dict[int, float]) -> str:
    names = {event.name for event in chain}
    if _TABLES in names:
        return "tables"
    if any(map(_is_attention, names)):
        return "attention"
    if names & _PRODUCTS:
        return "matrix products"
    if _QK_NORM in names:
        return "q and k norms"
    if not any(name.startswith("aten::") for name in names):
        return "rest"
    if _NORM in names or names & _NORMS:
        return "other norms"
    start = chain[0].time_range.start
    inside = any(event.name == _MODULE and start < products.get(id(event), 0.0) for event in chain)
    return "rotation" if inside else "elementwise"


def _is_attention(name: str) -> bool:
    return "attention" in name or "flash" in name
