"""What the device was given to do, as the profiler saw it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def device_work(call: Callable[[], object], device: str) -> list[str]:
    """Names of the kernels, copies and fills that one call of ``call`` runs, in order; nothing on CPU."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device != "cpu" else [])]
    with profile(activities=activities):  # the first profile of a process may miss what its set-up overlaps
        call()
        _synchronize(device)
    with profile(activities=activities) as profiler:
        call()
        _synchronize(device)
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return [event.name for event in sorted(events, key=lambda event: event.time_range.start)]


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
