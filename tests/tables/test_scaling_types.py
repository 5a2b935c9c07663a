"""Every type of scaling through tables, rotations, streams and the compiler, against angles formed one by one."""

from __future__ import annotations

import pytest
import torch

import oracle
from dit_rope import Grid, Pairing, RopeSpec, RopeStream, ShiftTable, known_scalings, rope_table, rotate_qk
from dit_rope.tables.scaling import axis_frequencies
from every_scaling import every_scaling

SCALINGS = every_scaling(pairs=4)
GRID = Grid(5, 3, 4, start_frame=2)


def spec_with(name: str, pairing: Pairing = Pairing.INTERLEAVED) -> RopeSpec:
    return RopeSpec((8, 8, 8), scaling=SCALINGS[name], pairing=pairing)


def by_definition(spec: RopeSpec, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin ``[tokens, pairs]`` in float64, from each axis' resolved numbers and each token's coordinates."""
    starts = (grid.start_frame, *([0] * (len(grid.sizes) - 1)))
    lines = [torch.arange(start, start + size) for start, size in zip(starts, grid.sizes, strict=True)]
    cosines, sines = [], []
    for axis, coordinate in enumerate(torch.meshgrid(*lines, indexing="ij")):
        scaled = axis_frequencies(spec, axis)
        position = coordinate.reshape(-1, 1).double() / scaled.position_divisor * scaled.position_scale
        angle = position * scaled.inverse.double() / scaled.angle_divisor
        cosines.append(angle.cos() * scaled.magnitude)
        sines.append(angle.sin() * scaled.magnitude)
    return torch.cat(cosines, dim=1), torch.cat(sines, dim=1)


def test_every_type_that_comes_with_the_package_is_tried_here() -> None:
    scaled = set(SCALINGS) | {"default", "none"}
    assert scaled <= set(known_scalings())
    assert {name for name in known_scalings() if "_" not in name} == scaled


@pytest.mark.parametrize("name", SCALINGS)
def test_table_holds_the_scaled_angles(name) -> None:
    spec = spec_with(name)
    cos, sin = rope_table(spec, GRID, dtype=torch.float64).cos_sin(repeat=False)
    # Positions are formed in float32: a frame number over its rate has an error of 2**-24 of itself, up to 9 here.
    atol = 8 * 2**-24 * 9 if name == "fps" else 1e-14
    for actual, expected in zip((cos, sin), by_definition(spec, GRID), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
    plain = rope_table(spec.with_scaling(None), GRID, dtype=torch.float64).cos_sin(repeat=False)
    assert not torch.equal(cos, plain[0])


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("pairing", Pairing)
@pytest.mark.parametrize("name", SCALINGS)
def test_rotation_is_by_the_scaled_angles(name, pairing, exact, device) -> None:
    spec = spec_with(name, pairing)
    q, k = torch.randn(2, 2, GRID.tokens, 3, 32, dtype=torch.float64, device=device)
    table = rope_table(spec, GRID, device=device, dtype=torch.float64)
    cos, sin = (rows.to(device) for rows in by_definition(spec, GRID))
    atol = 1e-4 if name == "fps" else 1e-13
    for actual, x in zip(rotate_qk(q, k, table, exact=exact), (q, k), strict=True):
        expected = oracle.rotate(x, cos, sin, interleaved=pairing is Pairing.INTERLEAVED)
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", SCALINGS)
def test_stream_rotates_far_frames_by_the_scaled_angles(name) -> None:
    spec, queries = spec_with(name), torch.randn(1, 3 * 12, 2, 24)
    stream = RopeStream(spec, (3, 4), window_frames=6)
    for start in range(0, 600, 3):
        stream.begin_chunk(3)
        if start == 597:
            rotated = stream.rotate(queries)
        stream.commit()
    cos, sin = by_definition(spec, Grid(3, 3, 4, start_frame=597))
    expected = oracle.rotate(queries, cos, sin, interleaved=True)
    # float32 cos, sin and products; Cosmos' frames besides have an error of two roundings of positions up to 900.
    atol = 900 * 2**-23 * 4 if name == "fps" else 4e-6
    torch.testing.assert_close(rotated.double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", SCALINGS)
def test_shift_rotates_by_the_scaled_angle_without_its_magnitude(name) -> None:
    spec = spec_with(name)
    cos, sin = ShiftTable(spec, dtype=torch.float64).rows[:, 7]
    torch.testing.assert_close(torch.hypot(cos, sin), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-15)
    scaled_cos, scaled_sin = by_definition(spec, Grid(8, 1, 1))
    expected = torch.atan2(scaled_sin[7, :4], scaled_cos[7, :4])
    torch.testing.assert_close(torch.atan2(sin, cos), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", SCALINGS)
def test_table_is_traced_without_a_graph_break_and_again_for_other_numbers(name) -> None:
    """The compiler takes a number that has changed since the last trace for one that is not known yet."""
    torch._dynamo.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def rotated(x: torch.Tensor, spec: RopeSpec) -> torch.Tensor:
        return x * rope_table(spec, GRID, dtype=torch.float64).cos_sin()[0]

    for scalings in (SCALINGS, every_scaling(pairs=4, longer=1.25)):
        spec = RopeSpec((8, 8, 8), scaling=scalings[name])
        expected = rope_table(spec, GRID, dtype=torch.float64).cos_sin()[0]
        torch.testing.assert_close(rotated(torch.ones_like(expected), spec), expected, rtol=0, atol=1e-14)
