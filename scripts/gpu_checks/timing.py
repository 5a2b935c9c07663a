"""Times of device work without the gaps of launching it, and of the host's part alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from benchmarking import Timing

from .problems import Call, Tensors

# Inputs of one round exceed the level 2 cache this many times, so that no call finds its own there.
CACHES = 3
# Below this many bytes a call, launching takes long enough beside the work that calls are replayed as a CUDA graph.
GRAPH_BYTES = 2**28
# Clock cycles, about a millisecond, that the GPU is kept busy while the host queues what is timed.
HEAD_START = 2_000_000


@dataclass(frozen=True)
class Measurement:
    """One round of a variant: milliseconds of a call, and how it was measured."""

    run: Callable[[], float]
    timed_by: str


def input_sets(bytes_of_one: int, device: str) -> int:
    """How many different inputs one round goes through."""
    if not device.startswith("cuda"):
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-CACHES * cache // bytes_of_one))


def measurement(call: Call, inputs: Sequence[Tensors], bytes_of_one: int, graph: bool = True) -> Measurement:
    """How to time ``call`` over ``inputs``; a call that cannot be captured is timed without a graph."""
    calls = [lambda pair=pair: call(*pair) for pair in inputs]
    if inputs[0][0].device.type != "cuda":
        return Measurement(lambda: _host_round(calls), "host clock")
    for each in calls:
        each()
    if graph and bytes_of_one < GRAPH_BYTES:
        try:
            return Measurement(_graph_round(calls), "graph replay")
        except RuntimeError:
            torch.cuda.synchronize()
    return Measurement(lambda: _event_round(lambda: [each() for each in calls], len(calls)), "events")


def interleave(measurements: dict[str, Measurement], rounds: int) -> dict[str, Timing]:
    """Times every variant once per round, in turn; two rounds beforehand are not counted."""
    times: dict[str, list[float]] = {name: [] for name in measurements}
    for number in range(rounds + 2):
        for name, each in measurements.items():
            milliseconds = each.run()
            if number >= 2:
                times[name].append(milliseconds)
    return {name: summary(values) for name, values in times.items()}


def summary(milliseconds: Sequence[float]) -> Timing:
    """Median, 20th and 80th percentile."""
    cuts = statistics.quantiles(milliseconds, n=5, method="inclusive")
    return Timing(cuts[0], statistics.median(milliseconds), cuts[3])


def host_time(call: Callable[[], object], device: str, batches: int, calls: int = 40) -> Timing:
    """Milliseconds that the host spends on one call, in batches short enough that the launch queue never fills."""
    cuda = device.startswith("cuda")
    times = []
    for _ in range(batches + 2):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append(1e3 * (time.perf_counter() - start) / calls)
        if cuda:
            torch.cuda.synchronize()
    return summary(times[2:])


def allocations(call: Callable[[], object], device: str) -> int:
    """Blocks of device memory that one call asks torch's allocator for."""
    if not device.startswith("cuda"):
        return 0
    call()
    name = "allocation.all.allocated"
    before = torch.cuda.memory_stats(device)[name]
    call()
    return int(torch.cuda.memory_stats(device)[name] - before)


def _host_round(calls: Sequence[Callable[[], object]]) -> float:
    start = time.perf_counter()
    for each in calls:
        each()
    return 1e3 * (time.perf_counter() - start) / len(calls)


def _event_round(run: Callable[[], object], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def _graph_round(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Kept until the capture ends, so that no call writes where another has written.
        outs = [each() for each in calls]
    del outs
    return lambda: _event_round(graph.replay, len(calls))
