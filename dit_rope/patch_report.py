"""What a patch replaces and what it leaves alone, in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import torch

from .backend_choice import explain_backends
from .models.adapter import GridTables, ModelAdapter, ModelTables, Rotations
from .models.plan import Options, Plan
from .spec import Fusion, Scaling, Scalings


def declared(adapter: ModelAdapter) -> str:
    """What a patch of this class would replace, without a model to look at."""
    lines = [adapter.model_class]
    lines += [f"  {place_of(tables)}: {tables_of(tables, builder_of(tables))}" for tables in adapter.tables]
    lines += [f"  {each.attention}: {turns_of(each, tuple(each.turned))}" for each in adapter.rotations]
    return "\n".join([*lines, *(f"  left alone: {sentence}" for sentence in adapter.left_alone)])


def place_of(tables: GridTables | ModelTables) -> str:
    """Path of the object that builds tables, or the name of the model's own method."""
    return tables.path or (tables.method if isinstance(tables, ModelTables) else "")


def builder_of(tables: GridTables | ModelTables) -> str:
    """The class names that build tables."""
    return tables.builder if isinstance(tables.builder, str) else " or ".join(tables.builder)


def tables_of(tables: GridTables | ModelTables, builder: str, dense: bool = False) -> str:
    """What happens to the tables of one object, of class ``builder``; ``dense`` where the model reads them itself."""
    ours = "dense, from axis tables" if dense else "axis tables in place of dense ones"
    how = ours if isinstance(tables, GridTables) else "the model's own"
    return f"{builder}, tables memoized, {how}"


def turns_of(rotations: Rotations, names: Sequence[str]) -> str:
    """Where the queries and keys of one kind of attention module turn: in its modules ``names``, if any."""
    form = rotations.format
    alone = "" if form is None or form.exact else ", in fast mode only: in exact mode the rotation is left to the model"
    if not names:
        assert rotations.rebound is not None
        return f"{rotations.rebound.function} rotates in one pass{alone}"
    together = ", ".join(names)
    return f"{together} {'norm and rotate' if 'norm' in together else 'project and rotate'}{alone}"


def _scaling_of(scaling: Scalings | Callable[[], Scalings]) -> str:
    if callable(scaling):
        name = getattr(scaling, "__qualname__", type(scaling).__name__)
        return f"what {name} returns, asked once in every forward pass"
    if scaling is None or isinstance(scaling, Scaling):
        return f"{scaling or 'none'} on every axis"
    return ", ".join(f"{one or 'none'} on axis {axis}" for axis, one in enumerate(scaling))


def describe(plan: Plan, options: Options) -> str:
    """Every replaced object of one model, the arithmetic and backend, and what is left alone and why."""
    adapter = plan.adapter
    lines = [f"{plan.name}: {type(plan.model).__name__}", *_replaced(plan)]
    if plan.rotations:
        lines += [
            f"  arithmetic: {_arithmetic(options)}",
            f"  fused: {_fused(plan, options)}",
            f"  backend on {_device(plan)}: {_backend(_device(plan), options)}",
        ]
    elif options.fuse is Fusion.NOTHING:
        lines.append("  left alone: norm and rotation of queries and keys, as fuse asks")
    if options.scaling is not None:
        lines.append(f"  frequencies scaled: {_scaling_of(options.scaling)}")
    under_compile = "all of it" if options.scaling is None else "all but the scaled tables"
    lines.append(f"  left alone under torch.compile: {under_compile}, because the compiler fuses the model's own code")
    classes = {found.rotations.attention_class for found in plan.rotations}
    cross = sum(type(module).__name__ in classes for module in plan.model.modules()) - len(plan.rotations)
    if cross:
        lines.append(f"  left alone: {cross} attention modules, which do not rotate")
    lines += _hooks_of_others(plan)
    return "\n".join([*lines, *(f"  left alone: {sentence}" for sentence in adapter.left_alone)])


def _hooks_of_others(plan: Plan) -> Iterator[str]:
    """A line for the hooks that somebody has put on what a patch replaces: they see something else once it is in."""
    norms = [
        (f"{each.path}.{name}", getattr(each.attention, name, None)) for each in plan.rotations for name in each.turned
    ]
    ropes = [(found.tables.path, found.target) for found in plan.tables if isinstance(found.tables, GridTables)]
    for modules, sees in ((norms, "queries and keys that have turned"), (ropes, "positions in place of tables")):
        paths = [path for path, module in modules if getattr(module, "_forward_hooks", None)]
        if paths:
            yield f"  hooks of others on {', '.join(paths)}: they are given {sees}"


def _replaced(plan: Plan) -> Iterator[str]:
    """A line or two for each kind of object that is replaced."""
    for found in plan.tables:
        yield f"  {place_of(found.tables)}: {tables_of(found.tables, found.builder, not plan.rotations)}"
    kinds: dict[tuple[str, tuple[str, ...]], list[Rotations]] = {}
    for rotation in plan.rotations:
        stem = re.sub(r"\.\d+(?=\.|$)", ".*", rotation.path)
        kinds.setdefault((stem, tuple(rotation.turned)), []).append(rotation.rotations)
    for (stem, names), rotations in kinds.items():
        yield f"  {stem}, {len(rotations)} of them: {turns_of(rotations[0], names)}"
        if names:
            ours = " and a processor of ours" if rotations[0].processor is not None else ""
            yield f"  {stem}, {len(rotations)} of them: two hooks{ours}, so that the processor does not rotate"


def _arithmetic(options: Options) -> str:
    same = "bitwise equal to unpatched" if options.scaling is None else "rounded as unpatched"
    exact, fast = f"exact ({same})", "fast (float32, rounded once)"
    if options.exact is None:
        return f"exact on CPU ({same}), fast elsewhere (float32, rounded once)"
    return exact if options.exact else fast


def _fused(plan: Plan, options: Options) -> str:
    """What happens in one pass."""
    if options.fuse is Fusion.ROTATION:
        return "rotation, as fuse asks; norms are the model's own"
    if not any("norm" in name for each in plan.rotations for name in each.turned):
        return "rotation; there is no norm before it"
    if options.exact:
        return "rotation; norms are the model's own in exact mode"
    return "norm and rotation" + ("" if options.exact is False else " in fast mode, rotation in exact mode")


def _device(plan: Plan) -> torch.device:
    device = next(plan.model.parameters()).device
    if device.type == "meta":  # a model without weights, which would be loaded to where this machine computes
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device


def _backend(device: torch.device, options: Options) -> str:
    if options.backend != "auto":
        return options.backend
    return next(name for name, why in explain_backends(device) if why == "chosen")
