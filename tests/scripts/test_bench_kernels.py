"""The benchmark of the kernels: failures are rows, peers are called as they document, shapes are those of models."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import rotation, variants
from benchmarks.peers import flashinfer_cache, flashinfer_norm
from benchmarks.problems import SHAPES, NotOffered, Operation, Problem
from benchmarks.reference import Expectation
from benchmarks.results import Row, read_csv
from benchmarks.sections import Settings, Wrong
from dit_rope import NormKind
from measure import bench_kernels


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


ROTATE = Problem(SHAPES["ltx"].tiny(), Operation.ROTATE, "cpu")


def broken(error: Exception) -> Callable[..., Any]:
    """A backend that raises in place of the first variant's, ``cuda``."""

    def failing(problem: Problem, backend: str) -> Any:
        if backend == "broken":
            raise error
        return variants.rotation_call(problem, "eager")

    return failing


def test_failing_variant_of_ours_is_a_row_beside_the_others(monkeypatch) -> None:
    monkeypatch.setattr(rotation, "rotation_call", broken(RuntimeError("PassManager::run failed\nat line 1")))
    variants = rotation.variants(ROTATE, {"triton": "broken", "cuda": "eager"}, {})
    rows = {row["variant"]: row for row in rotation.measure(ROTATE, variants, 2)}
    assert rows["cuda"]["ms_median"] > 0
    assert (rows["triton"]["note"], rows["triton"]["failed"]) == ("RuntimeError: PassManager::run failed", True)


def test_wrong_variant_of_ours_has_no_figure(monkeypatch) -> None:
    monkeypatch.setattr(rotation, "rotation_call", lambda problem, backend: lambda q, k: (q, k))
    variants = rotation.variants(ROTATE, {"cuda": "eager"}, {})
    (row,) = rotation.measure(ROTATE, variants, 2)
    assert row["failed"]
    assert row["note"].startswith("AssertionError: ")
    assert "ms_median" not in row


def test_variant_that_fails_when_it_is_timed_is_a_row_beside_the_others() -> None:
    variants = rotation.variants(ROTATE, {"cuda": "eager"}, {})

    def fail(q: torch.Tensor, k: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("too much")

    variants.calls.update({"triton": fail, "liger": fail})
    rows = {row["variant"]: row for row in rotation.measure(ROTATE, variants, 2)}
    assert rows["cuda"]["ms_median"] > 0
    assert rows["triton"]["failed"]
    assert rows["triton"]["note"] == rows["liger"]["note"] == "OutOfMemoryError: too much"
    assert "failed" not in rows["liger"]


def test_benchmark_command_stops_at_a_failing_variant(monkeypatch) -> None:
    monkeypatch.setattr(rotation, "rotation_call", broken(RuntimeError("no")))
    monkeypatch.setattr(rotation, "package_backends", lambda device: {"dit_rope": "broken"})
    case = next(rotation.cases(Settings("cpu", 2, quick=True)))
    with pytest.raises(Wrong, match="dit_rope, rotate at wan-1.3b-480p: RuntimeError: no"):
        case.run()


def bench(monkeypatch, *options: str) -> int:
    arguments = ["bench_kernels.py", "--rehearse", "--run", "headline", "--shape", "wan-1.3b-480p", *options]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        bench_kernels.main()
    return int(ended.value.code)


def test_failing_problem_is_a_row_and_makes_the_exit_code_1(monkeypatch, tmp_path: Path, capsys) -> None:
    measured = bench_kernels.measure

    def measure(problem: Problem, *arguments: object) -> list[Row]:
        if problem.operation is Operation.PER_HEAD:
            raise RuntimeError("CUDA error: an illegal memory access")
        return measured(problem, *arguments)

    monkeypatch.setattr(bench_kernels, "measure", measure)
    assert bench(monkeypatch, "--results", str(tmp_path)) == 1
    rows = read_csv(next(tmp_path.glob("kernels-*.csv")))
    assert [row["operation"] for row in rows if row["failed"]] == ["norm per head, rotate"]
    assert "norm across heads, rotate" in {row["operation"] for row in rows if row["of_copy"]}
    assert capsys.readouterr().out.splitlines()[-1] == f"{len(rows) - 1} figures, 1 failed, 0 left out"


def test_failing_host_time_is_a_row_and_makes_the_exit_code_1(monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench_kernels, "rotation_call", lambda problem, backend: {}["cuda"])
    assert bench(monkeypatch) == 1
    assert "  cuda: KeyError: 'cuda'" in capsys.readouterr().out


def test_problems_past_the_time_are_rows_with_the_reason(monkeypatch, tmp_path: Path) -> None:
    assert bench(monkeypatch, "--seconds", "-1", "--results", str(tmp_path)) == 0
    rows = read_csv(next(tmp_path.glob("kernels-*.csv")))
    assert sum(row.get("note") == "not measured: -1 seconds were up" for row in rows) == 3


def test_wrong_peer_is_left_out() -> None:
    problem = Problem(SHAPES["ltx"].tiny(), Operation.ROTATE, "cpu")
    variants = rotation.variants(problem, {"cuda": "eager"}, {"liger": lambda problem: lambda q, k: (q, k)})
    assert [*variants.calls] == ["cuda"]
    assert variants.missing["liger"].startswith("AssertionError: expected an error of at most")


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

    def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox: bool) -> torch.Tensor:
        pairs = x.unflatten(-1, (2, -1)).transpose(-1, -2) if is_neox else x.unflatten(-1, (-1, 2))
        x1, x2 = pairs.float().unbind(-1)
        both = torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1)
        return (both.transpose(-1, -2) if is_neox else both).flatten(-2).to(x.dtype)

    def out_of_place(positions, query, key, head_size, cos_sin_cache, is_neox=True):
        assert positions.dtype == torch.int32
        assert cos_sin_cache.dtype == torch.float32
        cos, sin = (values[:, None] for values in cos_sin_cache[positions.long()].chunk(2, dim=-1))
        heads = (x.view(x.shape[0], -1, head_size) for x in (query, key))
        return tuple(rotated(x, cos, sin, is_neox).flatten(1) for x in heads)

    def in_place(positions, query, key, head_size, cos_sin_cache, is_neox=True):
        out = out_of_place(positions, query, key, head_size, cos_sin_cache, is_neox)
        for x, y in zip((query, key), out, strict=True):
            x.copy_(y)

    def fused(qkv, q_weight, k_weight, *, num_heads_q, num_heads_v, head_dim, eps, **grid):
        assert num_heads_v == 0
        names = ("num_frame_channels", "num_height_channels", "num_width_channels")
        cos, sin = table_free(*(grid[name] for name in ("ppf", "pph", "ppw")), [grid[n] for n in names], grid["base"])
        out = []
        for x, weight in zip(qkv.chunk(2, dim=-1), (q_weight, k_weight), strict=True):
            normed = torch.nn.functional.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)
            heads = normed.unflatten(-1, (num_heads_q, head_dim))
            out.append(rotated(heads, cos, sin, not grid["interleave"]).to(qkv.dtype))
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
