"""Operators of attention modules and the bytes they move, before and after a patch; no clock is read.

Counted is the second of two forward passes, in one attention module of each path that rotates: all of it but GEMMs and
the attention product, as ``operator_counter`` says. The building of tables, and their conversion to tables of dit_rope,
are counted separately, in both passes.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dit_rope.adapters import adapter_of
from dit_rope.hooks.formats import Format
from dit_rope.hooks.plan import PatchPlan, make_plan
from dit_rope.patching import patch
from dit_rope.tables.caches import cache_clear

from .architectures import ARCHITECTURES, Architecture
from .operator_counter import Count, OperatorCounter
from .random_models import Noise
from .results import Row
from .sections import Case, Settings

FIGURES = ("kernels_before", "kernels_after", "q_units_before", "q_units_after", "q_units_minimum", "unit_bytes")
TABLE_FIGURES = (
    "table_kernels_before_first",
    "table_kernels_before_second",
    "table_kernels_after_first",
    "table_kernels_after_second",
)
INITIALIZERS = ("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_", "xavier_normal_")
DTYPE = torch.bfloat16


def cases(settings: Settings) -> Iterator[Case]:
    """One layer of each kind of every architecture, on CPU whatever the device: the counts are the same."""
    for name, architecture in ARCHITECTURES.items():
        yield Case(f"operators of {name}", functools.partial(_rows, name, architecture, settings.quick))


def _rows(name: str, architecture: Architecture, quick: bool) -> list[Row]:
    cache_clear()
    with constant_weights():
        model = architecture.build(1, "cpu", DTYPE)
    grid, text = ((1, 4, 6), 8) if quick else (architecture.grid, architecture.text)
    inputs = architecture.inputs(model.config, grid, text, 1, Noise(DTYPE))
    counted = count_patched(model, lambda: model(**inputs))
    tables = dict(zip(TABLE_FIGURES, counted.tables, strict=True))
    return [{"model": name, "module": stem, **figures, **tables} for stem, figures in counted.modules.items()]


@dataclass(frozen=True)
class Counted:
    """Figures of each kind of attention module by its path, and table kernels: :data:`FIGURES`, `TABLE_FIGURES`."""

    modules: dict[str, Row]
    tables: list[int]


def count_patched(model: torch.nn.Module, forward: Callable[[], object]) -> Counted:
    """Counts what ``forward``, which runs ``model`` in bfloat16, does unpatched and patched in fast mode, as on a GPU.

    The model is unpatched afterwards.

    Raises:
        ValueError: no adapter knows the model's class.
    """
    adapter = adapter_of(model)
    if adapter is None:
        raise ValueError(f"model must be of a class that an adapter knows, got {type(model).__name__}")
    plan = make_plan("model", model, adapter)
    before = run_steps(plan, forward, look=True)
    with patch(model, exact=False):
        after = run_steps(plan, forward)
    paths: dict[str, str] = {}
    for path in before[-1].attention:
        paths.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", path), path)
    modules = {stem: _figures(before[-1].attention[path], after[-1].attention[path]) for stem, path in paths.items()}
    return Counted(modules, [step.tables.kernels for steps in (before, after) for step in steps])


@dataclass(frozen=True)
class Step:
    """One forward pass: what ran in attention modules, by path, and for their tables."""

    attention: dict[str, Count]
    tables: Count


@contextlib.contextmanager
def _watched(target: Any, method: str, region: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """``target`` runs ``method`` in ``region()``, as a subclass that keeps its class's name."""
    cls = type(target)
    original = getattr(cls, method)

    @functools.wraps(original)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with region():
            return original(self, *args, **kwargs)

    target.__class__ = type(cls.__name__, (cls,), {method: run, "__module__": cls.__module__})
    try:
        yield
    finally:
        target.__class__ = cls


@contextlib.contextmanager
def _packing_watched(region: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """Conversions of a model's tables to those of dit_rope run in ``region()``."""
    original = {Format: Format.pack}

    def watch(pack: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with region():
                return pack(*args)

        return run

    for cls, pack in original.items():
        cls.pack = watch(pack)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for cls, pack in original.items():
            cls.pack = pack  # type: ignore[method-assign]


@contextlib.contextmanager
def constant_weights() -> Iterator[None]:
    """Models are built with weights of one value, which takes a tenth of the time and changes no count."""
    original = {name: getattr(torch.nn.init, name) for name in INITIALIZERS}
    for name in original:
        setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor.detach().fill_(0.001))
    try:
        yield
    finally:
        for name, function in original.items():
            setattr(torch.nn.init, name, function)


def run_steps(plan: PatchPlan, forward: Callable[[], object], steps: int = 2, look: bool = False) -> list[Step]:
    """Counts what calls of ``forward`` run in the attention modules and table builders of ``plan``.

    ``look`` counts what norms and projections return, too, in hooks, around which a patch would not fuse them.
    """
    counter, results = OperatorCounter(), [Step({}, Count()) for _ in range(steps)]
    step = results[0]

    def call(path: str) -> contextlib.AbstractContextManager[None]:
        # The first call counts: models that call a module again do it with the same kind of arguments.
        return counter.region(step.attention.setdefault(path, Count()) if path not in step.attention else Count())

    def count_rotated(name: str, module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        if counter.current is not None:
            counter.current.rotated[name] += output.numel()

    builders = {
        (id(builder.target), method): (builder.target, method)
        for builder in plan.tables
        for method in [builder.tables.method]
    }
    with contextlib.ExitStack() as stack:
        for target, method in builders.values():
            stack.enter_context(_watched(target, method, lambda: counter.region(step.tables)))
        stack.enter_context(_packing_watched(lambda: counter.region(step.tables)))
        for rotation in plan.rotations:
            stack.enter_context(_watched(rotation.attention, "forward", functools.partial(call, rotation.path)))
            for name, module in rotation.modules() if look else ():
                stack.callback(module.register_forward_hook(functools.partial(count_rotated, name)).remove)
        for step in results:  # noqa: B007 - the closures above read it
            with torch.no_grad(), counter:
                forward()
    return results


def _figures(before: Count, after: Count) -> Row:
    unit, least = minimum(before, after)
    sizes = [f"{size / unit:.1f}" for size in (before.bytes, after.bytes, least)]
    return dict(zip(FIGURES, [before.kernels, after.kernels, *sizes, unit], strict=True))


def minimum(before: Count, after: Count) -> tuple[int, int]:
    """Bytes of one query, and of reading and writing queries and keys once and the tables once.

    Keys count with the heads they have before a processor repeats them for the heads of the queries.
    """
    rotated = {kind: sum(n for name, n in before.rotated.items() if kind in name.split("_")) for kind in ("q", "k")}
    query = before.query or rotated["q"] or after.largest
    key = before.key or rotated["k"] or query
    if rotated["q"] and rotated["k"]:
        key = min(key, query * rotated["k"] // rotated["q"])
    return query * DTYPE.itemsize, 2 * (query + key) * DTYPE.itemsize + sum(after.tables.values())
