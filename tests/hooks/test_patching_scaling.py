"""A patched model with scaled frequencies: the bits of the unpatched model whose own tables were recomputed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dit_rope
from compiled_graphs import one_layer
from dit_rope import RopeSpec, Scaling
from dit_rope.tables.scaling import axis_frequencies
from every_scaling import every_scaling
from zoo import wan

TRAINED_FRAMES = 32
LONGER = 40
RIFLEX = (Scaling.of("riflex", frames=120, k=2), None, None)
SCALINGS = every_scaling(pairs=4)


@pytest.fixture(autouse=True)
def _quiet(one_thread: None) -> None:
    torch._dynamo.reset()


def forward(model: torch.nn.Module, dtype: torch.dtype = torch.float32, **size: int) -> torch.Tensor:
    with torch.no_grad():
        return wan.forward(model, dtype, **size)


def with_angles(
    model: Any, angles: Callable[[int, torch.Tensor], torch.Tensor], magnitudes: tuple[float, ...] = (1.0, 1.0, 1.0)
) -> Any:
    """A copy whose own rope buffers hold cos and sin of ``angles(axis, positions)``, for 64 positions on each axis.

    Float64 until the last cast and every value at both channels of its pair, as diffusers builds them.
    """
    twin = copy.deepcopy(model)
    positions = torch.arange(64)
    by_axis = [angles(axis, positions) for axis in range(3)]
    for name, function in (("freqs_cos", torch.cos), ("freqs_sin", torch.sin)):
        parts = [function(angle) * magnitude for angle, magnitude in zip(by_axis, magnitudes, strict=True)]
        buffer = torch.cat([axis_angles.repeat_interleave(2, dim=1).float() for axis_angles in parts], dim=1)
        twin.rope.register_buffer(name, buffer, persistent=False)
    return twin


def with_scaling(model: Any, scaling: Any) -> Any:
    """:func:`with_angles` of the numbers that a scaling resolves to."""
    side = 2 * (model.config.attention_head_dim // 6)
    spec = RopeSpec((model.config.attention_head_dim - 2 * side, side, side), scaling=scaling)
    scaled = [axis_frequencies(spec, axis) for axis in range(3)]
    magnitudes = tuple(axis_scaled.magnitude for axis_scaled in scaled)
    return with_angles(model, lambda axis, positions: scaled[axis].angles(positions.float()), magnitudes)


def riflex_angles(axis: int, positions: torch.Tensor) -> torch.Tensor:
    """RIFLEx on the frames, written out: theta 10,000, pair 2 of 4 at nine tenths of a turn in 120 frames."""
    frequencies = torch.tensor([10_000.0 ** (-2 * pair / 8) for pair in range(4)], dtype=torch.float64)
    if axis == 0:
        frequencies[1] = 0.9 * 2 * math.pi / 120
    return torch.outer(positions, frequencies)


def test_edit_frames_of_chronoedit_stand_as_far_apart_in_scaled_tables() -> None:
    model = wan.build("chronoedit")
    scaling = (Scaling.of("linear", factor=2.0), None, None)
    expected = forward(with_scaling(model, scaling), frames=2)
    assert not torch.equal(forward(model, frames=2), expected)
    with dit_rope.patch(model, scaling=scaling):
        assert torch.equal(forward(model, frames=2), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_riflex_on_a_video_longer_than_the_models_tables_is_bitwise_its_definition(dtype: torch.dtype) -> None:
    model = wan.build("wan", dtype)
    assert model.rope.max_seq_len == TRAINED_FRAMES < LONGER
    expected = forward(with_angles(model, riflex_angles), dtype, frames=LONGER)
    with dit_rope.patch(model), pytest.raises(RuntimeError, match="shape"):  # as unpatched
        forward(model, dtype, frames=LONGER)
    with dit_rope.patch(model, scaling=RIFLEX):
        for _ in range(2):
            assert torch.equal(forward(model, dtype, frames=LONGER), expected)
    linear = Scaling.of("linear", factor=1.0001)
    with dit_rope.patch(model, scaling=linear):
        assert not torch.equal(expected, forward(model, dtype, frames=LONGER))


@pytest.mark.parametrize("name", SCALINGS)
def test_patched_model_with_any_scaling_is_bitwise_the_model_with_such_tables(name: str) -> None:
    model = wan.build("wan")
    expected, unscaled = forward(with_scaling(model, SCALINGS[name])), forward(model)
    with dit_rope.patch(model, scaling=SCALINGS[name]):
        assert torch.equal(forward(model), expected)
    assert torch.equal(forward(model), unscaled)
    assert not torch.equal(expected, unscaled)


@pytest.mark.parametrize("name", wan.NAMES)
def test_every_model_can_be_scaled(name: str) -> None:
    model = wan.build(name)
    scaling = (Scaling.of("linear", factor=2.5), None, Scaling.of("ntk", factor=2.0))
    for frames in (2, 3):
        expected = forward(with_scaling(model, scaling), frames=frames)
        with dit_rope.patch(model, scaling=scaling):
            assert torch.equal(forward(model, frames=frames), expected)
            twin = copy.deepcopy(model)
        assert torch.equal(forward(twin, frames=frames), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_mode_with_scaling_is_close(dtype: torch.dtype) -> None:
    model = wan.build("wan", dtype)
    expected = forward(with_scaling(model, SCALINGS["yarn"]), dtype)
    with dit_rope.patch(model, exact=False, scaling=SCALINGS["yarn"]):
        actual = forward(model, dtype)
    # Two blocks, each with one more or one fewer rounding of queries and keys than the unpatched model has.
    torch.testing.assert_close(actual, expected, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


class LuminaSwitch:
    """Lumina-Next's time-aware scaling: interpolation until a timestep, NTK from there on; counts its calls."""

    def __init__(self) -> None:
        self.timestep = 0.0
        self.calls = 0

    def __call__(self) -> Scaling:
        self.calls += 1
        if self.timestep < 0.3:
            return Scaling.of("linear", factor=2.0)
        return Scaling.of("ntk", factor=2.0, exponent=1.0)


