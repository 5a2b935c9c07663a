"""The Triton kernels run by Triton's interpreter on CPU, against the float64 oracle.

Not collected by a plain ``pytest``: Triton decides when the kernels are imported whether they are interpreted, so
these need a process of their own with TRITON_INTERPRET=1. ``test_triton_kernels.py`` starts it, and by hand it is
``TRITON_INTERPRET=1 pytest tests/triton_interpreter_cases.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from oracle import rms_norm
from oracle import rotate as rotate_oracle
from tolerance import assert_within

from dit_rope.backends import triton_kernels
from dit_rope.rotation_args import RotationArgs
from dit_rope.spec import NormKind, Pairing

HALF, INTERLEAVED = Pairing.HALF, Pairing.INTERLEAVED
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _bfloat16_rounds_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter cuts float32 off where GPUs round it to bfloat16 (to nearest, ties to even)."""
    from triton.runtime import interpreter

    def convert(data: np.ndarray, source: object, target: object, rounding: object) -> np.ndarray:
        if data.dtype == np.uint16:
            return torch.from_numpy(data.astype(np.int32) << 16).view(F32).numpy().reshape(data.shape)
        bits = torch.from_numpy(np.ascontiguousarray(data)).to(BF16).view(torch.int16)
        return bits.numpy().view(np.uint16).reshape(data.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@dataclass(frozen=True)
class Case:
    """One call: shapes ``[batch, tokens, heads[i], dim]``, and where its tokens stand in the grid."""

    name: str
    tokens: int = 7
    heads: tuple[int, ...] = (3, 3)
    dim: int = 16
    pairs: tuple[int, ...] = (4, 2, 2)
    sizes: tuple[int, ...] = (2, 3, 4)
    batch: int = 1
    dtype: torch.dtype = BF16
    pairing: Pairing = INTERLEAVED
    first_rows: tuple[int, ...] | None = None
    token_offset: int = 0
    prefix: int = 0
    count: int | None = None
    positions: int | None = None
    inverse: bool = False
    exact: bool = False
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(7), compare=False)

    def args(self) -> RotationArgs:
        """Tables of random angles, as long as the rows reach; positions, if any, with negative rows among them."""
        firsts = self.first_rows or (0,) * len(self.pairs)
        count = self.tokens - self.prefix if self.count is None else self.count
        length = max(first + size for first, size in zip(firsts, self.sizes, strict=True))
        angles = torch.rand(length, max(self.pairs), generator=self.generator, dtype=torch.float64) * 7
        positions = None
        if self.positions is not None:
            positions = torch.randint(
                -1, length, (self.positions, count, len(self.pairs)), generator=self.generator, dtype=torch.int32
            )
        return RotationArgs(
            torch.stack((angles.cos(), angles.sin())).float(), positions, self.pairs, self.sizes, firsts,
            self.token_offset, self.prefix, count, self.pairing, self.inverse, self.exact,
        )  # fmt: skip

    def tensors(self) -> list[torch.Tensor]:
        """One contiguous tensor for each entry of heads."""
        return [
            torch.randn(self.batch, self.tokens, heads, self.dim, generator=self.generator).to(self.dtype)
            for heads in self.heads
        ]


