"""What every backend keeps of tables in other dtypes and layouts, of positions past them, and of chosen batch entries.

The second part of ``backend_contract.py``, which says how to run it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from contract_calls import (
    BACKEND,
    BF16,
    DEVICE,
    F16,
    F32,
    HALF,
    INTERLEAVED,
    Case,
    check_norm_rotation,
    check_rotation,
    compare,
    copies,
    dense,
    norm_rotate,
    poisoned,
    rotate,
    skip_unless,
)  # fmt: skip
from dit_rope.rotation_args import RotationArgs
from dit_rope.spec import NormKind, Pairing

pytestmark = pytest.mark.usefixtures("contract_backend")

both_pairings = pytest.mark.parametrize("pairing", list(Pairing), ids=lambda pairing: pairing.value)
PAST_THE_TABLE = (0, 1, 2**20, 2**31 - 1)


@both_pairings
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("dtypes", [(BF16, F32), (BF16, BF16), (F16, F16), (F32, F32)], ids=str)
def test_dense_table_is_one_axis(dtypes: tuple[torch.dtype, torch.dtype], exact: bool, pairing: Pairing) -> None:
    dtype, table = dtypes
    case = Case(
        tokens=29, heads=(3, 2), dim=32, pairs=(16,), sizes=(29,), dtype=dtype, table=table, exact=exact,
        pairing=pairing,
    )  # fmt: skip
    xs = case.tensors()
    check_rotation(xs, case.args(), poisoned(xs))


@both_pairings
@pytest.mark.parametrize("kind", list(NormKind), ids=lambda kind: kind.value)
def test_norm_rotate_takes_a_table_of_the_datas_dtype(kind: NormKind, pairing: Pairing) -> None:
    case = Case(heads=(3, 2), table=BF16, pairing=pairing)
    xs = case.tensors()
    check_norm_rotation(xs, case.weights(kind), kind, case.args(), poisoned(xs), biases=case.biases(kind))


@both_pairings
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_table_may_be_a_view_of_a_cache_of_cosines_beside_sines(exact: bool, pairing: Pairing) -> None:
    case = Case(
        tokens=29, heads=(3, 2), dim=32, pairs=(16,), sizes=(40,), positions=(1, 29), table=BF16, exact=exact,
        pairing=pairing,
    )  # fmt: skip
    args = case.args()
    cache = torch.cat(tuple(args.rows), dim=1)
    rows = cache.view(40, 2, 16).transpose(0, 1)
    assert rows.stride() == (16, 32, 1)
    xs = case.tensors()
    check_rotation(xs, replace(args, rows=rows), poisoned(xs))


@both_pairings
def test_position_past_the_table_does_not_rotate(pairing: Pairing) -> None:
    """Token by token another axis, and another row: the first past the table, the second, and some far from it."""
    skip_unless(BACKEND != "eager", "a position past the table may raise IndexError")
    case = Case(tokens=12, positions=(1, 12), pairing=pairing)
    args = case.args()
    assert args.positions is not None
    for token in range(12):
        row = PAST_THE_TABLE[token // 3]
        args.positions[:, token, token % 3] = min(args.rows.shape[1] + row, 2**31 - 1)
    for outs in (poisoned(case.tensors()), None):
        xs = case.tensors()
        check_rotation(xs, args, xs if outs is None else outs)


@dataclass(frozen=True)
class Shift:
    """Blocks of a pool that rotate in place: all of ``case.batch``, in one layout of their memory.

    Attributes:
        case: the pool; its positions have a row for each of ``entries``.
        entries: which blocks rotate.
        transposed: the pool is ``[blocks, heads, block, dim]`` in memory, else ``[blocks, block, heads, dim]``.
        frames_only: axis 0 rotates, every other axis has -1.
    """

    case: Case
    entries: tuple[int, ...] = (4, 1, 3)
    transposed: bool = False
    frames_only: bool = False

    def args(self) -> RotationArgs:
        """After the entries, in memory, comes that of a block which is not listed."""
        args = self.case.args()
        other = next(entry for entry in range(self.case.batch) if entry not in self.entries)
        entries = torch.tensor((*self.entries, other), dtype=torch.int32, device=DEVICE)[:-1]
        if self.frames_only and args.positions is not None:
            args.positions[..., 0].clamp_(min=0)
            args.positions[..., 1:] = -1
        return replace(args, entries=entries)

    def pool(self) -> list[torch.Tensor]:
        xs = self.case.tensors()
        return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in xs] if self.transposed else xs

    def check(self) -> None:
        """Turns the blocks and compares: those listed with the oracle, the others bit by bit."""
        xs, args = self.pool(), self.args()
        before = copies(xs)
        rotate(xs, args, xs)
        self.compare(before, copies(xs), args)

    def compare(self, before: list[torch.Tensor], now: list[torch.Tensor], args: RotationArgs) -> None:
        known = [i for i, entry in enumerate(self.entries) if 0 <= entry < self.case.batch]
        listed = [self.entries[i] for i in known]
        others = [entry for entry in range(self.case.batch) if entry not in listed]
        angles = dense(replace(args, entries=None), len(self.entries), self.case.tokens)
        angles = replace(angles, cos=angles.cos[known], sin=angles.sin[known], rotates=angles.rotates[known])
        for i, (x, out) in enumerate(zip(before, now, strict=True)):
            compare(x[listed], out[listed], angles, args, f"in tensor {i}")
            assert torch.equal(out[others], x[others]), f"changed a block of tensor {i} that is not listed"


POOL = Case(batch=6, tokens=5, heads=(3,), positions=(3, 1))


@both_pairings
@pytest.mark.parametrize("positions", [(3, 1), (3, 5), (1, 5), (1, 1)], ids=["block", "token", "offset", "all"])
@pytest.mark.parametrize("transposed", [False, True], ids=["blocks", "transposed"])
def test_entries_rotate_in_place(transposed: bool, positions: tuple[int, int], pairing: Pairing) -> None:
    case = replace(POOL, positions=positions, pairing=pairing, inverse=positions == (3, 1))
    Shift(case, transposed=transposed).check()


@both_pairings
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_entries_rotate_on_one_axis_alone(exact: bool, pairing: Pairing) -> None:
    Shift(replace(POOL, exact=exact, pairing=pairing), frames_only=True).check()


@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
def test_entries_of_two_tensors_with_a_prefix_and_a_tail(dtype: torch.dtype) -> None:
    case = replace(
        POOL, heads=(3, 2), dim=32, tokens=70, prefix=2, count=64, positions=(3, 64), dtype=dtype, pairing=HALF
    )
    Shift(case).check()


def test_entries_without_positions_stand_on_the_grid() -> None:
    Shift(replace(POOL, positions=None, token_offset=2)).check()


def test_entries_may_be_more_than_one_dimension_of_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ``backend_contract.py``; the block past the last entry has the number of one that is not listed."""
    if BACKEND == "cuda":
        monkeypatch.setattr("dit_rope.rotation.backends.cuda_kernels.MAX_GRID_ROWS", 2)
    Shift(replace(POOL, positions=(3, 4), prefix=1, count=4), entries=(4, 1, 5)).check()


