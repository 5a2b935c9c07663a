"""Sizes, numbers and objects that nobody should pass: taken rightly or refused by name; no crash, no wrong value."""

from __future__ import annotations

import inspect
import math
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import dit_rope
from dit_rope import Grid, NormKind, Pairing, RopeSpec, Scaling, Shard, rope_table
from dit_rope.compat import fastvideo, flashinfer
from dit_rope.tables.dense_memory import MAX_DENSE_BYTES
from wrong_arguments import GRID, HUGE, SPEC, WRONG, calls, every_argument, normal, wrong_argument_outcome

# Sizes.


def test_a_grid_of_a_billion_tokens_is_a_small_table() -> None:
    table = rope_table(SPEC, Grid(1000, 1000, 1000))
    assert table.count == 10**9
    assert table.rows.nbytes < 10**5
    x = normal(1, 3, 2, 8)
    shard = rope_table(SPEC, Grid(1000, 1000, 1000), shard=Shard.of_tokens(999_998_999, 999_999_002))
    small = rope_table(SPEC, Grid(1, 2, 1000), shard=Shard.of_tokens(999, 1002))
    rows = torch.tensor([[[999, 998, 999], [999, 999, 0], [999, 999, 1]]], dtype=torch.int32)
    first = torch.tensor(shard.first_rows, dtype=torch.int32)
    by_number, by_row = dit_rope.rotate(x, shard), dit_rope.rotate(x, table, positions=rows + first)
    assert torch.equal(by_number, by_row)
    assert not torch.equal(by_number, dit_rope.rotate(x, small))


@pytest.mark.parametrize("form", ["cos_sin", "complex", "positions"])
def test_the_dense_forms_of_a_billion_tokens_are_refused(form: str) -> None:
    table = rope_table(RopeSpec((44, 42, 42)), Grid(4000, 1000, 1000))
    tracemalloc.start()
    with pytest.raises(
        ValueError, match=f"grid must be small enough .* at most {MAX_DENSE_BYTES:,} bytes, got .*shard"
    ):
        getattr(table, form)()
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()
    with pytest.raises(ValueError, match="grid must be small enough"):
        fastvideo.get_rotary_pos_embed((4000, 1000, 1000), 128, 1, (44, 42, 42), 1e4)


def test_the_limit_of_dense_forms_is_where_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, grid = RopeSpec((4,)), Grid(50)
    size = sum(table.nbytes for table in rope_table(spec, grid).cos_sin())
    dit_rope.cache_clear()
    monkeypatch.setattr("dit_rope.tables.dense_memory.MAX_DENSE_BYTES", size)
    rope_table(spec, grid).cos_sin()
    with pytest.raises(ValueError, match=f"at most {size:,} bytes"):
        rope_table(spec, Grid(51)).cos_sin()


def test_one_axis_past_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="grid must be small enough for rows of its axes"):
        rope_table(RopeSpec((512,)), Grid(2**24), dtype=torch.float64)


@pytest.mark.parametrize("sizes", [(2**63,), (2**64, 1, 1), (HUGE, 1, 1), (2**24, 2**24, 2**24)])
def test_sizes_past_what_is_counted_in_are_refused(sizes: tuple[int, ...]) -> None:
    spec = RopeSpec((4,) * len(sizes))
    with pytest.raises(ValueError, match="grid must "):
        rope_table(spec, Grid(*sizes))


@pytest.mark.parametrize("shard", [Shard(2**62, 2**63), Shard.of_tokens(0, 2**63), Shard.of_tokens(HUGE, HUGE + 1)])
def test_shards_past_what_is_counted_in_are_refused(shard: Shard) -> None:
    with pytest.raises(ValueError, match="shard must "):
        rope_table(SPEC, GRID, shard=shard)


def test_a_shard_along_an_axis_that_is_not_there_is_refused_in_a_world_of_one_too() -> None:
    for world in (1, 2):
        with pytest.raises(ValueError, match=r"shard.axis must be below the grid's number of axes \(3\), got 3"):
            rope_table(SPEC, GRID, shard=Shard(0, world, axis=3))


