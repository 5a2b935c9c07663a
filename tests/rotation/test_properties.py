"""Random calls give what float64 gives, or are refused; a few hundred here, more in ``scripts/long_tests/fuzz.py``."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import kernel_properties
import properties
from benchmarks.results import read_csv
from dit_rope import Grid, Pairing, RopeSpec
from dit_rope.rotation import ops
from dit_rope.rotation.backends import cos_sin
from dit_rope.streaming import shift as shifting
from dit_rope.tables.table import RopeTable
from properties import F32, RIGHT, RotationDraw, TableDraw

few = settings(
    max_examples=100, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
pytestmark = pytest.mark.usefixtures("one_thread")


@few
@given(properties.STRATEGIES["table"][0])
def test_tables_are_those_of_float64(draw: TableDraw) -> None:
    properties.check_table(draw)


@few
@given(properties.STRATEGIES["rotation"][0])
def test_rotations_are_those_of_float64_or_refused(draw: RotationDraw) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        properties.check_rotation(draw)


@few
@given(properties.STRATEGIES["shift"][0])
def test_shifts_are_those_of_float64_or_refused(draw: properties.ShiftDraw) -> None:
    properties.check_shift(draw)


@few
@given(kernel_properties.STRATEGY[0])
def test_calls_of_a_backend_are_those_of_float64(draw: kernel_properties.KernelDraw) -> None:
    kernel_properties.check_kernel(draw)


PLAIN = RotationDraw(
    table=TableDraw(RopeSpec((4, 6, 4), pairing=Pairing.HALF), Grid(2, 3, 4, start_frame=5), None, F32),
    batch=2, heads=(3,), more_channels=2, layouts=("contiguous",), dtype=F32, prefix=1, suffix=2, places=None,
    inverse=False, inplace=False, exact=False, requires_grad=False, norm=None, parameters=((False, False),),
    parameter_dtype=F32, eps=1e-6, seed=3,
)  # fmt: skip


def test_the_check_of_a_rotation_notices_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs, prefixes, rows and pairs that are off by one, and an error of one part in a million."""
    assert properties.check_rotation(PLAIN) == RIGHT
    real = RopeTable.args

    def with_fault(**changes: object) -> None:
        monkeypatch.setattr(RopeTable, "args", lambda self, **options: replace(real(self, **options), **changes))
        with pytest.raises(AssertionError):
            # Another length, so that no layout is found that was validated without the fault.
            properties.check_rotation(replace(PLAIN, heads=(4 + len(str(changes)),)))

    with_fault(inverse=True)
    with_fault(prefix=2)
    with_fault(token_offset=1)
    with_fault(pairing=Pairing.INTERLEAVED)
    with_fault(sizes=(3, 2, 4))
    monkeypatch.setattr(RopeTable, "args", real)
    rotate = ops.rotate
    monkeypatch.setattr(ops, "rotate", lambda *a, **k: [out * (1 + 1e-6) for out in rotate(*a, **k)])
    with pytest.raises(AssertionError, match="are off; worst is"):
        properties.check_rotation(PLAIN)


def test_the_check_of_a_table_notices_a_start_frame_that_is_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert properties.check_table(PLAIN.table) == RIGHT
    later = replace(PLAIN.table, grid=Grid(2, 3, 4, start_frame=6))
    monkeypatch.setattr(properties, "build", lambda draw, real=properties.build: real(later))
    with pytest.raises(AssertionError, match="are off; worst is"):
        properties.check_table(PLAIN.table)


def test_the_check_of_a_shift_notices_one_in_the_wrong_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = properties.ShiftDraw(
        RopeSpec((4, 6)), 60, -3, None, False, 2, 3, 2, 1, "contiguous", False, False, F32, 1
    )  # fmt: skip
    assert properties.check_shift(draw) == RIGHT
    get = shifting.SHIFTS.get
    monkeypatch.setattr(shifting.SHIFTS, "get", lambda *arguments: get(*arguments).flip(0))
    with pytest.raises(AssertionError, match="are off; worst is"):
        properties.check_shift(draw)


def test_the_check_of_a_backend_notices_angles_of_another_head(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = kernel_properties.KernelDraw(
        0, Pairing.HALF, F32, "contiguous", 2, 5, (3, 2), (2, 3, 4), 0, 1, 4, "none", 5, False, False, False, False,
        None, False, False, 7,
    )  # fmt: skip
    assert kernel_properties.check_kernel(draw) == RIGHT
    real = cos_sin.row_indices
    monkeypatch.setattr(cos_sin, "row_indices", lambda args, heads: real(args, heads).flip(2))
    from dit_rope import cache_clear

    cache_clear()
    with pytest.raises(AssertionError, match="are off; worst is"):
        kernel_properties.check_kernel(draw)


def test_overlaps_are_found_by_numbering_places() -> None:
    shape = (2, 3, 2, 4)
    for layout in properties.LAYOUTS:
        x = properties.strided(layout, shape, F32, 0)
        assert x.shape == torch.Size(shape)
        assert properties.overlaps(x) == (layout in properties.SHARED), layout


def test_committed_draws_are_many_and_none_is_wrong() -> None:
    results = Path(__file__).resolve().parents[2] / "scripts" / "results" / "fuzz.csv"
    rows = read_csv(results)
    assert sum(int(row["draws"]) for row in rows) >= 100_000
    assert [row for row in rows if row["outcome"] == "wrong" and row["draws"] != "0"] == []
    assert {row["backend"] for row in rows} == {"eager", "triton", "cuda"}
