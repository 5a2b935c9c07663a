"""What every backend keeps of rotation and of norms with rotation, against the float64 oracle.

Not collected by a plain ``pytest``: which backend, and on which device, is chosen once for a process (see
``contract_calls.py``). ``test_eager.py``, ``test_triton_kernels.py`` and ``test_cuda_kernels.py`` start such processes;
by hand it is, for one, ``DIT_ROPE_BACKEND=cuda pytest tests/backends/backend_contract*.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contract_calls import (
    BACKEND,
    BF16,
    DEVICE,
    F16,
    F32,
    F64,
    HALF,
    INTERLEAVED,
    SKIPPED,
    Case,
    check_norm_rotation,
    check_rotation,
    copies,
    dense,
    formula,
    named,
    poisoned,
    rotate,
)  # fmt: skip
from dit_rope.spec import NormKind, Pairing
from tolerance import assert_within

pytestmark = pytest.mark.usefixtures("contract_backend")

both_pairings = pytest.mark.parametrize("pairing", list(Pairing), ids=lambda pairing: pairing.value)
both_norms = pytest.mark.parametrize("kind", list(NormKind), ids=lambda kind: kind.value)

ROTATIONS = [
    Case("one-token", tokens=1, heads=(1, 1), token_offset=5),
    Case("one-tensor-float32", tokens=67, heads=(3,), sizes=(3, 4, 6), dtype=F32),
    Case("gqa-batch", tokens=7, heads=(12, 3), batch=3, dtype=F16),
    Case("gqa-one-key-head", tokens=7, heads=(5, 1), dim=40, pairs=(8, 6, 6)),
    Case("partial-interleaved", dim=40, pairs=(6, 4, 5), dtype=F16),
    Case("partial-half", dim=64, pairs=(8, 7, 5), pairing=HALF, dtype=F32),
    Case("partial-96-of-128-half", tokens=5, heads=(2, 2), dim=128, pairs=(16, 16, 16), pairing=HALF),
    Case("partial-half-odd-tail", dim=40, pairs=(6, 2), sizes=(2, 5), pairing=HALF),
    Case("dim-80", dim=80, pairs=(16, 12, 12)),
    Case("dim-112-hunyuan", dim=112, pairs=(16, 20, 20), heads=(2, 2)),
    Case("dim-128-wan-start-frame", tokens=33, dim=128, pairs=(22, 21, 21), heads=(2, 2), first_rows=(9, 0, 1)),
    Case("dim-128-cosmos-half", dim=128, pairs=(20, 22, 22), heads=(2, 1), pairing=HALF),
    Case("odd-dim", dim=19, pairs=(4, 4), sizes=(2, 5), dtype=F32),
    Case("one-axis", pairs=(8,), sizes=(9,), pairing=HALF, first_rows=(3,)),
    Case("four-axes", dim=32, pairs=(3, 5, 2, 6), sizes=(2, 2, 3, 2), first_rows=(1, 0, 2, 4), token_offset=3),
    Case("many-tokens-of-few-channels", tokens=61, heads=(1, 1), sizes=(4, 4, 4)),
    Case("several-blocks", tokens=211, sizes=(5, 6, 7), batch=2, prefix=3),
    Case("prefix", tokens=11, prefix=4, dtype=F32),
    Case("prefix-and-suffix", tokens=19, prefix=3, count=9, batch=3, pairing=HALF),
    Case("padding-past-the-grid", tokens=15, prefix=1, token_offset=13),
    Case("nothing-rotates", tokens=5, token_offset=24),
    Case("positions-shared", tokens=9, batch=2, positions=(1, 5), prefix=2, count=5),
    Case("positions-batched", tokens=9, batch=2, positions=(2, 9), dtype=F32, pairing=HALF, dim=24),
    Case("positions-of-every-token", tokens=9, batch=3, positions=(3, 1), prefix=2, count=6),
    Case("positions-of-all", tokens=9, batch=3, positions=(1, 1), pairing=HALF),
    Case("inverse", inverse=True, dtype=F32, tokens=13),
    Case("inverse-half-positions", inverse=True, pairing=HALF, positions=(1, 7)),
]


@named(ROTATIONS)
def test_rotate_is_as_accurate_as_float32(case: Case) -> None:
    xs = case.tensors()
    check_rotation(xs, case.args(), poisoned(xs))


@named([case for case in ROTATIONS if case.prefix or case.positions or "partial" in case.name or "odd" in case.name])
def test_rotate_in_place_leaves_the_rest_alone(case: Case) -> None:
    xs = case.tensors()
    check_rotation(xs, case.args(), xs)


def test_rotate_one_tensor_in_place_and_the_other_not() -> None:
    case = Case(prefix=2, dim=24)
    xs = case.tensors()
    check_rotation(xs, case.args(), xs)
    (q, k), into = case.tensors(), poisoned(case.tensors())
    check_rotation([q, k], case.args(), [q, into[1]])
    q = case.tensors()[0]
    check_rotation([q, k], case.args(), [into[0], k])


@both_pairings
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_rotate_exact_is_bitwise_the_eager_formula(pairing: Pairing, dtype: torch.dtype, inverse: bool) -> None:
    case = Case(tokens=23, dim=48, pairs=(8, 7, 5), dtype=dtype, pairing=pairing, exact=True, inverse=inverse, prefix=2)
    xs = case.tensors()
    check_rotation(xs, case.args(), poisoned(xs))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@both_pairings
def test_rotate_copies_what_does_not_rotate_bit_by_bit(pairing: Pairing) -> None:
    case = Case(tokens=9, prefix=3, count=4, dim=24, pairs=(4, 2, 2), pairing=pairing, dtype=F32)
    xs = case.tensors()
    for x in xs:
        x[:, :3], x[:, 7:] = torch.inf, -0.0
        x[..., 16:] = -0.0
    outs = poisoned(xs)
    rotate(xs, case.args(), outs)
    for x, out in zip(copies(xs), copies(outs), strict=True):
        bits, expected = out.view(torch.int32), x.view(torch.int32)
        assert torch.equal(bits[:, :3], expected[:, :3])
        assert torch.equal(bits[:, 7:], expected[:, 7:])
        assert torch.equal(bits[..., 16:], expected[..., 16:])


def packed(case: Case) -> list[torch.Tensor]:
    """Q and k as views of one packed ``[B, S, 3, H, D]`` projection."""
    return list(case.random(case.batch, case.tokens, 3, case.heads[0], case.dim).to(DEVICE).unbind(2)[:2])


def transposed(case: Case) -> list[torch.Tensor]:
    """Q and k as ``[B, H, S, D]`` in memory."""
    return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.tensors()]


def after(elements: int) -> Callable[[Case], list[torch.Tensor]]:
    """Q and k that start some elements into a buffer whose rows are as much longer than they are."""
    return lambda case: [torch.nn.functional.pad(x, (elements, 0))[..., elements:] for x in case.tensors()]


# Of bfloat16, one to four elements are 2 to 8 bytes: the alignment of every row.
VIEWS = {"packed": packed, "transposed": transposed, "after-1": after(1), "after-2": after(2), "after-4": after(4)}


@pytest.mark.parametrize("into", ["contiguous", "view", "in-place"])
@pytest.mark.parametrize("view", VIEWS)
@both_pairings
def test_rotate_takes_any_outer_strides(view: str, into: str, pairing: Pairing) -> None:
    case = Case(batch=2, dim=32, pairs=(6, 2, 4), prefix=1, pairing=pairing)
    xs = VIEWS[view](case)
    if into == "contiguous":
        outs = poisoned(xs)
    elif into == "view":
        outs = [out.fill_(torch.nan) for out in VIEWS["after-1" if view == "transposed" else "transposed"](case)]
    else:
        outs = xs
    check_rotation(xs, case.args(), outs)


def test_rotate_takes_float32_of_any_alignment() -> None:
    case = Case(dtype=F32, dim=32, pairs=(6, 2, 4))
    for elements in (1, 2):
        xs = after(elements)(case)
        check_rotation(xs, case.args(), xs)


def test_rotate_leaves_memory_around_views_alone() -> None:
    case = Case(tokens=5, heads=(3,), dim=20, pairs=(3, 4, 3))
    buffer = torch.full((1, 7, 4, 32), 5.0, dtype=case.dtype, device=DEVICE)
    check_rotation(case.tensors(), case.args(), [buffer[:, 1:6, :3, 4:24]])
    outside = torch.ones(buffer.shape, dtype=torch.bool, device=DEVICE)
    outside[:, 1:6, :3, 4:24] = False
    assert (buffer[outside] == 5.0).all()


@pytest.mark.parametrize("dim", ["batch", "token", "head"])
def test_rotate_offsets_are_64_bit(dim: str) -> None:
    """Rows 2^31 elements apart, in an allocation of which only the pages of those rows are ever touched.

    With three heads more a program may have several heads at once.
    """
    case = Case(tokens=2, heads=(2, 3), batch=2, dim=16, pairs=(4, 4), sizes=(2, 2))
    far, strides = 2**31, {"batch": 128, "token": 32, "head": 16}
    strides[dim] = far
    x = torch.empty(far + 1024, dtype=case.dtype, device=DEVICE).as_strided((2, 2, 2, 16), (*strides.values(), 1))
    near, other = case.tensors()
    x.copy_(near)
    check_rotation([x], case.args(), [x])
    check_rotation([x, other], case.args(), [x, other])


def test_rotate_takes_more_batch_entries_than_one_dimension_of_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's y dimension is limited; here to 2, so that the grid has a block past the last entry."""
    if BACKEND == "cuda":
        monkeypatch.setattr("dit_rope.rotation.backends.cuda_kernels.MAX_GRID_ROWS", 2)
    case = Case(batch=7, tokens=5, positions=(7, 5))
    xs = case.tensors()
    check_rotation(xs, case.args(), poisoned(xs))