@pytest.mark.parametrize("norm", [None, *NormKind])
@pytest.mark.parametrize("shape", [(0, 24, 2, 8), (2, 0, 2, 8), (2, 24, 0, 8)], ids=["batch", "tokens", "heads"])
@pytest.mark.parametrize("exact", [False, True])
def test_nothing_at_all_is_rotated_to_nothing(shape: tuple[int, ...], norm: NormKind | None, exact: bool) -> None:
    x, table = normal(*shape), rope_table(SPEC, GRID)
    positions = torch.full((1, shape[1], 3), -1, dtype=torch.int32)
    options: dict[str, Any] = {"positions": positions, "exact": exact}
    if norm is None:
        q, k = dit_rope.rotate_qk(x, x, table, **options)
        single = dit_rope.rotate(x, table, inplace=True, **options)
    else:
        q, k = dit_rope.norm_rotate_qk(x, x, table, norm=norm, **options)
        single = dit_rope.norm_rotate(x, table, norm=norm, inplace=True, **options)
    assert single is x
    assert q.shape == k.shape == x.shape


def test_no_channel_and_too_few_are_refused() -> None:
    for dim in (0, 1, 7):
        with pytest.raises(ValueError, match=f"x must have at least the table's 8 channels per head, got {dim}"):
            dit_rope.rotate(normal(1, 24, 2, dim), rope_table(SPEC, GRID))


def test_one_token_is_rotated_by_its_own_angle() -> None:
    spec, x = RopeSpec((2,), theta=5.0), torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)
    rotated = dit_rope.rotate(x, rope_table(spec, Grid(1, start_frame=7))).flatten().double()
    c, s = math.cos(7.0), math.sin(7.0)
    expected = torch.tensor([3 * c - 4 * s, 3 * s + 4 * c], dtype=torch.float64)
    assert (rotated - expected).abs().max() <= 7 * 4 * 2.0**-24  # the table, two products and a sum are rounded


# Numbers.

NUMBERS = (0, 0.0, -0.0, -1.0, math.inf, -math.inf, math.nan, 10**400)


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: f"{value:.4}" if isinstance(value, float) else "int")
@pytest.mark.parametrize("name", ["theta", "theta_rescale", "interpolation"])
def test_invalid_bases_and_factors_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive and finite"):
        RopeSpec((4, 4, 4), **{name: value})


@pytest.mark.parametrize(
    "dims", [(3,), (4, 5), (0, 4), (-2,), (), (2,) * 5, (HUGE + 1,)], ids=lambda dims: str(dims)[:20]
)
def test_odd_or_empty_dims_are_refused(dims: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="dims must "):
        RopeSpec(dims)


def test_dims_that_do_not_sum_to_the_head_are_refused_where_they_must() -> None:
    with pytest.raises(ValueError, match=r"rope_dim_list must sum to hidden_size // heads_num \(64\)"):
        fastvideo.get_rotary_pos_embed((2, 3, 4), 128, 2, (16, 24, 20), 1e4)


EXTREMES = {
    "tiny theta in float32": RopeSpec((64,), theta=1e-300, frequency_dtype=torch.float32),
    "wide interpolation": RopeSpec((4,), scaling=Scaling.of("fastvideo", interpolation=1e308)),
    "steep rescale": RopeSpec((4,), theta=1e300, scaling=Scaling.of("fastvideo", theta_rescale=1e200)),
    "scaled past float64": RopeSpec((4,), theta=1e300, scaling=Scaling.of("ntk", factor=1e10)),
    "yarn without a base": RopeSpec(
        (4,), theta=1.0, scaling=Scaling.of("yarn", factor=2.0, original_max_position_embeddings=64)
    ),
    "yarn of no turns": RopeSpec(
        (4,), scaling=Scaling.of("yarn", factor=2.0, original_max_position_embeddings=64, beta_fast=0)
    ),
    "yarn turned back": RopeSpec(
        (4,), scaling=Scaling.of("yarn", factor=2.0, original_max_position_embeddings=64, beta_fast=-1)
    ),
    "longrope divided by zero": RopeSpec(
        (4,),
        scaling=Scaling.of(
            "longrope", short_factor=[0.0, 1.0], long_factor=[1.0, 1.0], original_max_position_embeddings=8, seq_len=4,
            factor=2.0,
        ),
    ),
    "numbers for a number": RopeSpec((4,), scaling=Scaling.of("ntk", factor=2.0, exponent=(1.0, 2.0))),
}  # fmt: skip


