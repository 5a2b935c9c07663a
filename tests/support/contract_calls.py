"""Calls for the contract that every backend keeps, what they must give, and the backend under test.

The environment chooses: ``DIT_ROPE_BACKEND`` is eager (the default), triton or cuda, ``DIT_ROPE_DEVICE`` is cpu (the
default) or cuda. On a CPU Triton needs TRITON_INTERPRET=1, and the CUDA kernels run in ``cuda_emulation.py``.
``DIT_ROPE_TUNING`` is JSON of the choices of ``cuda_tuning.Tuning`` that CUDA kernels are compiled with, where it is
set.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from dit_rope.rotation.backends import cuda_kernels, eager, triton_kernels
from dit_rope.rotation.backends.cuda_tuning import Tuning
from dit_rope.rotation_args import Norm, RotationArgs
from dit_rope.spec import NormKind, Pairing
from oracle import norm as norm_oracle
from oracle import rotate as rotate_oracle
from tolerance import assert_within

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "tests" / "backends").glob("backend_contract*.py"))

HALF, INTERLEAVED = Pairing.HALF, Pairing.INTERLEAVED
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

BACKEND = os.environ.get("DIT_ROPE_BACKEND", "eager")
DEVICE = os.environ.get("DIT_ROPE_DEVICE", "cpu")
MODULE = {"eager": eager, "triton": triton_kernels, "cuda": cuda_kernels}[BACKEND]

ODD_DIMS = {
    "test_rotate_is_as_accurate_as_float32[odd-dim]",
    "test_rotate_in_place_leaves_the_rest_alone[odd-dim]",
    *(f"test_norm_rotate_is_as_accurate_as_float32[odd-dim-{kind.value}]" for kind in NormKind),
}
PAST_THE_TABLE = {
    "test_position_past_the_table_does_not_rotate[interleaved]",
    "test_position_past_the_table_does_not_rotate[half]",
    "test_entry_outside_the_batch_is_ignored[rotate]",
    "test_entry_outside_the_batch_is_ignored[norm]",
    "test_head_past_the_table_does_not_rotate",
}
LONG_TABLES = {"test_angles_of_heads_are_in_tables_past_2_31_elements"}
# Every test that a backend may skip, and must.
SKIPPED = {"eager": PAST_THE_TABLE, "triton": LONG_TABLES, "cuda": ODD_DIMS}[BACKEND]


def run_contract(backend: str, device: str, tuning: Tuning | None = None) -> str:
    """Runs every test of the contract in a process of its own; returns pytest's last line.

    Raises:
        AssertionError: a test failed, with the output.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"DIT_ROPE_BACKEND": backend, "DIT_ROPE_DEVICE": device, "PYTHONPATH": str(ROOT)}
    if (backend, device) == ("triton", "cpu"):
        environment["TRITON_INTERPRET"] = "1"
    if tuning is not None:
        environment["DIT_ROPE_TUNING"] = json.dumps(asdict(tuning))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", *map(str, FILES)],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-20_000:]}\n{done.stderr[-2_000:]}"
    return done.stdout.strip().rpartition("\n")[2]


@contextmanager
def prepared(folder: Path) -> Iterator[None]:
    """While it is open, the backend takes calls on :data:`DEVICE`; ``folder`` keeps the kernels built for a CPU."""
    with _tuned(os.environ.get("DIT_ROPE_TUNING")), _on_cpu(folder):
        yield


def _tuned(choices: str | None) -> AbstractContextManager[object]:
    if choices is None:
        return nullcontext()
    return cuda_kernels.tuned(Tuning(**json.loads(choices)))


@contextmanager
def _on_cpu(folder: Path) -> Iterator[None]:
    if DEVICE == "cpu" and BACKEND == "cuda":
        from cuda_emulation import emulated

        with emulated(folder):
            yield
    elif DEVICE == "cpu" and BACKEND == "triton":
        from triton.runtime import interpreter

        with mock.patch.object(interpreter, "_convert_float", _round_to_nearest):
            yield
    else:
        yield


def _round_to_nearest(data: np.ndarray, source: object, target: object, rounding: object) -> np.ndarray:
    """Triton 3.6's interpreter cuts float32 off where GPUs round it to bfloat16 (to nearest, ties to even)."""
    if data.dtype == np.uint16:
        return torch.from_numpy(data.astype(np.int32) << 16).view(F32).numpy().reshape(data.shape)
    bits = torch.from_numpy(np.ascontiguousarray(data)).to(BF16).view(torch.int16)
    return bits.numpy().view(np.uint16).reshape(data.shape)


