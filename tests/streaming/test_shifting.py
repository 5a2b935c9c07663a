"""Rotated keys are keys rotated elsewhere; vectors and eviction plans are those of OpenVINO GenAI's token rotation."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import oracle
from dit_rope import Grid, Pairing, RopeSpec, Scaling, ShiftTable, plan_eviction, rope_table, rotate, shift_keys
from dit_rope.rotation import ops
from dit_rope.rotation.backends import eager
from dit_rope.rotation_args import RotationArgs
from dit_rope.streaming import shift as shifting
from rotated_keys import BLOCK, F32, F64, TEXT, angles, int32, naively_rotated, pool, rotated
from tolerance import assert_within

VIDEO = RopeSpec((8, 6, 6))

both_pairings = pytest.mark.parametrize("pairing", list(Pairing), ids=lambda pairing: pairing.value)


@pytest.fixture(params=["eager", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        request.getfixturevalue("cuda_on_cpu")
    return request.param


def test_table_is_one_for_all_layers_and_gathered_by_the_backend() -> None:
    table = ShiftTable(TEXT, step=BLOCK)
    with mock.patch.object(eager, "rotate", wraps=eager.rotate) as backend:
        for _ in range(30):
            shift_keys(pool(3), table, deltas=int32([1], [2], [2]), backend="eager")
    calls = [call.args[1] for call in backend.call_args_list]
    assert len(calls) == 30
    assert {args.rows.data_ptr() for args in calls} == {table.rows.data_ptr()}
    assert {args.positions.dtype for args in calls} == {torch.int32}
    assert {args.positions.shape for args in calls} == {(3, 1, 1)}


def test_spec_in_place_of_a_table_makes_one_table() -> None:
    with mock.patch.object(eager, "rotate", wraps=eager.rotate) as backend:
        for _ in range(3):
            shift_keys(pool(2), RopeSpec((16,)), delta_frames=-2, backend="eager")
    assert len({call.args[1].rows.data_ptr() for call in backend.call_args_list}) == 1


@pytest.mark.parametrize("axis", [0, 1])
def test_table_rows_are_multiples_of_the_step_in_float64_rounded_once(axis: int) -> None:
    table = ShiftTable(VIDEO, axis=axis, step=BLOCK)
    table.reserve(100)
    cos, sin = angles(RopeSpec((VIDEO.dims[axis],)), torch.arange(table.rows.shape[1]) * BLOCK)
    assert table.rows.dtype == F32
    assert table.rows.shape[1] > 100
    pairs = VIDEO.pairs[axis]
    assert torch.equal(table.rows[..., :pairs], torch.stack((cos, sin)).float())
    assert not table.rows[..., pairs:].any()


def test_table_of_float32_frequencies_has_float64_angles() -> None:
    table = ShiftTable(RopeSpec((16,), frequency_dtype=F32), step=64)
    frequencies = 1.0 / 10_000.0 ** (torch.arange(0, 16, 2, dtype=F32) / 16)
    exact = torch.outer(torch.arange(1001, dtype=F64) * 64, frequencies.double())
    assert torch.equal(table.reserve(1000)[:, :1001], torch.stack((exact.cos(), exact.sin())).float())


def test_table_grows_on_demand_and_old_rows_keep_their_bits() -> None:
    table = ShiftTable(TEXT, step=BLOCK)
    before, bits = table.rows, table.rows.clone()
    keys = pool(1, dtype=F32)
    longer = shift_keys(keys, table, deltas=int32([1000]))
    assert table.rows.shape[1] > 1000
    assert torch.equal(before, bits)
    assert torch.equal(table.rows[:, : bits.shape[1]], bits)
    moved = torch.full((1, BLOCK), -1000 * BLOCK)
    assert_within(longer, rotated(keys, TEXT, moved), naively_rotated(keys, TEXT, moved))


def test_row_past_the_table_is_an_error_in_the_backend() -> None:
    """The table as it is before it grows: what a backend does when nobody has looked at the deltas."""
    table = ShiftTable(TEXT)
    args = rotation_args(table.rows, int32([[table.rows.shape[1]]]), TEXT)
    with pytest.raises(IndexError):
        eager.rotate([pool(1)], args, [torch.empty(1, BLOCK, 2, 16)])


def test_row_past_the_table_does_not_turn_on_a_gpu(cuda_on_cpu: object) -> None:
    table, keys = ShiftTable(TEXT), pool(3)
    wrong = (table.rows.shape[1], 2**31 - 1)
    args = rotation_args(table.rows, int32([[wrong[0]], [1], [wrong[1]]]).view(3, 1, 1), TEXT)
    (out,) = ops.rotate([keys], args, backend="cuda")
    assert torch.equal(out[[0, 2]], keys[[0, 2]])
    assert not torch.equal(out[1], keys[1])


def test_table_refuses_a_row_that_would_take_all_memory() -> None:
    table = ShiftTable(TEXT)
    with pytest.raises(
        ValueError,
        match="deltas must be fewer than 1048576 steps of the table, got 2147483647; use one of more positions a step",
    ):
        shift_keys(pool(1), table, deltas=int32([2**31 - 1]))


def test_table_is_real_after_a_first_use_in_other_circumstances() -> None:
    spec = RopeSpec((10,), theta=77.0)
    with FakeTensorMode():
        shift_keys(torch.empty(1, BLOCK, 1, 10), spec, delta_frames=1)
    with torch.inference_mode():
        shift_keys(torch.empty(1, BLOCK, 1, 10), spec, delta_frames=1)
    with torch.device("meta"):
        table = ShiftTable(spec)
    assert table.rows.device.type == "cpu"
    keys = torch.randn(1, BLOCK, 1, 10)
    expected = shift_keys(keys, table, delta_frames=3)
    assert torch.equal(shift_keys(keys, spec, delta_frames=3), expected)


@both_pairings
def test_delta_of_a_block_is_that_delta_for_each_of_its_tokens(pairing: Pairing, backend: str) -> None:
    spec, keys, deltas = RopeSpec((16,), pairing=pairing), pool(3), int32([3], [0], [7])
    per_block = shift_keys(keys, spec, deltas=deltas, backend=backend)
    per_token = shift_keys(keys, spec, deltas=deltas.repeat(1, BLOCK), backend=backend)
    assert torch.equal(per_block, per_token)


@both_pairings
def test_deltas_may_differ_inside_a_block(pairing: Pairing, backend: str) -> None:
    spec, keys = RopeSpec((16,), pairing=pairing), pool(2, dim=20)
    deltas = int32([0, 1, 2, 9], [63, 5, 5, 0])
    actual = shift_keys(keys, spec, deltas=deltas, backend=backend)
    assert_within(actual, rotated(keys, spec, -deltas), naively_rotated(keys, spec, -deltas))
    assert torch.equal(actual[..., 16:], keys[..., 16:])


@both_pairings
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (F32, 1e-6)], ids=["float64", "float32"])
def test_shift_gives_keys_rotated_elsewhere(pairing: Pairing, dtype: torch.dtype, tolerance: float) -> None:
    spec, raw = RopeSpec((16,), pairing=pairing), pool(2).double()
    born = torch.arange(40, 40 + 2 * BLOCK).view(2, BLOCK)
    keys = rotated(raw, spec, born).to(dtype)
    assert (shift_keys(keys, spec, delta_frames=-7) - rotated(raw, spec, born - 7)).abs().max() <= tolerance
    assert (shift_keys(keys, spec, delta_frames=+7) - rotated(raw, spec, born + 7)).abs().max() <= tolerance
    deltas = int32([7], [11])
    assert (shift_keys(keys, spec, deltas=deltas) - rotated(raw, spec, born - deltas)).abs().max() <= tolerance


COEFFICIENTS = torch.tensor(
    [  # cosines and sines of one token each, no unit rotations among them
        ((0.5, 0.70710678), (0.8660254, -0.70710678)),
        ((0.8660254, 1.0), (0.5, 0.0)),
        ((-0.70710678, 0.0), (0.70710678, 1.0)),
        ((0.0, 0.6), (-1.0, -0.8)),
    ]
).permute(1, 0, 2)
BLOCK_BEFORE = torch.tensor(
    [
        [[1.0, 1.0, 1.0, 1.0], [-2.0, -2.0, -2.0, -2.0]],
        [[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]],
        [[1.0, 1.0, 1.0, 1.0], [-1.0, 2.0, -3.0, 4.0]],
        [[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]],
    ]
)
BLOCK_AFTER = torch.tensor(
    [
        [[-0.36602540, 1.41421356, 1.36602540, 0.0], [0.73205081, -2.82842712, -2.73205081, 0.0]],
        [[0.36602540, 1.0, 1.36602540, 1.0], [0.73205081, 2.0, 2.73205081, 2.0]],
        [[-1.41421356, -1.0, 0.0, 1.0], [2.82842712, -4.0, 1.41421356, 2.0]],
        [[1.0, 1.4, -1.0, -0.2], [2.0, 2.8, -2.0, -0.4]],
    ]
)
"""Tokens x heads x channels of the kernel's own unit test, neox pairing."""


