"""The program that runs the tests under other versions of torch: what it installs, runs and writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks.results import read_csv
from long_tests import torch_versions


def test_every_file_runs_but_those_left_out_by_name() -> None:
    chosen = torch_versions.chosen_tests()
    assert {
        "tests/rotation/test_ops.py",
        "tests/hooks/test_compiled_models.py",
        "tests/hooks/test_nudged_tables.py",
    } <= set(chosen)
    assert all((ROOT / "tests" / path).exists() for path in torch_versions.LEFT_OUT)
    assert not [path for path in chosen if path.startswith(("tests/scripts/", "tests/backends/test_cuda_compile"))]


def test_packages_of_torch_stay_and_others_are_as_pinned() -> None:
    pins = "# why\nnumpy==2.4.6\ntorch==2.13.0\ntyping_extensions==4.16.0\nsetuptools==84.2.1\nCython==3.0\n"
    installed = ["torch==2.11.0", "typing-extensions==4.15.0", "pip==23.2.1", "setuptools==65.5.0", "cython==3.1"]
    assert torch_versions.constraints(pins, installed) == [
        "torch==2.11.0",
        "typing-extensions==4.15.0",
        "cython==3.1",
        "numpy==2.4.6",
    ]


def test_errors_count_as_failures() -> None:
    report = '<testsuites><testsuite name="a" errors="1" failures="2" skipped="3" tests="10"/></testsuites>'
    assert torch_versions.counts(report) == {"passed": 4, "failed": 3, "skipped": 3}


def test_row_takes_the_place_of_its_version_and_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "versions.csv"
    for version, passed in (("2.11.0+cu130", 1), ("2.9.1+cu128", 2), ("2.11.0+cu130", 3)):
        torch_versions.write_row(path, {"torch": version, "python": "3.11.7", "passed": passed})
    rows = read_csv(path)
    assert [(row["torch"], row["passed"]) for row in rows] == [("2.9.1+cu128", "2"), ("2.11.0+cu130", "3")]
    assert all(row["commit"] for row in rows)


def test_committed_run_is_of_the_lowest_torch_declared_and_has_no_failures() -> None:
    rows = read_csv(ROOT / "scripts" / "results" / "torch-versions.csv")
    assert all(row["failed"] == "0" and int(row["passed"]) > 3000 for row in rows)
    ran = [row["torch"].partition("+")[0] for row in rows]
    assert ran == list(torch_versions.VERSIONS)
    lowest = ".".join(torch_versions.VERSIONS[0].split(".")[:2])
    assert f'"torch>={lowest}"' in (ROOT / "pyproject.toml").read_text()


def test_run_that_collects_nothing_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_versions, "chosen_tests", lambda: ["tests/no_such_file.py"])
    python = Path(sys.executable)
    with pytest.raises(SystemExit, match="got exit code 4"):
        torch_versions.run_tests(python, ["-n", "0"], tmp_path / "report.xml")
