"""What evicting blocks does: plans and angles as OpenVINO GenAI's own tests have them, and a cache that goes on."""

from __future__ import annotations

import pytest
import torch

from dit_rope import Pairing, RopeSpec, ShiftTable, plan_eviction, shift_keys
from dit_rope.streaming.eviction import EvictionPlan
from rotated_keys import BLOCK, F32, F64, int32, naively_rotated, pool, rotated
from tolerance import assert_within

SIN_4, COS_4 = 0.75680249, -0.65364362
PLANS = {
    "same-frequencies": (1.0, {1, 2}, [(1, 4, [SIN_4, SIN_4], [COS_4, COS_4])]),
    "two-frequencies": (2.0, {1, 2}, [(1, 4, [SIN_4, -0.30807174], [COS_4, -0.95136312])]),
    "first-and-last": (
        2.0,
        {0, 3},
        [(new, 2, [-0.90929742, -0.98776594], [-0.41614683, 0.15594369]) for new in (0, 1)],
    ),
    "every-other": (
        2.0,
        {0, 2},
        [
            (0, 2, [-0.90929742, -0.98776594], [-0.41614683, 0.15594369]),
            (1, 4, [SIN_4, -0.30807174], [COS_4, -0.95136312]),
        ],
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_plan_and_angles_of_four_blocks_of_two(name: str) -> None:
    theta, evicted, expected = PLANS[name]
    plan = plan_eviction(evicted, 4, 2)
    rows = ShiftTable(RopeSpec((4,), theta=theta, pairing=Pairing.HALF), step=2, dtype=F64).reserve(max(plan.steps))
    assert [(new, 2 * steps) for new, steps in zip(plan.blocks, plan.steps, strict=True)] == [e[:2] for e in expected]
    for steps, (_, _, sines, cosines) in zip(plan.steps, expected, strict=True):
        assert rows[0, steps].tolist() == pytest.approx(cosines, abs=1e-8)
        assert (-rows[1, steps]).tolist() == pytest.approx(sines, abs=1e-8)


@pytest.mark.parametrize(
    ("evicted", "blocks", "moved"), [({1, 2}, 7, 4), ({8, 0, 5, 3}, 9, 5), (set(range(24, 29)), 30, 1)]
)
def test_plan_moves_what_follows_an_evicted_block(evicted: set[int], blocks: int, moved: int) -> None:
    plan = plan_eviction(evicted, blocks, 8)
    assert len(plan.blocks) == len(plan.steps) == moved
    assert plan.next_position == 8 * (blocks - len(evicted))
    assert [block for block in range(blocks) if block not in evicted] == list(plan.kept)


@pytest.mark.parametrize(
    ("evicted", "blocks", "block_size"), [([1, 2, 6, 39], 32, 8), ([8, 0, 5, 50], 9, 16), ([0, 1, 2], 2, 8)]
)
def test_plan_refuses_blocks_that_are_not_there(evicted: list[int], blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match=rf"evicted must be different blocks below {blocks}, got .* outside"):
        plan_eviction(evicted, blocks, block_size)


@pytest.mark.parametrize("theta", [-1.0, 0.0, 1337.0])
def test_spec_needs_a_positive_theta(theta: float) -> None:
    if theta > 0:
        assert ShiftTable(RopeSpec((16,), theta=theta), step=8).rows.shape[1] > 0
        return
    with pytest.raises(ValueError, match="theta must be positive and finite"):
        RopeSpec((16,), theta=theta)


def test_plan_of_nothing_and_of_everything() -> None:
    assert plan_eviction((), 3, 4) == EvictionPlan((0, 1, 2), (), (), 12)
    assert plan_eviction({0, 1, 2}, 3, 4) == EvictionPlan((), (), (), 0)


@pytest.mark.parametrize("pairing", list(Pairing), ids=lambda pairing: pairing.value)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_eviction_leaves_the_logits_of_a_cache_without_the_evicted(pairing: Pairing, dtype: torch.dtype) -> None:
    spec, blocks = RopeSpec((16,), pairing=pairing), 7
    raw, query = pool(blocks, dtype=dtype), torch.randn(1, 1, 2, 16, dtype=dtype)
    keys = rotated(raw, spec, torch.arange(blocks * BLOCK).view(blocks, BLOCK)).to(dtype)
    plan = plan_eviction({1, 2, 5}, blocks, BLOCK)
    cache = keys[list(plan.kept)]
    steps = torch.tensor(plan.steps, dtype=torch.int32)[:, None]
    table = ShiftTable(spec, step=BLOCK, dtype=dtype)
    shift_keys(cache, table, deltas=steps, blocks=int32(*plan.blocks), inplace=True)

    remaining = raw[list(plan.kept)]
    fresh_positions = torch.arange(plan.next_position).view(-1, BLOCK)
    fresh = rotated(remaining, spec, fresh_positions)
    query_rotated = rotated(query, spec, torch.tensor([[plan.next_position]]))

    def logits(rotated: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bshd,nthd->hnt", query_rotated, rotated.double())

    if dtype == F64:
        assert (logits(cache) - logits(fresh)).abs().max() <= 1e-12
        return
    old_positions = fresh_positions.clone()
    old_positions[list(plan.blocks)] += steps * BLOCK
    naive = naively_rotated(naively_rotated(remaining, spec, old_positions), spec, fresh_positions - old_positions)
    assert_within(cache, fresh, naive)
    assert_within(logits(cache).float(), logits(fresh), logits(naive))
