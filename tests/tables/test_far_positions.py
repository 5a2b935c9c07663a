"""Scaled positions: rounded as the code of models rounds them where that ends, in float64 beyond."""

from __future__ import annotations

import pytest
import torch

from dit_rope import Grid, Pairing, RopeSpec, Scaling, Shard, rope_table, rotate, shift_keys
from dit_rope.tables.scaling_types import ROUNDED_POSITIONS

F32, F64 = torch.float32, torch.float64
SPECS = {
    "a third": (RopeSpec((16,), scaling=Scaling.of("fastvideo", interpolation=1 / 3)), 1 / 3),
    "seven tenths": (RopeSpec((16,), scaling=Scaling.of("fastvideo", interpolation=0.7)), 0.7),
    "fps 30": (RopeSpec((16,), scaling=Scaling.of("fps", fps=30)), 24 / 30),
    "fps 7": (RopeSpec((16,), scaling=Scaling.of("fps", fps=7)), 24 / 7),
    "both": (RopeSpec((16,), scaling=Scaling.of("fps", fps=7, base_fps=24.0 * 0.7)), 24 / 7 * 0.7),
}


def exact(positions: torch.Tensor, scale: float) -> torch.Tensor:
    frequencies = 10_000.0 ** (-torch.arange(0, 16, 2, dtype=F64) / 16)
    angles = torch.outer(positions.double() * scale, frequencies)
    return torch.stack((angles.cos(), angles.sin()))


@pytest.mark.parametrize("start", [ROUNDED_POSITIONS, 100_000, 1_000_000, 2**24 - 64])
@pytest.mark.parametrize(("spec", "scale"), SPECS.values(), ids=SPECS)
def test_far_positions_that_are_scaled_are_as_exact_as_others(spec, scale, start) -> None:
    table = rope_table(spec, Grid(64, start_frame=start), dtype=F64)
    error = (torch.stack(table.cos_sin(repeat=False)) - exact(torch.arange(start, start + 64), scale)).abs().max()
    assert error <= 64 * 2.0**-53 * start * max(scale, 1)


@pytest.mark.parametrize("pairing", Pairing)
def test_shifted_keys_and_the_table_agree_far_out(pairing) -> None:
    spec = RopeSpec((16,), pairing=pairing, scaling=Scaling.of("fastvideo", interpolation=0.7))
    x, near, far = torch.randn(1, 32, 2, 16, dtype=F64), Grid(32, start_frame=5000), Grid(32, start_frame=100_000)
    x_near, x_far = (rotate(x, rope_table(spec, grid, dtype=F64)) for grid in (near, far))
    assert (shift_keys(x_near, spec, delta_frames=95_000) - x_far).abs().max() <= 1e-9


@pytest.mark.parametrize(("spec", "scale"), SPECS.values(), ids=SPECS)
def test_positions_that_models_have_are_rounded_as_they_round_them(spec, scale) -> None:
    """Bit for bit FastVideo's and Cosmos' float32 positions, up to the last position that is rounded."""
    positions = torch.arange(ROUNDED_POSITIONS, dtype=F32)
    options = dict(spec.scaling.parameters)
    scaled = positions / options.get("fps", 1.0) * options.get("interpolation", options.get("base_fps", 24.0))
    frequencies = 1.0 / (10_000.0 ** (torch.arange(0, 16, 2).to(F64) / 16))
    angles = torch.outer(scaled, frequencies)
    table = rope_table(spec, Grid(ROUNDED_POSITIONS), dtype=F64)
    assert torch.equal(torch.stack(table.cos_sin(repeat=False)), torch.stack((angles.cos(), angles.sin())))


@pytest.mark.parametrize("interpolation", [1 / 3, 0.7])
def test_rows_do_not_depend_on_the_table_that_they_are_in(interpolation) -> None:
    spec, first = (
        RopeSpec((8, 4, 4), scaling=Scaling.of("fastvideo", interpolation=interpolation)),
        ROUNDED_POSITIONS - 40,
    )
    whole = rope_table(spec, Grid(80, 2, 2, start_frame=first)).cos_sin()[0].view(80, 4, 16)
    for start in (first, ROUNDED_POSITIONS - 1, ROUNDED_POSITIONS, ROUNDED_POSITIONS + 1):
        alone = rope_table(spec, Grid(1, 2, 2, start_frame=start)).cos_sin()[0]
        assert torch.equal(alone, whole[start - first])
    sliced = rope_table(spec, Grid(80, 2, 2, start_frame=first), shard=Shard(1, 2, axis=0)).cos_sin()[0]
    assert torch.equal(sliced.view(40, 4, 16), whole[40:])


def test_float32_frequencies_keep_float32_angles() -> None:
    spec = RopeSpec((16,), scaling=Scaling.of("fastvideo", interpolation=0.7), frequency_dtype=F32)
    positions = torch.arange(9000, 9032, dtype=F32) * 0.7
    angles = torch.outer(positions, 1.0 / (10_000.0 ** (torch.arange(0, 16, 2).to(F32) / 16)))
    assert torch.equal(rope_table(spec, Grid(32, start_frame=9000)).cos_sin(False)[0], angles.cos())
