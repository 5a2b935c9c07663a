"""What a patch replaces and what it leaves alone, in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import torch

from ..rotation.choice import explain_backends
from ..spec import Fusion, Scaling, Scalings
from .adapter import AttentionRotation, ModelAdapter, ModelTables
from .class_override import unpatched_class
from .fused_norms import makes_fresh_results
from .plan import Options, PatchPlan, RotationPlan, plain_path
from .rope_modules import reads_axes


def declared(adapter: ModelAdapter) -> str:
    """What a patch of this class would replace, without a model to look at."""
    lines = [adapter.model_class]
    lines += [f"  {place_of(tables)}: {builder_of(tables)}, {tables_of(tables)}" for tables in adapter.tables]
    lines += [f"  {each.attention}: {rotates_in(each, tuple(each.norms))}" for each in adapter.rotations]
    return "\n".join([*lines, *(f"  left alone: {sentence}" for sentence in adapter.not_patched)])


def place_of(tables: ModelTables) -> str:
    """Path of the object that builds tables, or the name of the model's own method."""
    return tables.path or tables.method


def builder_of(tables: ModelTables) -> str:
    """The class names that build tables."""
    return " or ".join(tables.builders)


def tables_of(tables: ModelTables, by_axis: bool | None = None) -> str:
    """What happens to the tables of one object; ``by_axis`` tells what kernels read of the last, if there were any."""
    memoized = "tables memoized, the model's own"
    if tables.axes is None:
        return memoized
    if by_axis is False:
        return f"{memoized}; kernels read a row for each token, as the last ones are not what arrays of axes expand to"
    where = "" if by_axis else ", where these expand to them bit for bit"
    return f"{memoized}; kernels read a small array for each axis, of the same values{where}"


def rotates_in(rotations: AttentionRotation, names: Sequence[str]) -> str:
    """Where the queries and keys of one kind of attention module rotate: in its modules ``names``, if any."""
    alone = "" if rotations.format.exact else ", in fast mode only: in exact mode the rotation is left to the model"
    if not names:
        assert rotations.replaced_function is not None
        return f"{rotations.replaced_function.name} rotates in one pass{alone}"
    together = ", ".join(names)
    return f"{together} {'norm and rotate' if 'norm' in together else 'project and rotate'}{alone}"


def _scaling_of(scaling: Scalings | Callable[[], Scalings]) -> str:
    if callable(scaling):
        name = getattr(scaling, "__qualname__", type(scaling).__name__)
        return f"what {name} returns, asked once in every forward pass"
    if scaling is None or isinstance(scaling, Scaling):
        return f"{scaling or 'none'} on every axis"
    return ", ".join(f"{one or 'none'} on axis {axis}" for axis, one in enumerate(scaling))


def describe(plan: PatchPlan, options: Options) -> str:
    """What is replaced in one model at this moment, the arithmetic and backend, and what is left alone and why."""
    plan = plan.now()
    patched = plan.state.active and bool(plan.state.objects)
    undone = "" if plan.state.active else " (undone)"
    lines = [
        f"{plan.name}: {type(plan.model).__name__}{undone}",
        *_tables(plan, options, patched),
        *_rotations(plan, patched),
    ]
    if any(each.why_left(patched) is None for each in plan.rotations):
        lines += [
            f"  arithmetic: {_arithmetic(options)}",
            f"  fused: {_fused(plan, options)}",
            f"  backend on {_device(plan)}: {_backend(_device(plan), options)}",
        ]
    if options.fuse is Fusion.NOTHING:
        lines.append("  left alone: norm and rotation of queries and keys, as fuse asks")
    if options.scaling is not None:
        lines.append(f"  frequencies scaled: {_scaling_of(options.scaling)}")
    under_compile = "all of it" if options.scaling is None else "all but the scaled tables"
    lines.append(f"  left alone under torch.compile: {under_compile}, because the compiler fuses the model's own code")
    lines.append(
        "  left alone under torch.func, dual numbers and jit tracing: all of it, because kernels have no tangents"
    )
    lines += _elsewhere(plan)
    return "\n".join([*lines, *(f"  left alone: {sentence}" for sentence in plan.adapter.not_patched)])


def _tables(plan: PatchPlan, options: Options, patched: bool) -> Iterator[str]:
    """A line for each object that builds tables."""
    for each in plan.tables:
        reason = each.why_left(patched)
        what = tables_of(each.tables, reads_axes(each.target))
        if reason is not None:
            what = f"left alone, its tables are built in every forward pass: {reason}"
        elif options.scaling is not None and each.tables.axes is not None:
            what = "tables memoized, scaled; kernels read a small array for each axis"
        yield f"  {place_of(each.tables)}: {each.builder}, {what}"


def _rotations(plan: PatchPlan, patched: bool) -> Iterator[str]:
    """A line or two for each kind of attention module: where it rotates, or why the model does."""
    kinds: dict[tuple[str, tuple[str, ...], str | None], list[RotationPlan]] = {}
    for each in plan.rotations:
        stem = re.sub(r"\.\d+(?=\.|$)", ".*", plain_path(each.path))
        kinds.setdefault((stem, tuple(each.names), each.why_left(patched)), []).append(each)
    for (stem, names, reason), found in kinds.items():
        which = f"{stem}, {len(found)} of them"
        if reason is not None:
            yield f"  left alone: {which}, where the model rotates: {reason}"
            continue
        yield f"  {which}: {rotates_in(found[0].rotations, names)}"
        watched = sum(not makes_fresh_results(getattr(each.attention, name)) for each in found for name in names)
        if watched:
            yield f"  {which}: {watched} of their modules are hooked or unknown, run by themselves, and rotate after it"


def _elsewhere(plan: PatchPlan) -> Iterator[str]:
    """A line for attention modules of the same classes that are not where a patch knows them to rotate."""
    known = {id(each.attention) for each in plan.rotations}
    classes = {each.attention_class for each in plan.adapter.rotations if each.norms}
    others = [
        plain_path(path)
        for path, module in plan.model.named_modules()
        if id(module) not in known and unpatched_class(module).__name__ in classes
    ]
    if others and plan.rotations:
        yield f"  left alone: {len(others)} attention modules, which do not rotate"
    elif others:
        yield (
            f"  left alone: {len(others)} attention modules, such as {others[0]}, which are not where dit_rope knows "
            "them to be: are their blocks wrapped?"
        )


def _arithmetic(options: Options) -> str:
    same = "bitwise equal to unpatched" if options.scaling is None else "rounded as unpatched"
    exact = f"exact ({same}; the model's own rotation where gradients are wanted)"
    fast = "fast (float32, rounded once)"
    if options.exact is None:
        return f"{exact} on CPU, {fast} elsewhere"
    return exact if options.exact else fast


def _fused(plan: PatchPlan, options: Options) -> str:
    """What happens in one pass."""
    if options.fuse is Fusion.ROTATION:
        return "rotation, as fuse asks; norms are the model's own"
    if not any("norm" in name for each in plan.rotations for name in each.names):
        return "rotation; there is no norm before it"
    if options.exact:
        return "rotation; norms are the model's own in exact mode"
    return "norm and rotation" + ("" if options.exact is False else " in fast mode, rotation in exact mode")


def _device(plan: PatchPlan) -> torch.device:
    device = next(plan.model.parameters()).device
    if device.type == "meta":  # a model without weights, which would be loaded to where this machine computes
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device


def _backend(device: torch.device, options: Options) -> str:
    if options.backend != "auto":
        return options.backend
    return next(name for name, why in explain_backends(device) if why == "chosen")
