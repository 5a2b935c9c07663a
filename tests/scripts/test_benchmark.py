"""``dit-rope bench``: its sections on small inputs, its files, and its checks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import dit_rope
from benchmarks import __main__ as benchmark_program
from benchmarks import operator_counts, rope_modules, table_building, timing
from benchmarks import rotation as rotation_section
from benchmarks import run as benchmark_run
from benchmarks.architectures import ARCHITECTURES
from benchmarks.peers import PEERS, rotary_embedding_torch
from benchmarks.problems import SHAPES, Operation, Problem
from benchmarks.reference import Expectation, assert_within
from benchmarks.report_text import rotation_losses, step_losses, table_losses
from benchmarks.results import Row, environment, read_csv, write_csv
from benchmarks.sections import Settings, Wrong
from benchmarks.timing import interleave, summary
from dit_rope import Grid, Pairing, cli
from dit_rope.rotation import api as rotation

TINY = Settings("cpu", rounds=3, quick=True)
SECTIONS = ("tables", "rotation", "operators", "step")


@pytest.fixture(autouse=True)
def _small(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few families, tokens and calls: what is tested here is that figures are right, not what they are."""
    monkeypatch.setattr(rope_modules, "FAMILIES", rope_modules.FAMILIES[3:5])
    monkeypatch.setattr(table_building, "HITS_OF_THREADS", 80)
    monkeypatch.setattr(rotation_section, "QUICK_TOKENS", 48)
    monkeypatch.setattr(operator_counts, "ARCHITECTURES", {"wan-1.3b": ARCHITECTURES["wan-1.3b"]})
    monkeypatch.setenv("COLUMNS", "400")
    dit_rope.cache_clear()
    yield
    dit_rope.cache_clear()


