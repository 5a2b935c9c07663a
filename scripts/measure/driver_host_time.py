"""Times calls of the CUDA backend, ``cuLaunchKernel`` included, in a process that runs over the stub of the driver.

``bench_host_time.py`` runs it. Prints one line of JSON: for each case the microseconds of one call, turn by
turn.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

import dit_rope
from dit_rope import Grid, NormKind, RopeSpec
from dit_rope.rotation import api, ops

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from torch_over_stub import STREAM, TorchOverStub, over_stub

CALLS = 50


def cases() -> dict[str, Callable[[], object]]:
    """Calls with one token of Wan 1.3B, whose number of tokens does not change the host time; and of a patched norm."""
    table = dit_rope.rope_table(RopeSpec((44, 42, 42)), Grid(1, 1, 1))
    q, k = (x.clone() for x in torch.randn(2, 1, 1, 12, 128, dtype=torch.bfloat16))
    weight, positions, args = torch.ones(12 * 128, dtype=torch.bfloat16), table.positions(), table.args()
    across = NormKind.ACROSS_HEADS
    rotate, norm_rotate = hook_calls(q, args, weight, across)
    return {
        "rotate_qk": lambda: dit_rope.rotate_qk(q, k, table, backend="cuda"),
        "rotate_qk in place": lambda: dit_rope.rotate_qk(q, k, table, inplace=True, backend="cuda"),
        "rotate_qk with positions": lambda: dit_rope.rotate_qk(q, k, table, positions=positions, backend="cuda"),
        "norm_rotate_qk": lambda: dit_rope.norm_rotate_qk(q, k, table, weight, weight, norm=across, backend="cuda"),
        "rotation of a hook": rotate,
        "norm and rotation of a hook": norm_rotate,
        "two empty_like": lambda: (torch.empty_like(q), torch.empty_like(k)),
    }


def hook_calls(
    q: torch.Tensor, args: Any, weight: torch.Tensor, kind: NormKind
) -> tuple[Callable[[], object], Callable[[], object]]:
    """What a patched norm calls, without and with the norm; also in versions that ``--beside`` may name."""
    before: Any = api
    if hasattr(before, "apply_norm"):
        return (
            lambda: before.apply([q], args, backend="cuda"),
            lambda: before.apply_norm([q], [weight], 1e-6, kind, args, backend="cuda"),
        )
    from dit_rope.rotation_args import Norm

    return (
        lambda: ops.rotate([q], args, backend="cuda"),
        lambda: ops.rotate([q], args, Norm.of([q], kind, 1e-6, [weight]), backend="cuda"),
    )


def as_before(fake: TorchOverStub) -> AbstractContextManager[object]:
    """What versions of the package ask of torch that ``--beside`` may name and this one does not."""
    stream = SimpleNamespace(cuda_stream=STREAM)
    return mock.patch.multiple(torch.cuda, current_device=fake.device, current_stream=lambda index: stream)


@torch.no_grad()
def main() -> None:
    """Times all cases in rounds; the first round is not counted."""
    torch.set_num_threads(1)
    rounds = int(sys.argv[1])
    with over_stub() as fake, as_before(fake):
        calls = cases()
        times: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(rounds + 1):
            for name, call in calls.items():
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                if number:
                    times[name].append(1e6 * (time.perf_counter() - start) / CALLS)
    print(json.dumps(times))


if __name__ == "__main__":
    main()
