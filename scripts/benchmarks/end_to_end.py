"""How much faster a patch makes a whole denoising step, by what is patched, and the most that any patch could gain."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from dit_rope.adapters import adapter_of
from dit_rope.hooks.options import Fusion
from dit_rope.hooks.plan import PatchPlan, RotationPlan, make_plan
from dit_rope.patching import patch
from dit_rope.rotation import Rounding

from .architectures import ARCHITECTURES, Architecture
from .random_models import Noise
from .results import Row
from .step_profile import KINDS, ROPE, shares
from .table_building import cold
from .timing import Timing, interleave

__all__ = [
    "ARCHITECTURES",
    "VARIANTS",
    "Mismatch",
    "Step",
    "Variant",
    "architecture_step",
    "measure_step",
    "pipeline_step",
    "runs",
    "whole_run",
]

UNPATCHED, WITHOUT = "unpatched", "without rope"
_FIRST = "first"
# The model rounds after its norm, after its weight and after its rotation; fast mode once.
_ROUNDINGS = 4


class Mismatch(Exception):
    """Outputs of a patched step differ from those of the unpatched one; the message names the variant and the error."""


@dataclass(frozen=True)
class Variant:
    """One way to patch; ``fuse`` and ``rounding`` as :func:`dit_rope.patch` takes them."""

    name: str
    fuse: Fusion
    rounding: Rounding


EXACT = Variant("tables, norm and rotation exact", Fusion.NORM_AND_ROTATION, Rounding.EXACT)
AS_MODEL = Variant("tables, norm and rotation as the model", Fusion.NORM_AND_ROTATION, Rounding.MODEL)
VARIANTS = (
    Variant("tables", Fusion.NOTHING, Rounding.EXACT),
    Variant("tables, rotation exact", Fusion.ROTATION, Rounding.EXACT),
    EXACT,
    AS_MODEL,
    Variant("tables, rotation", Fusion.ROTATION, Rounding.FAST),
    Variant("tables, norm and rotation", Fusion.NORM_AND_ROTATION, Rounding.FAST),
)
"""From the least to the most."""


@dataclass(frozen=True)
class Call:
    """A forward pass: the number of the model in its step, and the arguments."""

    model: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """The forward passes of a denoising step, or one of several equal passes.

    Attributes:
        models: unpatched, each once.
        calls: in order.
    """

    models: tuple[torch.nn.Module, ...]
    calls: tuple[Call, ...]

    @property
    def device(self) -> str:
        """The torch device that it runs on."""
        return str(next(self.models[0].parameters()).device)

    def run(self) -> list[torch.Tensor]:
        """Makes the calls; returns every tensor in their outputs."""
        with torch.no_grad():
            outputs = [self.models[call.model](*call.args, **call.kwargs) for call in self.calls]
        return [
            leaf
            for leaf in pytree.tree_leaves([_plain(output) for output in outputs])
            if isinstance(leaf, torch.Tensor)
        ]

    def plans(self) -> list[PatchPlan]:
        """What a patch would replace in each model."""
        adapted = [(f"model {number}", model, adapter_of(model)) for number, model in enumerate(self.models)]
        return [make_plan(name, model, adapter) for name, model, adapter in adapted if adapter is not None]

    def twin(self) -> Step:
        """The same calls of copies of the models, which share their parameters."""
        shared = {id(parameter): parameter for model in self.models for parameter in model.parameters()}
        return replace(self, models=tuple(copy.deepcopy(self.models, shared)))

    def compiled(self) -> Step:
        """The same calls of the models, each compiled whole."""
        return replace(self, models=tuple(torch.compile(model) for model in self.models))  # type: ignore[misc]


def architecture_step(
    architecture: Architecture,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    layers: int | None = None,
    grid: tuple[int, int, int] | None = None,
    text: int | None = None,
    batch: int = 1,
    config: Mapping[str, Any] | None = None,
) -> Step:
    """One forward pass of a model with random weights.

    Args:
        architecture: one of :data:`ARCHITECTURES`.
        device, dtype: of the weights and of the inputs.
        layers: of each kind; all that were released where None.
        grid: tokens after patching, frames, height and width; the architecture's own where None.
        text: tokens of text; the architecture's own where None.
        batch: videos, or images, in it.
        config: further values of the configuration.
    """
    model = architecture.build(layers, device, dtype, **(config or {}))
    sizes = (grid or architecture.grid, text or architecture.text, batch)
    inputs = architecture.inputs(model.config, *sizes, Noise(dtype, device=device))
    return Step((model,), (Call(0, (), {**inputs, "return_dict": False}),))


def pipeline_step(pipe: Any, **arguments: Any) -> Step:
    """The calls of the second step of a pipeline, which is run for two; guidance is as the pipeline does it.

    Args:
        pipe: a diffusers pipeline with a supported transformer.
        arguments: of its call, but for the number of steps. Those that it does not take are left out.

    Raises:
        UnsupportedModelError, ValueError: as :func:`dit_rope.patch`.
    """
    patch(pipe).undo()
    modules = [module for module in pipe.components.values() if isinstance(module, torch.nn.Module)]
    models = tuple(module for module in modules if adapter_of(module) is not None)
    calls: list[Call] = []
    parameters = inspect.signature(pipe.__call__).parameters
    accepted = {name: value for name, value in arguments.items() if name in parameters}
    with contextlib.ExitStack() as stack:
        for number, model in enumerate(models):
            hook = _remembers(calls, number)
            stack.callback(model.register_forward_pre_hook(hook, with_kwargs=True).remove)
        pipe(**{"prompt": "", **accepted, "num_inference_steps": 2, "output_type": "latent"})
    return Step(models, tuple(calls[len(calls) // 2 :]))


def measure_step(
    step: Step,
    *,
    rounds: int = 5,
    compiled: bool = False,
    advance: Callable[[], object] | None = None,
    on_error: Callable[[str, Exception], object] | None = None,
) -> list[Row]:
    """Times a step unpatched, patched in every way of :data:`VARIANTS`, and without any rope, after comparing outputs.

    Args:
        step: what to run.
        rounds: timed runs of each variant; they take turns.
        compiled: by ``torch.compile``, where a patched model runs its own code: unpatched and patched alone.
        advance: called after every run, of which there are :func:`runs`.
        on_error: called with the name of each variant that fails or whose output differs, and the error; the others
            are timed.

    Returns:
        A row for each variant: milliseconds of a step, ``ratio`` of the unpatched step to it, for the default
        variant the milliseconds of a step that finds no table, as the first one does, and the shares of the unpatched
        step.

    Raises:
        Mismatch: an output differs by more than it may, and ``on_error`` is None. Nothing is timed then.
    """
    if compiled:
        # Past some number of versions of the same code, the compiler leaves what comes next as it is.
        torch.compiler.reset()
    variants = _twins(step, compiled)
    for name, error in _errors(variants, step, compiled):
        if on_error is None:
            raise error
        del variants[name]
        on_error(name, error)
    cases: dict[str, Callable[[], object]] = {}
    for name, twin in variants.items():
        if name == default_variant(step.device):
            cases[_FIRST] = cold(twin.run)  # right before the runs that find what it has built
        cases[name] = twin.run
    timings = interleave(cases, rounds, warm_up=1, advance=advance)
    step_shares = dict.fromkeys(KINDS) if compiled else shares(step.plans(), step.run, step.device)
    return [_row(name, variants, timings, step, step_shares) for name in variants]


def whole_run(rows: list[Row], passes: int) -> list[Row]:
    """The rows of :func:`measure_step` for a run of so many such passes, of which only the first finds no table."""
    unpatched_ms = rows[0]["ms_median"] * passes
    runs = [row["ms_first"] and row["ms_first"] + row["ms_median"] * (passes - 1) for row in rows]
    return [
        {**row, "run_ms": run, "run_ratio": run and unpatched_ms / run} for row, run in zip(rows, runs, strict=True)
    ]


def runs(step: Step, rounds: int, compiled: bool) -> int:
    """How often :func:`measure_step` calls ``advance``."""
    bound = not compiled and _has_bound(step.plans())
    return (2 + (1 if compiled else len(VARIANTS)) + bound) * (rounds + 1)


def default_variant(device: str) -> str:
    """The name of what :func:`dit_rope.patch` does by default."""
    return (EXACT if device.startswith("cpu") else AS_MODEL).name


def _twins(step: Step, compiled: bool) -> dict[str, Step]:
    twins = {UNPATCHED: step}
    for variant in VARIANTS:
        if compiled and variant.name != default_variant(step.device):
            continue
        twins[variant.name] = twin = step.twin()
        for plan in twin.plans():
            patch(plan.model, fuse=variant.fuse, rounding=variant.rounding)
    if compiled:
        return {name: twin.compiled() for name, twin in twins.items()}
    if _has_bound(step.plans()):
        twins[WITHOUT] = step.twin()
        for plan in twins[WITHOUT].plans():
            _without_rope(plan)
    return twins


def _row(
    name: str, variants: Mapping[str, Step], timings: Mapping[str, Timing], step: Step, step_shares: Mapping[str, Any]
) -> Row:
    unpatched, patched = timings[UNPATCHED], timings[name]
    is_default = name == default_variant(step.device)
    rope = None if None in step_shares.values() else sum(step_shares[kind] for kind in ROPE)
    return {
        "variant": name,
        "default": is_default,
        "ms_p20": patched.p20,
        "ms_median": patched.median,
        "ms_p80": patched.p80,
        "ratio": unpatched.median / patched.median,
        "verdict": "" if name in (UNPATCHED, WITHOUT) else verdict(unpatched, patched),
        "ms_first": timings[_FIRST].median if is_default else None,
        "ratio_at_most": unpatched.median / timings[WITHOUT].median if WITHOUT in timings else None,
        "share_rope": rope,
        **{f"share_{kind.replace(' ', '_')}": share for kind, share in step_shares.items()},
    }


def verdict(unpatched: Timing, patched: Timing) -> str:
    """Whether the patched step is faster or slower, or the difference is within the spread of both."""
    if patched.p80 < unpatched.p20:
        return "faster"
    return "slower" if patched.p20 > unpatched.p80 else "no difference"


def _errors(variants: Mapping[str, Step], step: Step, compiled: bool) -> Iterator[tuple[str, Exception]]:
    """Names of variants that fail or whose outputs differ, and the errors.

    Exact variants must give the bits of the unpatched step; others must be as close as roundings allow.
    """
    expected = variants[UNPATCHED].run()
    bound = None
    for variant in [variant for variant in VARIANTS if variant.name in variants]:
        try:
            actual = variants[variant.name].run()
        except Exception as error:  # whatever a kernel or its compiler raises
            yield variant.name, error
            continue
        if variant.rounding is Rounding.EXACT or compiled:
            if not all(map(torch.equal, actual, expected)):
                yield variant.name, Mismatch(f"{variant.name} must give the bits of the unpatched model, got others")
            continue
        if bound is None:
            rounding = max(torch.finfo(y.dtype).eps for y in expected) / math.sqrt(12)  # root of the mean square
            bound = _distance(_moved(step).run(), expected) + rounding
        distance = _distance(actual, expected)
        if not distance <= bound:
            yield (
                variant.name,
                Mismatch(
                    f"{variant.name} must be within {_ROUNDINGS} roundings of queries and keys and one of the output, "
                    f"together {bound:.3g} of it, got {distance:.3g}"
                ),
            )


def _distance(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The root of the mean square of the differences, over that of the values."""
    squares = [(torch.linalg.vector_norm(a.double() - b.double()), torch.linalg.vector_norm(b.double()))
               for a, b in zip(actual, expected, strict=True)]  # fmt: skip
    return max(float(difference / size) for difference, size in squares)


