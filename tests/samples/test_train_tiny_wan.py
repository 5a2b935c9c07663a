"""The program that trained the sample still runs from end to end, in a few steps of everything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import dit_rope

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "tiny_wan" / "train_tiny_wan.py"


def test_smoke_run_writes_a_pipeline_that_loads_and_can_be_patched(tmp_path: Path) -> None:
    import diffusers

    call = [sys.executable, SCRIPT, "--smoke", "--out", tmp_path / "out", "--work-dir", tmp_path / "work"]
    subprocess.run(call, check=True, timeout=600, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(tmp_path / "out"))
    with dit_rope.patch(pipe) as handle:
        assert "WanTransformer3DModel" in handle.report()
    assert "## Training" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "loss_curve.csv").read_text().count("\n") > 2
