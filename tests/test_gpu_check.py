"""The GPU checks: a rehearsal of every program on CPU, and the logic that needs no GPU."""

from __future__ import annotations

import sys
import time
import types
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import gpu_check
from gpu_checks import plan, results, runner, targets
from gpu_checks.requirements import Requirement, describe, requirements, survey
from gpu_checks.runner import FAILED, PASSED, SKIPPED, Check, Deadline, Missing, Result, run_all, run_one

from dit_rope import NormKind
from dit_rope.benchmark import rotation
from dit_rope.benchmark.peers import flashinfer_cache, flashinfer_norm
from dit_rope.benchmark.problems import SHAPES, NotOffered, Operation, Problem
from dit_rope.benchmark.reference import Expectation
from dit_rope.benchmark.results import read_csv
from dit_rope.benchmark.sections import Wrong


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


def run(check: Check, seconds: float = 60.0, missing: dict[str, Missing] | None = None) -> Result:
    return run_one(check, Deadline(seconds), missing or {}, {}, lambda text: None)


def test_rehearsal_runs_every_program_and_writes_no_figure(capfd, monkeypatch) -> None:
    before = {path: path.stat().st_mtime for path in results.RESULTS.iterdir()}
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--rehearse", "--jobs", "2"])
    assert gpu_check.main() == 0
    said = capfd.readouterr().out
    assert said.count(PASSED) == len(plan.rehearsal()), said
    assert " ms" not in said
    assert "GB/s" not in said
    assert {path: path.stat().st_mtime for path in results.RESULTS.iterdir()} == before


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
    here, needed, extra = describe(findings)
    assert here.split() == ["here", "1.2"]
    assert "MISSING: No module named 'absent'; pip install needed" in needed
    assert "optional, missing" in extra
    missing = gpu_check.missing(findings)
    assert {name: entry.optional for name, entry in missing.items()} == {"needed": False, "extra": True}


def test_checks_need_only_what_the_report_lists() -> None:
    listed = {requirement.name for requirement in requirements()}
    checks = plan.checks([])
    assert {name for check in checks for name in check.needs} <= listed
    assert len({check.name for check in checks}) == len(checks)


