"""Times the rotation kernels on an NVIDIA GPU against a copy, the models' own code and other libraries' kernels.

    python scripts/measure/bench_kernels.py                                          # every shape, operation and peer
    python scripts/measure/bench_kernels.py --run headline                           # what has a target, in 15 seconds
    python scripts/measure/bench_kernels.py --shape wan-14b-720p --peers flash-attn --peer-path ~/rotary
    python scripts/measure/bench_kernels.py --sweep                                  # which choices are fastest

Every variant is compared with float64 on some tokens before it is timed. One that is wrong, or that cannot run, becomes
a row with the reason in place of figures, and the others are measured; the exit code is 1 where it is one of dit_rope.
Variants take turns. Inputs rotate so that a round exceeds the level 2 cache. Times are of CUDA events with the GPU kept
busy while the host queues; small shapes are replayed as a CUDA graph, and the column ``timed_by`` says which. Bandwidth
counts q and k read and written, and tables and positions read once; ``of_copy`` is its share of the bandwidth of
``torch.empty_like(x).copy_(x)`` of q and k in the same rounds.

``--peer-path`` names folders with packages or single files, such as flash-attn's ``rotary.py`` under the name
``rotary_flash_attn.py``. Results go to ``kernels-<device>.csv`` in the folder ``--results``, after every problem; the
column ``run`` has the name of the run, and rows of other runs stay in the file.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peers import PEERS, compiled_model
from benchmarks.problems import SHAPES, Operation, Problem, Shape
from benchmarks.results import Row
from benchmarks.rotation import COMPILED, MODEL, Variants, measure, one_line, row, variants
from benchmarks.timing import allocations, host_time
from benchmarks.variants import rotation_call
from gpu_checks import sweep
from gpu_checks.results import RESULTS, Record, result_path, table
from gpu_checks.targets import ALL_RUN, BACKEND, HEADLINE, HOST, HOST_OPERATIONS, PEERS_RUN, SHARES_RUN, TARGETS

COLUMNS = ("shape", "operation", "variant", "ms_p20", "ms_median", "ms_p80", "gb_per_s", "of_copy", "times_best_peer")


@dataclass(frozen=True)
class Run:
    """What a run measures: backends, operations, shapes and peers by name, and whether host time too."""

    backends: tuple[str, ...]
    operations: tuple[str, ...] = tuple(operation.value for operation in Operation)
    shapes: tuple[str, ...] = tuple(SHAPES)
    peers: tuple[str, ...] = tuple(PEERS)
    host: bool = True


RUNS = {
    ALL_RUN: Run((BACKEND, "triton")),
    # Needs neither diffusers nor Triton, and compiles nothing with them.
    SHARES_RUN: Run((BACKEND,), tuple(target.operation for target in TARGETS), HEADLINE, (MODEL,)),
    PEERS_RUN: Run((BACKEND,), host=False),
    "triton": Run(("triton",), peers=()),
}


def right_variants(problem: Problem, options: argparse.Namespace) -> Variants:
    """Every variant that was asked for, runs and is right; a rehearsal has eager code in place of kernels."""
    peers = {name: PEERS[name] for name in options.peers}
    if options.rehearse and COMPILED in peers:
        peers[COMPILED] = functools.partial(compiled_model, compiler="eager")
    backends = RUNS[options.run].backends
    return variants(problem, {name: "eager" if options.rehearse else name for name in backends}, peers)


def host_row(problem: Problem, backend: str, options: argparse.Namespace) -> Row:
    """Host time of one call on a few tokens, and the blocks of device memory it allocates, or why there is none."""
    try:
        call, (q, k) = rotation_call(problem, "eager" if options.rehearse else backend), problem.inputs(1)[0]
        timing = host_time(lambda: call(q, k), problem.device, options.rounds)
        blocks = allocations(lambda: call(q, k), problem.device)
    except Exception as error:  # whatever a kernel or its compiler raises: the others are measured
        return {**row(problem, backend, note=one_line(error), failed=True), "shape": HOST}
    values = {"ms_p20": timing.p20, "ms_median": timing.median, "ms_p80": timing.p80, "allocations": blocks}
    return {**row(problem, backend, timed_by="host clock", **values), "shape": HOST}


def problem_rows(problem: Problem, options: argparse.Namespace) -> list[Row]:
    """Every variant of one problem; one row with the reason where none could be measured."""
    try:
        return measure(problem, right_variants(problem, options), options.rounds)
    except Exception as error:  # such as memory that is used up, or a GPU that an earlier kernel has left unusable
        return [row(problem, backend, note=one_line(error), failed=True) for backend in RUNS[options.run].backends]


def run(shapes: list[Shape], options: argparse.Namespace, device: str, record: Record) -> None:
    """Every operation at every shape until the time is up, each in the results as soon as it is measured."""
    chosen, end = RUNS[options.run], time.monotonic() + options.seconds

    def add(rows: list[Row]) -> None:
        record.add([{"run": options.run, **row} for row in rows])

    if chosen.host:
        tiny = SHAPES["wan-1.3b-480p"].tiny()
        for name in HOST_OPERATIONS:
            add([host_row(Problem(tiny, Operation(name), device), backend, options) for backend in chosen.backends])
    for problem in problems(shapes, chosen, device):
        if time.monotonic() > end:
            note = f"not measured: {options.seconds:.0f} seconds were up"
            add([row(problem, backend, note=note) for backend in chosen.backends])
            continue
        new = problem_rows(problem, options)
        add(new)
        if not options.rehearse:
            print("\n".join([*table([line for line in new if "ms_median" in line], COLUMNS), ""]), flush=True)


def problems(shapes: list[Shape], chosen: Run, device: str) -> Iterator[Problem]:
    """Every operation at every shape that has it, operation by operation, so that targets come before the rest."""
    for operation in [Operation(name) for name in chosen.operations]:
        yield from (Problem(shape, operation, device) for shape in shapes if operation in shape.operations())


def without_figures(rows: list[Row]) -> list[str]:
    """Each reason why a variant has no figure, once."""
    reasons = [f"  {line['variant']}: {line['note']}" for line in rows if line.get("note")]
    return list(dict.fromkeys(reasons))


def summary(rows: list[Row]) -> str:
    """How many figures there are, and how many are missing."""
    figures, failures = sum("ms_median" in line for line in rows), sum(bool(line.get("failed")) for line in rows)
    return f"{figures} figures, {failures} failed, {len(rows) - figures - failures} left out"


def parse_options() -> argparse.Namespace:
    """The command line; a run's shapes and peers unless others are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", choices=[*RUNS], default=ALL_RUN, help="what is measured; everything if left out")
    parser.add_argument("--shape", action="append", choices=[*SHAPES], help="again for more; the run's if left out")
    parser.add_argument("--peers", nargs="*", choices=[*PEERS], help="the run's if left out; none may be named")
    parser.add_argument("--peer-path", action="append", default=[], help="a folder to import peers from")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=600.0, help="no operation is begun after this time")
    parser.add_argument("--results", type=Path, metavar="DIR", help="a folder for the CSV file; scripts/results")
    parser.add_argument("--sweep", action="store_true", help="time choices of the CUDA kernel instead")
    parser.add_argument("--rehearse", action="store_true", help="on CPU at tiny sizes; no CSV file without --results")
    options = parser.parse_args()
    options.shape = options.shape or RUNS[options.run].shapes
    options.peers = RUNS[options.run].peers if options.peers is None else options.peers
    if not options.rehearse:
        options.results = options.results or RESULTS
    return options


def main() -> None:
    """Measures the chosen shapes and writes their rows."""
    options = parse_options()
    sys.path[:0] = options.peer_path
    shapes = [SHAPES[name] for name in options.shape]
    device = "cpu" if options.rehearse else "cuda"
    if options.rehearse:
        shapes, options.rounds = [shape.tiny() for shape in shapes], 2
    elif not torch.cuda.is_available():
        sys.exit("bench_kernels.py needs a CUDA device; torch sees none")
    with torch.no_grad():
        if options.sweep:
            rows = sweep.run(shapes, device, options.rounds, options.rehearse, options.seconds, options.results)
            print(f"{len(rows)} rows, {sum(bool(line.get('failed')) for line in rows)} failed")
            sys.exit(any(line.get("failed") for line in rows))
        path = result_path("kernels", device, options.results) if options.results else None
        record = Record(path, device, keep=lambda earlier: earlier.get("run") != options.run)
        run(shapes, options, device, record)
    print("\n".join(["without figures:", *without_figures(record.rows)]))
    print("rehearsed" if path is None else f"written: {path}")
    print(summary(record.rows))
    sys.exit(any(line.get("failed") for line in record.rows))


if __name__ == "__main__":
    main()