NORMS = [
    Case("one-token", tokens=1, heads=(1, 1)),
    Case("one-tensor-float32", tokens=67, heads=(3,), sizes=(3, 4, 6), dtype=F32),
    Case("gqa-batch", tokens=7, heads=(12, 3), batch=3, dtype=F16, prefix=2),
    Case("partial-interleaved", dim=40, pairs=(6, 4, 5), heads=(5, 2)),
    Case("partial-half", dim=64, pairs=(8, 7, 5), pairing=HALF, dtype=F32, prefix=1, count=4),
    Case("several-blocks", tokens=101, sizes=(5, 6, 7), batch=2, prefix=3, heads=(4, 2), dim=32),
    Case("dim-112-half", dim=112, pairs=(16, 20, 20), heads=(2, 2), pairing=HALF),
    Case("dim-136", dim=136, pairs=(24, 22, 22), heads=(3, 3)),
    Case("odd-dim", dim=19, pairs=(4, 4), sizes=(2, 5), dtype=F32),
    Case("positions-batched", tokens=9, batch=2, positions=(2, 9), inverse=True),
]


@both_norms
@named(NORMS)
def test_norm_rotate_is_as_accurate_as_float32(case: Case, kind: NormKind) -> None:
    xs = case.tensors()
    weights, biases = case.weights(kind, (F32, case.dtype)), case.biases(kind, (case.dtype, F32))
    check_norm_rotation(xs, weights, kind, case.args(), poisoned(xs), biases=biases)


