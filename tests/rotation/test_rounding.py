"""Where a norm and a rotation round: bits of the model, its roundings in one pass, or one rounding at the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dit_rope
from dit_rope import Grid, NormKind, Pairing, RopeSpec, RopeTable, Rounding, norm_rotate, norm_rotate_qk, rotate
from dit_rope.rotation import ops
from dit_rope.rotation_args import Norm, NormRounding

H, D = 4, 64
HALF_SIZE = (torch.bfloat16, torch.float16)
every_norm = pytest.mark.parametrize("norm", list(NormKind), ids=lambda norm: norm.value)


def table_of(pairing: Pairing = Pairing.INTERLEAVED, dtype: torch.dtype = torch.float32) -> RopeTable:
    return dit_rope.rope_table(RopeSpec((24, 20, 20), pairing=pairing), Grid(3, 5, 7), dtype=dtype)


def inputs(norm: NormKind, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Data, weight and bias."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 105, H, D, generator=generator).to(dtype)
    channels = H * D if norm.across_heads else D
    weight, bias = (torch.rand(2, channels, generator=generator) + 0.5).to(dtype)
    return x, weight, bias if norm.centred else None


def share_of_different(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one != other).float().mean().item()


@every_norm
@pytest.mark.parametrize("pairing", list(Pairing), ids=lambda pairing: pairing.value)
@pytest.mark.parametrize("dtype", HALF_SIZE, ids=str)
def test_model_rounding_is_the_models_but_for_the_order_of_sums(
    dtype: torch.dtype, pairing: Pairing, norm: NormKind
) -> None:
    x, weight, bias = inputs(norm, dtype)
    results = {
        rounding: norm_rotate(x, table_of(pairing), weight, bias=bias, norm=norm, rounding=rounding)
        for rounding in Rounding
    }
    assert share_of_different(results[Rounding.MODEL], results[Rounding.EXACT]) < 2e-3
    assert share_of_different(results[Rounding.FAST], results[Rounding.EXACT]) > 0.1


@pytest.mark.parametrize("pairing", list(Pairing), ids=lambda pairing: pairing.value)
@pytest.mark.parametrize("dtype", [*HALF_SIZE, torch.float32, torch.float64], ids=str)
def test_rotation_alone_has_the_same_bits_in_exact_and_model_rounding(dtype: torch.dtype, pairing: Pairing) -> None:
    x, table = inputs(NormKind.PER_HEAD, dtype)[0], table_of(pairing)
    exact, model, fast = (rotate(x, table, rounding=rounding) for rounding in Rounding)
    assert torch.equal(exact, model)
    if pairing is Pairing.HALF and dtype is torch.float32:
        assert not torch.equal(exact, fast)


@every_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_data_has_nothing_to_round_in_between(dtype: torch.dtype, norm: NormKind) -> None:
    x, weight, bias = inputs(norm, dtype)
    model, exact = (
        norm_rotate(x, table_of(dtype=dtype), weight, bias=bias, norm=norm, rounding=rounding)
        for rounding in (Rounding.MODEL, Rounding.EXACT)
    )
    torch.testing.assert_close(model, exact, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("exact", [False, True])
def test_flag_names_two_of_the_roundings(exact: bool) -> None:
    x, weight, _ = inputs(NormKind.PER_HEAD, torch.bfloat16)
    named = Rounding.EXACT if exact else Rounding.FAST
    assert torch.equal(
        norm_rotate(x, table_of(), weight, exact=exact), norm_rotate(x, table_of(), weight, rounding=named)
    )
    assert torch.equal(rotate(x, table_of(), exact=exact), rotate(x, table_of(), rounding=named))


def test_queries_and_keys_round_as_each_alone() -> None:
    x, weight, _ = inputs(NormKind.PER_HEAD, torch.bfloat16)
    how: dict[str, Any] = {"rounding": Rounding.MODEL, "eps": 1e-5}
    q, k = norm_rotate_qk(x, x[:, :, :1], table_of(), weight, None, **how)
    assert torch.equal(q, norm_rotate(x, table_of(), weight, **how))
    assert torch.equal(k, norm_rotate(x[:, :, :1], table_of(), **how))


@every_norm
def test_model_rounding_in_place(norm: NormKind) -> None:
    x, weight, bias = inputs(norm, torch.bfloat16)
    how: dict[str, Any] = {"bias": bias, "norm": norm, "rounding": Rounding.MODEL, "prefix": 3, "suffix": 2}
    x = torch.cat((x, x[:, :5]), dim=1)
    expected = norm_rotate(x, table_of(), weight, **how)
    assert norm_rotate(x, table_of(), weight, inplace=True, **how) is x
    assert torch.equal(x, expected)


@every_norm
def test_gradients_do_not_round_in_between(norm: NormKind) -> None:
    """They are those of fast mode, whose error a test of its own bounds: a rounding has the derivative 1."""
    gradients = []
    for rounding in (Rounding.MODEL, Rounding.FAST):
        x, weight, bias = inputs(norm, torch.bfloat16)
        leaves = [each.clone().requires_grad_() for each in (x, weight, bias) if each is not None]
        out = norm_rotate(leaves[0], table_of(), leaves[1], bias=(*leaves, None)[2], norm=norm, rounding=rounding)
        out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).bfloat16())
        gradients.append([leaf.grad for leaf in leaves])
    for model, fast in zip(*gradients, strict=True):
        assert torch.equal(model, fast)


@every_norm
def test_transforms_see_the_same_roundings(norm: NormKind) -> None:
    x, weight, bias = inputs(norm, torch.bfloat16)
    how: dict[str, Any] = {"bias": bias, "norm": norm, "rounding": Rounding.MODEL}
    batched = torch.func.vmap(lambda one: norm_rotate(one[None], table_of(), weight, **how)[0])(x)
    assert share_of_different(batched, norm_rotate(x, table_of(), weight, **how)) < 2e-3


@every_norm
def test_transforms_round_every_step(norm: NormKind) -> None:
    x, weight, bias = inputs(norm, torch.bfloat16)
    args = table_of().args(exact=True)
    every_step, result = (
        Norm(norm, 1e-6, [weight], [] if bias is None else [bias], rounding)
        for rounding in (NormRounding.EVERY_STEP, NormRounding.RESULT)
    )
    batched = torch.func.vmap(lambda one: ops.rotate([one[None]], args, every_step)[0][0])(x)
    assert share_of_different(batched, ops.rotate([x], args, every_step)[0]) < 2e-3
    assert share_of_different(batched, ops.rotate([x], args, result)[0]) > 0.05


def test_compiled_code_keeps_the_rounding() -> None:
    x, weight, _ = inputs(NormKind.PER_HEAD, torch.bfloat16)
    table = table_of()
    call = torch.compile(
        lambda x: norm_rotate(x, table, weight, rounding=Rounding.MODEL), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(call(x), norm_rotate(x, table, weight, rounding=Rounding.MODEL))


def test_a_rounding_that_contradicts_the_flag_is_refused() -> None:
    x = torch.randn(1, 105, H, D)
    for rounding in (Rounding.MODEL, Rounding.FAST):
        with pytest.raises(ValueError, match=r"rounding must be Rounding.EXACT or None with exact=True, got Rounding."):
            rotate(x, table_of(), exact=True, rounding=rounding)
    assert torch.equal(
        rotate(x, table_of(), exact=True, rounding=Rounding.EXACT), rotate(x, table_of(), rounding=Rounding.EXACT)
    )


@pytest.mark.parametrize("rounding", ["model", 1, True, NormKind.PER_HEAD], ids=repr)
def test_a_rounding_that_is_none_is_refused(rounding: Any) -> None:
    with pytest.raises(TypeError, match="rounding must be a Rounding or None, got "):
        norm_rotate(torch.randn(1, 105, H, D), table_of(), rounding=rounding)