def test_checks_keep_the_path_that_was_given(monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    assert plan.environment()["PYTHONPATH"].endswith(":/somewhere/else")


def test_alone_and_together_fit_the_default_deadline() -> None:
    alone = [check.seconds for check in plan.checks([]) if check.alone]
    longest = max(check.seconds for check in plan.checks([]) if not check.alone)
    assert sum(alone) + longest <= gpu_check.SECONDS


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_checked_and_the_exit_code_is_2(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    monkeypatch.setattr(gpu_check, "requirements", lambda: [Requirement("torch", lambda: "2.9", "")])
    assert gpu_check.main() == 2
    assert "nothing was checked: torch sees no CUDA device" in capsys.readouterr().out


def test_missing_torch_is_said_before_it_is_imported() -> None:
    findings = survey([Requirement("torch", lambda: 1 / 0, "")])
    assert gpu_check.cannot_run(findings) == "it needs torch: division by zero"


@pytest.mark.parametrize(("optional", "verdict"), [(True, SKIPPED), (False, FAILED)])
def test_check_without_what_it_needs_is_not_run(optional: bool, verdict: str) -> None:
    check = Check("name", python("raise SystemExit(0)"), 60, needs=("tool",))
    result = run(check, missing={"tool": Missing("not on PATH", optional)})
    assert (result.result, result.detail) == (verdict, "needs tool: not on PATH")


def test_check_passes_with_its_last_line_as_detail() -> None:
    result = run(Check("name", python("print('first'); print('42 tests'); print()"), 60))
    assert (result.result, result.detail) == (PASSED, "42 tests")


def test_check_fails_with_its_exit_status_and_last_line() -> None:
    result = run(Check("name", python("raise SystemExit('expected 1, got 2')"), 60))
    assert (result.result, result.detail) == (FAILED, "exit status 1: expected 1, got 2")


def test_check_that_cannot_run_on_the_device_is_skipped() -> None:
    check = Check(
        "name", python("print('Error: Device not supported', flush=True); 1 / 0"), 60, skips=("not supported",)
    )
    assert run(check).result == SKIPPED


def test_check_past_its_limit_is_ended_with_what_it_started(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(runner, "LEAST_SECONDS", 1.0)
    alive = tmp_path / "alive"
    child = f"import pathlib, time; time.sleep(2.5); pathlib.Path({str(alive)!r}).touch()"
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    result = run(Check("name", python(code), 1.5))
    assert (result.result, result.detail) == (FAILED, "expected an end within 2 s, got none; last: begun")
    time.sleep(2.5)
    assert not alive.exists()


def test_check_is_not_begun_near_the_deadline() -> None:
    result = run(Check("name", python("pass"), 60), seconds=1)
    assert (result.result, result.detail) == (FAILED, "not run: the deadline was too near")


def test_deadline_keeps_time_for_what_runs_alone() -> None:
    now = 0.0
    deadline = Deadline(100, lambda: now)
    together, first, second = (
        Check(name, (), 80, alone=name != "together") for name in ("together", "first", "second")
    )
    first, second = (Check(check.name, (), seconds, alone=True) for check, seconds in ((first, 30), (second, 20)))
    for check in (first, second):
        deadline.promise(check.seconds)
    assert deadline.limit(together) == 50
    now = 60.0
    assert deadline.limit(together) == -10
    assert deadline.limit(first) == 20
    now = 75.0
    assert deadline.limit(second) == 20


def test_run_all_runs_those_alone_last_and_keeps_the_order() -> None:
    checks = [Check("timed", python("print(1)"), 20, alone=True), Check("other", python("print(2)"), 20)]
    said: list[str] = []
    found = run_all(checks, Deadline(60), {}, {}, 2, said.append)
    assert [(result.check, result.detail) for result in found] == [("timed", "1"), ("other", "2")]
    assert [line.split(":")[0].split()[-1] for line in said if "passed" in line] == ["other", "timed"]


def test_only_names_checks_by_words() -> None:
    names = [check.name for check in gpu_check.chosen_checks(plan.checks([]), ["contract", "memcheck"])]
    assert names == ["contract, cuda", "contract, triton", "memcheck, cuda"]
    with pytest.raises(SystemExit, match="--only must hold words of a check's name, got nothing; there are contract"):
        gpu_check.chosen_checks(plan.checks([]), ["nothing"])


def test_results_are_written_with_the_machine(tmp_path: Path, monkeypatch) -> None:
    machine = {"device": "GPU", "driver": "580", "commit": "abc"}
    monkeypatch.setattr(results, "environment", lambda device: machine)
    path = gpu_check.write([Result("one", PASSED, 1.23, "fine, really"), Result("two", FAILED, 0, "no")], tmp_path)
    one, two = read_csv(path)
    assert one == {"check": "one", "result": PASSED, "seconds": "1.2", "detail": "fine, really", **machine}
    assert two["result"] == FAILED


def test_environment_names_driver_and_compilers() -> None:
    wanted = {"device", "driver", "torch", "triton", "cuda_core", "cuda_bindings", "nvrtc", "commit"}
    assert wanted <= set(results.environment("cpu"))


def test_one_failure_makes_the_exit_code_1() -> None:
    passed, skipped = Result("a", PASSED, 0, ""), Result("b", SKIPPED, 0, "")
    assert gpu_check.verdict([passed, skipped]) == 0
    assert gpu_check.verdict([passed, Result("c", FAILED, 0, "")]) == 1
    assert gpu_check.summary([passed, skipped])[-1] == "1 passed, 0 failed, 1 skipped"


def timings(share: float = 0.95, times: float | str = 1.5, microseconds: float = 10.0) -> list[results.Row]:
    """Rows as a CSV file gives them, all with the same made-up figures."""
    kernels = [
        {"shape": shape, "operation": target.operation, "variant": "cuda", "of_copy": str(share)}
        | {"times_best_peer": str(times)}
        for target in targets.TARGETS
        for shape in targets.HEADLINE
    ]
    host = [
        {"shape": "host", "operation": operation, "variant": "cuda", "ms_median": str(microseconds / 1e3)}
        | {"allocations": str(blocks)}
        for operation, blocks in targets.ALLOCATIONS.items()
    ]
    return kernels + host


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


def test_targets_fail_without_a_figure() -> None:
    rows = [row for row in timings() if row["operation"] != "rotate"]
    rows.append({"shape": "wan-14b-720p", "operation": "rotate", "variant": "cuda", "note": "40 seconds were up"})
    verdict = next(each for each in targets.judge(rows) if each.name == "rotate at wan-14b-720p")
    assert verdict.passed is False
    assert verdict.detail.endswith("got no figure: 40 seconds were up")


def test_targets_fail_on_slow_calls_and_on_allocations() -> None:
    slow = failed(timings(microseconds=15.5))
    assert slow == {f"host time of {operation}" for operation in targets.HOST_OPERATIONS}
    rows = timings()
    rows[-1]["allocations"] = "3"
    assert failed(rows) == {f"host time of {rows[-1]['operation']}"}


def test_targets_are_judged_on_figures_of_this_run_alone() -> None:
    assert gpu_check.judged([Result(plan.BENCHMARK, FAILED, 1.0, "")]) == []
    assert gpu_check.judged([]) == []


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes_are_those_of_the_models(shape) -> None:
    tokens = {
        "wan-1.3b-480p": (32_760, 12, 128),
        "wan-14b-720p": (75_600, 40, 128),
        "hunyuan-video-720p": (118_800, 24, 128),
        "flux-1024": (4_608, 24, 128),
        "ltx": (4_992, 32, 64),
        "streaming-chunk": (4_680, 12, 128),
    }
    assert (shape.tokens, shape.heads, shape.head_dim) == tokens[shape.name]


def test_wrong_variant_of_ours_stops_the_benchmark(monkeypatch) -> None:
    problem = Problem(SHAPES["ltx"].tiny(), Operation.ROTATE, "cpu")
    monkeypatch.setattr(rotation, "own", lambda problem, backend: lambda q, k: (q, k))
    with pytest.raises(Wrong, match="cuda, rotate at ltx: .* elements are off"):
        rotation.variants(problem, {"cuda": "eager"}, {})


def test_wrong_peer_is_left_out() -> None:
    problem = Problem(SHAPES["ltx"].tiny(), Operation.ROTATE, "cpu")
    found = rotation.variants(problem, {"cuda": "eager"}, {"liger": lambda problem: lambda q, k: (q, k)})
    assert [*found.calls] == ["cuda"]
    assert found.missing["liger"].startswith("AssertionError: expected an error of at most")


def test_shape_within_fewer_tokens_keeps_its_lines_before_its_frames() -> None:
    wan = SHAPES["wan-1.3b-480p"]
    assert wan.within(8192).grid.sizes == (5, 30, 52)
    assert wan.within(500).grid.sizes == (1, 9, 52)
    assert wan.within(1).grid.sizes == (1, 1, 52)
    assert wan.within(10**6) == wan
    assert SHAPES["flux-1024"].within(512 + 640).tokens == 512 + 640


def test_expectation_refuses_unnormed_and_unturned_results() -> None:
    problem = Problem(SHAPES["flux-1024"].tiny(), Operation.PER_HEAD, "cpu")
    (q, _) = problem.inputs(1)[0]
    exact = problem.expectation.exact(q, torch.arange(q.shape[1]))
    problem.expectation.assert_right(exact.to(q.dtype), q)
    unnormed = Expectation(problem.table, problem.shape.prefix).exact(q, torch.arange(q.shape[1]))
    for wrong in (unnormed, torch.nn.functional.rms_norm(q, q.shape[-1:], problem.weights[0])):
        with pytest.raises(AssertionError, match="off by more than the bound"):
            problem.expectation.assert_right(wrong.to(q.dtype), q)


def stand_in_for_flashinfer() -> types.SimpleNamespace:
    """FlashInfer's documented arguments and results, in plain PyTorch."""

    def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox: bool) -> torch.Tensor:
        pairs = x.unflatten(-1, (2, -1)).transpose(-1, -2) if is_neox else x.unflatten(-1, (-1, 2))
        x1, x2 = pairs.float().unbind(-1)
        both = torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1)
        return (both.transpose(-1, -2) if is_neox else both).flatten(-2).to(x.dtype)

    def out_of_place(positions, query, key, head_size, cos_sin_cache, is_neox=True):
        assert positions.dtype == torch.int32
        assert cos_sin_cache.dtype == torch.float32
        cos, sin = (part[:, None] for part in cos_sin_cache[positions.long()].chunk(2, dim=-1))
        heads = (x.view(x.shape[0], -1, head_size) for x in (query, key))
        return tuple(turned(x, cos, sin, is_neox).flatten(1) for x in heads)

    def in_place(positions, query, key, head_size, cos_sin_cache, is_neox=True):
        out = out_of_place(positions, query, key, head_size, cos_sin_cache, is_neox)
        for x, y in zip((query, key), out, strict=True):
            x.copy_(y)

    def fused(qkv, q_weight, k_weight, *, num_heads_q, num_heads_v, head_dim, eps, **grid):
        assert num_heads_v == 0
        names = ("num_frame_channels", "num_height_channels", "num_width_channels")
        cos, sin = table_free(*(grid[name] for name in ("ppf", "pph", "ppw")), [grid[n] for n in names], grid["base"])
        out = []
        for part, weight in zip(qkv.chunk(2, dim=-1), (q_weight, k_weight), strict=True):
            normed = torch.nn.functional.rms_norm(part.float(), part.shape[-1:], weight.float(), eps)
            heads = normed.unflatten(-1, (num_heads_q, head_dim))
            out.append(turned(heads, cos, sin, not grid["interleave"]).to(qkv.dtype))
        return *out, qkv.new_empty(0)

    rope = types.SimpleNamespace(
        apply_rope_with_cos_sin_cache=out_of_place, apply_rope_with_cos_sin_cache_inplace=in_place
    )
    return types.SimpleNamespace(rope=rope, fused_qk_rmsnorm_rope=fused)


def table_free(ppf: int, pph: int, ppw: int, channels: list[int], base: float) -> tuple[torch.Tensor, torch.Tensor]:
    lines = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in (ppf, pph, ppw)), indexing="ij")
    angles = [
        line.flatten()[:, None] * base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        for line, dim in zip(lines, channels, strict=True)
    ]
    angle = torch.cat(angles, dim=1)[:, None]
    return angle.cos().float(), angle.sin().float()


@pytest.mark.parametrize("operation", [Operation.ROTATE, Operation.IN_PLACE, Operation.HALF_IN_PLACE])
def test_flashinfer_is_called_as_it_documents(operation: Operation, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in_for_flashinfer())
    problem = Problem(SHAPES["flux-1024"].tiny(), operation, "cpu")
    q, k = problem.inputs(1)[0]
    for index, out in enumerate(flashinfer_cache(problem)(q.clone(), k.clone())):
        problem.expectation.assert_near(out, (q, k)[index], index)


def test_flashinfers_norm_is_called_as_it_documents(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in_for_flashinfer())
    problem = Problem(SHAPES["wan-1.3b-480p"].tiny(), Operation.ACROSS_HEADS, "cpu")
    assert problem.operation.norm is NormKind.ACROSS_HEADS
    q, k = problem.inputs(1)[0]
    for index, out in enumerate(flashinfer_norm(problem)(q, k)):
        problem.expectation.assert_near(out, (q, k)[index], index)
    with pytest.raises(NotOffered):
        flashinfer_norm(Problem(problem.shape, Operation.PER_HEAD, "cpu"))