def test_function_chooses_the_scaling_of_each_forward() -> None:
    model = wan.build("wan")
    switch = LuminaSwitch()
    expected = {
        0.0: forward(with_scaling(model, Scaling.of("linear", factor=2.0))),
        0.5: forward(with_scaling(model, Scaling.of("ntk", factor=2.0, exponent=1.0))),
    }
    assert not torch.equal(expected[0.0], expected[0.5])
    with dit_rope.patch(model, scaling=switch):
        for calls, timestep in enumerate((0.0, 0.0, 0.5, 0.0, 0.5), start=1):
            switch.timestep = timestep
            assert torch.equal(forward(model), expected[timestep])
            assert switch.calls == calls
            if calls == 3:
                misses = dit_rope.cache_info().tables.misses
    assert dit_rope.cache_info().tables.misses == misses


def test_function_may_choose_none_and_one_per_axis() -> None:
    model = wan.build("wan")
    unscaled, scaled = forward(model), forward(with_scaling(model, RIFLEX))
    choices = [None, RIFLEX, (None, None, None)]
    with dit_rope.patch(model, scaling=lambda: choices.pop(0)):
        for expected in (unscaled, scaled, unscaled):
            assert torch.equal(forward(model), expected)


def test_function_that_chooses_something_else_is_refused_where_it_is_asked() -> None:
    model = wan.build("wan")
    refused = pytest.raises(TypeError, match="scaling must be a Scaling, None, or a tuple of them, .* got 'linear'")
    with dit_rope.patch(model, scaling=lambda: "linear"), refused:  # type: ignore[arg-type, return-value]
        forward(model)


def test_scaling_of_every_step_leaves_no_more_tables_than_the_cap() -> None:
    model = wan.build("wan")
    steps = iter(range(1, 41))
    entries = dit_rope.cache_info().tables.max_entries
    with dit_rope.patch(model, scaling=lambda: Scaling.of("linear", factor=float(next(steps)))):
        for _ in range(40):
            forward(model, height=2, width=2)
    info = dit_rope.cache_info().tables
    assert info.entries == entries
    assert info.misses == 2 * 40  # of each step the axis arrays and the dense form that the model is given


def test_compiled_model_has_scaled_tables() -> None:
    model = one_layer("wan").build()
    scaling = (RIFLEX[0], SCALINGS["yarn"], None)
    expected = {frames: forward(with_scaling(model, scaling), frames=frames) for frames in (3, LONGER)}
    with dit_rope.patch(model, scaling=scaling):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for frames in (3, LONGER):
            assert torch.equal(forward(compiled, frames=frames), expected[frames])


def test_compiled_blocks_behind_an_eager_rope_module_have_scaled_tables() -> None:
    model = wan.build("wan")
    expected = forward(with_scaling(model, SCALINGS["yarn"]))
    with dit_rope.patch(model, scaling=SCALINGS["yarn"]):
        model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        assert torch.equal(forward(model), expected)


def test_compiled_model_asks_the_function_in_every_forward_and_compiles_once() -> None:
    model = wan.build("wan")
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    factor = 1.5
    with dit_rope.patch(model, scaling=lambda: Scaling.of("linear", factor=factor)):
        compiled = torch.compile(model, backend=count)
        forward(compiled)
        once = len(graphs)
        for factor in (1.5, 2.0, 2.5, 3.0):
            expected = forward(with_scaling(model, Scaling.of("linear", factor=factor)))
            assert torch.equal(forward(compiled), expected)
    assert len(graphs) == once


def test_report_names_the_scaling_and_undo_takes_it_out() -> None:
    model = wan.build("wan")
    unscaled = forward(model)
    handle = dit_rope.patch(model, scaling=RIFLEX)
    assert "frequencies scaled: riflex(frames=120, k=2) on axis 0, none on axis 1, none on axis 2" in handle.report()
    assert "bitwise equal to unpatched" not in handle.report()
    assert "under torch.compile: everything but the scaled tables" in handle.report()
    handle.undo()
    assert torch.equal(forward(model), unscaled)
    with dit_rope.patch(model, scaling=SCALINGS["ntk"]) as handle:
        assert "frequencies scaled: ntk(factor=2.0) on every axis" in handle.report()
    with dit_rope.patch(model, scaling=LuminaSwitch()) as handle:
        assert "frequencies scaled: what LuminaSwitch returns, called once in every forward" in handle.report()
    with dit_rope.patch(model) as handle:
        assert "scaled" not in handle.report()


@pytest.mark.parametrize(
    ("scaling", "error", "message"),
    [
        ("linear", TypeError, "scaling must be a Scaling, None, or a tuple of them, one per axis, got 'linear'"),
        ((None, RIFLEX[0]), ValueError, r"one for all axes or have one per axis \(3\), got 2"),
        (RIFLEX[0], ValueError, r"riflex on the frame axis alone, got it on axis 1; pass \(Scaling.of\('riflex'"),
        (Scaling.of("su", factor=2.0), ValueError, "scaling must be one of default, .*, got 'su'"),
        (Scaling.of("linear"), ValueError, "linear scaling must have factor, got"),
    ],
)
def test_patch_refuses_a_scaling_and_leaves_the_model_alone(scaling: Any, error: type, message: str) -> None:
    model = wan.build("wan")
    classes = [type(module) for module in model.modules()]
    with pytest.raises(error, match=message):
        dit_rope.patch(model, scaling=scaling)
    assert [type(module) for module in model.modules()] == classes
