"""Reports: what a patch replaces, what it does not patch, and why."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import torch

from ..rotation import Rounding
from ..rotation.choice import explain_backends
from ..spec import Scaling, Scalings
from .adapter import AttentionRotation, ModelAdapter, ModelTables
from .class_override import record_of, unpatched_class
from .fused_norms import makes_fresh_results
from .options import Fusion, Options
from .plan import PatchPlan, RotationPlan, plain_path
from .rope_modules import reads_axes


def describe_adapter(adapter: ModelAdapter) -> str:
    """What a patch of this class would replace, without a model."""
    lines = [adapter.model_class]
    lines += [f"  {place_of(tables)}: {' or '.join(tables.builders)}, {tables_of(tables)}" for tables in adapter.tables]
    lines += [
        f"  {rotation.attention}: {rotates_in(rotation, tuple(rotation.norms))}" for rotation in adapter.rotations
    ]
    return "\n".join([*lines, *map(_not_patched, adapter.not_patched)])


def _not_patched(text: str) -> str:
    return f"  not patched: {text}"


def place_of(tables: ModelTables) -> str:
    """Path of the object that builds tables, or the name of the method if that is the model itself."""
    return tables.path or tables.method


def tables_of(tables: ModelTables, by_axis: bool | None = None) -> str:
    """What happens to the tables of one object.

    ``by_axis`` tells whether kernels read axis tables instead of the last dense tables; None if none were built.
    """
    if tables.axes is None:
        return "tables memoized"
    if by_axis is False:
        return "tables memoized; kernels read a row per token, because the last tables differ from those of a grid"
    where = "" if by_axis else ", if these expand to the model's tables bit for bit"
    return f"tables memoized; kernels read a small array per axis{where}"


def rotates_in(rotation: AttentionRotation, names: Sequence[str]) -> str:
    """Where queries and keys of one kind of attention module rotate: in its modules ``names``, if there are any."""
    form = rotation.format
    mode = ""
    if not form.exact:
        mode = ", but in exact mode the model rotates"
        mode += "" if form.formula is None else ", unless a kernel has the same bits"
    if not names:
        assert rotation.replaced_function is not None
        return f"{rotation.replaced_function.name} rotates in one pass{mode}"
    modules = ", ".join(names)
    return f"{modules} {'norm and rotate' if 'norm' in modules else 'project and rotate'}{mode}"


def _scaling_of(scaling: Scalings | Callable[[], Scalings]) -> str:
    if callable(scaling):
        name = getattr(scaling, "__qualname__", type(scaling).__name__)
        return f"what {name} returns, called once in every forward pass"
    if scaling is None or isinstance(scaling, Scaling):
        return f"{scaling or 'none'} on every axis"
    return ", ".join(f"{value or 'none'} on axis {axis}" for axis, value in enumerate(scaling))


def describe(plan: PatchPlan, options: Options) -> str:
    """What is replaced in one model at this moment, the arithmetic and backend, and what is not patched and why."""
    plan = plan.now()
    patched = plan.state.active and bool(plan.state.objects)
    undone = "" if plan.state.active else " (undone)"
    lines = [
        f"{plan.name}: {type(plan.model).__name__}{undone}",
        *_tables(plan, options, patched),
        *_rotations(plan, patched),
    ]
    if any(rotation.why_not_patched(patched) is None for rotation in plan.rotations):
        lines += [
            f"  arithmetic: {_arithmetic(options)}",
            f"  fused: {_fused(plan, options)}",
            f"  backend on {_device(plan)}: {_backend(_device(plan), options)}",
        ]
    if options.fuse is Fusion.NOTHING:
        lines.append(_not_patched("norm and rotation of queries and keys, because fuse is Fusion.NOTHING"))
    if options.scaling is not None:
        lines.append(f"  frequencies scaled: {_scaling_of(options.scaling)}")
    lines += list(_compiled(plan, options))
    lines.append(
        "  not patched under torch.func, dual numbers and jit tracing: everything, because kernels have no tangents"
    )
    return "\n".join([*lines, *_elsewhere(plan), *map(_not_patched, plan.adapter.not_patched)])


def _compiled(plan: PatchPlan, options: Options) -> Iterator[str]:
    """What a compiler sees of the patch."""
    traced = 0
    if options.compiled:
        records = [record_of(each.attention) for each in plan.rotations]
        traced = sum(record is not None and record.settings.traced is not None for record in records)
    if traced:
        yield f"  under torch.compile: {_count(traced, 'attention module')} with the operators of dit_rope in the graph"
    else:
        everything = "everything" if options.scaling is None else "everything but the scaled tables"
        yield f"  not patched under torch.compile: {everything}, because the compiler fuses the model's own code"


def _tables(plan: PatchPlan, options: Options, patched: bool) -> Iterator[str]:
    """A line for each object that builds tables."""
    for tables in plan.tables:
        reason = tables.why_not_patched(patched)
        text = tables_of(tables.tables, reads_axes(tables.target))
        if reason is not None:
            text = f"not patched, builds its tables in every forward pass: {reason}"
        elif options.scaling is not None and tables.tables.axes is not None:
            text = "tables memoized, scaled; kernels read a small array per axis"
        yield f"  {place_of(tables.tables)}: {tables.builder}, {text}"


def _rotations(plan: PatchPlan, patched: bool) -> Iterator[str]:
    """A line or two for each kind of attention module: where it rotates, or why it is not patched."""
    kinds: dict[tuple[str, tuple[str, ...], str | None], list[RotationPlan]] = {}
    for rotation in plan.rotations:
        stem = re.sub(r"\.\d+(?=\.|$)", ".*", plain_path(rotation.path))
        kinds.setdefault((stem, tuple(rotation.names), rotation.why_not_patched(patched)), []).append(rotation)
    for (stem, names, reason), plans in kinds.items():
        place = f"{stem} ({_count(len(plans), 'module')})"
        if reason is not None:
            yield _not_patched(f"{place}, where the model rotates: {reason}")
            continue
        yield f"  {place}: {rotates_in(plans[0].rotation, names)}"
        slow = sum(not makes_fresh_results(getattr(rotation.attention, name)) for rotation in plans for name in names)
        if slow:
            yield f"  {place}: {_count(slow, 'hooked or unknown norm')}, which rotate in a second pass"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _elsewhere(plan: PatchPlan) -> Iterator[str]:
    """A line for attention modules of the same classes at paths that the adapter does not name."""
    planned = {id(rotation.attention) for rotation in plan.rotations}
    classes = {rotation.attention_class for rotation in plan.adapter.rotations if rotation.norms}
    paths = [
        plain_path(path)
        for path, module in plan.model.named_modules()
        if id(module) not in planned and unpatched_class(module).__name__ in classes
    ]
    count = _count(len(paths), "attention module")
    if paths and plan.rotations:
        yield _not_patched(f"{count} without rotary embedding")
    elif paths:
        yield _not_patched(
            f"{count} at other paths than dit_rope knows, such as {paths[0]}; unwrap their blocks and patch again"
        )


def _arithmetic(options: Options) -> str:
    bits = "bitwise equal to unpatched" if options.scaling is None else "rounded as unpatched"
    texts = {
        Rounding.EXACT: f"exact ({bits}; the model's own rotation if gradients are wanted)",
        Rounding.MODEL: "rounded where the model rounds",
        Rounding.FAST: "fast (float32, rounded once)",
    }
    if options.rounding is None:
        return f"{texts[Rounding.EXACT]} on CPU, {texts[Rounding.MODEL]} elsewhere"
    return texts[options.rounding]


def _fused(plan: PatchPlan, options: Options) -> str:
    """Which operations are one pass over memory."""
    if options.fuse is Fusion.ROTATION:
        return "rotation, because fuse is Fusion.ROTATION; norms are the model's own"
    if not any("norm" in name for rotation in plan.rotations for name in rotation.names):
        return "rotation; the model has no norm before it"
    exact = "; in exact mode only norms of which one pass has the same bits"
    return "norm and rotation" + (exact if options.rounding in (None, Rounding.EXACT) else "")


def _device(plan: PatchPlan) -> torch.device:
    device = next(plan.model.parameters()).device
    if device.type == "meta":  # a model without weights: assume the device on which this machine would run it
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device


def _backend(device: torch.device, options: Options) -> str:
    if options.backend != "auto":
        return options.backend
    return next(name for name, why in explain_backends(device) if why == "chosen")
