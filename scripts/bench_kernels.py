"""Times the rotation kernels on an NVIDIA GPU against a copy, the models' own code and other libraries' kernels.

    python scripts/bench_kernels.py                                          # every shape, operation and peer
    python scripts/bench_kernels.py --shape wan-14b-720p --peers flash-attn --peer-path ~/rotary
    python scripts/bench_kernels.py --sweep                                  # which tiles are fastest here

Every variant is compared with float64 on some tokens before it is timed; a wrong one of ours stops with no figure and
exit code 1, a wrong peer is left out. Variants take turns. Inputs rotate so that a round exceeds the level 2 cache.
Times are of CUDA events with the GPU kept busy while the host queues; small shapes are replayed as a CUDA graph, and
the column ``timed_by`` says which. Bandwidth counts q and k read and written, and tables and positions read once;
``of_copy`` is its share of the bandwidth of ``torch.empty_like(x).copy_(x)`` of q and k in the same rounds.

``--peer-path`` names folders with packages or single files, such as flash-attn's ``rotary.py`` under the name
``rotary_flash_attn.py``. Results go to ``scripts/results/kernels-<device>.csv``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

import torch
from gpu_checks import sweep
from gpu_checks.peers import PEERS
from gpu_checks.problems import SHAPES, Call, NotOffered, Operation, Problem, Shape, Unavailable
from gpu_checks.results import Row, environment, result_path, table, write_rows
from gpu_checks.targets import HOST, HOST_OPERATIONS
from gpu_checks.timing import allocations, host_time, input_sets, interleave, measurement
from gpu_checks.variants import BACKENDS, check_own, own

COPY = "copy"
COLUMNS = ("shape", "operation", "variant", "ms_p20", "ms_median", "ms_p80", "gb_per_s", "of_copy", "times_best_peer")


class Wrong(Exception):
    """One of our own variants gave a wrong result or an error."""


def variants(problem: Problem, peers: list[str], rehearse: bool) -> tuple[dict[str, Call], dict[str, str]]:
    """Every variant that runs and is right, and why the others are left out.

    Raises:
        Wrong: for a variant of ours.
    """
    calls: dict[str, Call] = {}
    missing: dict[str, str] = {}
    for backend in BACKENDS:
        try:
            call = own(problem, "eager" if rehearse else backend)
            check_own(problem, call)
            calls[backend] = call
        except Unavailable as reason:
            missing[backend] = str(reason)
        except Exception as error:
            raise Wrong(f"{backend}, {problem.operation.value} at {problem.shape.name}: {error}") from error
    for name in peers:
        try:
            calls[name] = _right_peer(problem, name, rehearse)
        except NotOffered:
            continue
        except Exception as error:  # peers fail in ways of their own, which must not stop the run
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0].removeprefix("Unavailable: ")
    return calls, missing


def _right_peer(problem: Problem, name: str, rehearse: bool) -> Call:
    """A peer's call, after its result has been compared with float64."""
    how = {"compiler": "eager"} if rehearse and name == "model, compiled" else {}
    call = PEERS[name](problem, **how)
    q, k = problem.inputs(1)[0]
    for index, (out, x) in enumerate(zip(call(q.clone(), k.clone()), (q, k), strict=True)):
        problem.expectation.assert_near(out, x, index)
    return call


