"""Which division of a token among threads is fastest on this GPU, at the headline shapes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dit_rope.backends import cuda_kernels, cuda_plan
from dit_rope.benchmark.problems import Operation, Problem, Shape
from dit_rope.benchmark.results import Row
from dit_rope.benchmark.timing import Measurement, input_sets, measurement, take_turns
from dit_rope.benchmark.variants import check_own, own

from .results import table

THREAD_CHUNKS = (2, 4, 8)
MIN_THREADS = (64, 128, 256, 512)
OPERATIONS = (Operation.ROTATE, Operation.IN_PLACE, Operation.PER_HEAD, Operation.ACROSS_HEADS)


def run(shapes: Sequence[Shape], device: str, rounds: int, rehearse: bool = False) -> None:
    """Prints, for every headline shape and operation, the share of the best speed that each choice reaches."""
    for shape, operation in itertools.product([shape for shape in shapes if shape.headline], OPERATIONS):
        rows = measure(Problem(shape, operation, device), rounds, rehearse)
        if not rehearse:
            print(f"\n{shape.name}, {operation.value}")
            print("\n".join(table(rows, ("thread_chunks", "min_threads", "ms_median", "of_best"))), flush=True)


def measure(problem: Problem, rounds: int, rehearse: bool) -> list[Row]:
    """One row for each choice, fastest first; all choices are checked, then take turns."""
    moved = problem.data_bytes()
    inputs = problem.inputs(input_sets(moved // 2, problem.device))
    choices = list(itertools.product(THREAD_CHUNKS, MIN_THREADS))
    measurements = {}
    for choice in choices[:2] if rehearse else choices:
        with tiles(*choice):
            call = own(problem, "eager" if rehearse else "cuda")
            check_own(problem, call)
            calls = [functools.partial(call, q, k) for q, k in inputs]
            measurements[str(choice)] = _with_tiles(choice, measurement(calls, problem.device, moved))
    timings = take_turns(measurements, rounds)
    best = min(timing.median for timing in timings.values())
    rows = [
        {
            "thread_chunks": chunks,
            "min_threads": threads,
            "ms_median": timings[str((chunks, threads))].median,
            "of_best": best / timings[str((chunks, threads))].median,
        }
        for chunks, threads in choices
        if str((chunks, threads)) in timings
    ]
    return sorted(rows, key=lambda row: row["ms_median"])


@contextmanager
def tiles(thread_chunks: int, min_threads: int) -> Iterator[None]:
    """Plans made inside use these constants; plans made before are forgotten, on the way in and out."""
    before = cuda_plan.THREAD_CHUNKS, cuda_plan.MIN_THREADS
    cuda_plan.THREAD_CHUNKS, cuda_plan.MIN_THREADS = thread_chunks, min_threads
    _forget_plans()
    try:
        yield
    finally:
        cuda_plan.THREAD_CHUNKS, cuda_plan.MIN_THREADS = before
        _forget_plans()


def _forget_plans() -> None:
    cuda_plan.plan_for.cache_clear()
    cuda_kernels._launches.clear()


def _with_tiles(choice: tuple[int, int], inner: Measurement) -> Measurement:
    def run() -> float:
        with tiles(*choice):
            return inner.run()

    return Measurement(run, inner.timed_by)
