"""Which choices of the CUDA kernel are fastest on this GPU: one knob after another, at the headline shapes.

For each operation and shape the defaults take turns with every value of the first knob, the fastest of them with every
value of the next, and so on; a choice is kept where it is faster by more than :data:`LEAST_GAIN`. Each is compared with
float64 before it is timed, as a CUDA graph; one that is wrong or fails is a row with the reason. A copy of queries and
keys is timed beside them, and a call whose positions are all negative: nothing rotates, so what is left is how the data
move. ``scripts/gpu_checks/write_cuda_tuning.py`` makes the table of defaults from the rows.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.problems import EPS, Call, Operation, Problem, Shape
from benchmarks.results import Row
from benchmarks.rotation import COPY, copy_of, one_line, row
from benchmarks.timing import Measurement, Timing, input_sets, measurement, take_turns
from benchmarks.variants import check_call, rotation_call, unrotated_call
from dit_rope.rotation.backends import cuda_kernels
from dit_rope.rotation.backends.cuda_plan import Plan
from dit_rope.rotation.backends.cuda_tuning import Tuning
from dit_rope.rotation_args import Norm

from .candidates import KNOBS, first_steps, name_of, neighbours
from .results import Record, result_path, table

OPERATIONS = (Operation.ACROSS_HEADS, Operation.ROTATE, Operation.PER_HEAD, Operation.IN_PLACE)
UNROTATED = "nothing rotates"
KEPT = "kept"
# What timings of one call differ by from run to run.
LEAST_GAIN = 0.005
COLUMNS = ("knob", "variant", "ms_median", "of_copy", "kept", "note")


def run(
    shapes: Sequence[Shape],
    device: str,
    rounds: int,
    rehearse: bool = False,
    seconds: float = float("inf"),
    results: Path | None = None,
) -> list[Row]:
    """Tries every knob for every operation and headline shape until the time is up; returns the rows.

    Args:
        shapes: of which the headline ones are taken, the largest first.
        device: a torch device's name.
        rounds: timed rounds of every candidate.
        rehearse: eager code stands for the kernels, and no times are printed.
        seconds: no operation is begun after this time.
        results: the folder of ``sweep-<device>.csv``, written after every operation; none if left out.
    """
    end = time.monotonic() + seconds
    record = Record(result_path("sweep", device, results) if results is not None else None, device)
    headline = sorted((shape for shape in shapes if shape.headline), key=lambda shape: -shape.elements)
    problems = [Problem(shape, operation, device) for operation, shape in itertools.product(OPERATIONS, headline)]
    for problem in problems:
        if time.monotonic() > end:
            record.add([row(problem, "cuda", note=f"not measured: {seconds:.0f} seconds were up")])
            continue
        sweep = Sweep(problem, rounds, rehearse)
        try:
            new = sweep.measure()
        except Exception as error:  # such as memory that is used up: what was measured stays, and the others follow
            new = [*sweep.rows, row(problem, "cuda", note=one_line(error), failed=True)]
        record.add(new)
        if not rehearse:
            print(f"\n{problem.shape.name}, {problem.operation.value}")
            print("\n".join(table(new, COLUMNS)), flush=True)
    return record.rows


@dataclass
class Sweep:
    """The sweep of one operation at one shape."""

    problem: Problem
    rounds: int
    rehearse: bool = False
    rows: list[Row] = field(default_factory=list)

    @property
    def backend(self) -> str:
        """Which backend is called."""
        return "eager" if self.rehearse else "cuda"

    def measure(self) -> list[Row]:
        """One row for the copy, one for each candidate and step, and one for the choices that are kept."""
        best = Tuning()
        plans = {self.make_plan(best)}
        self._compile(first_steps(self.make_plan).values())
        for knob in KNOBS:
            candidates = neighbours(knob, best, self.make_plan, plans)
            if candidates:
                self._compile(candidates)
                best = self._step(knob, best, candidates)
        return [*self.rows, self._row(KEPT, name_of(best), best)]

    def make_plan(self, tuning: Tuning) -> Plan:
        """The plan of the problem's call with some choices."""
        problem = self.problem
        q, k = (torch.empty(1, 1, x.heads, x.head_dim, dtype=problem.dtype) for x in (problem.shape, problem.shape))
        outs = (q, k) if problem.operation.in_place else (torch.empty_like(q), torch.empty_like(k))
        args = problem.table.args(prefix=0, inverse=False, exact=False, positions=None)
        kind = problem.operation.norm
        norm = None if kind is None else Norm(kind, EPS, problem.weights)
        return cuda_kernels.plan_of((q, k), args, outs, norm, tuning)

    def _step(self, knob: str, best: Tuning, candidates: Sequence[Tuning]) -> Tuning:
        """Times candidates beside what was kept so far; the fastest."""
        moved, calls = self.problem.data_bytes(), {}
        inputs = self.problem.inputs(input_sets(moved // 2, self.problem.device))
        measurements = {}
        if not self.rows:
            measurements = {COPY: self._captured(copy_of(self.problem), inputs)}
        for tuning in (best, *candidates):
            name = name_of(tuning)
            try:
                with cuda_kernels.tuned(tuning):
                    call = rotation_call(self.problem, self.backend)
                    check_call(self.problem, call)
                    new = {name: call}
                    if tuning is best:
                        new[UNROTATED] = unrotated_call(self.problem, self.backend)
                # With its choices whenever it is called: a graph keeps them, a host clock calls it again.
                tuned = cuda_kernels.tuned(tuning)
                measurements |= {name: self._captured(tuned(tuning), inputs) for name, tuning in new.items()}
            except Exception as error:  # a candidate that fails must not lose the others
                self.rows.append(self._row(knob, name, tuning, note=one_line(error), failed=True))
                continue
            calls[name] = tuning
        timings = take_turns(measurements, self.rounds)
        fastest = min(calls, key=lambda name: timings[name].median, default=name_of(best))
        before = timings.get(name_of(best))
        if before is not None and timings[fastest].median > before.median * (1 - LEAST_GAIN):
            fastest = name_of(best)
        for name, timing in timings.items():
            self.rows.append(self._row(knob, name, calls.get(name), timing, kept=name == fastest))
        return calls.get(fastest, best)

    def _captured(self, call: Call, inputs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Measurement:
        """How to time a call, on a GPU without the time that the host takes for it."""
        device = self.problem.device
        timed_round = measurement([functools.partial(call, q, k) for q, k in inputs], device, 0)
        if device.startswith("cuda") and timed_round.timed_by != "graph replay":
            raise RuntimeError("a candidate must be captured as a CUDA graph")
        return timed_round

    def _compile(self, tunings: Iterable[Tuning]) -> None:
        if not self.rehearse:
            cuda_kernels.prepare({self.make_plan(tuning) for tuning in tunings}, torch.device(self.problem.device))

    def _row(self, knob: str, name: str, tuning: Tuning | None, timing: Timing | None = None, **values: object) -> Row:
        copy = next((line["ms_median"] for line in self.rows if line["variant"] == COPY), None)
        times: Row = {}
        if timing is not None:
            copy = timing.median if name == COPY else copy
            times = {"ms_p20": timing.p20, "ms_median": timing.median, "ms_p80": timing.p80}
            times["of_copy"] = None if copy is None else copy / timing.median
        choices = {} if tuning is None else asdict(tuning)
        return row(self.problem, name, knob=knob, **times, **choices, **values)