@pytest.mark.parametrize("name", EXTREMES)
def test_specs_without_finite_angles_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"(theta|spec|scaling|beta) must "):
        rope_table(EXTREMES[name], Grid(100))


def test_positions_past_256_keep_their_angles_in_bfloat16() -> None:
    """bfloat16 counts to 256: angles formed in it would give positions beyond one another's."""
    table = rope_table(RopeSpec((8,)), Grid(64, start_frame=4000), dtype=torch.bfloat16)
    cos, sin = table.cos_sin(repeat=False)
    angle = torch.arange(4000.0, 4064.0, dtype=torch.float64)
    for actual, exact in ((cos[:, 0], angle.cos()), (sin[:, 0], angle.sin())):
        assert (actual.double() - exact).abs().max() <= 2.0**-9 * (1 + 2.0**-8)
    x = normal(1, 64, 1, 8, dtype=torch.bfloat16)
    rows = (torch.arange(64, dtype=torch.int32) + table.first_rows[0])[None, :, None]
    assert torch.equal(dit_rope.rotate(x, table), dit_rope.rotate(x, table, positions=rows))


@pytest.mark.parametrize("position", [64, 10**6, 2**31 - 1])
@pytest.mark.parametrize("call", ["rotate", "norm_rotate"])
def test_positions_past_the_table_are_refused_also_where_the_layout_is_known(call: str, position: int) -> None:
    table, x = rope_table(RopeSpec((8,)), Grid(60)), normal(1, 3, 1, 8)
    rows = torch.tensor([[[0], [5], [-(2**31)]]], dtype=torch.int32)
    getattr(dit_rope, call)(x, table, positions=rows)
    rows[0, 1] = position
    with pytest.raises(ValueError, match=f"positions must be rows of the table, below 64, or negative, got {position}"):
        getattr(dit_rope, call)(x, table, positions=rows)


# NaN and infinities.


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("pairing", list(Pairing), ids=lambda pairing: pairing.value)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_pair(bad: float, pairing: Pairing, exact: bool) -> None:
    spec = RopeSpec((4, 2, 2), pairing=pairing)
    x = normal(2, 30, 3, 10)
    clean = x.clone()
    x[1, 17, 2, 3] = bad
    x[0, 1, 0, 9] = bad  # a channel past those that rotate
    table = rope_table(spec, GRID)
    options: dict[str, Any] = {"prefix": 2, "suffix": 4, "exact": exact}
    expected, out = dit_rope.rotate(clean, table, **options), dit_rope.rotate(x, table, **options)
    touched = torch.zeros(x.shape, dtype=torch.bool)
    touched[1, 17, 2, [2, 3] if pairing is Pairing.INTERLEAVED else [3, 7]] = True
    touched[0, 1, 0, 9] = True
    assert torch.equal(out[~touched], expected[~touched])
    assert not out[touched].isfinite().any()


@pytest.mark.parametrize("norm", list(NormKind), ids=lambda norm: norm.value)
@pytest.mark.parametrize("exact", [False, True])
def test_nan_stays_in_what_one_norm_averages(norm: NormKind, exact: bool) -> None:
    x = normal(2, 24, 3, 8)
    clean = x.clone()
    x[1, 5, 2, 3] = math.nan
    table = rope_table(SPEC, GRID)
    expected, out = (dit_rope.norm_rotate(tensor, table, norm=norm, exact=exact) for tensor in (clean, x))
    touched = torch.zeros(x.shape, dtype=torch.bool)
    touched[(1, 5) if norm.across_heads else (1, 5, 2)] = True
    assert torch.equal(out[~touched], expected[~touched])
    assert out[touched].isnan().all()


