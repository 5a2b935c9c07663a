"""``docs/compat.md``: its code runs, its functions and files exist, its figures are those of the CSV."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from benchmarks.results import read_csv

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "compat.md").read_text()


def test_code_blocks_run_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    namespace = {}
    for block in re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL):
        exec(compile(block, "compat.md", "exec"), namespace)
    assert capsys.readouterr().out == "[4, 6, 7, 8, 9, 3, 4, 5, 6, 7]\n"
    assert namespace["x"].shape == (2, 8, 60, 64)
    assert torch.isfinite(namespace["q_rotated"]).all()


def test_functions_named_exist() -> None:
    rows = re.findall(r"^\| `compat\.(\w+)` \| (.*?) \|", TEXT, flags=re.MULTILINE)
    assert len(rows) == 4
    for module, functions in rows:
        names = re.findall(r"`(\w+)`", functions)
        found = importlib.import_module(f"dit_rope.compat.{module}")
        both = "`_inplace`" in functions
        rotations = [name for name in names if name.startswith("apply_rope") or name.startswith("apply_llama")]
        names = [name for name in names if name != "_inplace"] + [f"{name}_inplace" for name in rotations if both]
        assert names
        assert [name for name in names if not callable(getattr(found, name, None))] == []


def test_files_named_exist() -> None:
    named = re.findall(r"`(?:python )?((?:docs|scripts)/[\w./-]*)`", TEXT)
    assert len(named) == 2
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_table_of_errors_is_that_of_the_csv() -> None:
    measured = {
        (row["last position"], row["source"]): row
        for row in read_csv(ROOT / "scripts" / "results" / "long-context-error.csv")
    }
    head, *rows = re.findall(r"^\| (up to position|[\d,]+) \| (.*) \|$", TEXT, flags=re.MULTILINE)
    sources = head[1].split(" | ")
    stated = {
        (last.replace(",", ""), source): cell
        for last, cells in rows
        for source, cell in zip(sources, cells.split(" | "), strict=True)
    }
    assert stated == {key: f"{row['error of cos, sin']}, {row['error of a vector']}" for key, row in measured.items()}
    assert {last for last, _ in stated} >= {"100000", "1000000"}