def running_test() -> str:
    """Name of the test that runs, with its parameters."""
    return os.environ["PYTEST_CURRENT_TEST"].rpartition("::")[2].rpartition(" ")[0]


def skip_unless(holds: bool, reason: str) -> None:
    """Skips the running test where something does not hold of the backend: in exactly the tests of SKIPPED."""
    expected = running_test() not in SKIPPED
    assert holds == expected, f"{BACKEND} must {'take' if expected else 'decline'} {running_test()}: {reason}"
    if not holds:
        pytest.skip(f"{BACKEND}: {reason}")


def _ask(xs: Sequence[torch.Tensor], args: RotationArgs, norm: NormKind | None) -> None:
    reason = None if BACKEND == "eager" else MODULE.declined(xs, args, norm)
    if reason is not None:
        skip_unless(False, reason)


def rotate(xs: Sequence[torch.Tensor], args: RotationArgs, outs: Sequence[torch.Tensor]) -> None:
    """Rotates ``xs`` into ``outs`` with the backend, unless it declines."""
    _ask(xs, args, None)
    MODULE.rotate(xs, args, outs)


def norm_rotate(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    eps: float,
    kind: NormKind,
    args: RotationArgs,
    outs: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None] = (),
) -> None:
    """Norms and rotates ``xs`` into ``outs`` with the backend, unless it declines."""
    _ask(xs, args, kind)
    MODULE.rotate(xs, args, outs, Norm.of(xs, kind, eps, weights, biases))


