"""The eager backend: exact mode to the bit, fast mode within the bound, whatever the shape, stride or dtype."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dit_rope
import model_code
import oracle
from contract_calls import run_contract
from dit_rope import Grid, NormKind, Pairing, RopeSpec, RopeTable, rope_table
from dit_rope.rotation import reference
from dit_rope.rotation.backends import cos_sin, eager
from dit_rope.rotation_args import Norm, RotationArgs
from tolerance import assert_within

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}


def table_of(
    dims: tuple[int, ...] = (6, 4, 4),
    grid: Grid | None = None,
    pairing: Pairing = Pairing.INTERLEAVED,
    **kwargs: object,
) -> RopeTable:
    return rope_table(RopeSpec(dims, pairing=pairing), grid or Grid(3, 4, 5), **kwargs)


def run(xs: list[torch.Tensor], table: RopeTable, exact: bool, **kwargs: object) -> list[torch.Tensor]:
    outs = [torch.full_like(x, torch.nan) for x in xs]
    eager.rotate(xs, table.args(exact=exact, **kwargs), outs)
    return outs


def test_eager_keeps_the_contract(device: str) -> None:
    run_contract("eager", device)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=NAMES.get)
@pytest.mark.parametrize("pairs", range(1, 36))
def test_exact_equals_wan_code_on_every_lane_and_tail(pairs: int, dtype: torch.dtype, table_dtype: torch.dtype) -> None:
    """Rows of 1 to 35 pairs put every element once in a full vector and once in a tail, for AVX2 and AVX-512."""
    table = table_of((2 * pairs,), Grid(13), dtype=table_dtype)
    x = torch.randn(2, 13, 3, 2 * pairs).to(dtype)
    cos, sin = table.cos_sin(broadcast=True)
    (out,) = run([x], table, exact=True)
    assert torch.equal(out, model_code.wan(x, cos, sin))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_exact_equals_wan_code_however_threads_split_the_work(dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    table = table_of((44, 42, 42), Grid(3, 11, 17))
    x = torch.randn(1, 561, 3, 128).to(dtype)
    try:
        torch.set_num_threads(threads)
        (out,) = run([x], table, exact=True)
        assert torch.equal(out, model_code.wan(x, *table.cos_sin(broadcast=True)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=NAMES.get)
def test_exact_equals_rotate_half_code(dtype: torch.dtype) -> None:
    table = table_of(pairing=Pairing.HALF)
    x = torch.randn(2, 60, 3, 14).to(dtype)
    (out,) = run([x], table, exact=True)
    assert torch.equal(out, model_code.rotate_half(x, *table.cos_sin(broadcast=True)))


@pytest.mark.parametrize("pairing", Pairing)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("inverse", [False, True])
def test_rotate_is_within_the_bound_of_float64(
    pairing: Pairing, dtype: torch.dtype, exact: bool, inverse: bool
) -> None:
    """Two heads of keys for three of queries, and two channels per head that do not rotate."""
    table = table_of(pairing=pairing)
    xs = [torch.randn(16, 60, heads, 16).to(dtype) for heads in (3, 2)]
    outs = run(xs, table, exact, inverse=inverse)
    cos, sin = table.cos_sin(repeat=False)
    for x, out in zip(xs, outs, strict=True):
        truth = oracle.rotate(x, cos, sin, interleaved=pairing is Pairing.INTERLEAVED, inverse=inverse)
        wide = x.to(torch.promote_types(dtype, torch.float32))
        naive = reference.rotated(wide, cos[None, :, None], (-sin if inverse else sin)[None, :, None], pairing)
        assert_within(out, truth, naive)
        assert torch.equal(out[..., 14:], x[..., 14:])


def test_rotate_chunks_of_any_size_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of()
    x = torch.randn(1, 64, 3, 16).bfloat16()
    (whole,) = run([x], table, exact=True, prefix=2)
    for size in (1, 1000, 5000):
        monkeypatch.setattr(eager, "CHUNK_BYTES", size)
        assert torch.equal(run([x], table, exact=True, prefix=2)[0], whole)


@pytest.mark.parametrize("exact", [True, False])
def test_rotate_leaves_prefix_and_suffix_as_they_are(exact: bool) -> None:
    table = table_of()
    x = torch.randn(2, 3 + 60 + 4, 3, 14)
    (out,) = run([x], table, exact, prefix=3)
    (middle,) = run([x[:, 3:63]], table, exact)
    assert torch.equal(out[:, :3], x[:, :3])
    assert torch.equal(out[:, 3:63], middle)
    assert torch.equal(out[:, 63:], x[:, 63:])


def test_positions_gather_rows_per_batch_and_negative_ones_do_not_rotate() -> None:
    table = table_of()
    order = torch.stack((torch.randperm(60), torch.randperm(60)))
    positions = table.positions()[0][order]
    positions[1, 7] = -1
    positions[0, 5, 1] = -1
    x = torch.randn(2, 60, 3, 14)
    (out,) = run([x], table, exact=False, positions=positions)
    cos, sin = (part[order].clone() for part in table.cos_sin(repeat=False))
    cos[1, 7], sin[1, 7] = 1.0, 0.0
    cos[0, 5, 3:5], sin[0, 5, 3:5] = 1.0, 0.0
    naive = reference.rotated(x, cos[:, :, None], sin[:, :, None], Pairing.INTERLEAVED)
    assert_within(out, oracle.rotate(x, cos, sin, interleaved=True), naive)


def views(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One ``[2, 60, 3, 14]`` tensor in several memory layouts."""
    return {
        "packed": torch.randn(2, 60, 3, 3 * 14).to(dtype)[..., 14:28],
        "transposed": torch.randn(2, 3, 60, 14).to(dtype).transpose(1, 2),
        "odd": torch.randn(2, 60, 3, 17).to(dtype)[..., 1:15],
        "expanded": torch.randn(1, 60, 1, 14).to(dtype).expand(2, 60, 3, 14),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("pairing", Pairing)
@pytest.mark.parametrize("layout", ["packed", "transposed", "odd", "expanded"])
def test_strided_views_give_the_bits_of_contiguous_ones(layout: str, pairing: Pairing, dtype: torch.dtype) -> None:
    table = table_of(pairing=pairing)
    x = views(dtype)[layout]
    (expected,) = run([x.contiguous()], table, exact=True)
    assert torch.equal(run([x], table, exact=True)[0], expected)
    if layout != "expanded":
        eager.rotate([x], table.args(exact=True), [x])
        assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("pairing", Pairing)
@pytest.mark.parametrize("layout", ["packed", "transposed", "odd"])
def test_strided_views_in_place_are_within_the_bound(layout: str, pairing: Pairing, dtype: torch.dtype) -> None:
    table = table_of(pairing=pairing)
    x = views(dtype)[layout]
    cos, sin = table.cos_sin(repeat=False)
    truth = oracle.rotate(x, cos, sin, interleaved=pairing is Pairing.INTERLEAVED)
    naive = reference.rotated(x.float(), cos[None, :, None], sin[None, :, None], pairing)
    eager.rotate([x], table.args(), [x])
    assert_within(x, truth, naive)


@pytest.mark.parametrize("norm", NormKind)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=NAMES.get)
@pytest.mark.parametrize("weighted", [True, False])
def test_norm_rotate_is_within_the_bound_of_float64(norm: NormKind, dtype: torch.dtype, weighted: bool) -> None:
    table = table_of()
    across = norm.across_heads
    xs = [3 * torch.randn(16, 2 + 60 + 1, heads, 16).to(dtype) for heads in (3, 2)]
    weights = [torch.randn(x.shape[2] * 16 if across else 16).to(dtype) if weighted else None for x in xs]
    biases = [torch.randn(weight.shape).to(dtype) for weight in weights if weight is not None and norm.centred]
    outs = [torch.full_like(x, torch.nan) for x in xs]
    eager.rotate(xs, table.args(prefix=2), outs, Norm.of(xs, norm, 1e-6, weights, biases))
    cos, sin = (torch.nn.functional.pad(part, (0, 0, 2, 1)) for part in table.cos_sin(repeat=False))
    cos[:2], cos[-1:] = 1.0, 1.0
    for x, weight, bias, out in zip(xs, weights, biases or [None, None], outs, strict=True):
        normed = oracle.norm(x, weight, bias, 1e-6, across_heads=across, centred=norm.centred)
        truth = oracle.rotate(normed, cos, sin, interleaved=True)
        wide = x.to(torch.promote_types(dtype, torch.float32))
        dims = (-2, -1) if across else (-1,)
        wide = wide - wide.mean(dims, keepdim=True) if norm.centred else wide
        naive = wide * torch.rsqrt(wide.square().mean(dims, keepdim=True) + 1e-6)
        if weight is not None:
            naive = naive * (weight.view(x.shape[2:]) if across else weight)
        if bias is not None:
            naive = naive + (bias.view(x.shape[2:]) if across else bias)
        assert_within(out, truth, reference.rotated(naive, cos[None, :, None], sin[None, :, None], Pairing.INTERLEAVED))


