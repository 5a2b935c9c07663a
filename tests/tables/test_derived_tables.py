"""What a table says of itself, and tables that are made of others by ``dataclasses.replace``."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch

from dit_rope import Grid, Pairing, RopeSpec, Shard, cache_clear, rope_table, rotate

SPEC = RopeSpec((8, 4, 4))


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("derived_first", [True, False])
def test_table_with_other_rows_and_the_cached_one_rotate_by_their_own(derived_first, backend) -> None:
    cache_clear()
    table, x = rope_table(SPEC, Grid(3, 4, 5)), torch.randn(1, 60, 2, 16)
    fresh = rotate(x, copy.deepcopy(table))
    derived = replace(table, rows=2 * table.rows)
    for variant, factor in sorted([(table, 1), (derived, 2)], key=lambda pair: pair[1] == 1 + derived_first):
        for _ in range(2):
            torch.testing.assert_close(rotate(x, variant, backend=backend), factor * fresh)
    assert torch.equal(rotate(x, rope_table(SPEC, Grid(3, 4, 5))), fresh)


@pytest.mark.parametrize("pairing", Pairing)
@pytest.mark.parametrize("shard", [None, Shard(1, 2, axis=1), Shard(2, 7)], ids=str)
def test_dense_forms_of_other_rows_are_of_those_rows(shard, pairing) -> None:
    spec = RopeSpec((8, 4, 4), pairing=pairing)
    table = rope_table(spec, Grid(3, 40, 5, start_frame=45), shard=shard)
    inside = (table.positions()[0, :, 0] >= 0)[:, None]
    derived = replace(table, rows=2 * table.rows)
    for repeat in (True, False):
        for actual, plain in zip(derived.cos_sin(repeat), table.cos_sin(repeat), strict=True):
            assert torch.equal(actual, torch.where(inside, 2 * plain, plain))
    assert torch.equal(derived.complex(), torch.where(inside, 2 * table.complex(), table.complex()))
    copied = replace(table)
    assert torch.equal(copied.cos_sin()[1], table.cos_sin()[1])


@pytest.mark.parametrize(
    "change",
    [
        {"rows": torch.zeros(2, 95, 4)},
        {"rows": torch.zeros(2, 96, 4, dtype=torch.float64)},
        {"rows": torch.zeros(2, 96, 4, device="meta")},
        {"dtype": torch.bfloat16},
        {"grid": Grid(3, 40, 5)},
        {"spec": RopeSpec((10, 4, 2))},
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(change) -> None:
    with pytest.raises(
        ValueError, match=r"rows must have shape \(2, \d+, [45]\), torch.(float32|bfloat16) on cpu, for the"
    ):
        replace(rope_table(SPEC, Grid(3, 4, 5)), **change)


def test_copies_and_pickles_have_the_forms_of_their_table() -> None:
    table = rope_table(SPEC, Grid(3, 4, 5))
    for copied in (copy.copy(table), copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert torch.equal(copied.cos_sin()[0], table.cos_sin()[0])
        assert copied.blocks == table.blocks == ((0, 32), (32, 64), (64, 96))


@pytest.mark.parametrize("shard", [None, Shard(1, 4)], ids=str)
def test_a_table_shows_itself_in_one_line(shard) -> None:
    text = repr(rope_table(SPEC, Grid(3, 4, 5), shard=shard, dtype=torch.bfloat16))
    assert "\n" not in text
    assert len(text) < 400
    assert text.endswith(f"{60 if shard is None else 15} tokens, rows (2, 96, 4) bfloat16 on cpu)")
    assert ("Shard" in text) == (shard is not None)


def test_an_axis_that_is_not_there_is_refused_by_name() -> None:
    table = rope_table(SPEC, Grid(3, 4, 5))
    with pytest.raises(ValueError, match=r"axis must be below the table's number of axes \(3\), got 5"):
        table.axis(5)
    with pytest.raises(ValueError, match="axis must be at least 0, got -1"):
        table.axis(-1)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_copies_and_pickles_of_a_used_table_do_not_carry_what_a_process_found_out(protocol: int) -> None:
    table = rope_table(SPEC, Grid(3, 4, 5))
    x = torch.randn(1, table.count, 2, SPEC.rotary_dim)
    expected = rotate(x, table)
    assert table.validated
    for copied in (copy.copy(table), copy.deepcopy(table), pickle.loads(pickle.dumps(table, protocol))):
        assert copied.validated == {}
        assert torch.equal(rotate(x, copied), expected)
    assert table.validated
