"""``positions=`` takes rows of a table's axes: made from coordinates, and refused where they are of another axis."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dit_rope import Grid, RopeSpec, RopeTable, Scaling, Shard, norm_rotate_qk, rope_table, rotate
from dit_rope.tables.shards import grid_coordinates

SPEC = RopeSpec((8, 4, 4))
SPECS = {
    "one axis": (RopeSpec((16,)), (60,)),
    "two axes": (RopeSpec((8, 8)), (5, 40)),
    "three axes": (SPEC, (5, 40, 3)),
    "four axes": (RopeSpec((4, 4, 4, 4)), (3, 33, 2, 4)),
    "scaled": (RopeSpec((8, 4, 4), scaling=Scaling.of("linear", factor=3.0)), (5, 40, 3)),
}


def coordinates(sizes: tuple[int, ...], start: int = 0) -> list[torch.Tensor]:
    first, *further_axes = grid_coordinates(sizes, 0, int(np.prod(sizes)), torch.device("cpu"))
    return [first + start, *further_axes]


@pytest.mark.parametrize("start", [0, 31, 32, 50])
@pytest.mark.parametrize(("spec", "sizes"), SPECS.values(), ids=SPECS)
def test_positions_at_every_coordinate_are_those_of_the_table(spec, sizes, start) -> None:
    table = rope_table(spec, Grid(*sizes, start_frame=start))
    positions = table.positions_at(*coordinates(sizes, start))
    assert positions.dtype == torch.int32
    assert torch.equal(positions, table.positions())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_tokens_in_another_order_rotate_as_in_the_order_of_the_grid(dtype) -> None:
    table = rope_table(SPEC, Grid(3, 4, 5, start_frame=40))
    x, order = torch.randn(2, 60, 2, 20).to(dtype), torch.randperm(60)
    positions = table.positions_at(*(c[order] for c in coordinates((3, 4, 5), 40)))
    assert torch.equal(rotate(x[:, order], table, positions=positions), rotate(x, table)[:, order])


@pytest.mark.parametrize("shard", [Shard(1, 2, axis=1), Shard(2, 7), Shard.of_tokens(50, 99)], ids=str)
def test_positions_of_a_shard_count_from_the_grid(shard) -> None:
    grid = Grid(3, 40, 5, start_frame=33)
    table, whole = rope_table(SPEC, grid, shard=shard), rope_table(SPEC, grid)
    x = torch.randn(1, 4, 1, 16)
    at = (torch.tensor([33, 34, 35, 33]), torch.tensor([0, 39, 21, 20]), torch.tensor([4, 0, 2, 1]))
    assert torch.equal(
        rotate(x, table, positions=table.positions_at(*at)), rotate(x, whole, positions=whole.positions_at(*at))
    )


def test_numbers_and_tensors_of_one_and_two_dims_go_together() -> None:
    table = rope_table(SPEC, Grid(3, 4, 5))
    per_entry = torch.tensor([[0, 1], [2, 0]])
    positions = table.positions_at(per_entry, torch.tensor([3, 1]), np.int64(2))
    assert positions.tolist() == [[[0, 35, 66], [1, 33, 66]], [[2, 35, 66], [0, 33, 66]]]
    assert table.positions_at(2, 3, 4).tolist() == [[[2, 35, 68]]]
    assert table.positions_at(torch.tensor(2), 3, 4).shape == (1, 1, 3)
    assert table.positions_at(torch.tensor([-1, 0]), -1, torch.tensor([4, -7])).tolist() == [
        [[-1, -1, 68], [0, -1, -1]]
    ]


def test_negative_coordinate_leaves_the_channels_of_its_axis() -> None:
    table, x = rope_table(SPEC, Grid(3, 4, 5)), torch.randn(1, 1, 1, 16)
    assert torch.equal(rotate(x, table, positions=table.positions_at(-1, -1, -1)), x)
    partly = rotate(x, table, positions=table.positions_at(2, -1, 4))
    assert torch.equal(partly[..., 8:12], x[..., 8:12])
    assert not torch.isclose(partly[..., :8], x[..., :8]).all()


@pytest.mark.parametrize(
    ("at", "error", "message"),
    [
        ((0, 0), ValueError, "coordinates must be one for each of 3 axes, got 2"),
        ((31, 4, 0), ValueError, "coordinates of axis 1 must be 0 to 3, or negative, got 4"),
        ((40, 0, 0), ValueError, "coordinates of axis 0 must be 31 to 33, or negative, got 40"),
        ((0, 0, 0), ValueError, "coordinates of axis 0 must be 31 to 33, or negative, got 0"),
        ((2**70, 0, 0), ValueError, "coordinates of axis 0 must be 31 to 33"),
        ((torch.tensor([31, 99]), 0, 0), ValueError, "coordinates of axis 0 must be 31 to 33, or negative, got 99"),
        ((31.0, 0, 0), TypeError, "coordinates of axis 0 must be an int, got 31.0"),
        ((torch.tensor([31.0]), 0, 0), TypeError, "coordinates of axis 0 must be ints, or an int32 or int64 tensor"),
        ((True, 0, 0), TypeError, "coordinates of axis 0 must be an int, got True"),
        ((torch.zeros(1, 1, 1).int() + 31, 0, 0), ValueError, r"axis 0 must have shape \[S\] or \[B, S\]"),
        (
            (torch.tensor([31, 32]), torch.tensor([0, 1, 2]), 0),
            ValueError,
            "coordinates must have shapes that broadcast",
        ),
        ((torch.zeros(1, device="meta").int(), 0, 0), ValueError, "must be on the table's device cpu, got meta"),
    ],
)
def test_coordinates_are_refused(at, error, message) -> None:
    with pytest.raises(error, match=message):
        rope_table(SPEC, Grid(3, 4, 5, start_frame=31)).positions_at(*at)


def test_positions_at_are_made_in_a_compiled_graph_too() -> None:
    table = rope_table(SPEC, Grid(3, 4, 5))

    def f(x, frame, row):
        return rotate(x, table, positions=table.positions_at(frame, row, 2))

    x, frame, row = torch.randn(1, 3, 2, 16), torch.tensor([0, 1, 2]), torch.tensor([3, 0, 1])
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, frame, row), f(x, frame, row))
    beyond = compiled(x, frame + 2**32, row + 2**33)  # not looked at, and so not rotated
    expected = table.positions_at(torch.tensor([-1] * 3), -1, 2)
    assert torch.equal(beyond, rotate(x, table, positions=expected))


def call(table: RopeTable, positions: torch.Tensor) -> torch.Tensor:
    return rotate(torch.randn(1, positions.shape[1], 1, 16), table, positions=positions.to(torch.int32))


@pytest.mark.parametrize("start", [0, 50])
def test_coordinates_in_place_of_rows_are_refused(start) -> None:
    table = rope_table(SPEC, Grid(3, 4, 5, start_frame=start))
    with pytest.raises(
        ValueError, match=r"rows of their own axis, \d+ to \d+ on axis ., or negative, got .*; table.pos"
    ):
        call(table, torch.stack(coordinates((3, 4, 5), start), dim=-1)[None])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rows_of_another_axis_are_refused_and_those_of_its_own_are_not(axis) -> None:
    table = rope_table(SPEC, Grid(3, 4, 5))
    for row in (-1, 0, 31, 32, 63, 64, 95, 96):
        positions = torch.full((2, 3, 3), -1)
        positions[1, 2, axis] = row
        x, allowed = torch.randn(2, 3, 1, 16), row < 0 or row // 32 == axis
        if allowed:
            rotate(x, table, positions=positions.int())
            continue
        with pytest.raises(ValueError, match=f"on axis {axis}, or negative, got {row}"):
            rotate(x, table, positions=positions.int())
        with pytest.raises(ValueError, match=f"on axis {axis}, or negative, got {row}"):
            norm_rotate_qk(x, x, table, positions=positions.int())


def test_rows_are_looked_at_in_every_call_and_not_once_per_layout() -> None:
    table = rope_table(SPEC, Grid(3, 4, 5))
    call(table, table.positions_at(torch.tensor([0, 1]), 2, 3))
    with pytest.raises(ValueError, match="axis 2"):
        call(table, torch.zeros(1, 2, 3) + torch.tensor([0, 32, 0]))


def test_lazily_negated_positions_are_refused() -> None:
    table = rope_table(RopeSpec((16,)), Grid(60))
    with pytest.raises(ValueError, match="positions must hold its own values, got a lazily negated view"):
        call(table, torch._neg_view(-torch.arange(4, dtype=torch.int32)[None, :, None]))