def test_norm_rotate_in_place_gives_the_same_bits() -> None:
    table = table_of()
    x = torch.randn(2, 63, 3, 16).bfloat16()
    weight, out = torch.randn(48).bfloat16(), torch.empty_like(x)
    eager.rotate([x], table.args(prefix=1), [out], Norm(NormKind.ACROSS_HEADS, 1e-6, [weight]))
    eager.rotate([x], table.args(prefix=1), [x], Norm(NormKind.ACROSS_HEADS, 1e-6, [weight]))
    assert torch.equal(x, out)


def test_rotate_takes_no_tokens() -> None:
    table = table_of()
    (out,) = run([torch.randn(2, 0, 3, 14)], table, exact=False, positions=table.positions()[:, :0])
    assert out.shape == (2, 0, 3, 14)


@pytest.mark.parametrize("norm", NormKind)
def test_norm_rotate_in_float64_is_exact_to_its_roundings(norm: NormKind) -> None:
    """The oracle rounds too, so that the bound is 16 roundings: fewer than norm and rotation do in both together."""
    table = table_of(dtype=torch.float64)
    x = torch.randn(2, 60, 3, 16, dtype=torch.float64)
    out = torch.full_like(x, torch.nan)
    eager.rotate([x], table.args(), [out], Norm(norm, 1e-6))
    normed = oracle.norm(x, None, None, 1e-6, across_heads=norm.across_heads, centred=norm.centred)
    truth = oracle.rotate(normed, *table.cos_sin(repeat=False), interleaved=True)
    assert (out - truth).abs().max() <= 16 * torch.finfo(torch.float64).eps * truth.abs().max()


