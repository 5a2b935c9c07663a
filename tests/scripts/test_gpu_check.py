"""The GPU checks: a rehearsal of every program on CPU, what a run consists of, its results, and the targets."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_gpu_runner import python

import gpu_check
from benchmarks.problems import SHAPES, Operation
from benchmarks.results import read_csv
from gpu_checks import plan, results, targets
from gpu_checks.requirements import Requirement, describe, requirements, survey
from gpu_checks.runner import FAILED, LEFT_OUT, PASSED, SKIPPED, Check, Part, Result, planned

PAGE = (plan.ROOT / "docs" / "gpu.md").read_text()


@pytest.fixture(autouse=True)
def _signals_put_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_rehearsal_runs_every_program_and_shows_no_figure(capfd, monkeypatch, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime for path in results.RESULTS.iterdir()}
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--rehearse", "--results", str(tmp_path)])
    assert gpu_check.main() == 0
    output = capfd.readouterr().out
    names = [name for part in plan.rehearsal(tmp_path) for name in part.results]
    assert f"{len(names)} passed, 0 failed, 0 skipped, 0 left out" in output
    assert " ms" not in output
    assert "GB/s" not in output
    assert {path: path.stat().st_mtime for path in results.RESULTS.iterdir()} == before
    rows = {path.name.partition("-")[0]: read_csv(path) for path in tmp_path.glob("*.csv")}
    assert {row["check"] for row in rows["gpu"]} == set(names)
    assert {row["run"] for row in rows["kernels"]} == {targets.SHARES_RUN, targets.PEERS_RUN}
    assert [row["mode"] for row in rows["wan"]] == ["eager"] * 8 + ["compiled"] * 2
    assert re.search(r"^contract, cuda \| .*\d+ tests collected", (tmp_path / gpu_check.LOG).read_text(), re.MULTILINE)


def test_requirements_say_what_is_missing_and_how_to_get_it() -> None:
    def absent() -> str:
        raise ModuleNotFoundError("No module named 'absent'")

    findings = survey(
        [
            Requirement("here", lambda: "1.2", "pip install here"),
            Requirement("needed", absent, "pip install needed"),
            Requirement("extra", absent, "pip install extra", optional=True),
        ]
    )
    present, needed, extra = describe(findings)
    assert present.split() == ["here", "1.2"]
    assert "MISSING: No module named 'absent'; pip install needed" in needed
    assert "optional, missing" in extra
    missing = gpu_check.missing(findings)
    assert {name: entry.optional for name, entry in missing.items()} == {"needed": False, "extra": True}


def test_checks_need_only_what_the_report_lists() -> None:
    listed = {requirement.name for requirement in requirements()}
    checks = [check for part in plan.parts(Path("results")) for check in part.checks]
    assert {name for check in checks for name in check.needs} <= listed
    names = [name for check in checks for name in check.results]
    assert len(set(names)) == len(names)


def test_headline_figures_need_no_diffusers_and_no_triton() -> None:
    first, headline, *_ = plan.parts(Path("results"))
    needs = {name for check in (*first.checks, *headline.checks) for name in check.needs}
    assert needs == {"cuda-core", "cuda-bindings", "nvrtc"}


def test_checks_keep_the_path_that_was_given(monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    assert plan.environment()["PYTHONPATH"].endswith(":/somewhere/else")


def test_two_calls_of_the_documented_lengths_run_everything() -> None:
    parts = plan.parts(Path("results"))
    commands = r"gpu_check.py --seconds (\d+) (?:--after first )?--results (first|second)"
    calls = re.findall(commands, gpu_check.__doc__)
    assert [name for _, name in calls] == ["first", "second"]
    assert set(calls) == set(re.findall(commands, PAGE))
    first, second = (float(seconds) for seconds, _ in calls)
    first_parts = [part for part, fits in planned(parts, first - plan.START) if fits]
    assert [part.name for part in first_parts] == ["kernel", "headline", "sweep", "contract", "behaviours"]
    remaining = gpu_check.unfinished(parts, {name for part in first_parts for name in part.results})
    assert [part.name for part in remaining] == ["peers", "triton", "triton-times", "wan-step"]
    assert all(fits for _, fits in planned(remaining, second - plan.START))


def test_page_has_every_part_in_order_with_its_seconds() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (\d+) \|", PAGE, flags=re.MULTILINE)
    assert rows == [(part.name, f"{part.seconds:.0f}") for part in plan.parts(Path("results"))]


def test_predictions_are_of_what_is_measured_and_name_its_targets() -> None:
    rows = read_csv(results.RESULTS / "gpu-predictions.csv")
    expected = [(target.operation, shape) for target in targets.TARGETS for shape in targets.HEADLINE]
    expected += [(operation, targets.HOST) for operation in targets.HOST_OPERATIONS]
    assert [(row["operation"], row["shape"]) for row in rows] == expected
    targets_of = {target.operation: target for target in targets.TARGETS}
    for row in rows:
        if row["shape"] == targets.HOST:
            assert float(row["target_host_us"]) == targets.HOST_MICROSECONDS
        else:
            target = targets_of[row["operation"]]
            assert float(row["target_of_copy"]) == target.of_copy
            assert float(row["target_times_best_peer"]) == target.times_best_peer


def test_files_with_gpu_tests_are_found() -> None:
    read = {Path(path).name for path in plan.gpu_test_files()}
    assert {"test_graph_capture.py", "test_scaling_types.py", "test_tables.py", "test_compat_vllm.py"} <= read


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_checked_and_the_exit_code_is_2(capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--results", str(tmp_path)])
    monkeypatch.setattr(gpu_check, "requirements", lambda: [Requirement("torch", lambda: "2.9", "")])
    assert gpu_check.main() == 2
    assert "nothing was checked: torch sees no CUDA device" in capsys.readouterr().out


def test_missing_torch_is_said_before_it_is_imported() -> None:
    code = "import sys, gpu_check; assert not {'torch', 'dit_rope'} & set(sys.modules)"
    folder = plan.ROOT / "scripts"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(folder)})
    findings = survey([Requirement("torch", lambda: 1 / 0, "")])
    assert gpu_check.cannot_run(findings) == "it needs torch: division by zero"


def chosen(*words: str) -> list[str]:
    parts = gpu_check.chosen_parts(plan.parts(Path("results")), words)
    return [name for part in parts for name in part.results]


def test_only_names_parts_checks_and_results_by_words() -> None:
    assert chosen("memcheck", "headline") == ["headline", "memcheck, cuda"]
    assert chosen("one-kernel") == ["one-kernel, cuda", "one-kernel, triton"]
    assert chosen("contract") == ["contract, cuda", "contract, triton"]
    assert "past-2^31-elements, triton" in chosen("triton")
    with pytest.raises(
        SystemExit, match="--only must hold words of a part's or check's name, got nothing; there are k"
    ):
        chosen("nothing")


def test_results_are_written_with_the_machine_as_they_come(tmp_path: Path, monkeypatch) -> None:
    machine = {"device": "GPU", "driver": "580", "commit": "abc"}
    monkeypatch.setattr(results, "environment", lambda device: machine)
    earlier = {"check": "zero", "result": PASSED, "device": "GPU", "driver": "570", "commit": "old"}
    record = results.Record(tmp_path / "new" / "rows.csv", "cuda")
    record.add([earlier])
    record.add([{"check": "one", "detail": "fine, really"}])
    zero, row = read_csv(record.path)
    assert (zero["driver"], zero["commit"], zero["detail"]) == ("570", "old", "")
    assert row == {"check": "one", "result": "", "detail": "fine, really", **machine}
    again = results.Record(record.path, "cuda", keep=lambda row: row["check"] == "zero")
    again.add([{"check": "two"}])
    assert [row["check"] for row in read_csv(record.path)] == ["zero", "two"]
    assert [path.name for path in record.path.parent.iterdir()] == ["rows.csv"]


def earlier_run(folder: Path) -> Path:
    folder.mkdir()
    rows = [
        {"check": "a, cuda", "result": PASSED, "seconds": "1.0", "detail": "", "commit": "first"},
        {"check": "b, cuda", "result": FAILED, "seconds": "1.0", "detail": "", "commit": "first"},
        {"check": "target: rotate", "result": PASSED, "seconds": "0.0", "detail": "", "commit": "first"},
    ]
    results.Record(folder / gpu_check.CSV, "cpu").add(rows)
    (folder / "kernels-gpu.csv").write_text("run\nheadline\n")
    return folder


def test_second_run_does_what_the_first_left(tmp_path: Path, monkeypatch, capsys) -> None:
    names = {name: f"{name}, cuda" for name in "abc"}
    command = python("import sys; [print(f'passed {name}: now') for name in sys.argv[1:]]")
    parts = [Part("part", 0, (Check("several", command, 60, reports=names),))]
    monkeypatch.setattr(plan, "rehearsal", lambda folder: parts)
    first, second = earlier_run(tmp_path / "first"), tmp_path / "second"
    arguments = ["gpu_check.py", "--rehearse", "--after", str(first), "--results", str(second)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert gpu_check.main() == 0
    rows = read_csv(second / gpu_check.CSV)
    assert [(row["check"], row["detail"]) for row in rows] == [("a, cuda", ""), ("b, cuda", "now"), ("c, cuda", "now")]
    assert rows[0]["commit"] == "first" != rows[1]["commit"]
    assert (second / "kernels-gpu.csv").read_text() == (first / "kernels-gpu.csv").read_text()


def test_run_on_a_gpu_writes_checks_targets_and_a_log_and_ends_with_1_where_one_failed(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    checks = (
        Check("good", python("print('fine')"), 60, needs=("cuda-core",)),
        Check("bad", python("print('hidden'); raise SystemExit('wrong')"), 60),
        Check("elsewhere", python("pass"), 60, needs=("tool",)),
    )
    monkeypatch.setattr(plan, "parts", lambda *arguments: [Part("part", 0, checks), Part("long", 9999, checks[:1])])
    listed = [Requirement("cuda-core", lambda: "1.2", ""), Requirement("tool", lambda: 1 / 0, "get it", True)]
    monkeypatch.setattr(gpu_check, "requirements", lambda: listed)
    monkeypatch.setattr(gpu_check, "cannot_run", lambda findings: None)
    monkeypatch.setattr(results, "environment", lambda device: {"device": "a GPU", "commit": "abc"})
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--results", str(tmp_path), "--seconds", "60"])
    rows = [row for row in timings(share=0.9) if row["shape"] == "wan-1.3b-480p" and row["operation"] == "rotate"]
    results.Record(results.result_path("kernels", "cuda", tmp_path), "cuda").add(rows)
    assert gpu_check.main() == 1
    results_of_checks = {row["check"]: (row["result"], row["detail"]) for row in read_csv(tmp_path / gpu_check.CSV)}
    assert results_of_checks["good"] == (LEFT_OUT, "needs about 9999 s, 60 s were left")
    assert results_of_checks["bad"] == (FAILED, "exit status 1: wrong")
    assert results_of_checks["elsewhere"] == (SKIPPED, "needs tool: division by zero; get it")
    assert results_of_checks["target: rotate at wan-1.3b-480p"][0] == FAILED
    assert results_of_checks["target: rotate at wan-14b-720p"][0] == LEFT_OUT
    output, log = capsys.readouterr().out, (tmp_path / gpu_check.LOG).read_text()
    assert "  runs      part" in output
    assert "  left out  long" in output
    assert "good | fine" in log
    assert "bad | hidden" in log
    assert set(output.splitlines()) <= set(log.splitlines())


def test_second_run_wants_results_of_a_first(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--after must be a folder with the gpu-check.csv of an earlier run, got"):
        gpu_check.take_over(tmp_path, tmp_path / "second")


def test_environment_names_driver_and_compilers() -> None:
    columns = {"device", "driver", "torch", "triton", "cuda_core", "cuda_bindings", "nvrtc", "commit"}
    assert columns <= set(results.environment("cpu"))


def test_one_failure_makes_the_exit_code_1() -> None:
    passed, skipped = Result("a", PASSED, 0, ""), Result("b", SKIPPED, 0, "")
    assert gpu_check.verdict_of([passed, skipped]) == 0
    assert gpu_check.verdict_of([passed, Result("c", FAILED, 0, "")]) == 1
    assert gpu_check.summary([passed, skipped])[-1] == "1 passed, 0 failed, 1 skipped, 0 left out"


def timings(share: float = 0.95, times: float | str = 1.5, microseconds: float = 10.0) -> list[results.Row]:
    """Rows as a CSV file gives them, all with the same made-up figures."""
    headline = {"run": targets.SHARES_RUN, "variant": "cuda", "ms_median": "1.0", "failed": ""}
    peers = {**headline, "run": targets.PEERS_RUN, "best_peer": "liger"}
    kernels = [
        {**run, "shape": shape, "operation": target.operation}
        for target in targets.TARGETS
        for shape in targets.HEADLINE
        for run in ({**headline, "of_copy": str(share)}, {**peers, "of_copy": "0.1", "times_best_peer": str(times)})
    ]
    host = {**headline, "shape": "host", "ms_median": str(microseconds / 1e3)}
    blocks = targets.ALLOCATIONS.items()
    return kernels + [{**host, "operation": operation, "allocations": str(number)} for operation, number in blocks]


def failed(rows: list[results.Row]) -> set[str]:
    return {verdict.name for verdict in targets.judge(rows) if verdict.passed is False}


def test_targets_are_of_shapes_and_operations_that_are_measured() -> None:
    assert tuple(name for name, shape in SHAPES.items() if shape.headline) == targets.HEADLINE
    for name in [target.operation for target in targets.TARGETS] + [*targets.HOST_OPERATIONS]:
        assert all(Operation(name) in SHAPES[shape].operations() for shape in targets.HEADLINE)


def test_targets_pass_where_reached() -> None:
    assert not failed(timings())
    assert len(targets.judge(timings())) == 2 * 3 * 3 + len(targets.ALLOCATIONS)


def test_targets_fail_below_the_share_of_copy() -> None:
    assert failed(timings(share=0.91)) == {f"rotate at {shape}" for shape in targets.HEADLINE}
    (verdict, *_) = targets.judge(timings(share=0.91))
    assert verdict.detail == "expected at least 93% of copy bandwidth, got 91.0%"


def test_targets_fail_below_the_best_peer() -> None:
    assert failed(timings(times=1.2)) == {
        f"{target.operation} at {shape}, peers" for target in targets.TARGETS[1:] for shape in targets.HEADLINE
    }


def test_targets_are_open_where_no_peer_ran() -> None:
    assert {verdict.passed for verdict in targets.judge(timings(times="")) if "peers" in verdict.name} == {None}


def test_targets_are_open_without_a_figure_and_fail_where_the_kernel_failed() -> None:
    rows = [row for row in timings() if row["operation"] != "rotate"]
    where = {"run": targets.SHARES_RUN, "variant": "cuda", "operation": "rotate"}
    rows.append({**where, "shape": "wan-14b-720p", "note": "40 seconds were up", "failed": ""})
    rows.append({**where, "shape": "wan-1.3b-480p", "note": "RuntimeError: no", "failed": "True"})
    verdicts = {verdict.name: verdict for verdict in targets.judge(rows)}
    expected = "expected at least 93% of copy bandwidth, got no figure: "
    late, wrong, missing = (
        verdicts[f"rotate at {shape}"] for shape in ("wan-14b-720p", "wan-1.3b-480p", targets.HEADLINE[2])
    )
    assert (late.passed, late.detail) == (None, f"{expected}40 seconds were up")
    assert (wrong.passed, wrong.detail) == (False, f"{expected}RuntimeError: no")
    assert (missing.passed, missing.detail) == (None, f"{expected}not measured")
    assert verdicts["norm per head, rotate at wan-14b-720p"].passed is True


def test_targets_take_a_run_of_everything_where_there_is_no_other() -> None:
    rows = [{**row, "run": targets.ALL_RUN} for row in timings() if row["run"] == targets.PEERS_RUN]
    verdicts = {verdict.name: verdict.passed for verdict in targets.judge(rows)}
    assert verdicts["rotate at wan-14b-720p, peers"] is True
    assert verdicts["rotate at wan-14b-720p"] is False


def test_targets_fail_on_slow_calls_and_on_allocations() -> None:
    slow = failed(timings(microseconds=15.5))
    assert slow == {f"host time of {operation}" for operation in targets.HOST_OPERATIONS}
    rows = timings()
    rows[-1]["allocations"] = "3"
    assert failed(rows) == {f"host time of {rows[-1]['operation']}"}


def test_targets_without_any_figures_are_left_out(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(results, "environment", lambda device: {"device": "a GPU"})
    judged = gpu_check.judged(tmp_path)
    assert {result.result for result in judged} == {LEFT_OUT}
    results.Record(results.result_path("kernels", "cuda", tmp_path), "cuda").add(timings())
    assert {result.result for result in gpu_check.judged(tmp_path)} == {PASSED}