def dense(args: RotationArgs, batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin ``[batch, tokens, pairs]``, token by token as the docstring of RotationArgs defines them."""
    cos = torch.ones(batch, tokens, sum(args.pairs))
    sin = torch.zeros(batch, tokens, sum(args.pairs))
    for b in range(batch):
        for i in range(tokens):
            j = i - args.prefix
            flat = args.token_offset + j
            if not 0 <= j < args.count or (args.positions is None and flat >= math.prod(args.sizes)):
                continue
            if args.positions is None:
                rows = [f + int(c) for f, c in zip(args.first_rows, np.unravel_index(flat, args.sizes), strict=True)]
            else:
                rows = args.positions[min(b, args.positions.shape[0] - 1), j].tolist()
            start = 0
            for row, pairs in zip(rows, args.pairs, strict=True):
                if row >= 0:
                    cos[b, i, start : start + pairs] = args.rows[0, row, :pairs]
                    sin[b, i, start : start + pairs] = args.rows[1, row, :pairs]
                start += pairs
    return cos, -sin if args.inverse else sin


def wan_formula(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairing: Pairing) -> torch.Tensor:
    """The rotation in float32, with the roundings of diffusers' Wan code; not rounded to the dtype of x."""
    out = x.float().clone()
    n = cos.shape[-1]
    first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if pairing is INTERLEAVED else (slice(n), slice(n, 2 * n))
    x1, x2, cos, sin = x.float()[..., first], x.float()[..., second], cos[:, :, None], sin[:, :, None]
    out[..., first] = x1 * cos - x2 * sin
    out[..., second] = x1 * sin + x2 * cos
    return out


def poisoned(xs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.full_like(x, torch.nan, memory_format=torch.contiguous_format) for x in xs]


def check_rotation(xs: Sequence[torch.Tensor], args: RotationArgs, outs: Sequence[torch.Tensor]) -> None:
    """Runs the kernel and compares each of ``outs``, which may be ``xs``, with the oracle."""
    cos, sin = dense(args, xs[0].shape[0], xs[0].shape[1])
    inputs = [x.clone() for x in xs]
    triton_kernels.rotate(xs, args, outs)
    for i, (x, out) in enumerate(zip(inputs, outs, strict=True)):
        exact = rotate_oracle(x, cos, sin, interleaved=args.pairing is INTERLEAVED)
        naive = wan_formula(x, cos, sin, args.pairing)
        assert_within(out, exact, naive, f"in tensor {i}")
        if args.exact:
            assert torch.equal(out, naive.to(out.dtype)), f"tensor {i} is not bitwise the eager formula"


def naive_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, kind: NormKind) -> torch.Tensor:
    x = x.float()
    across = kind is NormKind.ACROSS_HEADS
    out = x * torch.rsqrt((x * x).mean(dim=(-2, -1) if across else -1, keepdim=True) + eps)
    return out if weight is None else out * (weight.float().reshape(x.shape[-2:]) if across else weight.float())


def check_norm_rotation(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    kind: NormKind,
    args: RotationArgs,
    outs: Sequence[torch.Tensor],
    eps: float = 1e-6,
) -> None:
    cos, sin = dense(args, xs[0].shape[0], xs[0].shape[1])
    inputs = [x.clone() for x in xs]
    triton_kernels.norm_rotate(xs, weights, eps, kind, args, outs)
    for i, (x, weight, out) in enumerate(zip(inputs, weights, outs, strict=True)):
        normed = rms_norm(x, weight, eps, across_heads=kind is NormKind.ACROSS_HEADS)
        exact = rotate_oracle(normed, cos, sin, interleaved=args.pairing is INTERLEAVED)
        naive = wan_formula(naive_norm(x, weight, eps, kind), cos, sin, args.pairing)
        assert_within(out, exact, naive, f"in tensor {i}")


