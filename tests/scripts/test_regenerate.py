"""One command writes what follows from the adapters."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks.results import read_csv
from pages import regenerate, write_known_code, write_measured_tables, write_model_table

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = (ROOT / "scripts" / "results" / "operators.csv").read_text()


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of results with the committed operators."""
    monkeypatch.setattr(regenerate, "RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.results.RESULTS", tmp_path)
    monkeypatch.setattr(regenerate.count_operators, "PICTURE", tmp_path / "operators.svg")
    (tmp_path / "operators.csv").write_text(OPERATORS)
    return tmp_path


def test_operators_of_one_class_are_counted_and_those_of_others_stay(results: Path) -> None:
    name = "MotifVideoTransformer3DModel"
    before = list(csv.DictReader(OPERATORS.splitlines()))
    regenerate.count_operators_of(name)
    after = read_csv(results / "operators.csv")
    assert [row for row in after if row["model"] != name] == [row for row in before if row["model"] != name]
    figures = ("module", "kernels_before", "kernels_after", "q_units_before", "q_units_after")
    counted, committed = (
        [[row[figure] for figure in figures] for row in rows if row["model"] == name] for rows in (after, before)
    )
    assert counted == committed
    assert (results / "operators.svg").exists()


def test_everything_is_written_and_the_repository_is_up_to_date(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written: list[str] = []
    content = write_known_code.TARGET.read_text()
    (tmp_path / "known_code.json").write_text(content)
    monkeypatch.setattr(write_known_code, "TARGET", tmp_path / "known_code.json")
    monkeypatch.setattr(write_model_table, "main", lambda: written.append("models"))
    monkeypatch.setattr(write_measured_tables, "main", lambda: written.append("figures"))
    monkeypatch.setattr(regenerate, "count_operators_of", written.append)
    regenerate.main("WanTransformer3DModel")
    assert written == ["WanTransformer3DModel", "models", "figures"]
    assert (tmp_path / "known_code.json").read_text() == content