def measure(problem: Problem, peers: list[str], rounds: int, rehearse: bool) -> list[Row]:
    """One row for each variant of one operation at one shape."""
    calls, missing = variants(problem, peers, rehearse)
    if all(backend in missing for backend in BACKENDS):
        return [_row(problem, name, note=missing[name]) for name in BACKENDS]
    moved = problem.data_bytes()
    inputs = problem.inputs(input_sets(moved // 2, problem.device))
    calls = {COPY: _copy_of(problem), **calls}
    # Autograd runs a backward on the stream of its forward, which is not the one that is captured.
    graph = problem.operation is not Operation.BACKWARD
    measurements = {name: measurement(call, inputs, moved, graph) for name, call in calls.items()}
    timings = interleave(measurements, rounds)
    copy_rate = moved / timings[COPY].median
    best_peer = min((timings[name].median for name in timings if name in PEERS), default=None)
    rows = []
    for name, timing in timings.items():
        read = moved + _table_bytes(problem, name)
        rows.append(
            _row(
                problem,
                name,
                timed_by=measurements[name].timed_by,
                ms_p20=timing.p20,
                ms_median=timing.median,
                ms_p80=timing.p80,
                gb_per_s=read / timing.median / 1e6,
                of_copy=read / timing.median / copy_rate,
                times_best_peer=best_peer / timing.median if best_peer and name in BACKENDS else None,
            )
        )
    return rows + [_row(problem, name, note=reason) for name, reason in missing.items()]


def _table_bytes(problem: Problem, name: str) -> int:
    if name == COPY:
        return 0
    return problem.axis_table_bytes() if name in BACKENDS else problem.dense_table_bytes()


def _copy_of(problem: Problem) -> Call:
    """A copy of what the operation moves: q and k, or the keys that a shift turns."""
    if problem.operation is not Operation.SHIFT:
        return lambda q, k: (torch.empty_like(q).copy_(q), torch.empty_like(k).copy_(k))
    moving = problem.shape.tokens * (problem.shape.grid.sizes[0] - 1) // problem.shape.grid.sizes[0]
    return lambda q, k: (q, torch.empty_like(k[:, :moving]).copy_(k[:, :moving]))


def _row(problem: Problem, variant: str, **values: object) -> Row:
    shape = problem.shape
    where = {"tokens": shape.tokens, "heads": shape.heads, "head_dim": shape.head_dim, "dtype": "bfloat16"}
    return {"shape": shape.name, **where, "operation": problem.operation.value, "variant": variant, **values}


def measure_host(device: str, batches: int, rehearse: bool) -> list[Row]:
    """Host time of one call on a few tokens, and the blocks of device memory it allocates."""
    shape = SHAPES["wan-1.3b-480p"].tiny()
    problems = [Problem(shape, Operation(name), device) for name in HOST_OPERATIONS]
    return [_host_row(problem, backend, batches, rehearse) for problem in problems for backend in BACKENDS]


def _host_row(problem: Problem, backend: str, batches: int, rehearse: bool) -> Row:
    call, (q, k) = own(problem, "eager" if rehearse else backend), problem.inputs(1)[0]
    timing = host_time(lambda: call(q, k), problem.device, batches)
    row = _row(problem, backend, timed_by="host clock", allocations=allocations(lambda: call(q, k), problem.device))
    return {**row, "shape": HOST, "ms_p20": timing.p20, "ms_median": timing.median, "ms_p80": timing.p80}


def run(shapes: list[Shape], options: argparse.Namespace, device: str) -> list[Row]:
    """Every operation at every shape until the time is up."""
    end = time.monotonic() + options.seconds
    rows = measure_host(device, options.rounds, options.rehearse)
    for problem in problems(shapes, device):
        if time.monotonic() > end:
            rows.append(_row(problem, "cuda", note=f"not measured: {options.seconds:.0f} seconds were up"))
            continue
        new = measure(problem, options.peers, options.rounds, options.rehearse)
        rows += new
        if not options.rehearse:
            print("\n".join([*table([row for row in new if "ms_median" in row], COLUMNS), ""]), flush=True)
    return rows


def problems(shapes: list[Shape], device: str) -> Iterator[Problem]:
    """Every operation at every shape that has it, operation by operation, so that targets come before the rest."""
    for operation in Operation:
        yield from (Problem(shape, operation, device) for shape in shapes if operation in shape.operations())


def check(shapes: list[Shape], options: argparse.Namespace, device: str) -> str:
    """Compares every variant with float64, which also compiles what the caches on disk keep for a later run."""
    checked, reasons = 0, []
    for problem in problems(shapes, device):
        calls, missing = variants(problem, options.peers, options.rehearse)
        checked += len(calls)
        reasons += [_row(problem, name, note=reason) for name, reason in missing.items()]
    print("\n".join(["left out:", *left_out(reasons)]))
    return f"{checked} variants are right"


def left_out(rows: list[Row]) -> list[str]:
    """Each reason why a variant has no figure, once."""
    reasons = [f"  {row['variant']}: {row['note']}" for row in rows if row.get("note")]
    return list(dict.fromkeys(reasons))


def main() -> None:
    """Measures the chosen shapes and writes their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=[*SHAPES], help="again for more; all if left out")
    parser.add_argument("--peers", nargs="*", choices=[*PEERS], default=[*PEERS], help="none may be named")
    parser.add_argument("--peer-path", action="append", default=[], help="a folder to import peers from")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=600.0, help="no operation is begun after this time")
    parser.add_argument("--check-only", action="store_true", help="compare with float64, time nothing")
    parser.add_argument("--sweep", action="store_true", help="time tile choices of the CUDA kernel instead")
    parser.add_argument("--rehearse", action="store_true", help="run everything on CPU at tiny sizes, without figures")
    options = parser.parse_args()
    sys.path[:0] = options.peer_path
    shapes = [SHAPES[name] for name in options.shape or SHAPES]
    device = "cpu" if options.rehearse else "cuda"
    if options.rehearse:
        shapes, options.rounds = [shape.tiny() for shape in shapes], 2
    elif not torch.cuda.is_available():
        sys.exit("bench_kernels.py needs a CUDA device; torch sees none")
    with torch.no_grad():
        try:
            if options.rehearse:
                rehearse(shapes, options, device)
            elif options.sweep:
                sweep.run(shapes, device, options.rounds)
            elif options.check_only:
                print(check(shapes, options, device))
            else:
                rows = run(shapes, options, device)
                print("\n".join(["left out:", *left_out(rows)]))
                print(write_rows(result_path("kernels", device), rows, environment(device)))
        except Wrong as error:
            sys.exit(f"{error}: no figures")


def rehearse(shapes: list[Shape], options: argparse.Namespace, device: str) -> None:
    """Runs all that a GPU would, and prints no time."""
    print(check(shapes, options, device))
    rows = run(shapes, options, device)
    sweep.run(shapes, device, options.rounds, rehearse=True)
    print(f"rehearsed {len(rows)} variants without figures")


if __name__ == "__main__":
    main()