def named(cases: Sequence[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


ROTATIONS = [
    Case("one-token", tokens=1, heads=(1, 1), token_offset=5),
    Case("one-tensor-float32", tokens=67, heads=(3,), sizes=(3, 4, 6), dtype=F32),
    Case("gqa-batch", tokens=7, heads=(12, 3), batch=2, dtype=F16),
    Case("gqa-one-key-head", tokens=7, heads=(5, 1), dim=40, pairs=(8, 6, 6)),
    Case("partial-interleaved", dim=40, pairs=(6, 4, 5), dtype=F16),
    Case("partial-half", dim=64, pairs=(8, 7, 5), pairing=HALF, dtype=F32),
    Case("partial-96-of-128-half", tokens=5, heads=(2, 2), dim=128, pairs=(16, 16, 16), pairing=HALF),
    Case("dim-80", dim=80, pairs=(16, 12, 12)),
    Case("dim-112-hunyuan", dim=112, pairs=(16, 20, 20), heads=(2, 2)),
    Case("dim-128-wan-start-frame", tokens=33, dim=128, pairs=(22, 21, 21), heads=(2, 2), first_rows=(9, 0, 1)),
    Case("dim-128-cosmos-half", dim=128, pairs=(20, 22, 22), heads=(2, 1), pairing=HALF),
    Case("odd-dim", dim=19, pairs=(4, 4), sizes=(2, 5), dtype=F32),
    Case("one-axis", pairs=(8,), sizes=(9,), pairing=HALF, first_rows=(3,)),
    Case("four-axes", dim=32, pairs=(3, 5, 2, 6), sizes=(2, 2, 3, 2), first_rows=(1, 0, 2, 4), token_offset=3),
    Case("prefix", tokens=11, prefix=4, dtype=F32),
    Case("prefix-and-suffix", tokens=19, prefix=3, count=9, batch=2, pairing=HALF),
    Case("padding-past-the-grid", tokens=15, prefix=1, token_offset=13),
    Case("nothing-turns", tokens=5, token_offset=24),
    Case("positions-shared", tokens=9, batch=2, positions=1, prefix=2, count=5),
    Case("positions-batched", tokens=9, batch=2, positions=2, dtype=F32, pairing=HALF, dim=24),
    Case("inverse", inverse=True, dtype=F32, tokens=13),
    Case("inverse-half-positions", inverse=True, pairing=HALF, positions=1),
]


@named(ROTATIONS)
def test_rotate_is_as_accurate_as_float32(case: Case) -> None:
    xs = case.tensors()
    check_rotation(xs, case.args(), poisoned(xs))


@named([case for case in ROTATIONS if case.prefix or case.positions or "partial" in case.name or "odd" in case.name])
def test_rotate_in_place_equals_out_of_place(case: Case) -> None:
    xs, args = case.tensors(), case.args()
    outs = poisoned(xs)
    triton_kernels.rotate(xs, args, outs)
    triton_kernels.rotate(xs, args, xs)
    for x, out in zip(xs, outs, strict=True):
        assert torch.equal(x, out)


@pytest.mark.parametrize("pairing", list(Pairing), ids=lambda pairing: pairing.value)
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_rotate_exact_is_bitwise_the_eager_formula(pairing: Pairing, dtype: torch.dtype, inverse: bool) -> None:
    case = Case(
        "", tokens=23, dim=48, pairs=(8, 7, 6), dtype=dtype, pairing=pairing, exact=True, inverse=inverse, prefix=2
    )
    xs = case.tensors()
    check_rotation(xs, case.args(), poisoned(xs))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("pairing", list(Pairing), ids=lambda pairing: pairing.value)
def test_rotate_copies_what_does_not_turn_bit_by_bit(pairing: Pairing) -> None:
    case = Case("", tokens=9, prefix=3, count=4, dim=24, pairs=(4, 2, 2), pairing=pairing, dtype=F32)
    xs = case.tensors()
    for x in xs:
        x[:, :3], x[:, 7:] = torch.inf, -0.0
        x[..., 16:] = -0.0
    outs = poisoned(xs)
    triton_kernels.rotate(xs, case.args(), outs)
    for x, out in zip(xs, outs, strict=True):
        bits, expected = out.view(torch.int32), x.view(torch.int32)
        assert torch.equal(bits[:, :3], expected[:, :3])
        assert torch.equal(bits[:, 7:], expected[:, 7:])
        assert torch.equal(bits[..., 16:], expected[..., 16:])


def packed(case: Case) -> list[torch.Tensor]:
    """Q and k as views of one packed ``[B, S, 3, H, D]`` projection."""
    shape = (case.batch, case.tokens, 3, case.heads[0], case.dim)
    return list(torch.randn(shape, generator=case.generator).to(case.dtype).unbind(2)[:2])


def transposed(case: Case) -> list[torch.Tensor]:
    """Q and k as ``[B, H, S, D]`` in memory."""
    return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.tensors()]


def misaligned(case: Case) -> list[torch.Tensor]:
    """Q and k that start one element into a buffer whose rows are one element longer than they are."""
    return [torch.nn.functional.pad(x, (1, 0))[..., 1:] for x in case.tensors()]


VIEWS = {"packed": packed, "transposed": transposed, "misaligned": misaligned}


@pytest.mark.parametrize("into", ["contiguous", "view", "in-place"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("pairing", list(Pairing), ids=lambda pairing: pairing.value)
def test_rotate_takes_any_outer_strides(view: str, into: str, pairing: Pairing) -> None:
    case = Case("", batch=2, heads=(3, 3), dim=24, pairs=(4, 2, 4), prefix=1, pairing=pairing)
    xs = VIEWS[view](case)
    if into == "contiguous":
        outs = poisoned(xs)
    elif into == "view":
        outs = [out.fill_(torch.nan) for out in VIEWS["misaligned" if view == "transposed" else "transposed"](case)]
    else:
        outs = xs
    check_rotation(xs, case.args(), outs)


def test_rotate_leaves_memory_around_views_alone() -> None:
    case = Case("", tokens=5, heads=(3,), dim=20, pairs=(3, 4, 3))
    buffer = torch.full((1, 7, 4, 32), 5.0, dtype=case.dtype)
    out = buffer[:, 1:6, :3, 4:24]
    check_rotation(case.tensors(), case.args(), [out])
    outside = torch.ones(buffer.shape, dtype=torch.bool)
    outside[:, 1:6, :3, 4:24] = False
    assert (buffer[outside] == 5.0).all()


@pytest.mark.parametrize("dim", ["batch", "token", "head"])
def test_rotate_offsets_are_64_bit(dim: str) -> None:
    """Rows 2^31 elements apart, in an allocation of which only the pages of those rows are ever touched."""
    case = Case("", tokens=2, heads=(2,), batch=2, dim=16, pairs=(4, 4), sizes=(2, 2))
    far, strides = 2**31, {"batch": 128, "token": 32, "head": 16}
    strides[dim] = far
    x = torch.empty(far + 1024, dtype=case.dtype).as_strided((2, 2, 2, 16), (*strides.values(), 1))
    x.copy_(case.tensors()[0])
    check_rotation([x], case.args(), [x])


NORMS = [
    Case("one-token", tokens=1, heads=(1, 1)),
    Case("one-tensor-float32", tokens=67, heads=(3,), sizes=(3, 4, 6), dtype=F32),
    Case("gqa-batch", tokens=7, heads=(12, 3), batch=2, dtype=F16, prefix=2),
    Case("partial-interleaved", dim=40, pairs=(6, 4, 5), heads=(5, 2)),
    Case("partial-half", dim=64, pairs=(8, 7, 5), pairing=HALF, dtype=F32, prefix=1, count=4),
    Case("dim-112-half", dim=112, pairs=(16, 20, 20), heads=(2, 2), pairing=HALF),
    Case("odd-dim", dim=19, pairs=(4, 4), sizes=(2, 5), dtype=F32),
    Case("positions-batched", tokens=9, batch=2, positions=2, inverse=True),
]


@pytest.mark.parametrize("kind", list(NormKind), ids=lambda kind: kind.value)
@named(NORMS)
def test_norm_rotate_is_as_accurate_as_float32(case: Case, kind: NormKind) -> None:
    xs = case.tensors()
    sizes = [x.shape[2] * x.shape[3] if kind is NormKind.ACROSS_HEADS else x.shape[3] for x in xs]
    dtypes = (F32, case.dtype)
    weights = [torch.randn(size, generator=case.generator).to(dtypes[i]) for i, size in enumerate(sizes)]
    check_norm_rotation(xs, weights, kind, case.args(), poisoned(xs))


@pytest.mark.parametrize("pairing", list(Pairing), ids=lambda pairing: pairing.value)
@pytest.mark.parametrize("heads", [(12, 12), (40, 40), (64, 8)], ids=["wan-1.3b", "wan-14b", "gqa-64-8"])
def test_norm_rotate_across_many_heads(heads: tuple[int, int], pairing: Pairing) -> None:
    case = Case("", tokens=3, heads=heads, dim=128, pairs=(22, 21, 21), pairing=pairing)
    xs = case.tensors()
    weights = [torch.rand(count * 128, generator=case.generator).to(BF16) for count in heads]
    check_norm_rotation(xs, weights, NormKind.ACROSS_HEADS, case.args(), poisoned(xs))


@pytest.mark.parametrize("kind", list(NormKind), ids=lambda kind: kind.value)
def test_norm_rotate_weights_are_optional_each(kind: NormKind) -> None:
    case = Case("", heads=(3, 2), dtype=F32)
    xs = case.tensors()
    weight = torch.randn(xs[1].shape[2] * 16 if kind is NormKind.ACROSS_HEADS else 16, generator=case.generator)
    check_norm_rotation(xs, (None, weight), kind, case.args(), poisoned(xs), eps=1e-2)


@pytest.mark.parametrize("pairing", list(Pairing), ids=lambda pairing: pairing.value)
@pytest.mark.parametrize("kind", list(NormKind), ids=lambda kind: kind.value)
def test_norm_rotate_in_place_norms_unturned_tokens_too(kind: NormKind, pairing: Pairing) -> None:
    case = Case("", batch=2, tokens=9, heads=(3, 3), dim=24, pairs=(4, 2, 4), prefix=2, count=4, pairing=pairing)
    xs = packed(case)
    check_norm_rotation(xs, (None, None), kind, case.args(), xs)


def test_rotate_there_and_back_is_the_identity_to_two_roundings() -> None:
    case = Case("", tokens=21, dtype=F32)
    (x,), args = replace(case, heads=(3,)).tensors(), case.args()
    out = poisoned([x])
    triton_kernels.rotate([x], args, out)
    triton_kernels.rotate(out, replace(args, inverse=True), out)
    cos, sin = dense(args, 1, 21)
    there = wan_formula(x, cos, sin, INTERLEAVED)
    assert_within(out[0], x, wan_formula(there, cos, -sin, INTERLEAVED))


def test_rotate_of_no_tokens_does_nothing() -> None:
    case = Case("", tokens=0, count=0)
    xs = case.tensors()
    triton_kernels.rotate(xs, case.args(), poisoned(xs))