@dataclass(frozen=True)
class Case:
    """One call: shapes ``[batch, tokens, heads[i], dim]``, and where its tokens stand in the grid.

    ``positions`` are the batch entries and tokens that have positions of their own; ``bfloat16`` data and a float32
    table unless said otherwise.
    """

    name: str = ""
    tokens: int = 7
    heads: tuple[int, ...] = (3, 3)
    dim: int = 16
    pairs: tuple[int, ...] = (4, 2, 2)
    sizes: tuple[int, ...] = (2, 3, 4)
    batch: int = 1
    dtype: torch.dtype = BF16
    table: torch.dtype = F32
    pairing: Pairing = INTERLEAVED
    first_rows: tuple[int, ...] | None = None
    token_offset: int = 0
    prefix: int = 0
    count: int | None = None
    positions: tuple[int, int] | None = None
    inverse: bool = False
    exact: bool = False
    head_rows: int = 0

    def args(self) -> RotationArgs:
        """A table of random angles, as long as the rows reach; positions, if any, with negative rows among them.

        Neither is contiguous: around the table lies NaN, around the positions lie rows far past the table.
        """
        generator = torch.Generator().manual_seed(7)
        firsts = self.first_rows or (0,) * len(self.pairs)
        count = self.tokens - self.prefix if self.count is None else self.count
        reach = max(first + size for first, size in zip(firsts, self.sizes, strict=True))
        length, width = reach + self.head_rows * (max(self.heads) - 1), max(self.pairs)
        angles = torch.rand(length, width, generator=generator, dtype=F64) * 7
        table = torch.full((2, length + 2, width + 3), torch.nan, dtype=self.table)
        table[:, 1:-1, :width] = torch.stack((angles.cos(), angles.sin()))
        positions = None
        if self.positions is not None:
            axes = len(self.pairs)
            around = torch.full((*self.positions, axes + 2), 10**6, dtype=torch.int32)
            around[..., 1:-1] = torch.randint(-1, reach, (*self.positions, axes), generator=generator)
            positions = around.to(DEVICE)[..., 1:-1]
        return RotationArgs(
            table.to(DEVICE)[:, 1:-1, :width], positions, self.pairs, self.sizes, firsts, self.token_offset,
            self.prefix, count, self.pairing, self.inverse, self.exact, None, self.head_rows,
        )  # fmt: skip

    def random(self, *shape: int, seed: int = 8) -> torch.Tensor:
        """Random data of any shape, on the CPU."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.dtype)

    def tensors(self) -> list[torch.Tensor]:
        """One contiguous tensor for each entry of heads."""
        shapes = [(self.batch, self.tokens, heads, self.dim) for heads in self.heads]
        return [self.random(*shape, seed=8 + i).to(DEVICE) for i, shape in enumerate(shapes)]

    def weights(self, kind: NormKind, dtypes: Sequence[torch.dtype] = (F32, BF16)) -> list[torch.Tensor]:
        """One weight for each tensor, in ``dtypes``."""
        generator = torch.Generator().manual_seed(9)
        weights = [torch.rand(size, generator=generator) + 0.5 for size in self._normed_channels(kind)]
        return [weight.to(DEVICE, dtypes[i]) for i, weight in enumerate(weights)]

    def biases(self, kind: NormKind, dtypes: Sequence[torch.dtype] = (BF16, F32)) -> list[torch.Tensor]:
        """One bias for each tensor, in ``dtypes``; none for a norm that has no biases."""
        generator = torch.Generator().manual_seed(10)
        biases = [torch.randn(size, generator=generator) for size in self._normed_channels(kind)]
        return [bias.to(DEVICE, dtypes[i]) for i, bias in enumerate(biases)] if kind.centred else []

    def _normed_channels(self, kind: NormKind) -> list[int]:
        return [heads * self.dim if kind.across_heads else self.dim for heads in self.heads]


def named(cases: Sequence[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


@dataclass(frozen=True)
class Dense:
    """Cos and sin ``[batch, tokens, 1 or heads, pairs]`` in the dtype of the table, and whether each pair rotates."""

    cos: torch.Tensor
    sin: torch.Tensor
    rotates: torch.Tensor

    def of(self, x: torch.Tensor) -> Dense:
        """Those of the heads that ``x`` has."""
        return Dense(*(table[:, :, : x.shape[2]] for table in (self.cos, self.sin, self.rotates)))


def dense(args: RotationArgs, batch: int, tokens: int, heads: int = 1) -> Dense:
    """The angles token by token, as the docstring of RotationArgs defines them; for each head where they differ."""
    rows = args.rows.cpu()
    shape = (batch, tokens, heads if args.head_rows else 1, sum(args.pairs))
    cos, sin, rotates = (torch.full(shape, value, dtype=rows.dtype) for value in (1.0, 0.0, 0.0))
    for b, i, h in itertools.product(*map(range, shape[:3])):
        start = 0
        for first, pairs in zip(_rows_of(args, b, i - args.prefix), args.pairs, strict=True):
            row = first + h * args.head_rows
            if first >= 0 and row < rows.shape[1]:
                cos[b, i, h, start : start + pairs] = rows[0, row, :pairs]
                sin[b, i, h, start : start + pairs] = rows[1, row, :pairs]
                rotates[b, i, h, start : start + pairs] = 1.0
            start += pairs
    return Dense(cos, -sin if args.inverse else sin, rotates.bool())


def _rows_of(args: RotationArgs, b: int, j: int) -> list[int]:
    """Row of each axis of token ``j`` of the grid, -1 where it does not rotate."""
    unrotated = [-1] * len(args.pairs)
    if not 0 <= j < args.count:
        return unrotated
    if args.positions is not None:
        by_batch, by_token = (min(at, size - 1) for at, size in zip((b, j), args.positions.shape, strict=False))
        rows: list[int] = args.positions[by_batch, by_token].tolist()
        return rows
    flat = args.token_offset + j
    if flat >= math.prod(args.sizes):
        return unrotated
    return [f + int(c) for f, c in zip(args.first_rows, np.unravel_index(flat, args.sizes), strict=True)]


def formula(x: torch.Tensor, angles: Dense, pairing: Pairing, dtype: torch.dtype) -> torch.Tensor:
    """The rotation as eager model code writes it, in ``dtype``; not rounded to the dtype of x."""
    out = x.to(dtype)
    x1, x2 = (out[..., channels] for channels in _channels(angles, pairing))
    cos, sin = angles.cos.to(dtype), angles.sin.to(dtype)
    rotated = (x1 * cos - x2 * sin, x1 * sin + x2 * cos)
    out = out.clone()
    for channels, values in zip(_channels(angles, pairing), rotated, strict=True):
        out[..., channels] = values
    return out


def _channels(angles: Dense, pairing: Pairing) -> tuple[slice, slice]:
    """The first and the second channel of every pair."""
    n = angles.cos.shape[-1]
    return (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if pairing is INTERLEAVED else (slice(n), slice(n, 2 * n))


def unrotated_channels(x: torch.Tensor, angles: Dense, pairing: Pairing) -> torch.Tensor:
    """Which elements of ``x`` no rotation changes."""
    unrotated = torch.ones(x.shape, dtype=torch.bool)
    for channels in _channels(angles, pairing):
        unrotated[..., channels] = ~angles.rotates
    return unrotated


def poisoned(xs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Contiguous tensors of NaN."""
    return [torch.full_like(x, torch.nan, memory_format=torch.contiguous_format) for x in xs]


