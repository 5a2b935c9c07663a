"""Plans how cache blocks move when others are evicted; :mod:`dit_rope.streaming.shift` then moves their keys.

The numbers are those of OpenVINO GenAI (``cache_eviction.cpp`` at da1db864).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..scalars import as_int, integer

_MOST_BLOCKS = 2**24  # a plan is made block by block


@dataclass(frozen=True)
class EvictionPlan:
    """The blocks after an eviction: those that stay become consecutive, and the next token follows them.

    Attributes:
        kept: old numbers of the blocks that stay, in order: new block i is old block ``kept[i]``.
        blocks: new numbers of the blocks that move, ascending.
        steps: number of blocks by which each of them moves towards the start.
        next_position: position of the next token, which is the number of tokens that stay.
    """

    kept: tuple[int, ...]
    blocks: tuple[int, ...]
    steps: tuple[int, ...]
    next_position: int


def plan_eviction(evicted: Collection[int], blocks: int, block_size: int, *, tokens: int | None = None) -> EvictionPlan:
    """Plans the shift after ``evicted`` of ``blocks`` cache blocks of ``block_size`` tokens each.

    Args:
        evicted: numbers of the blocks that leave, none twice.
        blocks: the number of blocks.
        block_size: tokens of a full block.
        tokens: tokens of all blocks together, if the last block is not full; None if it is.

    Raises:
        TypeError: evicted is not a collection of ints.
        ValueError: an evicted block that does not exist or is repeated; sizes that are not positive; tokens that do not
            fill all blocks except the last.

    Example:
        >>> from dit_rope import plan_eviction
        >>> plan = plan_eviction({1, 2}, blocks=4, block_size=16, tokens=49)
        >>> plan.blocks, plan.steps, plan.next_position
        ((1,), (2,), 17)
    """
    sizes: list[int] = []
    for name, value in (("blocks", blocks), ("block_size", block_size)):
        size = as_int(value)
        if size is None or size < 1:
            raise ValueError(f"{name} must be a positive int, got {value!r}")
        sizes.append(size)
    blocks, block_size = sizes
    if blocks > _MOST_BLOCKS:
        raise ValueError(f"blocks must be at most {_MOST_BLOCKS}, got {blocks}")
    if not isinstance(evicted, Collection) or any(as_int(block) is None for block in evicted):
        raise TypeError(f"evicted must be a collection of block numbers, got {evicted!r}")
    last = block_size if tokens is None else integer("tokens", tokens, 1) - (blocks - 1) * block_size
    if not 1 <= last <= block_size:
        raise ValueError(
            f"tokens must fill {blocks} blocks of {block_size} but for the last, {(blocks - 1) * block_size + 1} to "
            f"{blocks * block_size}, got {tokens}"
        )
    evicted = [int(block) for block in evicted]
    leaving = set(evicted)
    outside = sorted(block for block in leaving if not 0 <= block < blocks)
    if outside or len(leaving) != len(evicted):
        wrong = f"{outside} outside" if outside else "repeated ones"
        raise ValueError(f"evicted must be different blocks below {blocks}, got {sorted(evicted)} with {wrong}")
    kept = tuple(block for block in range(blocks) if block not in leaving)
    moved = [(new, old - new) for new, old in enumerate(kept) if old != new]
    return EvictionPlan(
        kept=kept,
        blocks=tuple(new for new, _ in moved),
        steps=tuple(steps for _, steps in moved),
        next_position=len(kept) * block_size - (0 if blocks - 1 in leaving else block_size - last),
    )
