"""The choices of the CUDA kernel that a sweep tries, one knob after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from dit_rope.rotation.backends.cuda_plan import WARP, Plan
from dit_rope.rotation.backends.cuda_tuning import LOADS, STORES, Tuning

# Registers of an SM's four partitions, which share no warps, given to threads in steps; shared memory of an SM.
PARTITION_REGISTERS, PARTITIONS, REGISTER_STEP = 16_384, 4, 8
SHARED_BYTES = 220 << 10
# A thread needs as many registers, or its values go through memory; more than the other number no plan takes.
LEAST_REGISTERS, MOST_REGISTERS = {"rotate": 40, "norm per head": 56, "norm across heads": 64}, 80
LEAST_REGISTERS_OF_LATE_WEIGHTS = 56

MakePlan = Callable[[Tuning], Plan]
"""The plan of one call with some choices."""


def _threads(tuning: Tuning, plan: Plan) -> Iterator[Tuning]:
    for chunks in (2, 8):
        yield replace(tuning, thread_chunks=chunks)
    for least in (64, 256):
        yield replace(tuning, min_threads=least)


def _split(tuning: Tuning, plan: Plan) -> Iterator[Tuning]:
    yield replace(tuning, split=not tuning.split)


def _late_weights(tuning: Tuning, plan: Plan) -> Iterator[Tuning]:
    yield replace(tuning, late_weights=not tuning.late_weights)


def registers_for(blocks: int, threads: int) -> int:
    """The registers that a thread may take for an SM to hold so many blocks."""
    warps = -(-blocks * threads // WARP // PARTITIONS)
    return PARTITION_REGISTERS // (warps * WARP) // REGISTER_STEP * REGISTER_STEP


def _min_blocks(tuning: Tuning, plan: Plan) -> Iterator[Tuning]:
    """The largest number of blocks for each number of registers that they leave."""
    if plan.norm is None:
        least = LEAST_REGISTERS["rotate"]
    elif not plan.norm.across_heads:
        least = LEAST_REGISTERS["norm per head"]
    else:
        least = LEAST_REGISTERS_OF_LATE_WEIGHTS if plan.late_weights else LEAST_REGISTERS["norm across heads"]
    most = {registers_for(blocks, plan.threads): blocks for blocks in range(2, 33)}
    for registers, blocks in most.items():
        if least <= registers <= MOST_REGISTERS:
            yield replace(tuning, min_blocks=blocks)


def _loads(tuning: Tuning, plan: Plan) -> Iterator[Tuning]:
    for loads in LOADS:
        yield replace(tuning, loads=loads)


def _stores(tuning: Tuning, plan: Plan) -> Iterator[Tuning]:
    for stores in STORES:
        yield replace(tuning, stores=stores)


def _stages(tuning: Tuning, plan: Plan) -> Iterator[Tuning]:
    """With weights held, as blocks that stay read them once."""
    for blocks, stages in ((2, 2), (2, 3), (4, 3)):
        yield replace(tuning, stages=stages, min_blocks=blocks, split=False, late_weights=False)


def is_possible(plan: Plan, candidate: Tuning) -> bool:
    """Whether a plan has the stages that were asked for, and an SM room for them."""
    blocks = max(1, plan.min_blocks)
    return plan.stages == candidate.stages and blocks * plan.stage_bytes <= SHARED_BYTES


KNOBS: dict[str, Callable[[Tuning, Plan], Iterator[Tuning]]] = {
    "threads": _threads,
    "split": _split,
    "late weights": _late_weights,
    "min blocks": _min_blocks,
    "loads": _loads,
    "stores": _stores,
    "stages": _stages,
}
"""What to try, in order: first what decides the blocks, then what a compiler is told, then what the caches are told."""


def neighbours(knob: str, tuning: Tuning, make_plan: MakePlan, plans: set[Plan]) -> list[Tuning]:
    """The values of one knob beside ``tuning`` whose plans are new; adds them to ``tried``."""
    new = []
    for candidate in KNOBS[knob](tuning, make_plan(tuning)):
        plan = make_plan(candidate)
        if plan not in plans and is_possible(plan, candidate):
            plans.add(plan)
            new.append(candidate)
    return new


def first_steps(make_plan: MakePlan) -> dict[str, Tuning]:
    """The defaults, and every change of one knob, by a name that says the change; each plan once."""
    default = Tuning()
    plans = {make_plan(default)}
    steps = [default, *(candidate for knob in KNOBS for candidate in neighbours(knob, default, make_plan, plans))]
    return {name_of(tuning): tuning for tuning in steps}


def name_of(tuning: Tuning) -> str:
    """What differs from the defaults, such as ``"min_blocks=3 late_weights=True"``; ``"default"`` if nothing does."""
    default = vars(Tuning())
    return " ".join(f"{name}={value}" for name, value in vars(tuning).items() if value != default[name]) or "default"
