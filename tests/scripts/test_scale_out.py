"""The page on scale: its figures are those of a run, and the formulas of the script are the bytes of real tables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.results import read_csv

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "scale-out.md").read_text()
ROWS = read_csv(ROOT / "scripts" / "results" / "scale-out.csv")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from measure import scale_out

    return scale_out


def cells(head: str) -> list[list[str]]:
    """The lines of the table whose head starts so."""
    table = PAGE[PAGE.index(f"| {head} ") :].split("\n\n")[0].splitlines()[2:]
    return [re.findall(r"[^|]+", line.strip("|")) for line in table]


def test_figures_are_those_of_the_results() -> None:
    shown = [[cell.strip() for cell in line] for line in cells("tokens | ranks")]
    sizes = ("dense_part", "dense_whole", "axis", "positions", "queries_and_keys")
    assert shown == [
        [f"{int(row[name]):,}" for name in ("grid_tokens", "ranks", "tokens")]
        + [f"{int(row[name]) / 1e6:,.3g}" if int(row[name]) < 1e9 else f"{int(row[name]) / 1e6:,.0f}" for name in sizes]
        for row in ROWS
    ]


def test_times_are_those_of_the_results() -> None:
    shown = [[cell.strip() for cell in line] for line in cells("tokens of a rank | ms")]
    measured = sorted((row for row in ROWS if row["rotation_ms_measured"]), key=lambda row: int(row["tokens"]))
    assert shown == [
        [f"{int(row['tokens']):,}", f"{float(row['rotation_ms']):.2f}", f"{float(row['rotation_ms_measured']):.2f}"]
        for row in measured
    ]
    ratios = [float(row["rotation_ms_measured"]) / float(row["rotation_ms"]) for row in measured]
    assert f"took {min(ratios):.2f} to {max(ratios):.2f} times as long" in " ".join(PAGE.split())


def test_results_are_those_of_the_formulas(script: object) -> None:
    rows = {(int(row["grid_tokens"]), int(row["ranks"])): row for row in ROWS}
    assert len(rows) == len(script.GRIDS) * len(script.RANKS)
    for grid in script.GRIDS:
        for ranks in script.RANKS:
            for name, value in vars(script.cost(grid, ranks)).items():
                assert int(rows[grid.tokens, ranks][name]) == value
    same = sum(row["bytes_measured"] == "True" for row in ROWS)
    assert f"all {same} points agree" in PAGE


@pytest.mark.parametrize(("grid", "ranks"), [(0, 1), (0, 64), (1, 64), (2, 1024)])
def test_formulas_are_the_bytes_of_real_tables(script: object, grid: int, ranks: int) -> None:
    real = script.measured(script.GRIDS[grid], ranks)
    assert real == script.cost(script.GRIDS[grid], ranks)