def _moved(step: Step) -> Step:
    """A copy whose queries and keys are off by as much as roundings can move them, each value up or down at random."""
    twin = step.twin()
    generator = torch.Generator(step.device).manual_seed(0)

    def move(_module: torch.nn.Module, _args: Any, y: torch.Tensor) -> torch.Tensor:
        unit = torch.finfo(y.dtype).eps / 2
        signs = torch.rand(y.shape, generator=generator, device=y.device).sub_(0.5).sign_()
        wide = torch.float64 if y.dtype == torch.float64 else torch.float32
        return (y.to(wide) * (1 + _ROUNDINGS * unit * signs.to(wide))).to(y.dtype)

    for rotation in _rotations(twin.plans()):
        for _, module in rotation.modules():
            module.register_forward_hook(move)
    return twin


def _has_bound(plans: list[PatchPlan]) -> bool:
    """Whether the models' processors skip the rotation where they get no tables."""
    return all(
        rotation.rotation.replaced_function is None and rotation.rotation.unrotated is None
        for rotation in _rotations(plans)
    )


def _without_rope(plan: PatchPlan) -> None:
    """Keeps a model's tables, and neither norms nor rotates queries and keys: no patch can be faster."""
    for rotation in plan.rotations:
        parameters = list(inspect.signature(type(rotation.attention).forward).parameters)[1:]
        places = tuple(
            (name, parameters.index(name) if name in parameters else None) for name in rotation.rotation.rotary
        )
        rotation.attention.register_forward_pre_hook(_Without(places), with_kwargs=True)
        for name, module in rotation.modules():
            if "norm" in name:
                vars(module)["forward"] = _same
    patch(plan.model, fuse=Fusion.NOTHING)


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


@dataclass(frozen=True)
class _Without:
    """Forward pre-hook of an attention module: it replaces the rotary arguments, by name and place, by None."""

    rotary: tuple[tuple[str, int | None], ...]

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        places = [place for name, place in self.rotary if name not in kwargs]
        args = tuple(None if place in places else value for place, value in enumerate(args))
        return args, {**kwargs, **{name: None for name, _ in self.rotary if name in kwargs}}


def _rotations(plans: list[PatchPlan]) -> Iterator[RotationPlan]:
    return (rotation for plan in plans for rotation in plan.rotations)


def _remembers(calls: list[Call], number: int) -> Callable[..., None]:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(number, args, kwargs))

    return hook


def _plain(output: Any) -> Any:
    """An output of a model, as a tuple."""
    return output.to_tuple() if hasattr(output, "to_tuple") else output
