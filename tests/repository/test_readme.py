"""The README: its code runs, its figures are measured, it names every command and scaling type."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dit_rope
from benchmarks.results import read_csv
from dit_rope import cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BENCH = ROOT / "scripts" / "results" / "bench-cpu"
CODE = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def measured(file: str, column: str, variants: tuple[str, str], **filters: str) -> tuple[float, float]:
    """Figures of upstream and of dit_rope in one committed CSV file; "default" is the default of ``patch``."""
    rows = [
        row for row in read_csv(BENCH / f"{file}.csv") if all(row[name] == value for name, value in filters.items())
    ]
    upstream, patched = (
        [row for row in rows if (row["default"] == "True" if name == "default" else row["variant"] == name)]
        for name in variants
    )
    assert (len(upstream), len(patched)) == (1, 1), filters
    return float(upstream[0][column]), float(patched[0][column])


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
    ("subject", "text", "file", "column", "variants", "filters"),
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
def test_first_table_holds_the_committed_figures(
    subject: str,
    text: Callable[[float], str],
    file: str,
    column: str,
    variants: tuple[str, str],
    filters: dict[str, str],
) -> None:
    line = next(line for line in README.splitlines() if line.startswith(f"| {subject}"))
    upstream, patched = measured(file, column, variants, **filters)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:] == [text(upstream), text(patched), ratio_text(upstream / patched), f"`{file}.csv`"]


def test_first_table_names_the_machine_and_the_sizes_measured() -> None:
    row = next(row for row in read_csv(BENCH / "rotation.csv") if row["shape"] == WAN["shape"])
    assert f"| measured on CPU: {row['device']}, {row['threads']} threads, torch {row['torch'][:4]} |" in README
    assert f"({int(row['tokens']):,} tokens, {row['heads']} heads of {row['head_dim']})" in README


def test_code_blocks_run_in_order(loads_random_pipeline: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {}
    for block in CODE:
        exec(compile(block, "README.md", "exec"), namespace)
    assert loads_random_pipeline == ["samples/tiny-wan"]
    assert "WanTransformer3DModel" in capsys.readouterr().out
    assert namespace["video"].shape == (17, 96, 96, 3)
    assert namespace["q_rotated"].shape == namespace["q"].shape
    assert namespace["cos"].dtype == torch.float64


def test_first_example_is_six_lines_with_undo() -> None:
    lines = [line for line in CODE[0].splitlines() if line.strip()]
    assert len(lines) == 6
    assert lines[-1] == "handle.undo()"


def test_every_command_is_named() -> None:
    named = set(re.findall(r"\bdit-rope ([a-z]+)\b", README))
    assert named == {command.name for command in cli.app.registered_commands}


def test_scaling_types_named_are_known() -> None:
    (named,) = re.findall(r"The types are (.*?)\. ", README, flags=re.DOTALL)
    with pytest.raises(ValueError, match="scaling must be one of") as refusal:
        dit_rope.rope_table(dit_rope.RopeSpec((8,), scaling=dit_rope.Scaling.of("no such")), dit_rope.Grid(4))
    known = re.search(r"one of (.*), got", str(refusal.value)).group(1).split(", ")
    assert set(re.findall(r"`(\w+)`", named)) == set(known) - {"default", "none"}