def bench(out: Path, *arguments: str) -> object:
    options = ("--quick", "--rounds", "3", "--device", "cpu", "--out", str(out))
    return CliRunner().invoke(cli.app, ["bench", *options, *arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench") / "out"


@pytest.fixture
def output(folder: Path) -> Path:
    """The files of one run of every section."""
    if not folder.exists():
        result = bench(folder)
        assert result.exit_code == 0, result.output
        assert "Whole step:" in result.output
    return folder


def test_run_writes_a_file_for_each_section_and_the_report(output: Path) -> None:
    assert {path.name for path in output.iterdir()} == {"report.html", *(f"{name}.csv" for name in SECTIONS)}


def test_rows_name_the_machine_and_have_positive_ordered_times(output: Path) -> None:
    machine = environment("cpu")
    for name in SECTIONS:
        rows = read_csv(output / f"{name}.csv")
        assert rows, name
        for row in rows:
            assert {column: row[column] for column in machine} == {key: str(value) for key, value in machine.items()}
            prefix = "" if name == "tables" else "ms_"
            if row.get(f"{prefix}median"):
                low, middle, high = (float(row[f"{prefix}{which}"]) for which in ("p20", "median", "p80"))
                assert 0 < low <= middle <= high, row


def test_rotation_compares_ours_with_the_model_and_a_copy(output: Path) -> None:
    rows = [row for row in read_csv(output / "rotation.csv") if row["ms_median"]]
    measured: dict[tuple[str, ...], set[str]] = {}
    for row in rows:
        where = tuple(row[name] for name in ("shape", "tokens", "dtype", "operation"))
        measured.setdefault(where, set()).add(row["variant"])
    assert len(measured) == 2 * 3 + 3
    for variants in measured.values():
        assert {"copy", "dit_rope", "dit_rope, exact", "model, eager"} <= variants


def test_report_refers_to_no_other_file_and_shows_every_section(output: Path) -> None:
    page = (output / "report.html").read_text()
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!#)", page)
    assert not re.search(r"url\((?!#)|@import|<script|<link", page)
    for name in SECTIONS:
        section = page.partition(f'<section id="{name}">')[2].partition("</section>")[0]
        assert section.count("<svg") >= 1, name
        assert section.count("<table>") >= 1, name
        assert section.count("<dt>") >= 3, name
    assert str(environment("cpu")["torch"]) in page


def test_one_section_alone_writes_its_file_alone(tmp_path: Path) -> None:
    result = bench(tmp_path / "out", "--only", "operators")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", "operators.csv"}
    assert "Rotation:" not in result.output


def wrong_rotation(q: torch.Tensor, k: torch.Tensor, *args: object, **options: object) -> object:
    return q.clone(), k.clone()


def wrong_exact(q: torch.Tensor, k: torch.Tensor, table: object, *args: object, exact: bool = False, **options: object):
    rotated = rotate_qk(q, k, table, *args, exact=exact, **options)
    return tuple(torch.nextafter(x, x.new_full((), torch.inf)) if exact else x for x in rotated)


rotate_qk = rotation.rotate_qk


@pytest.mark.parametrize(("function", "message"), [(wrong_rotation, "by more than the bound"), (wrong_exact, "bits")])
def test_wrong_rotation_leaves_no_figure(function, message, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(rotation, "rotate_qk", function)
    result = bench(tmp_path / "out", "--only", "rotation")
    assert result.exit_code == 1
    assert message in result.output
    assert "no figures" in result.output
    assert "copy" not in result.output
    assert not (tmp_path / "out").exists()


def test_wrong_table_leaves_no_figure(tmp_path: Path, monkeypatch) -> None:
    full = table_building.full_grid_table
    monkeypatch.setattr(table_building, "full_grid_table", lambda *args: full(*args)[::-1])
    result = bench(tmp_path / "out", "--only", "tables")
    assert result.exit_code == 1
    assert "differs from the full grid" in result.output
    assert not (tmp_path / "out").exists()


def test_wrong_memo_leaves_no_figure() -> None:
    family = rope_modules.FAMILIES[0]
    model = family.build("cpu")
    tables = model.pos_embed(*family.inputs("cpu"))
    rope_modules._check(family, model, tables, tables)
    with pytest.raises(Wrong, match="the tables of QwenImage with the memo differ"):
        rope_modules._check(family, model, tables, tables[::-1])


def test_wrong_step_leaves_no_figure(tmp_path: Path, monkeypatch) -> None:
    def fail(*args: object, **options: object) -> list[Row]:
        raise benchmark_run.Mismatch("tables must give the bits of the unpatched model, got others")

    monkeypatch.setattr(benchmark_run, "measure_step", fail)
    result = bench(tmp_path / "out", "--only", "step")
    assert result.exit_code == 1
    assert "must give the bits" in result.output
    assert not (tmp_path / "out").exists()


def test_full_grid_is_fastvideos_table() -> None:
    from oracle import full_grid_table

    actual = table_building.full_grid_table((2, 3, 4), (44, 42, 42))
    assert all(map(torch.equal, actual, full_grid_table((2, 3, 4), (44, 42, 42), 10_000.0, dtype=torch.float64)))


def test_bytes_of_a_720p_table_are_those_of_its_axes() -> None:
    rows = table_building._count_bytes("cpu")
    medians = {(row["quantity"], row["case"], row["variant"]): row["median"] for row in rows}
    assert medians["bytes", "720p", "full grid"] == 2 * 8 * 21 * 45 * 80 * 128
    assert medians["bytes", "720p", "axis tables"] < medians["bytes", "720p", "full grid"] / 1000
    assert medians["bytes of entries", "2", "axis tables"] < 2 * medians["bytes of entries", "1", "axis tables"]
    assert dit_rope.cache_info().tables.entries == 0


def test_every_family_of_rope_modules_is_called_as_its_model_calls_it(monkeypatch) -> None:
    monkeypatch.undo()
    assert len(rope_modules.FAMILIES) >= 5
    assert len({family.model for family in rope_modules.FAMILIES}) == len(rope_modules.FAMILIES)


@pytest.mark.parametrize("operation", [Operation.ROTATE, Operation.PER_HEAD, Operation.ACROSS_HEADS])
@pytest.mark.parametrize("shape", ["wan-1.3b-480p", "flux-1024"])
def test_every_variant_of_ours_is_right_on_small_shapes(shape: str, operation: Operation) -> None:
    problem = Problem(SHAPES[shape].tiny(), operation, "cpu")
    variants = rotation_section.variants(problem, {"dit_rope": "eager"}, {"model": PEERS["model, eager"]}, exact=True)
    assert [*variants.calls] == ["dit_rope", "dit_rope, exact", "model"]


@pytest.mark.parametrize("pairing", Pairing)
def test_expectation_keeps_channels_past_the_rotary_ones(pairing: Pairing) -> None:
    table = dit_rope.rope_table(dit_rope.RopeSpec((4, 4), pairing=pairing), Grid(2, 3))
    x = torch.randn(2, 6, 3, 10)
    Expectation(table).assert_right(dit_rope.rotate(x, table), x)
    with pytest.raises(AssertionError, match="off by more than the bound"):
        Expectation(table).assert_right(torch.cat((dit_rope.rotate(x, table)[..., :8], x[..., :2]), dim=-1), x)


def test_rotary_embedding_torch_is_called_as_it_documents(monkeypatch) -> None:
    import sys
    import types

    def apply_rotary_emb(freqs: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x1, x2 = t.unflatten(-1, (-1, 2)).unbind(-1)
        return (t * freqs.cos() + torch.stack((-x2, x1), dim=-1).flatten(-2) * freqs.sin()).type(t.dtype)

    monkeypatch.setitem(sys.modules, "rotary_embedding_torch", types.SimpleNamespace(apply_rotary_emb=apply_rotary_emb))
    problem = Problem(SHAPES["flux-1024"].tiny(), Operation.ROTATE, "cpu")
    q, k = problem.inputs(1)[0]
    for index, out in enumerate(rotary_embedding_torch(problem)(q, k)):
        problem.expectation.assert_near(out, (q, k)[index], index)


def test_bound_refuses_one_rounding_too_many_and_nan() -> None:
    exact = torch.linspace(1, 1.9, 50, dtype=torch.float64)
    right = exact.bfloat16()
    assert_within(right, exact, exact.float())
    beyond = torch.where(right >= exact, right + 2**-7, right - 2**-7)
    for wrong in (beyond, torch.full_like(right, torch.nan)):
        with pytest.raises(AssertionError, match="50 of 50 elements are off"):
            assert_within(wrong, exact, exact.float())


def test_interleaved_cases_take_turns_after_a_warm_up() -> None:
    called: list[str] = []
    advanced: list[None] = []
    cases = {name: lambda name=name: called.append(name) for name in "ab"}
    times = interleave(cases, 3, warm_up=1, advance=lambda: advanced.append(None))
    assert called == list("ab" * 4)
    assert len(advanced) == 8
    assert all(0 <= timing.p20 <= timing.median <= timing.p80 for timing in times.values())


def test_summary_is_median_and_percentiles() -> None:
    assert summary([5.0, 1.0, 3.0, 2.0, 4.0]) == timing.Timing(1.8, 3.0, 4.2)
    assert summary([7.0]) == timing.Timing(7.0, 7.0, 7.0)


def test_csv_holds_columns_that_only_some_rows_have(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "new" / "rows.csv", [{"a": 1}, {"a": 2, "note": "x, y"}], "cpu")
    first, second = read_csv(path)
    assert [*first] == ["a", "note", *environment("cpu")]
    assert (first["note"], second["note"]) == ("", "x, y")


def test_losses_are_named() -> None:
    table = {"case": "a", "variant": "axis tables", "unit": "ms", "times_better": 0.5}
    assert table_losses([table, {**table, "times_better": 2.0}]) == [
        "a: axis tables: 2.00x the time of what upstream builds"
    ]
    rotated = {"shape": "s", "tokens": 5, "dtype": "d", "operation": "o", "variant": "dit_rope", "best_peer": "peer"}
    rows = [{**rotated, "times_best_peer": 0.8}, {**rotated, "times_best_peer": 1.2}, rotated]
    assert rotation_losses(rows) == ["s, 5 tokens, d, o: dit_rope is 0.80x as fast as peer"]
    steps = [
        {"variant": "unpatched", "verdict": "", "ratio": 1.0, "ratio_at_most": 1.1},
        {"variant": "tables", "verdict": "no difference", "ratio": 1.001, "ratio_at_most": 1.1},
    ]
    assert step_losses(steps)[0] == "tables: no difference (1.001x)"


def test_sections_of_the_command_are_those_that_are_measured() -> None:
    assert tuple(benchmark_program.Section) == tuple(benchmark_run.SECTIONS) == SECTIONS
    assert {name for name, _ in benchmark_run.cases(["operators"], TINY)} == {"operators"}


def test_shapes_on_a_cpu_are_limited_and_on_a_gpu_whole() -> None:
    small = [problem for problem, _ in rotation_section._problems(Settings("cpu", 3))]
    assert {problem.shape.name for problem in small} == {*SHAPES, rotation_section.GROWTH}
    limited = [problem.shape for problem in small if problem.shape.name in SHAPES]
    assert max(shape.tokens - shape.prefix for shape in limited) <= rotation_section.CPU_TOKENS
    whole = [problem.shape for problem, _ in rotation_section._problems(Settings("cuda", 3))]
    assert Grid(21, 45, 80) in {shape.grid for shape in whole}