@pytest.mark.parametrize("kind", [kind for kind in NormKind if kind.across_heads], ids=lambda kind: kind.value)
@both_pairings
@pytest.mark.parametrize(
    "heads", [(12, 12), (40, 40), (64, 8), (32, 8), (64, 64)], ids=lambda heads: f"{heads[0]}-{heads[1]}"
)
def test_norm_rotate_across_many_heads(heads: tuple[int, int], pairing: Pairing, kind: NormKind) -> None:
    case = Case(tokens=3, heads=heads, dim=128, pairs=(22, 21, 21), pairing=pairing)
    xs = case.tensors()
    weights, biases = case.weights(kind, (BF16, BF16)), case.biases(kind, (BF16, BF16))
    check_norm_rotation(xs, weights, kind, case.args(), poisoned(xs), biases=biases)


DIMS = [
    Case("64", dim=64, pairs=(12, 10, 10)),
    Case("80", dim=80, pairs=(16, 12, 12)),
    Case("96", dim=96, pairs=(16, 16, 16)),
    Case("96-partial", dim=96, pairs=(8, 8, 8)),
    Case("112", dim=112, pairs=(16, 20, 20)),
    Case("120", dim=120, pairs=(20, 20, 20)),
    Case("128", dim=128, pairs=(22, 21, 21)),
    Case("128-partial", dim=128, pairs=(20, 14, 14)),
    Case("160", dim=160, pairs=(40, 20, 20)),
    Case("160-partial", dim=160, pairs=(16, 12, 12)),
    Case("256", dim=256, pairs=(44, 42, 42)),
    Case("256-float32", dim=256, pairs=(44, 42, 42), dtype=F32),
    Case("512", dim=512, pairs=(88, 84, 84)),
]


@pytest.mark.parametrize("kind", [kind for kind in NormKind if not kind.across_heads], ids=lambda kind: kind.value)
@both_pairings
@named(DIMS)
def test_norm_rotate_per_head_of_any_dim(case: Case, pairing: Pairing, kind: NormKind) -> None:
    case = replace(case, pairing=pairing, heads=(3, 2), tokens=5, prefix=1)
    xs = case.tensors()
    check_norm_rotation(xs, case.weights(kind), kind, case.args(), poisoned(xs), biases=case.biases(kind))


@pytest.mark.parametrize("dtypes", [(F16, F32), (BF16, F16), (F64, BF16)], ids=str)
@both_norms
def test_norm_rotate_weights_may_have_any_dtype_and_stride(kind: NormKind, dtypes: tuple[torch.dtype, ...]) -> None:
    case = Case(heads=(3, 2))
    xs = case.tensors()
    weights, biases = (
        [torch.stack((each, each - 9), dim=1)[:, 0] for each in parameters]
        for parameters in (case.weights(kind, dtypes), case.biases(kind, dtypes[::-1]))
    )
    check_norm_rotation(xs, weights, kind, case.args(), poisoned(xs), biases=biases)


