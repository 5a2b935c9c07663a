"""What every backend keeps of what single models ask: angles for each head, LayerNorm, layouts, 16-bit arithmetic.

The third part of ``backend_contract.py``, which says how to run it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from contract_calls import (
    BACKEND,
    BF16,
    DEVICE,
    F16,
    F32,
    HALF,
    Case,
    check_norm_rotation,
    check_rotation,
    copies,
    named,
    poisoned,
    rotate,
    skip_unless,
)  # fmt: skip
from dit_rope.rotation_args import RotationArgs
from dit_rope.spec import NormKind, Pairing

pytestmark = pytest.mark.usefixtures("contract_backend")

both_pairings = pytest.mark.parametrize("pairing", list(Pairing), ids=lambda pairing: pairing.value)
every_norm = pytest.mark.parametrize("kind", list(NormKind), ids=lambda kind: kind.value)
layer_norms = pytest.mark.parametrize("kind", [kind for kind in NormKind if kind.centred], ids=lambda kind: kind.value)

# Tables are views of odd row strides unless made contiguous, as "aligned" does.
OWN_ANGLES = [
    Case("one-token", tokens=1, heads=(2, 2), head_rows=24),
    Case("head-after-head", tokens=9, heads=(4, 4), dim=64, pairs=(32,), sizes=(9,), head_rows=9),
    Case("aligned-mochi", tokens=3, heads=(24, 24), dim=128, pairs=(64,), sizes=(3,), head_rows=3),
    Case("aligned-ltx", tokens=3, heads=(32, 32), dim=64, pairs=(32,), sizes=(3,), head_rows=3),
    Case("aligned-ltx2-half", tokens=3, heads=(32, 32), dim=64, pairs=(32,), sizes=(3,), head_rows=3, pairing=HALF),
    Case("aligned-16-bit-table", tokens=5, dim=64, pairs=(32,), sizes=(5,), head_rows=5, table=BF16),
    Case("aligned-float32", tokens=5, dim=32, pairs=(16,), sizes=(5,), head_rows=5, dtype=F32),
    Case("token-after-token", tokens=9, heads=(3, 3), pairs=(8,), sizes=(9,), positions=(1, 9), head_rows=1),
    Case("three-axes", tokens=23, heads=(5, 5), batch=2, head_rows=5),
    Case("aligned-axes", tokens=5, dim=64, pairs=(16, 8, 8), head_rows=4),
    Case("three-axes-positions", tokens=9, batch=2, positions=(2, 9), head_rows=6, dtype=F16, dim=24),
    Case("other-head-counts", tokens=7, heads=(12, 3), dim=40, pairs=(8, 6, 6), head_rows=2),
    Case("more-keys-than-queries", tokens=7, heads=(2, 9), head_rows=1, pairing=HALF),
    Case("one-tensor", tokens=67, heads=(3,), sizes=(3, 4, 6), dtype=F32, head_rows=7),
    Case("partial-interleaved", dim=40, pairs=(6, 4, 5), head_rows=3),
    Case("partial-half", tokens=5, heads=(2, 2), dim=128, pairs=(48,), sizes=(5,), head_rows=5, pairing=HALF),
    Case("prefix-and-suffix", tokens=19, prefix=3, count=9, batch=3, head_rows=4, pairing=HALF),
    Case("padding-past-the-grid", tokens=15, prefix=1, token_offset=13, head_rows=1),
    Case("positions-of-all", tokens=9, batch=3, positions=(1, 1), head_rows=2),
    Case("inverse", inverse=True, tokens=13, head_rows=3),
    Case("dim-88", dim=88, pairs=(22, 22), sizes=(3, 4), heads=(3, 2), head_rows=5),
    Case("many-heads-of-many-channels", tokens=2, heads=(64, 64), dim=128, pairs=(64,), sizes=(2,), head_rows=2),
]


def arguments(case: Case) -> RotationArgs:
    """Those of the case; the table of an aligned one starts every row at 16 bytes."""
    args = case.args()
    return replace(args, rows=args.rows.contiguous()) if case.name.startswith("aligned") else args


@named(OWN_ANGLES)
def test_rotate_by_each_heads_own_angles(case: Case) -> None:
    xs = case.tensors()
    check_rotation(xs, arguments(case), poisoned(xs))


@named([case for case in OWN_ANGLES if case.prefix or case.positions or "partial" in case.name])
def test_rotate_in_place_by_each_heads_own_angles(case: Case) -> None:
    xs = case.tensors()
    check_rotation(xs, arguments(case), xs)


@both_pairings
@pytest.mark.parametrize("dtypes", [(BF16, F32), (BF16, BF16), (F16, F16), (F32, F32)], ids=str)
def test_rotate_exact_by_each_heads_own_angles(pairing: Pairing, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    dtype, table = dtypes
    case = Case(
        "aligned", tokens=5, heads=(3, 2), dim=48, pairs=(16,), sizes=(5,), dtype=dtype, table=table, pairing=pairing,
        exact=True, head_rows=5,
    )  # fmt: skip
    xs = case.tensors()
    check_rotation(xs, arguments(case), poisoned(xs))


@every_norm
@named([case for case in OWN_ANGLES if not case.exact])
def test_norm_rotate_by_each_heads_own_angles(case: Case, kind: NormKind) -> None:
    xs = case.tensors()
    weights, biases = case.weights(kind), case.biases(kind)
    check_norm_rotation(xs, weights, kind, arguments(case), poisoned(xs), biases=biases)


def test_head_past_the_table_does_not_rotate() -> None:
    """The rows of the first heads are in the table, those of the last are not, and some are past int32."""
    skip_unless(BACKEND != "eager", "a row past the table may raise IndexError")
    case = Case("aligned", tokens=7, heads=(6, 4), pairs=(8,), sizes=(7,), positions=(1, 7), head_rows=3)
    args = arguments(case)
    assert args.positions is not None
    args.positions[0, :, 0] = torch.tensor([0, args.rows.shape[1] - 4, 3, -1, 5, 2**31 - 1, 2**31 - 8])
    for further in (3, 2**30):
        xs = case.tensors()
        check_rotation(xs, replace(args, head_rows=further), poisoned(xs))


def test_angles_of_heads_are_in_tables_past_2_31_elements() -> None:
    """Only the pages of two rows are ever touched."""
    skip_unless(BACKEND != "triton", "tables must have fewer than 2**31 elements")
    case = Case(tokens=1, heads=(2,), dim=16, pairs=(8,), sizes=(1,), dtype=F16, table=F16, head_rows=1)
    (x,), near, far = case.tensors(), case.args(), 2**28
    rows = torch.empty(far * 8 + 64, dtype=F16, device=DEVICE).as_strided((2, far + 1, 8), (16, 8, 1))
    rows[:, 0], rows[:, far] = near.rows[:, 0], near.rows[:, 1]
    outs = poisoned([x, x])
    rotate([x], near, outs[:1])
    rotate([x], replace(near, rows=rows, head_rows=far), outs[1:])
    assert torch.equal(outs[0], outs[1])


@layer_norms
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_layer_norm_keeps_the_variance_of_a_large_mean(kind: NormKind, dtype: torch.dtype) -> None:
    """A variance that is a difference of mean squares would be off by more than the bound."""
    case = Case(tokens=5, heads=(3, 2), dim=64, pairs=(12, 10, 10), dtype=dtype)
    xs = [(x * 4 + 500).contiguous() for x in case.tensors()]
    weights, biases = case.weights(kind), case.biases(kind)
    check_norm_rotation(xs, weights, kind, case.args(), poisoned(xs), biases=biases)


@layer_norms
def test_layer_norm_of_equal_channels_is_the_bias(kind: NormKind) -> None:
    case = Case(tokens=5, heads=(3, 2), dtype=F32)
    xs = [torch.full_like(x, 0.3) for x in case.tensors()]
    weights, biases = case.weights(kind), case.biases(kind)
    check_norm_rotation(xs, weights, kind, case.args(), poisoned(xs), eps=1e-5, biases=biases)


@layer_norms
@pytest.mark.parametrize("given", ["weights", "biases", "neither"])
def test_layer_norm_weights_and_biases_are_optional(kind: NormKind, given: str) -> None:
    case = Case(heads=(3, 2), dim=24, pairs=(4, 2, 2))
    xs = case.tensors()
    weights = case.weights(kind) if given == "weights" else [None, None]
    biases = case.biases(kind) if given == "biases" else []
    check_norm_rotation(xs, weights, kind, case.args(), poisoned(xs), biases=biases)


@layer_norms
@pytest.mark.parametrize("heads", [30, 48])
def test_layer_norm_of_cogvideox(kind: NormKind, heads: int) -> None:
    """Heads before tokens in memory, in place, after text that is normed and does not rotate."""
    case = Case(tokens=7, heads=(heads, heads), dim=64, pairs=(8, 12, 12), prefix=3, sizes=(1, 2, 2))
    xs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.tensors()]
    weights, biases = case.weights(kind, (BF16, BF16)), case.biases(kind, (BF16, BF16))
    check_norm_rotation(xs, weights, kind, case.args(), xs, biases=biases)


def fused(case: Case) -> list[torch.Tensor]:
    """Q and k as heads of one projection ``[B, S, C + C + C]``, whose rows are longer than C."""
    channels = [heads * case.dim for heads in (*case.heads, case.heads[-1])]
    parts = case.random(case.batch, case.tokens, sum(channels)).to(DEVICE).split(channels, dim=-1)
    return [part.unflatten(2, (heads, case.dim)) for part, heads in zip(parts, case.heads, strict=False)]


def mixed(case: Case) -> list[torch.Tensor]:
    """Q as a fused projection has it, k with heads before tokens in memory."""
    k = case.tensors()[1]
    return [fused(case)[0], k.transpose(1, 2).contiguous().transpose(1, 2)]


@pytest.mark.parametrize("into", ["contiguous", "other", "in-place"])
@pytest.mark.parametrize("view", [fused, mixed], ids=lambda view: view.__name__)
@pytest.mark.parametrize("kind", [None, *NormKind], ids=lambda kind: kind.value if kind else "rotate")
def test_queries_and_keys_may_each_have_their_strides(kind: NormKind | None, view: object, into: str) -> None:
    assert callable(view)
    case = Case(batch=2, tokens=5, heads=(3, 2), dim=32, pairs=(6, 2, 8), prefix=1)
    xs = view(case)
    outs = xs if into == "in-place" else poisoned(xs)
    if into == "other":
        outs = [out.fill_(torch.nan) for out in (mixed if view is fused else fused)(case)]
    if kind is None:
        check_rotation(xs, case.args(), outs)
    else:
        check_norm_rotation(xs, case.weights(kind), kind, case.args(), outs, biases=case.biases(kind))


@both_pairings
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_dense_table_of_every_batch_entry(exact: bool, pairing: Pairing) -> None:
    """The rows of batch entry b follow those of entry b - 1: ``[2, B * S, P]``, as positions say."""
    case = Case(
        batch=3, tokens=9, heads=(3, 2), dim=32, pairs=(16,), sizes=(21,), prefix=2, positions=(3, 7), pairing=pairing,
        exact=exact,
    )  # fmt: skip
    rows = torch.arange(21, dtype=torch.int32, device=DEVICE).view(3, 7, 1)
    xs = case.tensors()
    check_rotation(xs, replace(case.args(), positions=rows), poisoned(xs))


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "in-place"])
@pytest.mark.parametrize(("dim", "pairs"), [(128, 64), (128, 48), (40, 14)], ids=["whole", "96-of-128", "28-of-40"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_rotate_exact_in_16_bits_is_rotate_half(dtype: torch.dtype, dim: int, pairs: int, inplace: bool) -> None:
    """Cosmos 3, Ideogram 4 and MiniMax-H3 round every product to the dtype of the data, and the sum again."""
    case = Case(
        tokens=6, heads=(3, 2), dim=dim, pairs=(pairs,), sizes=(6,), dtype=dtype, table=dtype, pairing=HALF, exact=True
    )
    args, xs = case.args(), case.tensors()
    cos, sin = (torch.cat((part, part), dim=-1)[None, :, None] for part in args.rows.cpu().unbind())
    inputs, outs = copies(xs), xs if inplace else poisoned(xs)
    rotate(xs, args, outs)
    for x, out in zip(inputs, outs, strict=True):
        covered, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
        first, second = covered.chunk(2, dim=-1)
        rotated = covered * cos + torch.cat((-second, first), dim=-1) * sin
        assert rotated.dtype == dtype
        assert torch.equal(out.cpu(), torch.cat((rotated, rest), dim=-1))


@pytest.mark.parametrize("kind", [None, *NormKind], ids=lambda kind: kind.value if kind else "rotate")
def test_96_of_128_channels_rotate_in_halves(kind: NormKind | None) -> None:
    """Channel i with channel i + 48: the halves are of what rotates, not of the head."""
    case = Case(tokens=4, heads=(2, 2), dim=128, pairs=(48,), sizes=(4,), pairing=HALF)
    args, xs = case.args(), case.tensors()
    if kind is not None:
        check_norm_rotation(xs, case.weights(kind), kind, args, poisoned(xs), biases=case.biases(kind))
        return
    quarter = torch.stack((torch.zeros(4, 48), torch.ones(4, 48))).to(DEVICE)
    outs = poisoned(xs)
    rotate(xs, replace(args, rows=quarter), outs)
    for x, out in zip(xs, outs, strict=True):
        assert torch.equal(out[..., :48], -x[..., 48:96])
        assert torch.equal(out[..., 48:96], x[..., :48])
        assert torch.equal(out[..., 96:], x[..., 96:])
