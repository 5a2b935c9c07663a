"""Tables of figures from CSV files: which rows, which columns, and where they come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from pages import write_measured_tables
from pages.write_measured_tables import Measured

CSV = """size,code,ms,device,threads,torch,python,commit
1000,ours,1.25,a CPU,2,2.13,3.11,abc
1000,theirs,12.5,a CPU,2,2.13,3.11,abc
2000,ours,,a CPU,2,2.13,3.11,abc
"""


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "times.csv").write_text(CSV)
    monkeypatch.setattr(write_measured_tables, "RESULTS", tmp_path)


def test_table_shows_rows_in_the_given_form_and_their_source() -> None:
    text = Measured("t", "times", "make it", {"code": "{code}", "ms": "{ms:.1f}"}, where={"size": "1000"}).text()
    assert text == (
        "| code | ms |\n| --- | --- |\n| ours | 1.2 |\n| theirs | 12.5 |\n\n"
        "`make it` wrote `scripts/results/times.csv`: a CPU, 2 threads, torch 2.13, Python 3.11.\n"
    )


def test_table_spreads_a_column_and_leaves_gaps_empty() -> None:
    text = Measured("t", "times", "make it", {"code": "{code}"}, across="size", cell="{ms:.0f}").text()
    assert text.splitlines()[:4] == [
        "| code | 1,000 | 2,000 |",
        "| --- | --- | --- |",
        "| ours | 1 |  |",
        "| theirs | 12 |  |",
    ]


def test_table_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"where must leave rows of times.csv, got \{'code': 'nobody'\}"):
        Measured("t", "times", "make it", {"code": "{code}"}, where={"code": "nobody"}).text()


def test_table_with_an_unknown_column_is_refused() -> None:
    with pytest.raises(KeyError):
        Measured("t", "times", "make it", {"code": "{kode}"}).text()