def test_tokens_that_do_not_rotate_keep_what_is_not_finite() -> None:
    x = torch.full((1, 30, 2, 8), math.inf)
    x[:, 26:] = math.nan
    out = dit_rope.rotate(x, rope_table(SPEC, GRID, shard=Shard.of_tokens(20, 44)), prefix=2, suffix=4)
    assert out[:, :2].isposinf().all()
    assert out[:, 6:26].isposinf().all(), "padding"
    assert out[:, 26:].isnan().all()


# Views and gradients.


def views() -> dict[str, torch.Tensor]:
    """``[2, 24, 2, 8]`` each, elements of which are one place in memory."""
    return {
        "expanded batch": normal(1, 24, 2, 8).expand(2, 24, 2, 8),
        "expanded tokens": normal(2, 1, 2, 8).expand(2, 24, 2, 8),
        "expanded heads": normal(2, 24, 1, 8).expand(2, 24, 2, 8),
        "sliding": normal(1000).as_strided((2, 24, 2, 8), (100, 3, 8, 1)),
    }


@pytest.mark.parametrize("name", views())
@pytest.mark.parametrize("exact", [False, True])
def test_views_that_overlap_are_rotated_and_not_written_to(name: str, exact: bool) -> None:
    x, table = views()[name], rope_table(SPEC, GRID)
    before = x.clone()
    for call in (dit_rope.rotate, dit_rope.norm_rotate):
        out, expected = call(x, table, exact=exact), call(before, table, exact=exact)
        # Whether a compiler fuses a multiply and an add depends on the strides: two roundings, of numbers up to 4.
        assert (out - expected).abs().max() <= (0 if exact else 2 * 4 * 2.0**-23)
        with pytest.raises(ValueError, match="x must not share memory between its own elements when inplace=True"):
            call(x, table, exact=exact, inplace=True)
        assert torch.equal(x, before)


def test_a_weight_inside_what_is_overwritten_is_refused() -> None:
    x, table = normal(1, 24, 2, 8), rope_table(SPEC, GRID)
    with pytest.raises(ValueError, match="q must not share memory with a weight or bias when inplace=True"):
        dit_rope.norm_rotate_qk(x, normal(1, 24, 2, 8), table, x[0, 0, 0], inplace=True)
    expected = dit_rope.norm_rotate(x, table, x[0, 0, 0].clone())
    assert torch.equal(dit_rope.norm_rotate(x, table, x[0, 0, 0]), expected)


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("call", [dit_rope.rotate, dit_rope.norm_rotate])
def test_tensors_that_require_grad_are_not_overwritten(call: Callable[..., torch.Tensor], leaf: bool) -> None:
    x, table = normal(1, 24, 2, 8).requires_grad_(), rope_table(SPEC, GRID)
    x = x if leaf else x * 2
    before = x.detach().clone()
    with pytest.raises(ValueError, match="inplace must be False when x or a weight requires grad"):
        call(x, table, inplace=True)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("parameter", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [NormKind.PER_HEAD, NormKind.LAYER_PER_HEAD])
def test_exact_norms_take_parameters_of_any_dtype(norm: NormKind, parameter: torch.dtype, dtype: torch.dtype) -> None:
    """Of most mixtures torch's own LayerNorm raises RuntimeError for most mixtures."""
    x, table, weight = normal(1, 24, 2, 8, dtype=dtype), rope_table(SPEC, GRID), torch.rand(8).to(parameter)
    exact, fast = (dit_rope.norm_rotate(x, table, weight, norm=norm, exact=mode) for mode in (True, False))
    assert exact.dtype == dtype
    # Of numbers up to 4: four roundings in exact mode, of the norm, the weight, two products and their sum, and one.
    assert (exact.double() - fast.double()).abs().max() <= 5 * 4 * torch.finfo(dtype).eps