def test_entries_may_be_a_view() -> None:
    """Such as the sources of ``[n, 2]`` pairs of blocks."""
    shift = Shift(POOL)
    xs, args = shift.pool(), shift.args()
    before = copies(xs)
    assert args.entries is not None
    entries = torch.stack((args.entries, torch.zeros_like(args.entries)), dim=1)[:, 0]
    rotate(xs, replace(args, entries=entries), xs)
    shift.compare(before, copies(xs), args)


def test_no_entries_change_nothing() -> None:
    Shift(replace(POOL, positions=(1, 1)), entries=()).check()


@pytest.mark.parametrize("operation", ["rotate", "norm"])
def test_entry_outside_the_batch_is_ignored(operation: str) -> None:
    skip_unless(BACKEND != "eager", "an entry outside the batch may raise IndexError")
    shift = Shift(replace(POOL, positions=(7, 1)), entries=(-1, 4, 6, 2**31 - 1, 0, -(2**31), 7))
    if operation == "rotate":
        shift.check()
        return
    xs = shift.pool()
    before = copies(xs)
    norm_rotate(xs, [None], 1e-6, NormKind.PER_HEAD, shift.args(), xs)
    for entry in range(6):
        assert torch.equal(xs[0][entry].cpu(), before[0][entry]) is (entry not in (0, 4))


@pytest.mark.parametrize("kind", list(NormKind), ids=lambda kind: kind.value)
def test_entries_are_normed_and_no_others(kind: NormKind) -> None:
    shift = Shift(replace(POOL, prefix=1))
    (x,), args, weights = shift.pool(), shift.args(), replace(POOL, heads=(3,)).weights(kind)
    (before,) = copies([x])
    norm_rotate([x], weights, 1e-6, kind, args, [x])
    picked, listed = before[list(shift.entries)].to(DEVICE), poisoned([before[list(shift.entries)].to(DEVICE)])
    check_norm_rotation([picked], weights, kind, replace(args, entries=None), listed)
    assert torch.equal(x[list(shift.entries)], listed[0])
    others = [entry for entry in range(6) if entry not in shift.entries]
    assert torch.equal(x[others].cpu(), before[others])


def test_entries_offsets_are_64_bit() -> None:
    """Blocks 2^31 elements apart, in an allocation of which only the pages of those blocks are ever touched."""
    case = Case(tokens=2, heads=(2,), batch=2, dim=16, pairs=(4, 4), sizes=(2, 2), positions=(1, 2))
    far = 2**31
    x = torch.empty(far + 64, dtype=case.dtype, device=DEVICE).as_strided((2, 2, 2, 16), (far, 32, 16, 1))
    x.copy_(case.tensors()[0])
    before = copies([x])
    shift = Shift(case, entries=(1,))
    args = shift.args()
    rotate([x], args, [x])
    shift.compare(before, copies([x]), args)


def test_positions_are_where_their_strides_say() -> None:
    """Axis after axis in memory, tokens backwards of nothing else: no two strides are alike."""
    case = Case(batch=2, positions=(2, 7))
    args = case.args()
    assert args.positions is not None
    elsewhere = args.positions.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert elsewhere.stride() == (7, 1, 14)
    xs = case.tensors()
    check_rotation(xs, replace(args, positions=elsewhere, pairing=INTERLEAVED), poisoned(xs))
