"""Programs of a GPU run that are killed at any moment leave what they had measured, in files that can be read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.results import Row, read_csv, write_rows

ROOT = Path(__file__).resolve().parents[2]
TIMES = 10


def killed(program: str, folder: Path) -> list[tuple[str, int]]:
    """The signal and exit status of a whole run, and of those that were killed."""
    command = [sys.executable, str(ROOT / "tests" / "support" / "killed_runs.py"), program, str(folder), str(TIMES)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert process.returncode == 0, process.stderr
    return [tuple(status) for status in json.loads(process.stdout)]


def rows_of(folder: Path, pattern: str) -> list[Row]:
    """The rows of a CSV file, none where there is no such file; all of them are whole."""
    rows = [row for path in folder.glob(pattern) for row in read_csv(path)]
    assert all(None not in row and None not in row.values() for row in rows)
    assert all(row["device"] and row["commit"] for row in rows)
    return rows


def notes(folder: Path) -> list[str]:
    path = folder / "done"
    return path.read_text().split() if path.exists() else []


def test_killed_benchmark_leaves_the_rows_that_it_had_measured(tmp_path: Path) -> None:
    statuses = killed("bench_kernels", tmp_path)
    assert statuses[0] == ("", 0)
    names = [(row["shape"], row["operation"], row["variant"]) for row in rows_of(tmp_path / "0", "kernels-*.csv")]
    assert len(names) == 4 + 3 * 3
    lengths = []
    for number in range(1, TIMES + 1):
        rows = rows_of(tmp_path / str(number), "kernels-*.csv")
        assert [(row["shape"], row["operation"], row["variant"]) for row in rows] == names[: len(rows)]
        assert len(rows) >= max(map(int, notes(tmp_path / str(number))), default=0)
        lengths.append(len(rows))
    assert any(0 < length < len(names) for length in lengths)


def test_killed_check_leaves_the_results_that_were_known_and_nothing_that_runs(tmp_path: Path) -> None:
    statuses = killed("gpu_check", tmp_path)
    assert statuses[0] == ("", 0)
    names = {row["check"] for row in rows_of(tmp_path / "0", "gpu-check.csv")}
    assert len(names) == 12
    counts = []
    for number, (sent, status) in enumerate(statuses[1:], start=1):
        folder = tmp_path / str(number)
        results = {row["check"]: row["result"] for row in rows_of(folder, "gpu-check.csv")}
        passed = {check for check, result in results.items() if result == "passed"}
        assert set(notes(folder)) <= passed
        assert set(results) <= names
        assert set(results.values()) <= {"passed", "left out"}
        assert (folder / "gpu-check.log").exists() or not results
        assert status != 0 or passed == names
        counts.append(len(passed))
        if sent != "SIGKILL" and (folder / "pids").exists():
            assert status in (0, 128 + signal.Signals[sent])
            assert [pid for pid in (folder / "pids").read_text().split() if Path(f"/proc/{pid}").exists()] == []
    assert any(0 < count < len(names) for count in counts)


def test_rows_that_cannot_be_written_leave_the_file_as_it_was(tmp_path: Path, monkeypatch) -> None:
    path = write_rows(tmp_path / "rows.csv", [{"check": "a"}], {"device": "GPU"})
    before = path.read_text()

    def full(value: object) -> object:
        if value == "c":
            raise OSError("no space left on device")
        return value

    monkeypatch.setattr(results, "_short", full)
    with pytest.raises(OSError, match="no space left"):
        write_rows(path, [{"check": "b"}, {"check": "c"}], {"device": "GPU"})
    assert path.read_text() == before


def test_commit_comes_from_the_environment_where_git_does_not_know(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("DIT_ROPE_COMMIT", "0123456789ab")
    assert results.environment("cpu")["commit"] != "0123456789ab"
    monkeypatch.setattr(results, "__file__", str(tmp_path / "dit_rope" / "benchmark" / "results.py"))
    assert results.environment("cpu")["commit"] == "0123456789ab"
    monkeypatch.delenv("DIT_ROPE_COMMIT")
    assert results.environment("cpu")["commit"] == "unknown"