def test_second_call_finds_its_angles() -> None:
    dit_rope.cache_clear()
    table = table_of()
    positions = table.positions()
    x = torch.randn(2, 60, 3, 14)
    for kwargs in ({}, {"positions": positions}, {"inverse": True}):
        for _ in range(2):
            run([x], table, exact=True, **kwargs)
    info = dit_rope.cache_info().expanded
    assert (info.misses, info.hits, info.entries) == (3, 3, 3)


@pytest.mark.parametrize("what", ["rows", "positions"])
def test_angles_follow_a_write_to_what_they_came_from(what: str) -> None:
    table = table_of()
    rows, positions = table.rows.clone(), table.positions().clone()
    args = dataclasses.replace(table.args(positions=positions), rows=rows)
    x, before, after = torch.randn(2, 60, 3, 14), torch.empty(2, 60, 3, 14), torch.empty(2, 60, 3, 14)
    eager.rotate([x], args, [before])
    if what == "rows":
        rows[1].neg_()
    else:
        positions[:] = positions.flip(1)
    # Rows are known as the tensor that they are, positions by their values.
    told = pytest.warns(RuntimeWarning, match="expanded table cache was written to in place")
    with told if what == "rows" else contextlib.nullcontext():
        eager.rotate([x], args, [after])
    assert not torch.equal(after, before)
    dit_rope.cache_clear()
    eager.rotate([x], args, [before])
    assert torch.equal(after, before)


def test_angles_are_not_those_of_freed_memory() -> None:
    """Each turn frees its positions; were their address all that is remembered, the next would hit."""
    dit_rope.cache_clear()
    table = table_of()
    x = torch.randn(1, 60, 3, 14)
    for seed in range(20):
        positions = table.positions()[:, torch.randperm(60, generator=torch.Generator().manual_seed(seed))]
        (out,) = run([x], table, exact=True, positions=positions)
        cos, sin = cos_sin.dense_cos_sin(table.args(positions=positions), 60)
        assert torch.equal(out, reference.rotated(x, cos, sin, Pairing.INTERLEAVED))


def test_angles_of_inference_tensors_are_not_kept() -> None:
    """They have no version counter, so that a write to them would go unseen."""
    dit_rope.cache_clear()
    table = table_of()
    x = torch.randn(1, 60, 3, 14)
    with torch.inference_mode():
        args = dataclasses.replace(table.args(exact=True), rows=table.rows.clone())
        eager.rotate([x], args, [torch.empty_like(x)])
    assert dit_rope.cache_info().expanded.entries == 0


def own_angles(heads: int, tokens: int, dtype: torch.dtype = torch.float32, **kwargs: object) -> RotationArgs:
    """Angles of 7 pairs for each of ``heads``, token after token; the positions are row numbers of head 0."""
    rows = torch.randn(2, tokens * heads, 7, dtype=dtype)
    positions = torch.arange(0, tokens * heads, heads, dtype=torch.int32)[None, :, None]
    where = {"pairs": (7,), "sizes": (0,), "first_rows": (0,), "token_offset": 0, "prefix": 0, "count": tokens}
    flags = {"pairing": Pairing.INTERLEAVED, "inverse": False, "exact": True, "head_rows": 1}
    return RotationArgs(rows, positions, **{**where, **flags, **kwargs})


