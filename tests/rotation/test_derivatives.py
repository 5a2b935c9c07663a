"""Derivatives of the public functions of every order and kind: right, or refused, in both modes and for all norms."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import oracle
from dit_rope import (
    Grid,
    NormKind,
    Pairing,
    RopeSpec,
    RopeTable,
    norm_rotate,
    norm_rotate_qk,
    rope_table,
    rotate,
    rotate_qk,
)
from dit_rope.rotation import ops
from dit_rope.rotation_args import RotationArgs
from tolerance import assert_within

F64 = torch.float64
MODES = pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
Call = Callable[..., Any]


def table_of(pairing: Pairing = Pairing.INTERLEAVED, dtype: torch.dtype = F64) -> RopeTable:
    return rope_table(RopeSpec((4, 2), pairing=pairing), Grid(2, 2), dtype=dtype)


def positions_of(table: RopeTable) -> torch.Tensor:
    """Those of the table in another order; one token does not rotate, of another some pairs do not."""
    positions = table.positions().flip(1)
    positions[0, 2], positions[0, 3, 1] = -1, -1
    return positions


def tokens(*shape: int, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(*(shape or (1, 6, 2, 7)), dtype=dtype)


def rotation_of(exact: bool, positions: bool = False, **further: Any) -> Call:
    """Of ``[B, 6, H, 7]``: a token before the grid's and one after, a channel past those that rotate."""
    table = table_of(**further)
    options = {"positions": positions_of(table)} if positions else {}
    return lambda x: rotate(x, table, prefix=1, suffix=1, exact=exact, **options)


def norm_of(norm: NormKind, exact: bool) -> tuple[Call, tuple[torch.Tensor, ...]]:
    """Norm and rotation as a function of x, weight and, in a LayerNorm, bias; and arguments for it."""
    table, size = table_of(), 14 if norm.across_heads else 7

    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return norm_rotate(x, table, weight, bias=bias, norm=norm, prefix=1, suffix=1, exact=exact)

    return call, (tokens(), *[torch.randn(size, dtype=F64) for _ in range(2 if norm.centred else 1)])


