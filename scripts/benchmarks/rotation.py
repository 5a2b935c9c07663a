"""Rotation, and norm with rotation, of the models' shapes: dit_rope, the models' code, other libraries, and a copy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from dit_rope.spec import Grid, NormKind

from .peers import PEERS
from .problems import SHAPES, Call, NotOffered, Operation, Problem, Shape, Unavailable
from .results import Row
from .sections import Case, Settings, Wrong
from .timing import Measurement, input_sets, measurement, take_turns
from .variants import check_call, exact_call, rotation_call

COPY = "copy"
MODEL, COMPILED = "model, eager", "model, compiled"
EXACT = ", exact"
CPU_TOKENS, QUICK_TOKENS = 8192, 512
"""At most so many tokens of a shape are measured on a CPU, and in a quick run: with fewer frames, or else lines."""
QUICK_SHAPES = ("wan-1.3b-480p", "flux-1024")
WIDTH = "wan-1.3b-480p"
"""The shape that is measured in float32 as well, and whose width is measured at growing numbers of tokens."""
GROWTH = "wan-1.3b, growth"

Peers = Mapping[str, Callable[[Problem], Call]]


@dataclass(frozen=True)
class Variants:
    """By name: calls that are right, why others are left out, and why those of dit_rope failed."""

    calls: dict[str, Call] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def cases(settings: Settings) -> Iterator[Case]:
    """Every shape, with and without its norm; then one width at growing numbers of tokens."""
    for problem, peers in _problems(settings):
        label = f"{problem.operation.value}, {problem.shape.name}, {str(problem.dtype).removeprefix('torch.')}"
        yield Case(label, functools.partial(_rows, problem, peers, settings))


def package_backends(device: str) -> dict[str, str]:
    """Variants of dit_rope by name: every backend for this kind of device."""
    return {f"dit_rope, {name}": name for name in ("cuda", "triton")} if device != "cpu" else {"dit_rope": "eager"}


def variants(problem: Problem, backends: Mapping[str, str], peers: Peers, exact: bool = False) -> Variants:
    """Every variant that runs and is right; ``exact`` adds exact mode."""
    checked = Variants()
    for name, backend in backends.items():
        try:
            call = rotation_call(problem, backend)
            check_call(problem, call)
            checked.calls[name] = call
            if exact:
                checked.calls[name + EXACT] = exact_call(problem, backend)
        except Unavailable as reason:
            checked.missing[name if name not in checked.calls else name + EXACT] = str(reason)
        except Exception as error:  # whatever a kernel or its compiler raises: the other variants are measured
            checked.failed[name if name not in checked.calls else name + EXACT] = one_line(error)
    for name, peer in peers.items():
        try:
            checked.calls[name] = _right_peer(problem, peer)
        except NotOffered:
            continue
        except Exception as error:  # whatever a peer raises must not stop the run
            checked.missing[name] = one_line(error).removeprefix("Unavailable: ")
    return checked


def one_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def measure(problem: Problem, checked: Variants, rounds: int) -> list[Row]:
    """One row for each variant of one operation at one shape; none is timed without one of dit_rope.

    Rows of variants that have no figure say why in ``note``; those of ``found.failed`` have ``failed`` set, and so
    have those of dit_rope that fail only when they are timed.
    """
    measurements = _measurements(problem, checked) if any(_is_package(name) for name in checked.calls) else {}
    if not any(_is_package(name) for name in measurements):
        reasons = {name: reason for name, reason in checked.missing.items() if _is_package(name)}
        return _without_figures(problem, Variants({}, reasons, checked.failed))
    moved = problem.data_bytes()
    timings = take_turns(measurements, rounds, warm_up=1)  # each has run once already
    copy, model = timings[COPY].median, timings.get(MODEL)
    best_peer = min((name for name in timings if name in PEERS), key=lambda name: timings[name].median, default=None)
    rows = []
    for name, timing in timings.items():
        read = moved + _table_bytes(problem, name)
        values = {
            "timed_by": measurements[name].timed_by,
            "ms_p20": timing.p20,
            "ms_median": timing.median,
            "ms_p80": timing.p80,
            "gb_per_s": read / timing.median / 1e6,
            "of_copy": read / timing.median / (moved / copy),
            "times_copy": timing.median / copy,
            "times_model": model.median / timing.median if model else None,
            "times_best_peer": timings[best_peer].median / timing.median if best_peer and _is_package(name) else None,
            "best_peer": best_peer if _is_package(name) else None,
        }
        rows.append(row(problem, name, **values))
    return rows + _without_figures(problem, checked)


def _measurements(problem: Problem, checked: Variants) -> dict[str, Measurement]:
    """How to time a copy and each variant, once tried; a variant that fails moves to where ``found`` says why."""
    moved = problem.data_bytes()
    inputs = problem.inputs(input_sets(moved // 2, problem.device))
    # Autograd runs a backward on the stream of its forward, which is not the one that is captured.
    graph = problem.operation is not Operation.BACKWARD
    measurements = {}
    for name, call in {COPY: copy_of(problem), **checked.calls}.items():
        try:
            timed_round = measurement([functools.partial(call, q, k) for q, k in inputs], problem.device, moved, graph)
            timed_round.run()
        except Exception as error:
            if name == COPY:
                raise
            (checked.failed if _is_package(name) else checked.missing)[name] = one_line(error)
        else:
            measurements[name] = timed_round
    return measurements


def _without_figures(problem: Problem, checked: Variants) -> list[Row]:
    missing = [row(problem, name, note=reason) for name, reason in checked.missing.items()]
    return missing + [row(problem, name, note=reason, failed=True) for name, reason in checked.failed.items()]


def row(problem: Problem, variant: str, **values: object) -> Row:
    """A line of the results; its columns are those of what is measured, then ``values``."""
    shape, dtype = problem.shape, str(problem.dtype).removeprefix("torch.")
    where = {"tokens": shape.tokens, "heads": shape.heads, "head_dim": shape.head_dim, "dtype": dtype}
    return {"shape": shape.name, **where, "operation": problem.operation.value, "variant": variant, **values}


def _problems(settings: Settings) -> Iterator[tuple[Problem, Peers]]:
    device, quick = settings.device, settings.quick
    limit = QUICK_TOKENS if quick else CPU_TOKENS if device == "cpu" else None
    peers = {name: peer for name, peer in PEERS.items() if not (quick and name == COMPILED)}
    for full in [SHAPES[name] for name in (QUICK_SHAPES if quick else SHAPES)]:
        shape = full if limit is None else full.within(limit + full.prefix)
        norm = Operation.ACROSS_HEADS if shape.norm is NormKind.ACROSS_HEADS else Operation.PER_HEAD
        # The one operation that some peers have, who have no kernel for a CPU.
        more = (Operation.HALF_IN_PLACE,) if shape.headline and device != "cpu" else ()
        for dtype in (torch.float32, torch.bfloat16) if full.name == WIDTH else (torch.bfloat16,):
            for operation in (Operation.ROTATE, norm, *more):
                yield Problem(shape, operation, device, dtype), peers
    wan = SHAPES[WIDTH]
    frames = (1, 2, 4) if quick else (1, 4, 16, 64) if device == "cpu" else (1, 4, 16, 64, 256)
    for count in frames:
        growing = Shape(GROWTH, Grid(count, 16, 16), wan.heads, wan.dims, wan.norm)
        yield Problem(growing, Operation.ROTATE, device), {MODEL: PEERS[MODEL]}


def _rows(problem: Problem, peers: Peers, settings: Settings) -> list[Row]:
    exact = not problem.operation.in_place
    checked = variants(problem, package_backends(settings.device), peers, exact)
    rows = measure(problem, checked, settings.rounds)
    for name, reason in checked.failed.items():
        raise Wrong(f"{name}, {problem.operation.value} at {problem.shape.name}: {reason}")
    return rows


def _right_peer(problem: Problem, peer: Callable[[Problem], Call]) -> Call:
    """A peer's call, after its result has been compared with float64."""
    call = peer(problem)
    q, k = problem.inputs(1)[0]
    for index, (out, x) in enumerate(zip(call(q.clone(), k.clone()), (q, k), strict=True)):
        problem.expectation.assert_near(out, x, index)
    return call


def _is_package(name: str) -> bool:
    return name not in PEERS and name != COPY


def _table_bytes(problem: Problem, name: str) -> int:
    if name == COPY:
        return 0
    return problem.axis_table_bytes() if _is_package(name) else problem.dense_table_bytes()


def copy_of(problem: Problem) -> Call:
    """A copy of what the operation moves: q and k, or the keys that a shift rotates."""
    if problem.operation is not Operation.SHIFT:
        return lambda q, k: (torch.empty_like(q).copy_(q), torch.empty_like(k).copy_(k))
    moving = problem.shape.tokens * (problem.shape.grid.sizes[0] - 1) // problem.shape.grid.sizes[0]
    return lambda q, k: (q, torch.empty_like(k[:, :moving]).copy_(k[:, :moving]))
