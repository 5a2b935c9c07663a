"""The launch path over the real cuda-core and cuda-bindings, with a stub below as the driver: needs no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import stub_driver

HERE = Path(__file__).resolve().parent


@pytest.mark.skipif(stub_driver.why_not() is not None, reason=str(stub_driver.why_not()))
def test_launch_path_keeps_its_contract_over_the_installed_cuda_core(tmp_path: Path) -> None:
    """In a process of its own: a process that has looked for a driver does not look again."""
    environment = stub_driver.environment(stub_driver.build(tmp_path)) | {"PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", "launch_over_stub.py"]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    output = f"{done.stdout[-20_000:]}\n{done.stderr[-2_000:]}"
    assert done.returncode == 0, output
    assert "skipped" not in done.stdout, output
