"""The sample programs run, and print or write what they say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("program", ["patch_a_pipeline", "rotate_tensors"])
@pytest.mark.usefixtures("loads_random_pipeline")
def test_program_runs(program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", [program])
    runpy.run_path(str(ROOT / "samples" / f"{program}.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "bitwise equal: True" in out or "largest change of a score" in out


def test_generate_video_writes_a_video(
    loads_random_pipeline: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "video.mp4"
    options = ["--model", "a/model", "--steps", "2", "--height", "32", "--width", "48", "--frames", "5"]
    monkeypatch.setattr("sys.argv", ["generate_video.py", *options, "--device", "cpu", "--out", str(out)])
    runpy.run_path(str(ROOT / "samples" / "generate_video.py"), run_name="__main__")
    assert loads_random_pipeline == ["a/model"]
    assert out.stat().st_size > 0
    assert f"wrote {out}" in capsys.readouterr().out