def test_sparse_and_negated_tensors_are_refused() -> None:
    table = rope_table(SPEC, GRID)
    with pytest.raises(TypeError, match="x must be a strided tensor, got torch.sparse_coo"):
        dit_rope.rotate(normal(1, 24, 2, 8).to_sparse(), table)
    with pytest.raises(ValueError, match="x must hold its own values, got a lazily negated view"):
        dit_rope.rotate(torch._neg_view(normal(1, 24, 2, 8)), table)
    x, ones = normal(1, 24, 2, 8), torch.ones(8)
    for name, make, error in (
        ("weight", torch._neg_view, ValueError),
        ("bias", torch._neg_view, ValueError),
        ("weight", torch.Tensor.to_sparse, TypeError),
    ):
        parameters = {"weight": ones, "bias": ones} | {name: make(ones)}
        with pytest.raises(error, match=f"{name} must "):
            dit_rope.norm_rotate(x, table, norm=NormKind.LAYER_PER_HEAD, **parameters)


def test_integers_of_numpy_are_integers() -> None:
    x, table, two = normal(1, 27, 2, 8), rope_table(SPEC, GRID), np.int64(2)
    expected = dit_rope.rotate(x, table, prefix=2, suffix=1)
    for _ in range(2):
        assert torch.equal(dit_rope.rotate(x, table, prefix=two, suffix=np.int8(1)), expected)
    compiled = torch.compile(lambda y: dit_rope.rotate(y, table, prefix=2, suffix=1), backend="aot_eager")
    assert torch.equal(compiled(x), expected)


# Arguments of the wrong type, one at a time.


@pytest.mark.parametrize(("name", "argument"), every_argument())
def test_an_argument_of_the_wrong_type_is_named(name: str, argument: str) -> None:
    """Whatever is passed for it: the call goes through, or raises ValueError or TypeError with the argument's name."""
    outcomes = [wrong_argument_outcome(name, argument, kind) for kind in WRONG]
    assert outcomes.count("refused") >= 5


def test_every_public_name_is_called_with_wrong_arguments() -> None:
    tested = {name.split(".")[-1].split(" ")[0] for name in calls()}
    without = {"Fusion", "NormKind", "Pairing", "PositionPolicy", "Rounding", "UnsupportedModelError", "__version__"}
    without |= {
        "cache_clear",
        "cache_info",
        "known_scalings",
        "rotary_dim",
    }  # enums, what takes no argument, what is deprecated
    made_for_users = {"Patch", "RopeTable"}  # made by patch and rope_table
    assert tested | without | made_for_users >= set(dit_rope.__all__)
    public = {
        name for name, value in vars(flashinfer).items() if inspect.isfunction(value) and name.startswith("apply")
    }
    assert tested >= public - {"apply_rope_inplace_with_cache"}


def test_calls_of_the_table_are_accepted() -> None:
    for name, (function, arguments) in calls().items():
        function(**arguments)
        assert set(arguments) <= set(inspect.signature(function).parameters), name


def test_unregister_adapter_refuses_none() -> None:
    with pytest.raises(ValueError, match="adapter must be one that register_adapter was given, got None"):
        dit_rope.unregister_adapter(None)  # type: ignore[arg-type]


def test_true_is_not_taken_for_one_where_one_was() -> None:
    table, x = rope_table(SPEC, GRID), normal(1, 25, 2, 8)
    dit_rope.rotate(x, table, prefix=1)
    with pytest.raises(TypeError, match="prefix must be an int, got True"):
        dit_rope.rotate(x, table, prefix=True)
    with pytest.raises(TypeError, match="prefix must be an int, got 1.0"):
        dit_rope.rotate(x, table, prefix=1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="inverse must be a bool, got 0"):
        dit_rope.rotate(x, table, prefix=1, inverse=0)  # type: ignore[arg-type]
    dit_rope.norm_rotate(x, table, eps=1, suffix=1)
    with pytest.raises(TypeError, match="eps must be a float, got True"):
        dit_rope.norm_rotate(x, table, eps=True, suffix=1)


def test_a_table_takes_positions_of_its_own_axes_only() -> None:
    table = rope_table(SPEC, GRID)
    args = table.args(positions=torch.zeros(1, 5, 3, dtype=torch.int32))
    assert replace(args, prefix=1).count == 5
    with pytest.raises(ValueError, match="positions must be int32"):
        table.args(positions=torch.zeros(1, 5, 2, dtype=torch.int32))