def rotation_args(rows: torch.Tensor, positions: torch.Tensor, spec: RopeSpec) -> RotationArgs:
    return RotationArgs.of_rows(rows, positions, spec.pairs, BLOCK, spec.pairing)


@both_pairings
@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 1e-6), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)], ids=str)
def test_vectors_of_the_kernel(dtype: torch.dtype, tolerance: float, pairing: Pairing, backend: str) -> None:
    order = torch.tensor([0, 1, 2, 3] if pairing is Pairing.HALF else [0, 2, 1, 3])
    tokens = torch.arange(4, dtype=torch.int32).view(1, 4, 1)
    args = rotation_args(COEFFICIENTS.contiguous(), tokens, RopeSpec((4,), pairing=pairing))
    (actual,) = ops.rotate([BLOCK_BEFORE[None][..., order].to(dtype)], args, backend=backend)
    assert (actual[0].float() - BLOCK_AFTER[..., order]).abs().max() <= tolerance


def test_table_of_long_blocks_has_the_recorded_sines() -> None:
    """Blocks 18 to 44 of 53 leave, 27 blocks of 16 tokens; recorded in float16, with the sign of a move back."""
    plan = plan_eviction(range(18, 45), 53, 16)
    assert (plan.blocks[0], plan.steps[0] * 16) == (18, 432)
    rows = ShiftTable(RopeSpec((64,), pairing=Pairing.HALF), step=16).reserve(plan.steps[0])
    assert -rows[1, plan.steps[0], :4] == pytest.approx([0.9995, 0.3618, 0.8564, 0.0395], abs=1e-2)


