"""What every backend keeps of a norm that rounds as a model's own code does, with the rotation after it.

The part of ``backend_contract.py``, which says how to run it, about ``Norm.rounding``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from contract_calls import (
    F16,
    F32,
    HALF,
    MODULE,
    Case,
    copies,
    dense,
    formula,
    named,
    poisoned,
)
from dit_rope.rotation_args import Norm, NormRounding, RotationArgs
from dit_rope.spec import NormKind

pytestmark = pytest.mark.usefixtures("contract_backend")

EPS = 1e-6
RESULT, EVERY_STEP = NormRounding.RESULT, NormRounding.EVERY_STEP
# A sum in another order changes the scale of a head by a few units in the last place of float32, and so rounds a few
# values to their other neighbour. Another place of rounding changes a fifth of them.
MOST_DIFFERENT = 4e-3

every_norm = pytest.mark.parametrize("kind", list(NormKind), ids=lambda kind: kind.value)
both_roundings = pytest.mark.parametrize("rounding", [RESULT, EVERY_STEP], ids=lambda rounding: rounding.value)

CASES = [
    Case("bfloat16", tokens=21, dim=64, pairs=(12, 10, 10), exact=True),
    Case("bfloat16-half", tokens=21, dim=64, pairs=(12, 10, 10), pairing=HALF, exact=True),
    Case("float16", tokens=21, dim=128, pairs=(22, 21, 21), dtype=F16, exact=True),
    Case("float32", tokens=21, dim=64, pairs=(12, 10, 10), dtype=F32, exact=True),
    Case("table-of-the-data", tokens=21, dim=64, pairs=(12, 10, 10), table=torch.bfloat16, exact=True),
    Case("text-around", tokens=30, prefix=4, count=22, dim=80, pairs=(16, 12, 12), exact=True),
    Case("partial-half", tokens=21, dim=96, pairs=(8, 8, 8), pairing=HALF, exact=True),
    Case("other-head-counts", tokens=21, heads=(12, 3), dim=64, pairs=(12, 10, 10), exact=True),
    Case("each-heads-own-angles", tokens=21, dim=64, pairs=(32,), sizes=(21,), head_rows=21, exact=True),
]


def in_steps(x: torch.Tensor, norm: Norm, index: int) -> torch.Tensor:
    """The norm by single operations, each rounded where ``norm.rounding`` says, as a value of the dtype of ``x``."""
    across, wide = norm.kind.across_heads, x.float()
    dims = (-2, -1) if across else (-1,)
    if norm.kind.centred:
        wide = wide - wide.mean(dims, keepdim=True)
    y = wide * torch.rsqrt(wide.square().mean(dims, keepdim=True) + norm.eps)
    for parameters, combine in ((norm.weights, torch.mul), (norm.biases, torch.add)):
        if parameters:
            if norm.rounding is EVERY_STEP:
                y = y.to(x.dtype).float()
            parameter = parameters[index].float().cpu()
            y = combine(y, parameter.view(x.shape[-2:]) if across else parameter)
    return y.to(x.dtype)


def check(xs: Sequence[torch.Tensor], norm: Norm, args: RotationArgs, outs: Sequence[torch.Tensor]) -> None:
    angles = dense(args, *xs[0].shape[:2], max(x.shape[2] for x in xs))
    inputs = copies(xs)
    MODULE.rotate(xs, args, outs, norm)
    for index, (x, out) in enumerate(zip(inputs, copies(outs), strict=True)):
        normed = in_steps(x, norm, index)
        dtype = torch.promote_types(x.dtype, args.rows.dtype) if args.exact else F32
        expected = formula(normed, angles.of(x), args.pairing, dtype).to(x.dtype)
        if x.dtype == F32:
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
            continue
        different = (out != expected).float().mean().item()
        assert different <= MOST_DIFFERENT, f"{different:.2%} of tensor {index} differs from the same steps in torch"
        # One normed value of a pair may be its neighbour, hence so may each product.
        step = torch.finfo(x.dtype).eps * normed.float().abs().amax(-1, keepdim=True)
        assert ((out.float() - expected.float()).abs() <= 2 * step).all()


def norm_of(case: Case, kind: NormKind, rounding: NormRounding) -> Norm:
    dtypes = (case.dtype, case.dtype)
    return Norm(kind, EPS, case.weights(kind, dtypes), case.biases(kind, dtypes), rounding)


@every_norm
@both_roundings
@named(CASES)
def test_norm_rounds_where_the_model_does(case: Case, rounding: NormRounding, kind: NormKind) -> None:
    xs = case.tensors()
    check(xs, norm_of(case, kind, rounding), case.args(), poisoned(xs))


@every_norm
@both_roundings
def test_norm_rounds_in_place(rounding: NormRounding, kind: NormKind) -> None:
    case = replace(CASES[0], prefix=2, tokens=23)
    xs = case.tensors()
    check(xs, norm_of(case, kind, rounding), case.args(), xs)


@every_norm
def test_rotation_after_it_may_be_fast(kind: NormKind) -> None:
    case = replace(CASES[0], exact=False)
    xs = case.tensors()
    check(xs, norm_of(case, kind, RESULT), case.args(), poisoned(xs))


@both_roundings
def test_norm_without_weights_rounds_once(rounding: NormRounding) -> None:
    case = CASES[0]
    xs = case.tensors()
    check(xs, Norm(NormKind.PER_HEAD, EPS, rounding=rounding), case.args(), poisoned(xs))


@both_roundings
def test_weights_of_another_dtype_take_part_in_float32(rounding: NormRounding) -> None:
    case = CASES[0]
    xs = case.tensors()
    weights = case.weights(NormKind.PER_HEAD, (F32, F16))
    check(xs, Norm(NormKind.PER_HEAD, EPS, weights, rounding=rounding), case.args(), poisoned(xs))


def test_roundings_differ() -> None:
    """The three roundings are three results, so that a backend that ignores them fails."""
    case = CASES[0]
    xs = case.tensors()
    results = []
    for rounding in NormRounding:
        outs = poisoned(xs)
        args = replace(case.args(), exact=rounding is not NormRounding.NONE)
        MODULE.rotate(xs, args, outs, norm_of(case, NormKind.PER_HEAD, rounding))
        results.append(outs[0].cpu())
    shares = [
        (one != other).float().mean().item() for one, other in zip(results, results[1:] + results[:1], strict=True)
    ]
    assert min(shares) > 0.05, shares