def copies(xs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """On the CPU, whatever is written to ``xs`` later."""
    return [x.to("cpu", copy=True, memory_format=torch.contiguous_format) for x in xs]


def compare(x: torch.Tensor, out: torch.Tensor, angles: Dense, args: RotationArgs, context: str = "") -> None:
    """Compares the rotation ``out`` of ``x``, on any device, with the oracle; what does not rotate, bit by bit."""
    x, out, angles = x.cpu(), out.cpu(), angles.of(x)
    if x.numel() == 0:
        return
    exact = rotate_oracle(x, angles.cos, angles.sin, interleaved=args.pairing is INTERLEAVED)
    dtype = torch.promote_types(x.dtype, args.rows.dtype) if args.exact else F32
    naive = formula(x, angles, args.pairing, dtype)
    assert_within(out, exact, naive, context)
    if args.exact:
        assert torch.equal(out, naive.to(out.dtype)), f"not bitwise the eager formula {context}"
    unrotated = unrotated_channels(x, angles, args.pairing)
    assert torch.equal(out[unrotated], x[unrotated]), f"changed what does not rotate {context}"


def check_rotation(xs: Sequence[torch.Tensor], args: RotationArgs, outs: Sequence[torch.Tensor]) -> None:
    """Rotates ``xs`` and compares each of ``outs``, which may be ``xs``, with the oracle."""
    angles = dense(args, *xs[0].shape[:2], max(x.shape[2] for x in xs))
    inputs = copies(xs)
    rotate(xs, args, outs)
    for i, (x, out) in enumerate(zip(inputs, outs, strict=True)):
        compare(x, out, angles, args, f"in tensor {i}")


def _naive_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, kind: NormKind, order: int
) -> torch.Tensor:
    """The norm as a model writes it, in float32; its sums begin ``order`` channels further on."""
    x = x.float()
    dims = (-2, -1) if kind.across_heads else (-1,)
    if kind.centred:
        x = x - x.roll(order, -1).mean(dim=dims, keepdim=True)
    out = x * torch.rsqrt((x * x).roll(order, -1).mean(dim=dims, keepdim=True) + eps)
    if weight is not None:
        out = out * (weight.float().reshape(x.shape[-2:]) if kind.across_heads else weight.float())
    if bias is not None:
        out = out + (bias.float().reshape(x.shape[-2:]) if kind.across_heads else bias.float())
    return out


def check_norm_rotation(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    kind: NormKind,
    args: RotationArgs,
    outs: Sequence[torch.Tensor],
    eps: float = 1e-6,
    biases: Sequence[torch.Tensor | None] = (),
) -> None:
    """Norms and rotates ``xs`` and compares each of ``outs``, which may be ``xs``, with the oracle."""
    angles = dense(args, *xs[0].shape[:2], max(x.shape[2] for x in xs))
    inputs = copies(xs)
    norm_rotate(xs, weights, eps, kind, args, outs, biases)
    for i, (x, out) in enumerate(zip(inputs, outs, strict=True)):
        if x.numel() == 0:
            continue
        weight, bias = (
            None if not parameters or parameters[i] is None else parameters[i].cpu() for parameters in (weights, biases)
        )
        normed = norm_oracle(x, weight, bias, eps, across_heads=kind.across_heads, centred=kind.centred)
        of_x = angles.of(x)
        exact = rotate_oracle(normed, of_x.cos, of_x.sin, interleaved=args.pairing is INTERLEAVED)
        # Of the orders in which one may sum, that which happens to be worst: any backend's order may be as bad.
        naive = max(
            (formula(_naive_norm(x, weight, bias, eps, kind, order), of_x, args.pairing, F32) for order in range(4)),
            key=lambda naive, exact=exact: float((naive.double() - exact).abs().max()),
        )
        assert_within(out.cpu(), exact, naive, f"in tensor {i}")
