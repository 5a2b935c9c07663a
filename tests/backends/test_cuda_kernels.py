"""The CUDA kernel keeps the contract of every backend, on a GPU and run on a CPU, where faults of it are found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import cuda_emulation
from contract_calls import run_contract
from dit_rope.rotation.backends import cuda_kernels, cuda_plan, eager
from dit_rope.rotation.backends.cuda_tuning import Tuning
from dit_rope.rotation_args import Norm, RotationArgs
from dit_rope.spec import NormKind, Pairing

needs_compiler = pytest.mark.skipif(
    cuda_emulation.COMPILER is None, reason="no C++ compiler (g++ or clang++) to build the CUDA kernel for a CPU"
)


@needs_compiler
def test_kernel_keeps_the_contract_on_a_cpu() -> None:
    run_contract("cuda", "cpu")


@pytest.mark.gpu
def test_kernel_keeps_the_contract() -> None:
    run_contract("cuda", "cuda")


def norm_and_rotation(kind: NormKind, folder: Path, tuning: Tuning | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A norm and a rotation by the kernel, built in ``folder`` for a CPU, and by the eager backend.

    There are several blocks, of several warps for each token.
    """
    rows = torch.stack((torch.zeros(5, 64), torch.ones(5, 64)))
    args = RotationArgs.of_rows(rows, None, (64,), 5, Pairing.INTERLEAVED)
    x = torch.randn(1, 5, 24, 128).bfloat16()
    outs = torch.zeros_like(x), torch.zeros_like(x)
    eager.rotate([x], args, [outs[1]], Norm(kind, 1e-6))
    with cuda_emulation.emulated(folder), cuda_kernels.tuned(tuning or Tuning()):
        cuda_kernels.rotate([x], args, [outs[0]], Norm(kind, 1e-6))
    return outs


STREAM = Tuning(stages=2)
FAULTS = {
    "outside": ("place.token < args.tokens", "place.token <= args.tokens", "access outside of every tensor"),
    "misaligned": ("? lane * Plan::chunk", "? lane * Plan::chunk / 2", "misaligned access"),
    "diverging": ("shared);\n    __sync", "shared);\n    if (place.row == 0) __sync", "different barriers"),
}
STREAM_FAULTS = {
    "not-filled-again": ("if (fetches && next < args.tokens)", "if (false)", "a wait that never ends"),
    "other-bytes-announced": ("announce(arrival, kHeads", "announce(arrival, 2 * kHeads", "a wait that never ends"),
    "not-prepared": ("place, of_token);\n    __syncthreads();", "place, of_token);", "a wait that never ends"),
    "not-waited-for": ("wait_for(shared.arrivals + at, parity);", "", "filled before it was waited for"),
    "past-the-last": ("if (fetches && next < args.tokens)", "if (fetches)", "access outside of every tensor"),
    "broken-copy": ("dense ? kHeads * kHeadBytes", "dense ? kHeads * kHeadBytes - 8", "broken 16 bytes"),
}


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_run_on_a_cpu_finds_what_a_gpu_would_let_pass(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong, message = FAULTS[fault]
    break_kernel(right, wrong, tmp_path, monkeypatch)
    with pytest.raises(RuntimeError, match=message):
        norm_and_rotation(NormKind.ACROSS_HEADS, tmp_path / "built")


@needs_compiler
@pytest.mark.parametrize("fault", STREAM_FAULTS)
def test_run_on_a_cpu_finds_what_is_wrong_with_copies_ahead(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong, message = STREAM_FAULTS[fault]
    break_kernel(right, wrong, tmp_path, monkeypatch)
    with pytest.raises(RuntimeError, match=message):
        norm_and_rotation(NormKind.ACROSS_HEADS, tmp_path / "built", STREAM)


@needs_compiler
@pytest.mark.parametrize(
    ("barrier", "kind", "tuning"),
    [
        (0, NormKind.ACROSS_HEADS, None),
        (1, NormKind.PER_HEAD, None),
        (2, NormKind.PER_HEAD, None),
        (0, NormKind.ACROSS_HEADS, STREAM),
    ],
)
def test_run_on_a_cpu_needs_every_barrier(
    barrier: int, kind: NormKind, tuning: Tuning | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actual, expected = norm_and_rotation(kind, tmp_path / "right", tuning)
    torch.testing.assert_close(actual, expected)
    parts = (cuda_plan.kernel_sources() / "rope.cu").read_text().split("__syncthreads();")
    assert len(parts) == 5
    broken = "".join(part + ("" if i in (barrier, 4) else "__syncthreads();") for i, part in enumerate(parts))
    break_kernel("__syncthreads();".join(parts), broken, tmp_path, monkeypatch)
    actual, expected = norm_and_rotation(kind, tmp_path / "built", tuning)
    assert not torch.allclose(actual, expected)


@needs_compiler
def test_rotation_in_place_touches_no_unrotated_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor reads it: only the memory of the others is allowed."""
    rows = torch.stack((torch.zeros(70, 16), torch.ones(70, 16)))
    args = RotationArgs(rows, None, (16,), (70,), (0,), 0, 3, 67, Pairing.INTERLEAVED, False, False)
    x, whole = torch.randn(1, 80, 2, 32), cuda_emulation._range
    monkeypatch.setattr(cuda_emulation, "_range", lambda tensor: whole(tensor[:, 3:70]))
    with cuda_emulation.emulated(tmp_path):
        cuda_kernels.rotate([x], args, [x])
        with pytest.raises(RuntimeError, match="access outside of every tensor"):
            cuda_kernels.rotate([x], args, [torch.empty_like(x)])


def break_kernel(right: str, wrong: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets kernels be built from a copy of the sources in which ``wrong`` stands for the one place of ``right``."""
    shutil.copytree(cuda_plan.kernel_sources(), folder / "kernels")
    source = folder / "kernels" / "rope.cu"
    text = source.read_text()
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong))
    monkeypatch.setattr(cuda_emulation, "kernel_sources", lambda: folder / "kernels")
