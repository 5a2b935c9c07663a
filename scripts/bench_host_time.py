"""Times what Python does in one call of the CUDA backend, up to the driver: everything but compilation and the GPU.

    python scripts/bench_host_time.py

Tensors lie on CPU and the launch itself is left out, so that this runs anywhere. ``bench_kernels.py`` times whole
calls where there is a GPU; the driver's own launch takes some 3 us more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from unittest import mock

import torch
from benchmarking import write_results

import dit_rope
from dit_rope import Grid, NormKind, RopeSpec
from dit_rope.backends import cuda_kernels
from dit_rope.backends.cuda_arguments import Launch
from dit_rope.benchmark.timing import interleave

CALLS = 1000


class NoLaunch:
    """Stands in for the module that compiles and launches."""

    @staticmethod
    def run(launch: Launch, pointers: bytes, device: torch.device) -> None:
        """Does nothing."""


def no_launcher() -> type[NoLaunch]:
    """A plain function, since a mock would take as long as the call."""
    return NoLaunch


def cases() -> dict[str, Callable[[], object]]:
    """Calls with one token of Wan 1.3B: time that grows with tokens is none of Python's."""
    table = dit_rope.rope_table(RopeSpec((44, 42, 42)), Grid(1, 1, 1))
    q, k = torch.randn(2, 1, 1, 12, 128, dtype=torch.bfloat16)
    q, k, weight, positions = q.clone(), k.clone(), torch.ones(12 * 128, dtype=torch.bfloat16), table.positions()
    return {
        "rotate_qk": lambda: dit_rope.rotate_qk(q, k, table, backend="cuda"),
        "rotate_qk in place": lambda: dit_rope.rotate_qk(q, k, table, inplace=True, backend="cuda"),
        "rotate_qk with positions": lambda: dit_rope.rotate_qk(q, k, table, positions=positions, backend="cuda"),
        "norm_rotate_qk": lambda: dit_rope.norm_rotate_qk(
            q, k, table, weight, weight, norm=NormKind.ACROSS_HEADS, backend="cuda"
        ),
        "two empty_like": lambda: (torch.empty_like(q), torch.empty_like(k)),
    }


def repeated(call: Callable[[], object]) -> Callable[[], None]:
    """CALLS calls."""

    def run() -> None:
        for _ in range(CALLS):
            call()

    return run


def main() -> None:
    """Prints a line for each case and writes ``results/host-time-cpu.csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    with (
        mock.patch.object(cuda_kernels, "_why_no_device", return_value=None),
        mock.patch.object(cuda_kernels, "_launcher", no_launcher),
    ):
        timings = interleave({name: repeated(call) for name, call in cases().items()}, rounds)
    rows: list[dict[str, object]] = []
    for name, timing in timings.items():
        low, median, high = (round(1e3 * ms / CALLS, 2) for ms in (timing.p20, timing.median, timing.p80))
        rows.append({"call": name, "us_p20": low, "us_median": median, "us_p80": high})
        print(f"{name:26} {median:6.1f} us  [{low:.1f}, {high:.1f}]")
    print(write_results("host-time-cpu", rows))


if __name__ == "__main__":
    main()
