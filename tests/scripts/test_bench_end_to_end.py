"""The benchmark of whole steps: every variant is there, compared before it is timed, and shares add up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

import dit_rope
from benchmarks import end_to_end
from benchmarks.end_to_end import ARCHITECTURES, VARIANTS, Mismatch, Step, architecture_step, measure_step
from benchmarks.results import read_csv
from benchmarks.step_profile import KINDS, ROPE, shares
from benchmarks.timing import Timing
from dit_rope.rotation import ops
from dit_rope.rotation_args import NormRounding
from measure import bench_end_to_end
from zoo import named

SMALL = {
    name: {key: value for key, value in named(example).config.items() if key not in ARCHITECTURES[name].depths}
    for name, example in (
        ("wan-1.3b", "wan"),
        ("hunyuan-video", "hunyuan-video"),
        ("flux", "flux"),
        ("ltx", "ltx-padded"),
        ("qwen-image", "qwen-image"),
    )
}
NAMES = ["unpatched", *(variant.name for variant in VARIANTS), "without rope"]
BY_NAME = pytest.mark.parametrize("name", SMALL)


@pytest.fixture(autouse=True)
def _quiet(one_thread: None) -> None:
    dit_rope.cache_clear()


def small_step(name: str, dtype: torch.dtype = torch.float32) -> Step:
    return architecture_step(ARCHITECTURES[name], layers=1, dtype=dtype, grid=(2, 3, 4), text=6, config=SMALL[name])


@pytest.fixture
def step() -> Step:
    return small_step("wan-1.3b")


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in SMALL), ("wan-1.3b", torch.bfloat16)], ids=str
)
def test_step_is_measured_in_every_variant(name: str, dtype: torch.dtype) -> None:
    step, calls = small_step(name, dtype), []
    rows = measure_step(step, rounds=3, advance=lambda: calls.append(1))
    assert [row["variant"] for row in rows] == NAMES
    assert len(calls) == end_to_end.runs(step, 3, compiled=False)
    unpatched_ms = rows[0]["ms_median"]
    for row in rows:
        assert 0 < row["ms_p20"] <= row["ms_median"] <= row["ms_p80"]
        assert row["ratio"] == pytest.approx(unpatched_ms / row["ms_median"])
        assert row["ratio_at_most"] == rows[-1]["ratio"]
        assert row["default"] is (row["variant"] == "tables, norm and rotation exact")
        assert (row["ms_first"] is not None) is row["default"]
        assert row["verdict"] in ("", "faster", "slower", "no difference")


@BY_NAME
def test_shares_of_a_step_add_up_and_find_every_kind(name: str) -> None:
    step = small_step(name)
    shares_of_kinds = shares(step.plans(), step.run, "cpu")
    assert list(shares_of_kinds) == list(KINDS)
    assert sum(shares_of_kinds.values()) == pytest.approx(1)
    assert all(share > 0 for share in shares_of_kinds.values()), shares_of_kinds
    assert not any("forward" in vars(module) for module in step.models[0].modules())


def test_without_rope_norms_and_rotates_nothing(step: Step) -> None:
    attention = end_to_end._twins(step, compiled=False)["without rope"].models[0].blocks[0].attn1
    x, tables, calls = torch.randn(1, 24, 48), (torch.ones(1, 24, 1, 24),) * 2, []
    assert attention.norm_q(x) is x
    attention.processor = lambda *args, **kwargs: calls.append((args[1:], kwargs)) or x
    attention(x, None, None, tables)
    attention(x, None, None, rotary_emb=tables)
    assert calls == [((x, None, None, None), {})] * 2


def test_twins_share_parameters_and_leave_the_step_unpatched(step: Step) -> None:
    twins = end_to_end._twins(step, compiled=False)
    parameters = {id(parameter) for parameter in step.models[0].parameters()}
    for twin in twins.values():
        assert {id(parameter) for parameter in twin.models[0].parameters()} == parameters
    dit_rope.patch(step.models[0]).undo()


@pytest.mark.parametrize("normed", [False, True], ids=["rotation", "norm-and-rotation"])
def test_wrong_output_gives_no_figures(step: Step, normed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rotate, calls = ops.rotate, []

    def wrong(xs: Any, args: Any, norm: Any = None, **options: Any) -> Any:
        return [x * (2 if normed == (norm is not None) else 1) for x in rotate(xs, args, norm, **options)]

    monkeypatch.setattr(ops, "rotate", wrong)
    with pytest.raises(Mismatch, match="must"):
        measure_step(step, rounds=3, advance=lambda: calls.append(1))
    assert not calls


def test_fast_mode_may_not_miss_the_rotation(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    rotate = ops.rotate

    def missing(xs: Any, args: Any, norm: Any = None, **options: Any) -> Any:
        fused = norm is not None and norm.rounding is NormRounding.NONE
        return list(xs) if fused else rotate(xs, args, norm, **options)

    monkeypatch.setattr(ops, "rotate", missing)
    with pytest.raises(Mismatch, match=r"tables, norm and rotation must be within .* got"):
        measure_step(step, rounds=3)


def test_others_are_timed_beside_variants_that_fail(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    rotate, errors = ops.rotate, {}

    def fail(xs: Any, args: Any, norm: Any = None, **options: Any) -> Any:
        if norm is not None:
            raise RuntimeError("out of registers")
        return [2 * x for x in rotate(xs, args, **options)]

    monkeypatch.setattr(ops, "rotate", fail)
    rows = measure_step(step, rounds=1, on_error=errors.__setitem__)
    assert [row["variant"] for row in rows] == ["unpatched", "tables", "without rope"]
    assert {name: type(error) for name, error in errors.items()} == {
        "tables, rotation exact": Mismatch,
        "tables, norm and rotation exact": RuntimeError,
        "tables, norm and rotation as the model": RuntimeError,
        "tables, rotation": Mismatch,
        "tables, norm and rotation": RuntimeError,
    }


def test_verdict_says_where_a_variant_loses() -> None:
    unpatched = Timing(9.0, 10.0, 11.0)
    assert end_to_end.verdict(unpatched, Timing(12.0, 13.0, 14.0)) == "slower"
    assert end_to_end.verdict(unpatched, Timing(6.0, 7.0, 8.0)) == "faster"
    assert end_to_end.verdict(unpatched, Timing(8.0, 9.5, 10.5)) == "no difference"


def test_whole_run_builds_tables_in_its_first_pass_only() -> None:
    rows = [
        {"variant": "unpatched", "ms_median": 10.0, "ms_first": None},
        {"variant": "patched", "ms_median": 8.0, "ms_first": 12.0},
    ]
    unpatched, patched = end_to_end.whole_run(rows, 4)
    assert unpatched["run_ms"] is unpatched["run_ratio"] is None
    assert patched["run_ms"] == 12 + 3 * 8
    assert patched["run_ratio"] == pytest.approx(40 / 36)


@pytest.mark.parametrize(
    ("name", "guided", "passes"),
    [("wan-1.3b", True, (2, 1)), ("wan-1.3b", False, (1, 1)), ("ltx", True, (1, 2)), ("flux", True, (1, 1))],
)
def test_guidance_is_as_the_pipeline_does_it(name: str, guided: bool, passes: tuple[int, int]) -> None:
    assert ARCHITECTURES[name].guided(guided) == passes


def test_compiled_step_has_the_models_own_code(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    real, resets = torch.compiler.reset, []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1) or real())
    rows = measure_step(step, rounds=3, compiled=True)
    assert resets == [1]  # so that the limit of recompilations is its own
    assert [row["variant"] for row in rows] == ["unpatched", "tables, norm and rotation exact"]
    assert rows[0]["share_rope"] is None
    torch._dynamo.reset()


def test_pipeline_step_records_the_calls_of_one_step(random_wan: Any) -> None:
    size = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 8}
    guided = end_to_end.pipeline_step(random_wan, **size, guidance_scale=4.0, unknown=1)
    plain = end_to_end.pipeline_step(random_wan, **size, guidance_scale=1.0)
    assert (len(guided.calls), len(plain.calls)) == (2, 1)
    assert guided.models == (random_wan.transformer,)
    assert not random_wan.transformer._forward_pre_hooks
    assert [row["variant"] for row in measure_step(guided, rounds=3)] == NAMES


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small architectures for the script, and a folder for what it writes."""
    monkeypatch.setattr("benchmarks.results.RESULTS", tmp_path)
    for name, architecture in ARCHITECTURES.items():
        config = {**architecture.config, **SMALL[name]}
        monkeypatch.setitem(ARCHITECTURES, name, replace(architecture, config=config, text=6))
    return tmp_path


