"""Checks that run in processes of their own: limits, several results of one process, parts that fit or do not."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

import gpu_check
from gpu_checks import runner
from gpu_checks.runner import FAILED, LEFT_OUT, PASSED, SKIPPED, Check, Deadline, Missing, Part, Result, Runner, planned


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


def run_parts(parts: list[Part], seconds: float = 60.0, missing: dict[str, Missing] | None = None) -> list[Result]:
    results: list[Result] = []
    Runner(Deadline(seconds), missing or {}, {}, results.append, lambda text: None, lambda line: None).run(parts)
    return results


def run(check: Check, seconds: float = 60.0, missing: dict[str, Missing] | None = None) -> Result:
    (result,) = run_parts([Part("part", 0, (check,))], seconds, missing)
    return result


@pytest.mark.parametrize(("optional", "verdict"), [(True, SKIPPED), (False, FAILED)])
def test_check_without_what_it_needs_is_not_run(optional: bool, verdict: str) -> None:
    check = Check("name", python("raise SystemExit(0)"), 60, needs=("tool",), reports={"a": "a, cuda", "b": "b, cuda"})
    results = run_parts([Part("part", 0, (check,))], missing={"tool": Missing("not on PATH", optional)})
    assert {(result.check, result.result) for result in results} == {("a, cuda", verdict), ("b, cuda", verdict)}
    assert {result.detail for result in results} == {"needs tool: not on PATH"}


def test_check_passes_with_its_last_line_as_detail() -> None:
    result = run(Check("name", python("print('first'); print('42 tests'); print()"), 60))
    assert (result.result, result.detail) == (PASSED, "42 tests")


def test_check_fails_with_its_exit_status_and_last_line() -> None:
    result = run(Check("name", python("raise SystemExit('expected 1, got 2')"), 60))
    assert (result.result, result.detail) == (FAILED, "exit status 1: expected 1, got 2")


def test_check_that_cannot_be_begun_fails() -> None:
    result = run(Check("name", ("/nowhere/at/all",), 60))
    assert (result.result, result.detail[:15]) == (FAILED, "cannot be begun")


def test_check_that_cannot_run_on_the_device_is_skipped() -> None:
    check = Check(
        "name", python("print('Error: Device not supported', flush=True); 1 / 0"), 60, skips=("not supported",)
    )
    assert run(check).result == SKIPPED


def test_check_past_its_limit_is_ended_with_what_it_started(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import pathlib, time; time.sleep(2.5); pathlib.Path({str(alive)!r}).touch()"
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    result = run(Check("name", python(code), 1.5))
    assert (result.result, result.detail) == (FAILED, "expected an end within 2 s, got none; last: begun")
    time.sleep(2.5)
    assert not alive.exists()


def test_check_that_cannot_be_ended_is_not_waited_for(monkeypatch) -> None:
    monkeypatch.setattr(runner, "LEAST_SECONDS", 0.1)
    monkeypatch.setattr(runner.os, "killpg", lambda group, number: None)
    start = time.monotonic()
    result = run(Check("name", python("import time; time.sleep(10)"), 0.6))
    assert (result.result, result.detail) == (FAILED, "expected an end within 1 s, got none; last: no output")
    assert time.monotonic() - start < 8


def test_check_that_the_end_of_the_run_cuts_off_is_left_out(monkeypatch) -> None:
    monkeypatch.setattr(runner, "LEAST_SECONDS", 0.1)
    result = run(Check("name", python("import time; print('begun', flush=True); time.sleep(9)"), 60), seconds=1.0)
    assert (result.result, result.detail) == (LEFT_OUT, "cut off by the end of the run; last: begun")


def reporting(code: str, *names: str, seconds: float = 60.0) -> dict[str, tuple[str, str]]:
    """Results and details of a check whose command runs ``code`` for each of its arguments."""
    command = python(
        f"import os, sys, time\nfor name in sys.argv[1:]:\n    {code}\n    print(f'passed {{name}}: right', flush=True)"
    )
    check = Check("several", command, seconds, reports={name: f"{name}, cuda" for name in names})
    results = run_parts([Part("part", 0, (check,))])
    assert len(results) == len(names)
    return {result.check.removesuffix(", cuda"): (result.result, result.detail) for result in results}


def test_one_process_gives_several_results() -> None:
    assert reporting("pass", "a", "b") == {"a": (PASSED, "right"), "b": (PASSED, "right")}


def test_result_that_ends_its_process_fails_and_the_rest_is_begun_again() -> None:
    results = reporting("name == 'b' and os._exit(9)", "a", "b", "c")
    assert results == {"a": (PASSED, "right"), "b": (FAILED, "exit status 9: passed a: right"), "c": (PASSED, "right")}


def test_failure_that_ends_its_process_does_not_fail_the_next() -> None:
    results = reporting("name == 'a' and (print('failed a: wrong', flush=True), os._exit(1))", "a", "b")
    assert results == {"a": (FAILED, "wrong"), "b": (PASSED, "right")}


def test_result_that_hangs_fails_and_the_rest_is_begun_again() -> None:
    results = reporting("name == 'b' and time.sleep(60)", "a", "b", "c", seconds=1.0)
    assert results["a"] == results["c"] == (PASSED, "right")
    assert results["b"] == (FAILED, "expected an end within 1 s, got none; last: passed a: right")


def test_result_that_is_not_printed_fails() -> None:
    results = reporting("if name == 'a': continue", "a", "b")
    assert results["b"] == (PASSED, "right")
    assert results["a"][0] == FAILED


def test_part_that_does_not_fit_is_left_out_and_later_ones_run() -> None:
    parts = [Part(name, seconds, (Check(name, python("pass"), 60),)) for name, seconds in (("long", 90), ("short", 5))]
    assert [(part.name, fits) for part, fits in planned(parts, 60)] == [("long", False), ("short", True)]
    long, short = run_parts(parts)
    assert (long.result, long.detail) == (LEFT_OUT, "needs about 90 s, 60 s were left")
    assert short.result == PASSED
    assert gpu_check.verdict_of([long, short]) == 0
    assert gpu_check.announced(parts, 60)[1].split() == ["left", "out", "long", "about", "90", "s"]


def test_parts_run_one_after_the_other_and_checks_of_a_part_together() -> None:
    wait = "import sys, time; time.sleep(float(sys.argv[1]))"
    first = Part("first", 0, tuple(Check(s, (*python(wait), s), 20) for s in ("0.6", "0.1")))
    results = run_parts([first, Part("second", 0, (Check("0", (*python(wait), "0"), 20),))])
    assert [result.check for result in results] == ["0.1", "0.6", "0"]
