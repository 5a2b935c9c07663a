"""The operators: schemas, fakes, gradients, and tracing by torch.compile."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

import model_code
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
from dit_rope.rotation_args import Norm, NormRounding, RotationArgs
from tolerance import assert_within


@pytest.fixture
def table() -> RopeTable:
    return rope_table(RopeSpec((4, 2, 2)), Grid(2, 3, 2))


def flat(table: RopeTable, **kwargs: bool) -> tuple[object, ...]:
    return (*ops._flatten(table.args(**kwargs)), "eager")


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotate_passes_opcheck(table: RopeTable, dtype: torch.dtype, exact: bool) -> None:
    xs = [torch.randn(2, 12, heads, 10, dtype=dtype, requires_grad=True) for heads in (3, 1)]
    torch.library.opcheck(torch.ops.dit_rope.rotate.default, (xs, *flat(table, exact=exact)))


def test_rotate_inplace_passes_opcheck(table: RopeTable) -> None:
    xs = [torch.randn(2, 12, heads, 10) for heads in (3, 1)]
    torch.library.opcheck(torch.ops.dit_rope.rotate_.default, (xs, *flat(table)))


@pytest.mark.parametrize("norm", NormKind)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rounding", NormRounding)
def test_norm_rotate_passes_opcheck(table: RopeTable, norm: NormKind, weighted: bool, rounding: NormRounding) -> None:
    xs = [torch.randn(2, 12, heads, 10, requires_grad=True) for heads in (3, 1)]
    sizes = [30, 10] if norm.across_heads else [10, 10]
    weights = [torch.randn(size, requires_grad=True) for size in sizes] if weighted else []
    biases = [torch.randn(size, requires_grad=True) for size in sizes] if norm.centred else []
    exact = rounding is not NormRounding.NONE
    arguments = (xs, weights, biases, 1e-6, norm.value, rounding.value, *flat(table, exact=exact))
    torch.library.opcheck(torch.ops.dit_rope.norm_rotate.default, arguments)


def test_norm_rotate_inplace_passes_opcheck(table: RopeTable) -> None:
    xs, weights = [torch.randn(2, 12, 3, 10)], [torch.randn(10)]
    arguments = (xs, weights, [], 1e-6, "per_head", "none", *flat(table))
    torch.library.opcheck(torch.ops.dit_rope.norm_rotate_.default, arguments)


@pytest.mark.parametrize("pairing", Pairing)
@pytest.mark.parametrize("exact", [False, True])
def test_rotate_passes_gradcheck(pairing: Pairing, exact: bool) -> None:
    table = rope_table(RopeSpec((4, 2, 2), pairing=pairing), Grid(2, 3, 2), dtype=torch.float64)
    q, k = (torch.randn(1, 15, heads, 10, dtype=torch.float64, requires_grad=True) for heads in (2, 1))

    def rotated(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rotate_qk(q, k, table, prefix=2, suffix=1, exact=exact)

    assert torch.autograd.gradcheck(rotated, (q, k))
    assert torch.autograd.gradgradcheck(lambda q: rotate(q, table, prefix=2, suffix=1), (q,))


@pytest.mark.parametrize("norm", NormKind)
@pytest.mark.parametrize("exact", [False, True])
def test_norm_rotate_passes_gradcheck(norm: NormKind, exact: bool) -> None:
    table = rope_table(RopeSpec((4, 2, 2)), Grid(2, 3, 2), dtype=torch.float64)
    q, k = (torch.randn(1, 14, heads, 10, dtype=torch.float64, requires_grad=True) for heads in (2, 1))
    sizes = (20, 10) if norm.across_heads else (10, 10)
    sizes = (*sizes, *sizes) if norm.centred else sizes
    parameters = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]

    def rotated(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, q_weight, k_weight, *biases = tensors
        options = dict(zip(("q_bias", "k_bias"), biases, strict=False))
        return norm_rotate_qk(q, k, table, q_weight, k_weight, norm=norm, prefix=1, suffix=1, exact=exact, **options)

    assert torch.autograd.gradcheck(rotated, (q, k, *parameters))
    assert torch.autograd.gradcheck(lambda x: norm_rotate(x, table, norm=norm, prefix=1, suffix=1), (q,))


def own_angles(heads: int, exact: bool, dtype: torch.dtype) -> RotationArgs:
    """Angles of 4 pairs for each of ``heads``, of 12 tokens after one that does not rotate."""
    angles = torch.randn(heads * 12, 4, dtype=torch.float64)
    rows = torch.stack((angles.cos(), angles.sin())).to(dtype)
    return RotationArgs.of_rows(rows, None, (4,), 12, Pairing.INTERLEAVED, prefix=1, exact=exact, head_rows=12)


@pytest.mark.parametrize("exact", [False, True])
def test_own_angles_of_heads_pass_gradcheck_and_opcheck(exact: bool) -> None:
    args = own_angles(3, exact, torch.float64)
    xs = tuple(torch.randn(1, 14, heads, 10, dtype=torch.float64, requires_grad=True) for heads in (3, 2))
    assert torch.autograd.gradcheck(lambda *xs: tuple(ops.rotate(xs, args)), xs)
    torch.library.opcheck(torch.ops.dit_rope.rotate.default, (list(xs), *ops._flatten(args), "eager"))


@pytest.mark.parametrize("norm", NormKind)
def test_norms_by_own_angles_of_heads_pass_gradcheck(norm: NormKind) -> None:
    args = own_angles(3, False, torch.float64)
    x = torch.randn(1, 14, 3, 10, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(30 if norm.across_heads else 10, dtype=torch.float64) for _ in range(2))
    weight.requires_grad_()
    bias.requires_grad_(norm.centred)

    def rotated(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return ops.rotate([x], args, Norm(norm, 1e-6, [weight], [bias] if norm.centred else ()))[0]

    assert torch.autograd.gradcheck(rotated, (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_gradient_is_torchs(dtype: torch.dtype) -> None:
    """Of one rotation that rotates nothing, so that only the roundings of the norm are left."""
    table = rope_table(RopeSpec((4, 2, 2)), Grid(1, 1, 1))
    x, grad = torch.randn(2, 40, 3, 10).to(dtype).requires_grad_(), torch.randn(2, 40, 3, 10).to(dtype)
    weight, bias = (torch.randn(10).to(dtype).requires_grad_() for _ in range(2))
    out = norm_rotate(x, table, weight, bias=bias, norm=NormKind.LAYER_PER_HEAD, suffix=39)
    actual = torch.autograd.grad(out, (x, weight, bias), grad)
    expected, naive = (layer_norm_gradient(x, weight, bias, grad, wide) for wide in (torch.float64, torch.float32))
    for got, exact, single in zip(actual, expected, naive, strict=True):
        assert got.dtype == dtype
        assert_within(got, exact, single)


def layer_norm_gradient(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, grad: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    wide = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, weight, bias)]
    out = torch.nn.functional.layer_norm(wide[0], weight.shape, wide[1], wide[2], 1e-6)
    return torch.autograd.grad(out, wide, grad.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_gradient_equals_the_model_codes(table: RopeTable, dtype: torch.dtype) -> None:
    x = torch.randn(2, 12, 3, 8).to(dtype).requires_grad_()
    grad = torch.randn(2, 12, 3, 8).to(dtype)
    (expected,) = torch.autograd.grad(model_code.wan(x, *table.cos_sin(broadcast=True)), x, grad)
    (actual,) = torch.autograd.grad(rotate(x, table, exact=True), x, grad)
    assert torch.equal(actual, expected)


def test_gradients_are_none_for_an_output_nobody_used(table: RopeTable) -> None:
    q, k = (torch.randn(1, 12, 2, 8, requires_grad=True) for _ in range(2))
    rotated, _ = rotate_qk(q, k, table)
    rotated.sum().backward()
    assert q.grad is not None
    assert k.grad is None or not k.grad.any()


@pytest.mark.parametrize("exact", [False, True])
def test_compiled_rotation_equals_eager_without_a_graph_break(table: RopeTable, exact: bool) -> None:
    torch._dynamo.reset()
    q, k, weight = torch.randn(1, 12, 3, 8), torch.randn(1, 12, 1, 8), torch.randn(8)

    def rotated(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = rotate_qk(q, k, table, exact=exact)
        q, k = norm_rotate_qk(q * 2, k, table, weight)
        return norm_rotate_qk(q, k, table, k_bias=weight, norm=NormKind.LAYER_PER_HEAD)

    compiled = torch.compile(rotated, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(compiled(q, k), rotated(q, k), strict=True):
        assert torch.equal(actual, expected)


def test_compiled_rotation_in_place_equals_eager(table: RopeTable) -> None:
    torch._dynamo.reset()
    q, k = torch.randn(1, 12, 3, 8), torch.randn(1, 12, 1, 8)
    expected = rotate_qk(q, k, table)

    def rotated(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rotate_qk(q, k, table, inplace=True)

    actual = torch.compile(rotated, backend="inductor", fullgraph=True)(q, k)
    for got, written, exact in zip(actual, (q, k), expected, strict=True):
        assert torch.equal(got, exact)
        assert torch.equal(written, exact)


def test_compile_traces_as_the_first_call_of_a_process() -> None:
    program = """
        import torch, dit_rope
        table = dit_rope.rope_table(dit_rope.RopeSpec((4, 2, 2)), dit_rope.Grid(2, 3, 2))
        compiled = torch.compile(lambda q, k: dit_rope.rotate_qk(q, k, table), backend="aot_eager", fullgraph=True)
        q, k = torch.randn(1, 12, 3, 8), torch.randn(1, 12, 1, 8)
        first = compiled(q, k)
        assert all(torch.equal(a, b) for a, b in zip(first, dit_rope.rotate_qk(q, k, table)))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=300)
