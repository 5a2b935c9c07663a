"""Times of calls that take turns, on a host clock or, on a GPU, without the gaps of launching them."""

from __future__ import annotations

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

# Inputs of one round exceed the level 2 cache this many times, so that no call finds its own there.
CACHES = 3
# Below this many bytes a call, launching takes long enough beside the work that calls are replayed as a CUDA graph.
GRAPH_BYTES = 2**28
# Clock cycles, about a millisecond, that the GPU is kept busy while the host queues what is timed.
HEAD_START = 2_000_000


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one case over all rounds: the median, and the 20th and 80th percentile."""

    p20: float
    median: float
    p80: float

    def times(self, factor: float) -> Timing:
        """The same timing in another unit."""
        return Timing(self.p20 * factor, self.median * factor, self.p80 * factor)


@dataclass(frozen=True)
class Measurement:
    """One round of a variant: milliseconds of a call, and how it was measured."""

    run: Callable[[], float]
    timed_by: str


def interleave(
    cases: Mapping[str, Call], rounds: int, *, warm_up: int = 2, advance: Call | None = None
) -> dict[str, Timing]:
    """Times every case once per round, in turn, so that a machine that slows down favours none.

    Args:
        cases: what to call, by name. The device has finished what it was given before and after each.
        rounds: timed calls of each.
        warm_up: rounds beforehand that are not counted.
        advance: called after every call, counted or not, such as to move a progress bar.
    """
    measurements = {name: measurement([case], "cpu", 0) for name, case in cases.items()}
    return take_turns(measurements, rounds, warm_up=warm_up, advance=advance)


def take_turns(
    measurements: Mapping[str, Measurement], rounds: int, *, warm_up: int = 2, advance: Call | None = None
) -> dict[str, Timing]:
    """As :func:`interleave`, of rounds that time themselves."""
    times: dict[str, list[float]] = {name: [] for name in measurements}
    for number in range(rounds + warm_up):
        for name, timed_round in measurements.items():
            milliseconds = timed_round.run()
            if number >= warm_up:
                times[name].append(milliseconds)
            if advance is not None:
                advance()
    return {name: summary(values) for name, values in times.items()}


def summary(milliseconds: Sequence[float]) -> Timing:
    """Median, 20th and 80th percentile."""
    if len(milliseconds) == 1:
        return Timing(*3 * (milliseconds[0],))
    cuts = statistics.quantiles(milliseconds, n=5, method="inclusive")
    return Timing(cuts[0], statistics.median(milliseconds), cuts[3])


def measurement(calls: Sequence[Call], device: str, call_bytes: int, graph: bool = True) -> Measurement:
    """How to time ``calls``, which do the same with different inputs, on ``device``.

    On a GPU, calls that move less than ``GRAPH_BYTES`` are replayed as a CUDA graph unless ``graph`` is false or they
    cannot be captured; others are timed by events. Elsewhere the host's clock is read around them.
    """
    if not device.startswith("cuda"):
        return Measurement(lambda: _host_round(calls), "host clock")
    for call in calls:
        call()
    if graph and call_bytes < GRAPH_BYTES:
        try:
            return Measurement(_graph_round(calls), "graph replay")
        except RuntimeError:
            torch.cuda.synchronize()
    return Measurement(lambda: _event_round(lambda: [call() for call in calls], len(calls)), "events")


def input_sets(call_bytes: int, device: str) -> int:
    """How many different inputs one round goes through."""
    if not device.startswith("cuda"):
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-CACHES * cache // call_bytes))


def host_time(call: Call, device: str, batches: int, calls: int = 40) -> Timing:
    """Milliseconds that the host spends on one call, in batches short enough that the launch queue never fills."""
    times = []
    for _ in range(batches + 2):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append(1e3 * (time.perf_counter() - start) / calls)
        _synchronize()
    return summary(times[2:])


def allocations(call: Call, device: str) -> int:
    """Blocks of device memory that one call asks torch's allocator for."""
    if not device.startswith("cuda"):
        return 0
    call()
    name = "allocation.all.allocated"
    before = torch.cuda.memory_stats(device)[name]
    call()
    return int(torch.cuda.memory_stats(device)[name] - before)


def keep_freed_memory() -> None:
    """Makes glibc keep what is freed, as tcmalloc, jemalloc and torch's CUDA allocator do; elsewhere does nothing.

    By default it returns every block over 32 MiB to the system, which zeroes its pages when they are next touched: a
    cost that is the same for all variants and hides their difference.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mmap_threshold, trim_threshold = -3, -1
    libc = ctypes.CDLL(None)
    for option in (mmap_threshold, trim_threshold):
        libc.mallopt(option, 2**30)


def _host_round(calls: Sequence[Call]) -> float:
    _synchronize()
    start = time.perf_counter()
    for call in calls:
        call()
    _synchronize()
    return 1e3 * (time.perf_counter() - start) / len(calls)


def _event_round(run: Call, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / calls


def _graph_round(calls: Sequence[Call]) -> Callable[[], float]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Kept until the capture ends, so that no call writes where another has written.
        outs = [call() for call in calls]
    del outs
    return lambda: _event_round(graph.replay, len(calls))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