# --------------------------------------------------------------------------------------------------- planning evictions


def test_empty_list_changes_nothing(backend: str) -> None:
    keys = pool(4)
    keys[0, 0, 0, :2] = torch.tensor([torch.inf, -0.0])  # which no rotation by an angle of zero keeps
    none = torch.empty(0, dtype=torch.int32)
    before = keys.clone()
    out = shift_keys(keys, TEXT, deltas=none.view(0, 1), blocks=none, inplace=True, backend=backend)
    assert out is keys
    assert torch.equal(keys, before)
    assert torch.equal(shift_keys(keys, TEXT, delta_frames=0, backend=backend), before)


@both_pairings
@pytest.mark.parametrize("transposed", [False, True], ids=["tokens-first", "heads-first"])
def test_only_listed_blocks_change(pairing: Pairing, transposed: bool, backend: str) -> None:
    spec, keys = RopeSpec((16,), pairing=pairing), pool(6, heads=3)
    if transposed:
        keys = keys.transpose(1, 2).contiguous().transpose(1, 2)
    before, listed, deltas = keys.clone(), [4, 1, 3], int32([5], [1], [33])
    assert shift_keys(keys, spec, deltas=deltas, blocks=int32(*listed), inplace=True, backend=backend) is keys
    moved = -deltas.expand(-1, BLOCK)
    assert_within(keys[listed], rotated(before[listed], spec, moved), naively_rotated(before[listed], spec, moved))
    assert torch.equal(keys[[0, 2, 5]], before[[0, 2, 5]])


def test_shift_out_of_place_leaves_the_keys() -> None:
    keys = pool(2)
    before = keys.clone()
    out = shift_keys(keys, TEXT, delta_frames=5)
    assert torch.equal(keys, before)
    assert torch.equal(out, shift_keys(keys, TEXT, delta_frames=5, inplace=True))


