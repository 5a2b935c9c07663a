"""The values that describe a rotation: equal when they mean the same, refused when they mean nothing."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch

from dit_rope import Grid, Pairing, RopeSpec, Scaling, Shard


def test_spec_is_frozen_and_hashable() -> None:
    spec = RopeSpec((44, 42, 42))
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.theta = 2.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        Grid(1, 2).start_frame = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        Shard().rank = 1
    assert len({spec, RopeSpec((44, 42, 42)), RopeSpec((42, 44, 42))}) == 2


def test_spec_is_equal_however_it_is_spelled() -> None:
    spec = RopeSpec([44, 42, 42], theta=10_000, scaling=[Scaling.of("linear", factor=2)] * 3)
    respelled = RopeSpec((44, 42, 42), 1e4, Pairing.INTERLEAVED, scaling=Scaling.of("linear", factor=2.0))
    assert spec == respelled
    assert hash(spec) == hash(respelled)
    assert (spec.rotary_dim, spec.pairs) == (128, (22, 21, 21))


def test_values_survive_pickling() -> None:
    scaling = Scaling.of("yarn", factor=4.0, original_max_position_embeddings=64)
    for value in (RopeSpec((8, 6), scaling=scaling), Grid(2, 3, start_frame=4), Shard(1, 2, axis=0)):
        assert pickle.loads(pickle.dumps(value)) == value


def test_scaling_is_equal_in_any_order_of_its_parameters_and_takes_lists() -> None:
    assert Scaling.of("a", x=1.0, y=[1.0, 2.0]) == Scaling.of("a", y=(1.0, 2.0), x=1.0)
    assert hash(Scaling.of("a", y=[1.0])) == hash(Scaling.of("a", y=(1.0,)))


def test_spec_keeps_one_scaling_for_all_axes_or_one_per_axis() -> None:
    linear, ntk = Scaling.of("linear", factor=2.0), Scaling.of("ntk", factor=2.0)
    by_axis = RopeSpec((8, 6), scaling=[linear, Scaling.of("linear", factor=2)])
    assert by_axis == RopeSpec((8, 6), scaling=linear)
    assert (by_axis.axis_scaling(0), by_axis.axis_scaling(1)) == (linear, linear)
    mixed = RopeSpec((8, 6), scaling=[linear, None])
    assert mixed == by_axis.with_scaling((linear, None)) != by_axis.with_scaling((linear, ntk))
    assert (mixed.axis_scaling(0), mixed.axis_scaling(1)) == (linear, None)
    assert hash(mixed) == hash(RopeSpec((8, 6), scaling=(linear, None)))
    assert RopeSpec((8, 6), scaling=(None, None)) == RopeSpec((8, 6)) == mixed.with_scaling(None)


def test_scaling_shows_itself() -> None:
    assert str(Scaling.of("yarn", factor=4.0, truncate=False)) == "yarn(factor=4.0, truncate=False)"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (3, {}, "kind must be the name of a scaling type, got 3"),
        ("linear", {"factor": "4"}, "factor of linear scaling must be a number or numbers, got '4'"),
        ("linear", {"factor": {4: 5}}, "factor of linear scaling must be a number or numbers"),
        ("longrope", {"short_factor": [1.0, None]}, r"must be a number or numbers, got \(1.0, None\)"),
        ("linear", {"factor": torch.ones(1)}, "factor of linear scaling must be a number or numbers"),
    ],
)
def test_scaling_refuses(kind, options, message) -> None:
    with pytest.raises(TypeError, match=message):
        Scaling.of(kind, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dims": ()}, ValueError, "dims must have 1 to 4 axes, got 0"),
        ({"dims": (2,) * 5}, ValueError, "dims must have 1 to 4 axes, got 5"),
        ({"dims": (44, 41)}, ValueError, r"dims must be even, got \(44, 41\)"),
        ({"dims": (44, 0)}, ValueError, "dims must be at least 2, got 0"),
        ({"dims": (44.0,)}, TypeError, r"dims must be an int, got 44.0"),
        ({"dims": (True,)}, TypeError, "dims must be an int, got True"),
        ({"theta": 0.0}, ValueError, "theta must be positive and finite, got 0.0"),
        ({"theta": float("inf")}, ValueError, "theta must be positive and finite, got inf"),
        ({"theta": (1e4, 1e4, 1e3)}, TypeError, r"theta must be one number for all axes, got \(10000.0, "),
        ({"pairing": "half"}, TypeError, "pairing must be a Pairing, got 'half'"),
        (
            {"scaling": "linear"},
            TypeError,
            "scaling must be a Scaling, None, or a tuple of them, one per axis, got 'linear'",
        ),
        ({"scaling": (None, "linear", None)}, TypeError, "scaling must be a Scaling, None, or a tuple of them"),
        ({"scaling": (None, None)}, ValueError, r"scaling must be one for all axes or have one per axis \(3\), got 2"),
        ({"frequency_dtype": torch.int32}, TypeError, "frequency_dtype must be a floating point torch.dtype"),
        ({"frequency_dtype": "float32"}, TypeError, "frequency_dtype must be a floating point torch.dtype"),
    ],
)
def test_spec_refuses(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        RopeSpec(**{"dims": (8, 6, 4)} | arguments)


RESCALED = Scaling.of("fastvideo", theta_rescale=2.0, interpolation=0.5)
OLD_PICKLE = (
    b"\x80\x04\x8c\rdit_rope.spec\x8c\x08RopeSpec\x93)\x81}(\x8c\x04dimsK\x08K\x06\x86\x8c\x05thetaG@\xc3\x88\0\0\0\0\0"
    b"\x8c\x07pairing\x8c\rdit_rope.spec\x8c\x07Pairing\x93\x8c\x0binterleaved\x85R"
    b"\x8c\rtheta_rescaleG@\0\0\0\0\0\0\0G?\xf0\0\0\0\0\0\0\x86\x8c\rinterpolationG?\xe0\0\0\0\0\0\0G?\xf0\0\0\0\0\0\0\x86"
    b"\x8c\x07scalingN\x8c\x0ffrequency_dtype\x8c\x05torch\x8c\x07float64\x93ub."
)
"""``RopeSpec((8, 6), theta_rescale=(2.0, 1.0), interpolation=(0.5, 1.0))``, written by 0.1."""


def test_old_options_of_a_spec_are_a_scaling_and_warn() -> None:
    with pytest.warns(DeprecationWarning, match="options of a scaling type now"):
        spec = RopeSpec((8, 6), theta_rescale=2, interpolation=(0.5, 0.5))
    assert spec == RopeSpec((8, 6), scaling=RESCALED)
    with pytest.warns(DeprecationWarning, match="the old names go in 0.3"):
        assert spec.theta_rescale == (2.0, 2.0)
    with pytest.warns(DeprecationWarning, match="the old names go in 0.3"):
        assert RopeSpec((8, 6), scaling=(RESCALED, None)).interpolation == (0.5, 1.0)
    with pytest.warns(DeprecationWarning, match="options of a scaling type"):
        assert RopeSpec((8, 6), 1e4, Pairing.INTERLEAVED, 1.0) == RopeSpec((8, 6))


@pytest.mark.filterwarnings("ignore:theta_rescale and interpolation:DeprecationWarning")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"theta_rescale": (1.0, 2.0)}, ValueError, r"one value per axis \(3\), got \(1.0, 2.0\)"),
        ({"theta_rescale": "2"}, TypeError, "theta_rescale must be a number or numbers, got '2'"),
        ({"interpolation": -1.0}, ValueError, "interpolation must be positive and finite, got -1.0"),
        ({"interpolation": 0.5, "scaling": RESCALED}, ValueError, "scaling must be None with theta_rescale or inter"),
    ],
)
def test_old_options_of_a_spec_are_checked(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        RopeSpec((8, 6, 4), **arguments)


def test_spec_that_an_older_version_pickled_is_read() -> None:
    assert pickle.loads(OLD_PICKLE) == RopeSpec((8, 6), scaling=(RESCALED, None))


def test_grid_counts_its_tokens_and_shows_itself() -> None:
    grid = Grid(21, 45, 80, start_frame=3)
    assert grid.tokens == 75_600
    assert grid == Grid(21, 45, 80, start_frame=3) != Grid(21, 45, 80)
    assert repr(grid) == "Grid(21, 45, 80, start_frame=3)"


def test_numbers_of_numpy_are_numbers() -> None:
    two = np.int64(2)
    spec = RopeSpec((two, 4), theta=np.float32(16), scaling=Scaling.of("ntk", factor=np.float32(0.5), exponent=two))
    assert repr(spec) == repr(RopeSpec((2, 4), theta=16.0, scaling=Scaling.of("ntk", factor=0.5, exponent=2)))
    assert repr(Grid(two, np.uint8(3), start_frame=two)) == repr(Grid(2, 3, start_frame=2))
    assert repr(Shard(np.int32(1), two, axis=np.int16(0))) == repr(Shard(1, 2, axis=0))
    assert repr(Shard.of_tokens(np.int64(1), two)) == repr(Shard.of_tokens(1, 2))
    for wrong in (np.bool_(True), np.float64(2), torch.tensor(2)):
        with pytest.raises(TypeError, match="Grid size must be an int"):
            Grid(wrong)


@pytest.mark.parametrize(
    ("sizes", "start", "error", "message"),
    [
        ((), 0, ValueError, "Grid must have 1 to 4 sizes, got 0"),
        ((1,) * 5, 0, ValueError, "Grid must have 1 to 4 sizes, got 5"),
        ((3, 0), 0, ValueError, "Grid size must be at least 1, got 0"),
        ((3, 2.0), 0, TypeError, "Grid size must be an int, got 2.0"),
        ((3,), -1, ValueError, "start_frame must be at least 0, got -1"),
        ((3,), 0.5, TypeError, "start_frame must be an int, got 0.5"),
    ],
)
def test_grid_refuses(sizes, start, error, message) -> None:
    with pytest.raises(error, match=message):
        Grid(*sizes, start_frame=start)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 2, "world": 2}, ValueError, r"rank must be below world \(2\), got 2"),
        ({"rank": -1}, ValueError, "rank must be at least 0, got -1"),
        ({"world": 0}, ValueError, "world must be at least 1, got 0"),
        ({"world": 2.0}, TypeError, "world must be an int, got 2.0"),
        ({"axis": -1}, ValueError, "axis must be at least 0, got -1"),
        ({"tokens": (0, 4), "world": 2}, ValueError, "tokens must not be combined with axis or world"),
        ({"tokens": (0, 4), "axis": 1}, ValueError, "tokens must not be combined with axis or world"),
        ({"tokens": (4, 4)}, ValueError, "tokens stop must be at least 5, got 4"),
        ({"tokens": (-1, 4)}, ValueError, "tokens start must be at least 0, got -1"),
    ],
)
def test_shard_refuses(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        Shard(**arguments)
