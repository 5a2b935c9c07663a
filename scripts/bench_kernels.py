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
import functools
import sys
import time
from collections.abc import Iterator

import torch
from gpu_checks import sweep
from gpu_checks.results import environment, result_path, table, write_rows
from gpu_checks.targets import HOST, HOST_OPERATIONS

from dit_rope.benchmark.peers import PEERS, compiled_model
from dit_rope.benchmark.problems import SHAPES, Operation, Problem, Shape
from dit_rope.benchmark.results import Row
from dit_rope.benchmark.rotation import COMPILED, Variants, measure, row, variants
from dit_rope.benchmark.sections import Wrong
from dit_rope.benchmark.timing import allocations, host_time
from dit_rope.benchmark.variants import own

BACKENDS = ("cuda", "triton")
COLUMNS = ("shape", "operation", "variant", "ms_p20", "ms_median", "ms_p80", "gb_per_s", "of_copy", "times_best_peer")


def right_variants(problem: Problem, options: argparse.Namespace) -> Variants:
    """Every variant that was asked for, runs and is right; a rehearsal has eager code in place of kernels."""
    peers = {name: PEERS[name] for name in options.peers}
    if options.rehearse and COMPILED in peers:
        peers[COMPILED] = functools.partial(compiled_model, compiler="eager")
    return variants(problem, {name: "eager" if options.rehearse else name for name in BACKENDS}, peers)


def measure_host(device: str, batches: int, rehearse: bool) -> list[Row]:
    """Host time of one call on a few tokens, and the blocks of device memory it allocates."""
    shape = SHAPES["wan-1.3b-480p"].tiny()
    problems = [Problem(shape, Operation(name), device) for name in HOST_OPERATIONS]
    return [_host_row(problem, backend, batches, rehearse) for problem in problems for backend in BACKENDS]


def _host_row(problem: Problem, backend: str, batches: int, rehearse: bool) -> Row:
    call, (q, k) = own(problem, "eager" if rehearse else backend), problem.inputs(1)[0]
    timing = host_time(lambda: call(q, k), problem.device, batches)
    values = row(problem, backend, timed_by="host clock", allocations=allocations(lambda: call(q, k), problem.device))
    return {**values, "shape": HOST, "ms_p20": timing.p20, "ms_median": timing.median, "ms_p80": timing.p80}


def run(shapes: list[Shape], options: argparse.Namespace, device: str) -> list[Row]:
    """Every operation at every shape until the time is up."""
    end = time.monotonic() + options.seconds
    rows = measure_host(device, options.rounds, options.rehearse)
    for problem in problems(shapes, device):
        if time.monotonic() > end:
            rows.append(row(problem, "cuda", note=f"not measured: {options.seconds:.0f} seconds were up"))
            continue
        new = measure(problem, right_variants(problem, options), options.rounds)
        rows += new
        if not options.rehearse:
            print("\n".join([*table([line for line in new if "ms_median" in line], COLUMNS), ""]), flush=True)
    return rows


def problems(shapes: list[Shape], device: str) -> Iterator[Problem]:
    """Every operation at every shape that has it, operation by operation, so that targets come before the rest."""
    for operation in Operation:
        yield from (Problem(shape, operation, device) for shape in shapes if operation in shape.operations())


def check(shapes: list[Shape], options: argparse.Namespace, device: str) -> str:
    """Compares every variant with float64, which also compiles what the caches on disk keep for a later run."""
    checked, reasons = 0, []
    for problem in problems(shapes, device):
        found = right_variants(problem, options)
        checked += len(found.calls)
        reasons += [row(problem, name, note=reason) for name, reason in found.missing.items()]
    print("\n".join(["left out:", *left_out(reasons)]))
    return f"{checked} variants are right"


def left_out(rows: list[Row]) -> list[str]:
    """Each reason why a variant has no figure, once."""
    reasons = [f"  {line['variant']}: {line['note']}" for line in rows if line.get("note")]
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