def check_all_derivatives(call: Call, inputs: tuple[torch.Tensor, ...]) -> None:
    """Forward and backward, of first and second order, batched and not, against differences."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    batched = {"check_batched_grad": True, "check_forward_ad": True, "check_batched_forward_grad": True}
    assert gradcheck(call, leaves, **batched)
    second = {"check_fwd_over_rev": True, "check_batched_grad": True}
    assert gradgradcheck(call, leaves, fast_mode=True, **second)  # by random projections, since all take minutes


@pytest.mark.parametrize("pairing", Pairing)
@pytest.mark.parametrize("positions", [False, True])
@MODES
def test_rotation_has_all_derivatives(pairing: Pairing, positions: bool, exact: bool) -> None:
    check_all_derivatives(rotation_of(exact, positions, pairing=pairing), (tokens(1, 6, 1, 7),))


@pytest.mark.parametrize("norm", NormKind)
@MODES
def test_norm_with_rotation_has_all_derivatives(norm: NormKind, exact: bool) -> None:
    call, inputs = norm_of(norm, exact)
    check_all_derivatives(call, inputs)


@MODES
def test_rotation_by_own_angles_of_heads_has_all_derivatives(exact: bool) -> None:
    angles = torch.randn(8, 3, dtype=F64)
    rows = torch.stack((angles.cos(), angles.sin()))
    args = RotationArgs.of_rows(rows, None, (3,), 4, Pairing.INTERLEAVED, prefix=1, exact=exact, head_rows=4)
    check_all_derivatives(lambda *xs: tuple(ops.rotate(xs, args)), (tokens(), tokens(1, 6, 1, 7)))


@MODES
def test_table_that_requires_grad_gets_it(exact: bool) -> None:
    """No kernel gives it, so that the operators are torch's own operations then."""
    args, rows = table_of().args(prefix=1, exact=exact), table_of().rows

    def call(rows: torch.Tensor, x: torch.Tensor, inplace: bool = False) -> torch.Tensor:
        target = x * 1 if inplace else x
        return ops.rotate([target], RotationArgs(**{**vars(args), "rows": rows}), inplace=inplace)[0]

    check_all_derivatives(call, (rows, tokens(1, 6, 1, 7)))
    x, leaf, grad = tokens(1, 6, 1, 7), rows.clone().requires_grad_(), tokens(1, 6, 1, 7)
    expected = torch.autograd.grad(call(leaf, x), leaf, grad)
    assert torch.equal(torch.autograd.grad(call(leaf, x, inplace=True), leaf, grad)[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("pairing", Pairing)
@MODES
def test_tangent_is_rotated_as_the_tensor_is(pairing: Pairing, dtype: torch.dtype, exact: bool) -> None:
    table = table_of(pairing, F64 if dtype == F64 else torch.float32)
    x, v = tokens(2, 4, 3, 8, dtype=dtype), tokens(2, 4, 3, 8, dtype=dtype)

    def call(x: torch.Tensor) -> torch.Tensor:
        return rotate(x, table, exact=exact)

    out, tangent = torch.func.jvp(call, (x,), (v,))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(call(forward_ad.make_dual(x, v)))
    for primal, of in ((out, x), (tangent, v), (dual.primal, x), (dual.tangent, v)):
        naive = rotate(of, table, exact=True)
        if exact:
            assert torch.equal(primal, naive)
        else:
            cos, sin = table.cos_sin(repeat=False)
            assert_within(primal, oracle.rotate(of, cos, sin, interleaved=pairing is Pairing.INTERLEAVED), naive)


def transforms(call: Call, x: torch.Tensor, v: torch.Tensor) -> dict[str, Any]:
    """The same derivatives by every way that torch has of asking for them; keys with one first word are one thing."""

    def power(x: torch.Tensor) -> torch.Tensor:
        return (call(x) ** 4).sum()

    functional, func = torch.autograd.functional, torch.func
    leaf = x.clone().requires_grad_()
    out, stacked = call(leaf), torch.stack((v, x))
    return {
        "jvp of func": func.jvp(call, (x,), (v,))[1],
        "jvp linearized": func.linearize(call, x)[1](v),
        "jvp by two backward passes": functional.jvp(call, x, v)[1],
        "gradient": torch.autograd.grad(power(leaf), leaf)[0],
        "gradient of func": func.grad(power)(x),
        "gradient in a batch": func.vmap(func.grad(power))(torch.stack((x, v)))[0],
        "gradient of a batch": func.grad(lambda xs: sum(map(power, func.vmap(lambda x: x)(xs))))(torch.stack((x, v)))[
            0
        ],
        "vjp": torch.autograd.grad(out, leaf, v, retain_graph=True)[0],
        "vjp of func": func.vjp(call, x)[1](v)[0],
        "vjp batched": torch.autograd.grad(out, leaf, stacked, retain_graph=True, is_grads_batched=True)[0][0],
        "hvp by two backward passes": functional.hvp(power, x, v)[1],
        "hvp forward over reverse": func.jvp(func.grad(power), (x,), (v,))[1],
        "hvp reverse over forward": func.grad(lambda x: func.jvp(power, (x,), (v,))[1])(x),
        "hvp of vhp": functional.vhp(power, x, v)[1],
        "jacobian": functional.jacobian(call, x),
        "jacobian vectorized": functional.jacobian(call, x, vectorize=True),
        "jacobian forward": functional.jacobian(call, x, vectorize=True, strategy="forward-mode"),
        "jacobian of jacrev": func.jacrev(call)(x),
        "jacobian of jacfwd": func.jacfwd(call)(x),
        "hessian": functional.hessian(power, x),
        "hessian vectorized": functional.hessian(power, x, vectorize=True),
        "hessian of func": func.hessian(power)(x),
    }


@pytest.mark.parametrize("kind", [None, *NormKind])
@MODES
def test_every_way_of_asking_gives_one_derivative(kind: NormKind | None, exact: bool) -> None:
    if kind is None:
        call: Call = rotation_of(exact, positions=True)
    else:
        normed, (_, *parameters) = norm_of(kind, exact)
        call = lambda x: normed(x, *parameters)  # noqa: E731
    results = transforms(call, tokens(), tokens())
    for _, group in itertools.groupby(results.items(), key=lambda item: item[0].split()[0]):
        (_, first), *remaining = group
        assert first.abs().max() > 0.1
        for name, derivative in remaining:
            # Float64 computations of one number in another order, a hundred roundings of numbers no larger.
            assert (derivative - first).abs().max() <= 100 * torch.finfo(F64).eps * first.abs().max(), name


@MODES
def test_penalty_on_a_gradient_reaches_every_parameter(exact: bool) -> None:
    """As in a discriminator: the norm of the gradient of a loss, differentiated by the weights before the rotation."""
    call, (x, weight) = norm_of(NormKind.PER_HEAD, exact)
    second = rotation_of(exact)

    def penalty(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        (grad,) = torch.autograd.grad((second(call(x, weight)) ** 3).sum(), x, create_graph=True)
        return grad.square().sum()

    leaves = (x.requires_grad_(), weight.requires_grad_())
    assert gradcheck(penalty, leaves)


@MODES
def test_batches_of_positions_tables_and_weights(exact: bool) -> None:
    table, x = table_of(), tokens(2, 4, 2, 7)
    positions = torch.stack(
        (table.positions(), table.positions().flip(1), torch.full((1, 4, 2), -1, dtype=torch.int32))
    )
    expected = torch.stack([rotate(x, table, positions=rows, exact=exact) for rows in positions])
    by_positions = torch.func.vmap(lambda rows: rotate(x, table, positions=rows, exact=exact))(positions)
    assert (by_positions - expected).abs().max() <= 4 * torch.finfo(F64).eps * expected.abs().max()
    assert torch.equal(by_positions[2], x)
    by_both = torch.func.vmap(lambda x, rows: rotate(x, table, positions=rows, exact=exact))(x[:, None], positions[:2])
    assert torch.equal(by_both, torch.stack((by_positions[0][:1], by_positions[1][1:])))
    weights = torch.randn(3, 7, dtype=F64)
    normed = torch.func.vmap(lambda weight: norm_rotate(x, table, weight, exact=exact))(weights)
    single = norm_rotate(x, table, weights[2], exact=exact)
    assert (normed[2] - single).abs().max() <= 16 * torch.finfo(F64).eps * single.abs().max()


@pytest.mark.parametrize("norm", [None, NormKind.PER_HEAD, NormKind.LAYER_ACROSS_HEADS])
@MODES
def test_in_place_calls_carry_tangents_and_batches(norm: NormKind | None, exact: bool) -> None:
    table = table_of()

    def in_place(qkv: torch.Tensor, inplace: bool = True) -> torch.Tensor:
        """Of views of one tensor, as packed projections are."""
        packed = qkv.clone()
        q, k, _ = packed.unbind(2)
        options = {} if norm is None else {"norm": norm}
        outs = (rotate_qk if norm is None else norm_rotate_qk)(q, k, table, inplace=inplace, exact=exact, **options)
        return torch.stack((*outs, packed[:, :, 2]), dim=2) if not inplace else packed

    qkv, v = tokens(2, 4, 3, 2, 7), tokens(2, 4, 3, 2, 7)
    expected = torch.func.jvp(lambda qkv: in_place(qkv, inplace=False), (qkv,), (v,))
    for actual, desired in zip(torch.func.jvp(in_place, (qkv,), (v,)), expected, strict=True):
        assert torch.equal(actual, desired)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(in_place(forward_ad.make_dual(qkv, v)))
        assert torch.equal(dual.tangent, expected[1])
    batch = torch.func.vmap(in_place)(torch.stack((v, qkv)))
    assert torch.equal(batch[1], expected[0])


def test_in_place_calls_under_transforms_are_refused_as_elsewhere() -> None:
    table, x = table_of(), tokens(2, 4, 2, 7)

    def same_twice(x: torch.Tensor) -> torch.Tensor:
        return rotate_qk(x, x, table, inplace=True)[0]

    with pytest.raises(ValueError, match="q and k must not share memory when inplace=True"):
        torch.func.jvp(same_twice, (x,), (x,))
    with pytest.raises(ValueError, match="q and k must not share memory when inplace=True"):
        torch.func.vmap(same_twice)(x[None])
    with pytest.raises(ValueError, match="inplace must be False when x or a weight requires grad"):
        torch.func.grad(lambda x: rotate(x * 1, table, inplace=True).sum())(x)


@MODES
def test_writing_to_another_tensor_carries_tangents(exact: bool) -> None:
    args, x, v = table_of().args(exact=exact), tokens(2, 4, 2, 7), tokens(2, 4, 2, 7)
    with forward_ad.dual_level():
        out = torch.empty_like(x)
        ops.rotate_into([forward_ad.make_dual(x, v)], args, [out])
        assert torch.equal(forward_ad.unpack_dual(out).tangent, ops.rotate([v], args)[0])


def test_operators_called_by_name_are_transformed_too() -> None:
    """As a graph of torch.compile calls them, without the functions before them."""
    args, (x, v) = table_of().args(), (tokens(2, 4, 2, 7), tokens(2, 4, 2, 7))
    flat = (*ops._flatten(args), "eager")

    def call(x: torch.Tensor) -> torch.Tensor:
        (rotated,) = torch.ops.dit_rope.rotate([x], *flat)
        (normed,) = torch.ops.dit_rope.norm_rotate([rotated], [], [], 1e-6, "per_head", "none", *flat)
        copy = normed.clone()
        torch.ops.dit_rope.rotate_([copy], *flat)
        torch.ops.dit_rope.norm_rotate_([copy], [], [], 1e-6, "per_head", "none", *flat)
        return copy

    expected = torch.autograd.functional.jvp(call, x, v)[1]
    assert (torch.func.jvp(call, (x,), (v,))[1] - expected).abs().max() <= 1e-13 * expected.abs().max()
    assert (torch.func.vmap(call)(torch.stack((x, v)))[1] - call(v)).abs().max() <= 1e-13


@MODES
def test_transforms_inside_inference_mode_and_without_gradients(exact: bool) -> None:
    call, x, v = rotation_of(exact), tokens(), tokens()
    expected = torch.func.jvp(call, (x,), (v,))[1]
    for mode in (torch.inference_mode(), torch.no_grad()):
        with mode:
            x_copy, v_copy = x.clone(), v.clone()
            of_torch = torch.func.jvp(torch.square, (x_copy,), (v_copy,))[1]
            if of_torch.any():  # torch up to 2.11 has no tangents in inference mode
                assert torch.equal(torch.func.jvp(call, (x_copy,), (v_copy,))[1], expected)
            assert torch.equal(torch.func.vmap(call)(torch.stack((x_copy, v_copy)))[1], expected)


@MODES
def test_graph_made_outside_of_dual_numbers_carries_their_gradients(exact: bool) -> None:
    call, (x, grad, v) = rotation_of(exact), (tokens(), tokens(), tokens())
    leaf = x.requires_grad_()
    out = call(leaf)
    expected = [torch.autograd.grad(out, leaf, cotangent, retain_graph=True)[0] for cotangent in (grad, v)]
    with forward_ad.dual_level():
        (back,) = torch.autograd.grad(out, leaf, forward_ad.make_dual(grad, v))
        for actual, desired in zip(forward_ad.unpack_dual(back), expected, strict=True):
            assert (actual - desired).abs().max() <= 4 * torch.finfo(F64).eps * desired.abs().max()


def test_layout_is_that_of_the_operator_under_a_transform() -> None:
    table = table_of()
    for x in (tokens(2, 4, 3, 7), tokens(2, 3, 4, 7).transpose(1, 2), tokens(2, 4, 5, 7)[:, :, ::2]):
        out = torch.func.jvp(lambda x: rotate(x, table), (x,), (x,))[0]
        assert out.stride() == rotate(x, table).stride()


@MODES
def test_compiled_transforms_are_those_of_the_function(exact: bool) -> None:
    """Of gradients and batches; torch.compile itself does not trace tangents through views."""
    torch._dynamo.reset()
    call, x, v = rotation_of(exact), tokens(), tokens()
    gradient = torch.func.grad(lambda x: (call(x) ** 3).sum())
    for transformed, argument in ((torch.func.vmap(call), torch.stack((x, v))), (gradient, x)):
        compiled = torch.compile(transformed, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(argument), transformed(argument))
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    compiled(x)  # a graph made without dual numbers
    with forward_ad.dual_level():
        assert torch.equal(forward_ad.unpack_dual(compiled(forward_ad.make_dual(x, v))).tangent, call(v))
    leaf = x.requires_grad_()
    (grad,) = torch.autograd.grad((compiled(leaf) ** 3).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        grad.sum().backward()


@MODES
def test_tracing_by_torch_jit_keeps_calls_in_place(exact: bool) -> None:
    table, x, v = table_of(), tokens(2, 4, 2, 7), tokens(2, 4, 2, 7)

    def call(x: torch.Tensor) -> torch.Tensor:
        return norm_rotate(rotate(x * 1, table, exact=exact, inplace=True), table, exact=exact, inplace=True)

    assert torch.equal(torch.jit.trace(call, (x,))(v), call(v))