def test_dense_cos_sin_of_every_head() -> None:
    args = own_angles(3, 20, prefix=2)
    args.positions[0, 4] = -1
    cos, sin = cos_sin.dense_cos_sin(args, 25, heads=2)
    assert cos.shape == sin.shape == (1, 25, 2, 7)
    expected = args.rows.view(2, 20, 3, 7)[:, :, :2].clone()
    expected[0, 4], expected[1, 4] = 1.0, 0.0
    assert torch.equal(cos[0, 2:22], expected[0])
    assert torch.equal(sin[0, 2:22], expected[1])
    for unrotated in (slice(2), slice(22, None), 6):
        assert (cos[0, unrotated] == 1.0).all()
        assert not sin[0, unrotated].any()


@pytest.mark.parametrize("pairing", Pairing)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_exact_by_each_heads_angles_equals_the_reference(pairing: Pairing, dtype: torch.dtype) -> None:
    """As LTX and Mochi have them: products and their sum in float32."""
    args = own_angles(3, 20, pairing=pairing)
    q, k = (torch.randn(2, 20, heads, 16).to(dtype) for heads in (3, 2))
    outs = [torch.full_like(x, torch.nan) for x in (q, k)]
    eager.rotate([q, k], args, outs)
    cos, sin = args.rows.view(2, 1, 20, 3, 7)
    assert torch.equal(outs[0], reference.rotated(q, cos, sin, pairing))
    assert torch.equal(outs[1], reference.rotated(k, cos[:, :, :2], sin[:, :, :2], pairing))


def test_each_heads_angles_are_found_again() -> None:
    """For as many heads as a call has: gathering them takes as long as the rotation."""
    dit_rope.cache_clear()
    args = own_angles(3, 20)
    x, more = torch.randn(1, 20, 2, 14), torch.randn(1, 20, 3, 14)
    for xs in ([x], [x, more], [more, x]):
        for _ in range(2):
            eager.rotate(xs, args, [torch.empty_like(x) for x in xs])
    info = dit_rope.cache_info().expanded
    assert (info.misses, info.hits, info.entries) == (2, 4, 2)


@pytest.mark.parametrize("norm", NormKind)
def test_norm_rotate_by_chunks_gives_the_same_bits(norm: NormKind, monkeypatch: pytest.MonkeyPatch) -> None:
    args = own_angles(3, 20, exact=False, prefix=2)
    xs = [torch.randn(1, 23, heads, 16).bfloat16() for heads in (2, 3)]
    outs = [[torch.full_like(x, torch.nan) for x in xs] for _ in range(4)]
    eager.rotate(xs, args, outs[0], Norm(norm, 1e-6))
    for out, size in zip(outs[1:], (1, 1000, 1500), strict=True):
        monkeypatch.setattr(eager, "CHUNK_BYTES", size)
        eager.rotate(xs, args, out, Norm(norm, 1e-6))
        assert all(map(torch.equal, out, outs[0]))


class NoFloat64NorComplex(TorchDispatchMode):
    """What Apple's and Ascend's devices are to PyTorch, on any device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            dtype = leaf.dtype if isinstance(leaf, torch.Tensor) else leaf
            if dtype in (torch.float64, torch.complex64, torch.complex128):
                raise TypeError(f"{func} met {dtype}")
        return out


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("pairing", Pairing)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=NAMES.get)
def test_device_without_float64_and_complex_numbers_needs_neither(
    exact: bool, pairing: Pairing, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = table_of(pairing=pairing)
    x, weight = torch.randn(2, 60, 3, 14).to(dtype), torch.rand(42).to(dtype)
    rotated = run([x], table, exact)
    normed = [torch.full_like(x, torch.nan)]
    eager.rotate([x], table.args(exact=False), normed, Norm(NormKind.ACROSS_HEADS, 1e-6, [weight]))

    monkeypatch.setattr(eager, "WITHOUT_FLOAT64_OR_COMPLEX", frozenset({"cpu"}))
    outs = [torch.full_like(x, torch.nan) for _ in range(3)]
    args = [
        table.args(exact=exact),
        table.args(exact=False),
        table.args(exact=exact, inverse=True),
    ]
    with NoFloat64NorComplex():
        eager.rotate([x], args[0], outs[:1])
        eager.rotate([x], args[1], outs[1:2], Norm(NormKind.ACROSS_HEADS, 1e-6, [weight]))
        eager.rotate(outs[:1], args[2], outs[2:])
    for ours, theirs in ((outs[0], rotated[0]), (outs[1], normed[0])):
        assert (ours - theirs).abs().max() <= 2 * torch.finfo(dtype).eps * theirs.abs().max()
    if exact:
        assert torch.equal(outs[0], rotated[0])
    torch.testing.assert_close(outs[2], x, rtol=0, atol=float(8 * torch.finfo(dtype).eps * x.abs().max()))
