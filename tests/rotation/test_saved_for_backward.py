"""What a backward pass keeps and gives: saved tensors, their versions and hooks, layouts, one gradient of two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import dit_rope
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
from dit_rope.compat import flashinfer, huggingface, vllm
from dit_rope.rotation import ops
from dit_rope.rotation_args import Norm, RotationArgs

MODES = pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
MODIFIED = "modified by an inplace operation"


@pytest.fixture
def table() -> RopeTable:
    return rope_table(RopeSpec((4, 2, 2)), Grid(2, 3, 2))


def tokens(*shape: int, **options: Any) -> torch.Tensor:
    return torch.randn(*(shape or (2, 12, 2, 8)), **options)


@pytest.mark.parametrize("written", ["positions", "rows"])
@pytest.mark.parametrize("normed", [False, True])
@MODES
def test_writes_before_a_backward_pass_are_noticed(table: RopeTable, written: str, normed: bool, exact: bool) -> None:
    positions, rows = table.positions().clone(), table.rows.clone()
    args = replace(table.args(positions=positions, exact=exact), rows=rows)
    x = tokens(requires_grad=True)
    (out,) = ops.rotate([x], args, Norm(NormKind.PER_HEAD, 1e-6) if normed else None)
    (positions if written == "positions" else rows)[..., :1].zero_()
    with pytest.raises(RuntimeError, match=MODIFIED):
        out.sum().backward()


@pytest.mark.parametrize("written", ["x", "weight"])
def test_writes_to_what_a_norm_needs_are_noticed(table: RopeTable, written: str) -> None:
    x, weight = tokens(), torch.ones(8, requires_grad=True)
    out = norm_rotate(x, table, weight)
    with torch.no_grad():
        (x if written == "x" else weight).mul_(2)
    with pytest.raises(RuntimeError, match=MODIFIED):
        out.sum().backward()


def test_cache_written_between_forward_and_backward_is_noticed() -> None:
    """As a cache that grows with the longest sequence so far."""
    cache, query = torch.randn(16, 8), tokens(5, 16, requires_grad=True)
    out, _ = flashinfer.apply_rope_with_cos_sin_cache(torch.arange(5), query, query, 8, cache)
    cache.mul_(2)
    with pytest.raises(RuntimeError, match=MODIFIED):
        out.sum().backward()


@MODES
def test_saved_tensors_go_through_hooks(table: RopeTable, exact: bool) -> None:
    x, weight, positions, grad = (
        tokens(requires_grad=True),
        torch.randn(8, requires_grad=True),
        table.positions(),
        tokens(),
    )

    def call() -> torch.Tensor:
        return norm_rotate(rotate(x, table, positions=positions, exact=exact), table, weight, positions=positions)

    expected = torch.autograd.grad(call(), (x, weight), grad)
    packed = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    for needed in (positions, table.rows, weight):
        assert any(saved.data_ptr() == needed.data_ptr() for saved in packed)
    with torch.autograd.graph.save_on_cpu():
        offloaded = call()
    for output in (out, offloaded):
        for actual, desired in zip(torch.autograd.grad(output, (x, weight), grad), expected, strict=True):
            assert torch.equal(actual, desired)


@pytest.mark.parametrize("reentrant", [False, True])
@MODES
def test_checkpoints_and_retained_graphs_give_the_same_gradient(table: RopeTable, exact: bool, reentrant: bool) -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        return norm_rotate(rotate(x, table, exact=exact), table).pow(2).sum()

    x = tokens(requires_grad=True)
    loss = call(x)
    expected = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)
    checkpoint(call, x, use_reentrant=reentrant).backward()
    assert torch.equal(x.grad, expected)


@MODES
def test_tables_and_positions_of_inference_mode_train(exact: bool) -> None:
    """Autograd saves no tensor of inference mode: copies are."""
    table = rope_table(RopeSpec((4, 2, 2)), Grid(2, 3, 2))
    with torch.inference_mode():
        positions = table.positions().flip(1)
        rows = table.rows.clone()
    x, grad = tokens(requires_grad=True), tokens()
    args = replace(table.args(positions=positions, exact=exact), rows=rows)
    (actual,) = torch.autograd.grad(ops.rotate([x], args)[0], x, grad)
    (expected,) = torch.autograd.grad(rotate(x, table, positions=positions.clone(), exact=exact), x, grad)
    assert torch.equal(actual, expected)


@MODES
def test_only_what_depends_on_a_leaf_requires_grad(table: RopeTable, exact: bool) -> None:
    q, k, weight = tokens(requires_grad=True), tokens(), torch.ones(8, requires_grad=True)
    for tensors, required in (((q, k), (True, False)), ((k, q), (False, True)), ((q, q * 2), (True, True))):
        assert tuple(out.requires_grad for out in rotate_qk(*tensors, table, exact=exact)) == required
        assert tuple(out.requires_grad for out in norm_rotate_qk(*tensors, table, exact=exact)) == required
    outs = norm_rotate_qk(k, k.clone(), table, None, weight, exact=exact)
    assert [out.requires_grad for out in outs] == [False, True]
    sum(out.sum() for out in rotate_qk(q, k, table, exact=exact)).backward()
    assert q.grad is not None


@pytest.mark.parametrize("pairing", Pairing)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_gradient_lies_in_memory_as_what_it_is_of(pairing: Pairing, dtype: torch.dtype) -> None:
    """Attention gives ``[B, H, S, D]`` gradients, of which later sums depend on where numbers lie."""
    table = rope_table(RopeSpec((4, 2), pairing=pairing), Grid(2, 3))
    x = tokens(2, 6, 3, 8).to(dtype).requires_grad_()
    for grad in (tokens(2, 3, 6, 8).transpose(1, 2), tokens(2, 6, 3, 8), tokens(1, 6, 3, 8).expand(2, -1, -1, -1)):
        (back,) = torch.autograd.grad(rotate(x, table, exact=True), x, grad.to(dtype))
        assert back.stride() == torch.empty_like(grad.to(dtype)).stride()


@pytest.mark.parametrize("backend", ["eager", "cuda"])
@MODES
def test_gradients_may_be_views_of_any_kind(cuda_on_cpu: object, table: RopeTable, backend: str, exact: bool) -> None:
    """Lazily negated, expanded, strided in the last dim: a kernel that read their memory would read something else."""
    x, weight, plain = tokens(requires_grad=True), torch.randn(8, requires_grad=True), tokens()
    negated = torch._neg_view(-plain)
    assert negated.is_neg()
    strided = torch.stack((plain, tokens()), dim=-1)[..., 0]
    calls: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: rotate(x, table, exact=exact, backend=backend),
        lambda: norm_rotate(x, table, weight, backend=backend),
    )
    for call in calls:
        expected = torch.autograd.grad(call(), x, plain)[0]
        for grad in (negated, strided):
            assert torch.equal(torch.autograd.grad(call(), x, grad)[0], expected)
        ones = torch.autograd.grad(call(), x, torch.ones_like(plain))[0]
        assert torch.equal(torch.autograd.grad(call(), x, torch.ones(()).expand(plain.shape))[0], ones)


def test_every_backend_is_torchs_operations_under_a_transform(cuda_on_cpu: object, table: RopeTable) -> None:
    x, v = tokens(), tokens()
    q, k = tokens(requires_grad=True), tokens(requires_grad=True)
    results = []
    for backend in ("cuda", "eager"):

        def call(x: torch.Tensor, backend: str = backend) -> torch.Tensor:
            return norm_rotate(rotate(x, table, backend=backend), table, backend=backend)

        outs = rotate_qk(q, k, table, backend=backend)
        many = torch.autograd.grad(outs, (q, k), (torch.stack((x, v)),) * 2, is_grads_batched=True)
        results.append([*torch.func.jvp(call, (x,), (v,)), torch.func.vmap(call)(torch.stack((x, v))), *many])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def calls_of_others() -> dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]]:
    """A function of one tensor, in the signature of another library, and what to call it with."""
    angles = torch.randn(1, 6, 4)
    cos, sin = (torch.cat((table, table), dim=-1) for table in (angles.cos(), angles.sin()))
    pairs = tuple(table[0, :, :4].repeat_interleave(2, dim=-1) for table in (cos, sin))
    cache, positions = torch.randn(16, 8), torch.randint(0, 16, (6,))

    def in_place(function: Callable[..., Any], *arguments: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def call(x: torch.Tensor) -> torch.Tensor:
            query, key = x.clone(), x.clone()
            function(positions, query, key, *arguments) if arguments else function(query, key, [0, 2, 6], [3, 1])
            return query + key

        return call

    flat, heads = torch.randn(6, 16), torch.randn(6, 2, 8)
    return {
        "transformers": (lambda x: huggingface.apply_rotary_pos_emb(x, x * 2, cos, sin)[1], torch.randn(2, 3, 6, 8)),
        "diffusers": (lambda x: huggingface.apply_rotary_emb(x, pairs), torch.randn(2, 3, 6, 8)),
        "complex": (
            lambda x: huggingface.apply_rotary_emb(x, torch.complex(cos, sin)[0, :, :4], use_real=False),
            torch.randn(2, 6, 3, 8),
        ),
        "vllm": (in_place(vllm.rotary_embedding, 8, cache, True), flat),
        "flashinfer": (lambda x: flashinfer.apply_rope_with_cos_sin_cache(positions, x, x * 2, 8, cache)[1], flat),
        "flashinfer in place": (in_place(flashinfer.apply_rope_with_cos_sin_cache_inplace, 8, cache), flat),
        "flashinfer without a cache": (lambda x: flashinfer.apply_rope(x, x, [0, 2, 6], [3, 1])[0], heads),
        "flashinfer without a cache, in place": (in_place(flashinfer.apply_rope_inplace), heads),
    }


@pytest.mark.parametrize("name", calls_of_others())
def test_functions_of_other_libraries_have_tangents_and_batches(name: str) -> None:
    """They are linear: the tangent is what they make of the tangent; either way float32 products rounded alike."""
    call, x = calls_of_others()[name]
    v = torch.randn_like(x)
    with torch.no_grad():
        expected = call(v)
    bound = 8 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (torch.func.jvp(call, (x,), (v,))[1] - expected).abs().max() <= bound
    assert (torch.func.vmap(call)(torch.stack((x, v)))[1] - expected).abs().max() <= bound


@pytest.mark.parametrize("name", ["transformers", "diffusers", "complex", "flashinfer", "flashinfer without a cache"])
def test_functions_of_other_libraries_have_second_derivatives(name: str) -> None:
    call, x = calls_of_others()[name]
    v = torch.randn_like(x)

    def power(x: torch.Tensor) -> torch.Tensor:
        return (call(x) ** 4).sum()

    actual = torch.autograd.functional.hvp(power, x, v)[1]
    expected = torch.func.jvp(torch.func.grad(power), (x,), (v,))[1]
    assert expected.abs().max() > 1
    # Two float32 computations of the same numbers, a hundred roundings each.
    assert (actual - expected).abs().max() <= 100 * torch.finfo(torch.float32).eps * expected.abs().max()


def test_positions_over_rewritten_memory_are_read_again() -> None:
    """A new tensor over an old buffer has the address and the version of the one before."""
    np = pytest.importorskip("numpy", exc_type=ImportError)
    dit_rope.cache_clear()
    table, x = rope_table(RopeSpec((4, 2, 2)), Grid(2, 3, 2)), tokens()
    buffer = table.positions().numpy().copy()
    positions = torch.from_numpy(buffer)
    for order in (np.arange(12), np.arange(12)[::-1], np.roll(np.arange(12), 5)):
        buffer[:] = table.positions().numpy()[:, order]
        expected = rotate(x, table, positions=torch.tensor(buffer))
        assert torch.equal(rotate(x, table, positions=torch.from_numpy(buffer)), expected)
        assert torch.equal(rotate(x, table, positions=positions), expected)


def test_rows_over_rewritten_memory_are_read_again() -> None:
    table, x = rope_table(RopeSpec((4, 2, 2)), Grid(2, 3, 2)), tokens()
    buffer = table.rows.numpy().copy()
    for factor in (1, 2, 3):
        buffer[:] = table.rows.numpy() * factor
        (actual,) = ops.rotate([x], replace(table.args(), rows=torch.from_numpy(buffer)))
        (expected,) = ops.rotate([x], replace(table.args(), rows=torch.tensor(buffer)))
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("pairing", Pairing)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@MODES
def test_tokens_of_negative_rows_keep_infinities_and_zeros(pairing: Pairing, dtype: torch.dtype, exact: bool) -> None:
    """By (1, 0) an infinity makes its neighbour NaN, and -0.0 becomes 0.0. Gradients keep theirs too."""
    table = rope_table(RopeSpec((4, 2), pairing=pairing), Grid(2, 3))
    positions = table.positions().repeat(2, 1, 1)
    positions[0, 1], positions[1, 4], positions[1, 2, 1] = -1, -1, -1
    x = tokens(2, 6, 2, 7).to(dtype)
    x[0, 1, 0, 0], x[0, 1, 1], x[1, 4] = torch.inf, -0.0, torch.nan
    second = [2, 5] if pairing is Pairing.HALF else [4, 5]  # the pair of axis 1, in either order of channels
    x[1, 2, :, second] = torch.tensor([torch.inf, -0.0]).to(dtype)

    def check(out: torch.Tensor) -> None:
        as_bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
        for index in ((0, 1), (1, 4), (1, 2, slice(None), second)):
            unchanged = out[index].view(as_bits) == x[index].view(as_bits)
            assert (unchanged | (out[index].isnan() & x[index].isnan())).all()  # one NaN is like another
        assert out[0, 2:].isfinite().all()

    check(rotate(x, table, positions=positions, exact=exact))
    check(rotate(x.clone(), table, positions=positions, exact=exact, inplace=True))
    check(torch.func.jvp(lambda x: rotate(x, table, positions=positions, exact=exact), (x,), (x,))[0])
    leaf = torch.zeros_like(x, requires_grad=True)
    check(torch.autograd.grad(rotate(leaf, table, positions=positions, exact=exact), leaf, x)[0])


@MODES
def test_padding_of_a_shard_keeps_infinities(exact: bool) -> None:
    x = tokens(1, 4, 1, 4)
    x[0, 2:] = torch.tensor([torch.inf, -0.0, 1.0, -torch.inf])
    index = ((2,), (2,), (0,), 0, 0, 4, Pairing.INTERLEAVED, False, exact)
    angles = torch.randn(2, 2)
    args = RotationArgs(torch.stack((angles.cos(), angles.sin())), None, *index)
    (out,) = ops.rotate([x], args)
    assert torch.equal(out[0, 2:].view(torch.int32), x[0, 2:].view(torch.int32))
    assert not torch.equal(out[0, :2], x[0, :2])
