"""The README: its code runs, its commands and files exist, its table of models is the package's."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path

import diffusers
import pytest
import torch
from typer.testing import CliRunner

import dit_rope
from benchmarks.results import read_csv
from dit_rope import cli
from dit_rope.models import ADAPTERS
from pages import write_model_table

ROOT = Path(__file__).resolve().parents[2]


README = (ROOT / "README.md").read_text()
BENCH = ROOT / "scripts" / "results" / "bench-cpu"
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def caches():
    """The README configures the caches; gives them their caps back."""
    before = dit_rope.cache_info().tables
    yield
    dit_rope.cache_configure(max_entries=before.max_entries, max_bytes=before.max_bytes)


@pytest.fixture
def loads_random_pipeline(monkeypatch, random_wan):
    """Whatever model is asked for, the random pipeline is loaded; returns the list of what was asked for."""
    asked = []

    def from_pretrained(model, **_options):
        asked.append(str(model))
        return random_wan

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
    return asked


def measured(file: str, column: str, variants: tuple[str, str], **where: str) -> tuple[float, float]:
    """Upstream's figure and ours in one file of the committed benchmark; "default" is what ``patch`` does unasked."""
    rows = [row for row in read_csv(BENCH / f"{file}.csv") if all(row[name] == value for name, value in where.items())]
    upstream, ours = (
        [row for row in rows if (row["default"] == "True" if name == "default" else row["variant"] == name)]
        for name in variants
    )
    assert (len(upstream), len(ours)) == (1, 1), where
    return float(upstream[0][column]), float(ours[0][column])


def time_text(ms: float) -> str:
    return f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.1f} ms" if ms >= 1 else f"{ms:.2f} ms"


def size_text(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def ratio_text(ratio: float) -> str:
    return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.1f}x" if ratio >= 2 else f"{ratio:.2f}x"


GRID = ("full grid", "axis tables")
COLD = {"case": "wan-720p-81-frames", "quantity": "cold build"}
WAN = {"shape": "wan-1.3b-480p"}
NORM = "norm across heads, rotate"


@pytest.mark.parametrize(
    ("subject", "text", "file", "column", "variants", "where"),
    [
        ("build the 720p", time_text, "tables", "median", GRID, COLD),
        ("bytes held", size_text, "tables", "median", GRID, {"case": "720p", "quantity": "bytes"}),
        ("rotate q and k", time_text, "rotation", "ms_median", ("model, eager", "dit_rope"),
         {**WAN, "dtype": "float32", "operation": "rotate"}),
        ("the same in bfloat16", time_text, "rotation", "ms_median", ("model, eager", "dit_rope, exact"),
         {**WAN, "dtype": "bfloat16", "operation": "rotate"}),
        ("RMSNorm and rotate", time_text, "rotation", "ms_median", ("model, eager", "dit_rope"),
         {**WAN, "dtype": "bfloat16", "operation": NORM}),
        ("whole step", time_text, "step", "ms_median", ("unpatched", "default"), {}),
    ],
)  # fmt: skip
def test_first_table_holds_the_committed_figures(subject, text, file, column, variants, where):
    line = next(line for line in README.splitlines() if line.startswith(f"| {subject}"))
    upstream, ours = measured(file, column, variants, **where)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:] == [text(upstream), text(ours), ratio_text(upstream / ours), f"`{file}.csv`"]


def test_first_table_names_the_machine_and_the_sizes_measured():
    row = next(row for row in read_csv(BENCH / "rotation.csv") if row["shape"] == WAN["shape"])
    assert f"| measured on CPU: {row['device']}, {row['threads']} threads, torch {row['torch'][:4]} |" in README
    assert f"({int(row['tokens']):,} tokens, {row['heads']} heads of {row['head_dim']})" in README


def test_code_blocks_run_in_order(loads_random_pipeline, caches, capsys):
    namespace = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert loads_random_pipeline == ["samples/tiny-wan"]
    assert "WanTransformer3DModel" in capsys.readouterr().out
    assert namespace["video"].shape == (17, 96, 96, 3)
    assert namespace["q_rotated"].shape == namespace["q"].shape
    assert namespace["cos"].dtype == torch.float64


def test_first_example_is_six_lines_with_undo():
    lines = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(lines) == 6
    assert lines[-1] == "handle.undo()"


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_make_goals_exist(text):
    goals = set(re.findall(r"\bmake ([a-z]+)\b", "\n".join(re.findall(r"`[^`]+`", text) + blocks("shell", text))))
    assert goals
    for goal in goals:
        done = subprocess.run(["make", "-n", goal], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_commands_exist_and_all_are_named():
    named = set(re.findall(r"\bdit-rope ([a-z]+)\b", README))
    assert named == {command.name for command in cli.app.registered_commands}
    for command in named:
        assert CliRunner().invoke(cli.app, [command, "--help"]).exit_code == 0


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_files_named_exist(text):
    named = re.findall(r"[`\"]((?:\.ci|docs|dit_rope|kernels|samples|scripts|tests)/[\w./-]*)[`\"]", text)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_tables_of_models_are_those_of_the_adapters():
    assert write_model_table.with_section(README, write_model_table.rows()) == README
    assert all(f"| `{adapter.model_class}` |" in README for adapter in ADAPTERS)
    text = (ROOT / "docs" / "models.md").read_text()
    assert write_model_table.with_section(text, write_model_table.left_alone()) == text


def test_scaling_types_named_are_known():
    (named,) = re.findall(r"the types are (.*?)\.$", README, flags=re.MULTILINE)
    with pytest.raises(ValueError, match="scaling must be one of") as refusal:
        dit_rope.rope_table(dit_rope.RopeSpec((8,), scaling=dit_rope.Scaling.of("no such")), dit_rope.Grid(4))
    known = re.search(r"one of (.*), got", str(refusal.value)).group(1).split(", ")
    assert set(re.findall(r"`(\w+)`", named)) <= set(known)
    assert len(re.findall(r"`(\w+)`", named)) == 10


@pytest.mark.parametrize("program", ["patch_a_pipeline", "rotate_tensors"])
def test_sample_programs_run(program, loads_random_pipeline, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [program])
    runpy.run_path(str(ROOT / "samples" / f"{program}.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "bitwise equal: True" in out or "largest change of a score" in out


def test_generate_video_program_writes_a_video(loads_random_pipeline, monkeypatch, tmp_path, capsys):
    out = tmp_path / "video.mp4"
    options = ["--model", "a/model", "--steps", "2", "--height", "32", "--width", "48", "--frames", "5"]
    monkeypatch.setattr("sys.argv", ["generate_video.py", *options, "--device", "cpu", "--out", str(out)])
    runpy.run_path(str(ROOT / "samples" / "generate_video.py"), run_name="__main__")
    assert loads_random_pipeline == ["a/model"]
    assert out.stat().st_size > 0
    assert f"wrote {out}" in capsys.readouterr().out
