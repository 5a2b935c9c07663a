"""The Triton backend: which calls it takes, and the contract of every backend, in another process.

Whether kernels are interpreted or compiled is decided once per process, when Triton decorates them. The contract
therefore runs apart, on a CPU with TRITON_INTERPRET=1, while this process keeps the kernels that
``test_triton_compile.py`` compiles.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from contract_calls import run_contract
from dit_rope.rotation.backends import triton_kernels
from dit_rope.spec import NormKind
from gpu_call_cases import SMALL, WRONG_ARGUMENTS, WRONG_TENSORS

ROOT = Path(__file__).resolve().parents[2]


def test_kernel_keeps_the_contract(device: str) -> None:
    pytest.importorskip("triton", exc_type=ImportError)
    run_contract("triton", device)


@pytest.fixture
def x(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """A tensor on CPU, which for once is a device that the backend takes."""
    pytest.importorskip("triton", exc_type=ImportError)
    monkeypatch.setattr(triton_kernels, "DEVICE_TYPES", ("cpu",))
    return torch.zeros(1, 24, 3, 40, dtype=torch.bfloat16)


def test_declined_accepts_what_the_kernel_takes(x: torch.Tensor) -> None:
    packed = torch.zeros(1, 24, 3, 3, 40, dtype=torch.bfloat16).unbind(2)
    assert triton_kernels.declined([x], SMALL) is None
    assert triton_kernels.declined([x, x[:, :, :1]], SMALL) is None
    assert triton_kernels.declined(packed[:2], SMALL, NormKind.ACROSS_HEADS) is None
    assert triton_kernels.declined([x.transpose(1, 2).contiguous().transpose(1, 2)], replace(SMALL, exact=True)) is None


def test_declined_names_the_device() -> None:
    pytest.importorskip("triton", exc_type=ImportError)
    assert "got cpu" in str(triton_kernels.declined([torch.zeros(1, 24, 3, 40)], SMALL))


def test_declined_says_that_triton_is_missing(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "_has_triton", lambda: False)
    assert triton_kernels.declined([x], SMALL) == "triton is not installed"


def test_declined_does_not_import_triton_for_a_tensor_on_cpu() -> None:
    program = (
        "import sys, torch\n"
        "from dit_rope.rotation.backends import triton_kernels\n"
        "from dit_rope.rotation_args import RotationArgs\n"
        "from dit_rope.spec import Pairing\n"
        "args = RotationArgs.of_rows(torch.zeros(2, 1, 1), None, (1,), 1, Pairing.HALF)\n"
        "assert triton_kernels.declined([torch.zeros(1, 1, 1, 2)], args)\n"
        "assert 'triton' not in sys.modules\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env=environment)


@pytest.mark.parametrize(("change", "reason"), WRONG_TENSORS)
def test_declined_names_what_is_wrong_with_the_tensors(x: torch.Tensor, change, reason: str) -> None:
    assert reason in str(triton_kernels.declined(change(x), SMALL))


TOO_LONG = ({"rows": torch.zeros(2, 1, 1).expand(2, 2**30, 1)}, "fewer than 2**31 elements")


@pytest.mark.parametrize(("changes", "reason"), [*WRONG_ARGUMENTS, TOO_LONG])
def test_declined_names_what_is_wrong_with_the_arguments(x: torch.Tensor, changes, reason: str) -> None:
    assert reason in str(triton_kernels.declined([x], replace(SMALL, **changes)))


def test_declined_leaves_long_rows_to_the_caller(x: torch.Tensor) -> None:
    long = x.new_zeros(1, 24, 65, 256)
    assert "got 32768" in str(triton_kernels.declined([long], SMALL, NormKind.ACROSS_HEADS))
    assert triton_kernels.declined([long], SMALL, NormKind.PER_HEAD) is None


def test_rotate_refuses_with_the_reason() -> None:
    x = torch.zeros(1, 24, 3, 40, dtype=torch.float64)
    with pytest.raises(ValueError, match="the Triton backend cannot take this call: "):
        triton_kernels.rotate([x], SMALL, [x])