@pytest.mark.parametrize(("blocks", "block", "heads", "dim"), [(3, 2, 4, 64), (2, 32, 256, 1024)])
def test_shift_of_other_sizes_is_as_accurate_as_float32(blocks: int, block: int, heads: int, dim: int) -> None:
    spec, keys = RopeSpec((dim,), pairing=Pairing.HALF), torch.randn(blocks, block, heads, dim)
    deltas = torch.randint(64, (blocks, block), dtype=torch.int32)
    shifted = shift_keys(keys, spec, deltas=deltas)
    few = slice(0, 4)  # heads: the oracle goes pair by pair
    exact = rotated(keys[:, :, few], spec, -deltas)
    assert_within(shifted[:, :, few], exact, naively_rotated(keys[:, :, few], spec, -deltas))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_shift_of_a_video_rotates_one_axis_alone(axis: int, backend: str) -> None:
    keys = torch.randn(2, 12, 2, 24)  # 20 rotated channels, 4 unrotated ones
    table = ShiftTable(VIDEO, axis=axis)
    out = shift_keys(keys, table, delta_frames=-9, backend=backend)
    moved = torch.full((2, 12), -9)
    assert_within(out, rotated(keys, VIDEO, moved, axis), naively_rotated(keys, VIDEO, moved, axis))
    first = sum(VIDEO.dims[:axis])
    unrotated = [channel for channel in range(24) if not first <= channel < first + VIDEO.dims[axis]]
    assert torch.equal(out[..., unrotated], keys[..., unrotated])


def test_shift_of_a_video_gives_keys_of_other_frames() -> None:
    raw = torch.randn(1, 2 * 6, 2, 20, dtype=F64)
    at_9, at_4 = (
        oracle.rotate(
            raw,
            *oracle.full_grid_table((2, 2, 3), VIDEO.dims, VIDEO.theta, dtype=F64, start_frame=start, repeat=False),
            interleaved=True,
        )
        for start in (9, 4)
    )
    assert (shift_keys(at_9, VIDEO, delta_frames=-5) - at_4).abs().max() <= 1e-12


@pytest.mark.parametrize(
    "scaling",
    [
        Scaling.of("yarn", factor=8.0, original_max_position_embeddings=64),
        Scaling.of(
            "longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8, factor=4.0,
            original_max_position_embeddings=64, seq_len=256,
        ),
    ],
    ids=["yarn", "longrope"],
)  # fmt: skip
def test_shift_is_a_unit_rotation_where_the_scaling_has_a_magnitude(scaling: Scaling) -> None:
    spec = RopeSpec((16,), scaling=scaling)
    raw = torch.randn(1, 8, 2, 16, dtype=F64)
    table = rope_table(spec, Grid(64), dtype=F64)

    def keys_at(first: int) -> torch.Tensor:
        positions = torch.arange(first, first + 8, dtype=torch.int32).view(1, 8, 1)
        return rotate(raw, table, positions=positions)

    keys = keys_at(20)
    assert (keys.norm(dim=-1) / raw.norm(dim=-1)).min() > 1.05  # the magnitude, which a shift must not apply again
    shifted = shift_keys(keys, spec, delta_frames=13)
    assert (shifted.norm(dim=-1) - keys.norm(dim=-1)).abs().max() <= 1e-12
    assert (shifted - keys_at(33)).abs().max() <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_lossy_keys_are_refused_unless_asked_for(dtype: torch.dtype, backend: str) -> None:
    keys = pool(2).to(dtype)
    with pytest.raises(ValueError, match=rf"keys must be float32 or float64, got {dtype}, .*allow_lossy=True"):
        shift_keys(keys, TEXT, delta_frames=-3)
    once = shift_keys(keys, TEXT, delta_frames=-3, allow_lossy=True, backend=backend)
    moved = torch.full((2, BLOCK), -3)
    assert_within(once, rotated(keys, TEXT, moved), naively_rotated(keys, TEXT, moved))


def test_rows_that_are_new_are_finished_before_another_stream_can_see_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams wait for nobody; a second thread that does not grow the table takes no lock."""
    table = ShiftTable(TEXT, step=BLOCK)
    rows: list[torch.Tensor] = []
    monkeypatch.setattr(shifting, "finish", lambda device: rows.append(table.rows))
    before = table.rows
    grown = table.reserve(before.shape[1])
    assert grown is not before
    assert len(rows) == 1
    assert rows[0] is before
    assert table.reserve(before.shape[1]) is grown
    assert len(rows) == 1