def script(*args: str) -> Result:
    app = typer.Typer()
    app.command()(bench_end_to_end.main)
    return CliRunner().invoke(app, [*args, "--threads", "1", "--rounds", "3", "--no-compile"])


def test_script_writes_every_variant_of_every_run(results: Path) -> None:
    result = script("wan-1.3b", "ltx", "--grid", "2x3x4", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    rows = read_csv(results / "end-to-end-cpu.csv")
    assert [row["variant"] for row in rows] == 4 * NAMES
    runs = {(row["model"], row["steps"], row["guided"], row["batch"], row["passes"]) for row in rows}
    assert runs == {
        ("wan-1.3b", "50", "True", "1", "100"),
        ("wan-1.3b", "4", "False", "1", "4"),
        ("ltx", "50", "True", "2", "50"),
        ("ltx", "4", "False", "1", "4"),
    }
    for row in rows:
        assert sum(float(row[f"share_{kind.replace(' ', '_')}"]) for kind in KINDS) == pytest.approx(1, rel=1e-4)
        rope = sum(float(row[f"share_{kind.replace(' ', '_')}"]) for kind in ROPE)
        assert float(row["share_rope"]) == pytest.approx(rope, rel=1e-4)
    assert "times as fast" in result.output


def test_script_prints_no_figures_and_fails_where_outputs_differ(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "rotate", lambda xs, *a, **k: xs)
    result = script("wan-1.3b", "--grid", "2x3x4", "--dtype", "float32")
    assert result.exit_code != 0
    assert "no figures" in result.output
    assert "times as fast" not in result.output
    assert not list(results.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no-such-model"], "must be of wan-1.3b"),
        (["wan-1.3b", "--grid", "2x3"], "must be FRAMESxHEIGHTxWIDTH"),
        (["wan-1.3b", "--grid", "2x3x4", "--released"], "must not stand beside --released"),
        (["wan-1.3b", "--layers", "0"], "should be greater than or equal to 1"),
        (["wan-1.3b", "--dtype", "int8"], "int8"),
    ],
    ids=["target", "grid", "released", "layers", "dtype"],
)
def test_script_refuses_bad_arguments(
    results: Path, args: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = script(*args)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert not list(results.iterdir())