@both_norms
def test_norm_rotate_weights_are_optional_each(kind: NormKind) -> None:
    case = Case(tokens=67, heads=(3, 2), dtype=F32)
    xs, weights = case.tensors(), case.weights(kind, (F32, F32))
    biases = (*case.biases(kind)[:1], None) if kind.centred else ()
    check_norm_rotation(xs, (None, weights[1]), kind, case.args(), poisoned(xs), eps=1e-2, biases=biases)


@both_pairings
@both_norms
def test_norm_rotate_in_place_norms_unrotated_tokens_too(kind: NormKind, pairing: Pairing) -> None:
    case = Case(batch=2, tokens=9, dim=24, pairs=(4, 2, 2), prefix=2, count=4, pairing=pairing)
    xs = packed(case)
    check_norm_rotation(xs, (None, None), kind, case.args(), xs, eps=0.5)


@both_norms
def test_norm_rotate_takes_views_of_any_alignment(kind: NormKind) -> None:
    case = Case(dim=32, pairs=(6, 2, 4), prefix=1)
    for elements in (1, 4):
        xs = after(elements)(case)
        weights, biases = (
            [torch.cat((each[:elements], each))[elements:] for each in parameters]
            for parameters in (case.weights(kind, (BF16, BF16)), case.biases(kind, (BF16, BF16)))
        )
        check_norm_rotation(xs, weights, kind, case.args(), xs, biases=biases)


def test_rotate_there_and_back_is_the_identity_to_two_roundings() -> None:
    case = Case(tokens=21, heads=(3,), dtype=F32)
    (x,), args = case.tensors(), case.args()
    out = poisoned([x])
    rotate([x], args, out)
    rotate(out, replace(args, inverse=True), out)
    angles = dense(args, 1, 21)
    there = formula(x.cpu(), angles, INTERLEAVED, F32)
    naive = formula(there, replace(angles, sin=-angles.sin), INTERLEAVED, F32)
    assert_within(out[0].cpu(), x.cpu(), naive)


def test_rotate_of_no_tokens_does_nothing() -> None:
    case = Case(tokens=0, count=0)
    xs = case.tensors()
    rotate(xs, case.args(), poisoned(xs))


@st.composite
def calls(draw: st.DrawFn) -> tuple[Case, int, str]:
    """A call of any shape that every backend takes, the elements its rows start after, and its operation."""
    pairs = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    pairs = (pairs[0] + sum(pairs) % 2, *pairs[1:])
    rotary = 2 * sum(pairs)
    prefix, count, suffix = (draw(st.integers(0, most)) for most in (3, 40, 3))
    dtype = draw(st.sampled_from([F16, BF16, F32]))
    operation = draw(st.sampled_from(["rotate", "exact", "in-place", *NormKind]))
    batch = draw(st.integers(1, 3))
    positions = None
    if count and draw(st.booleans()):
        positions = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, count])))
    case = Case(
        tokens=prefix + count + suffix,
        heads=tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=2))),
        dim=rotary + 2 * draw(st.integers(0, 5)),
        pairs=pairs,
        sizes=tuple(draw(st.integers(1, 6)) for _ in pairs),
        batch=batch,
        dtype=dtype,
        table=draw(st.sampled_from([F32, dtype])),
        pairing=draw(st.sampled_from(Pairing)),
        first_rows=tuple(draw(st.integers(0, 3)) for _ in pairs),
        token_offset=draw(st.integers(0, 9)),
        prefix=prefix,
        count=count,
        positions=positions,
        inverse=draw(st.booleans()),
        exact=operation == "exact",
        head_rows=draw(st.sampled_from([0, 0, 1, 5])),
    )
    return case, draw(st.sampled_from([0, 0, 1, 2])), operation


@settings(max_examples=25, derandomize=True, database=None, deadline=None)
@given(calls())
def test_calls_of_any_shape_are_as_accurate_as_float32(call: tuple[Case, int, str | NormKind]) -> None:
    case, elements, operation = call
    xs, args = after(elements)(case), case.args()
    if isinstance(operation, NormKind):
        weights, biases = case.weights(operation), case.biases(operation)
        check_norm_rotation(xs, weights, operation, args, poisoned(xs), biases=biases)
    else:
        check_rotation(xs, args, xs if operation == "in-place" else poisoned(xs))


def test_every_skip_is_of_a_test_that_exists(request: pytest.FixtureRequest) -> None:
    """Runs with both files of the contract: what SKIPPED names must be among their tests."""
    assert {item.name for item in request.session.items} >= SKIPPED
