"""Engines that cut tables themselves, with explicit shards: every rank its own part, over gloo on CPU.

Each test whose docstring names an issue is of a mistake that an engine has made there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dit_rope
import oracle
from dit_rope import Grid, RopeSpec, Shard, rope_table, rotate
from ranks import Died, Ranks
from tolerance import all_equal

WORLD = 4
SPEC = RopeSpec((8, 6, 6))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(WORLD, tmp_path_factory.mktemp("ranks"), seconds=30) as started:
        yield started


def gathered(local: torch.Tensor) -> list[torch.Tensor]:
    """The parts of all ranks, which are of one size."""
    parts = [torch.empty_like(local) for _ in range(WORLD)]
    torch.distributed.all_gather(parts, local.contiguous())
    return parts


def tables_of_all_ranks(sizes: tuple[int, ...], start: int, axis: int | None) -> list[bool]:
    """Whether the tables of all ranks together, in each form, are the whole grid's; by form."""
    grid, rank = Grid(*sizes, start_frame=start), torch.distributed.get_rank()
    table = rope_table(SPEC, grid, shard=Shard(rank, WORLD, axis=axis), dtype=torch.float64)
    whole = oracle.full_grid_table(sizes, SPEC.dims, 10_000.0, dtype=torch.float64, start_frame=start, repeat=False)
    joined, equal = [], []
    for local_table, full in zip(table.cos_sin(repeat=False), whole, strict=True):
        if axis is None:
            joined.append(torch.cat(gathered(local_table)))
            identity = torch.full_like(joined[-1][grid.tokens :], 1.0 if len(joined) == 1 else 0.0)
            equal.append(torch.equal(joined[-1], torch.cat([full, identity])))
        else:
            local = [size // WORLD if at == axis else size for at, size in enumerate(sizes)]
            parts = [shard.view(*local, -1) for shard in gathered(local_table)]
            equal.append(torch.equal(torch.cat(parts, dim=axis).flatten(0, -2), full))
    return equal


@pytest.mark.parametrize(("sizes", "axis"), [((4, 8, 12), 0), ((4, 8, 12), 1), ((4, 8, 12), 2), ((3, 5, 7), None)])
@pytest.mark.parametrize("start", [0, 31])
def test_tables_of_all_ranks_together_are_the_whole(
    ranks: Ranks, sizes: tuple[int, ...], axis: int | None, start: int
) -> None:
    assert ranks.run(tables_of_all_ranks, sizes, start, axis) == [[True, True]] * WORLD


def rotation_of_a_part(sizes: tuple[int, ...], start: int, ring: bool) -> tuple[bool, bool]:
    """A ring rotates its tokens before the exchange; Ulysses rotates all tokens of its heads after the exchange."""
    rank, grid = torch.distributed.get_rank(), Grid(*sizes, start_frame=start)
    length = -(-grid.tokens // WORLD)
    torch.manual_seed(0)
    x = torch.randn(2, WORLD * length, WORLD, 20, dtype=torch.float64)
    cos, sin = oracle.full_grid_table(sizes, SPEC.dims, 10_000.0, dtype=torch.float64, start_frame=start, repeat=False)
    expected = x.clone()
    expected[:, : grid.tokens] = oracle.rotate(x[:, : grid.tokens], cos, sin, interleaved=True)
    local = x[:, rank * length : (rank + 1) * length].contiguous()
    if ring:
        local = rotate(local, rope_table(SPEC, grid, shard=Shard(rank, WORLD), dtype=torch.float64), exact=True)
        rotated = torch.cat(gathered(local), dim=1)
    else:
        heads = torch.cat(gathered(local), dim=1)[:, :, rank : rank + 1].contiguous()
        table = rope_table(SPEC, grid, dtype=torch.float64)
        rotated = rotate(heads, table, suffix=heads.shape[1] - grid.tokens, exact=True)
        rotated = torch.cat(gathered(rotated), dim=2)
    return torch.equal(rotated, expected), torch.equal(rotated[:, grid.tokens :], x[:, grid.tokens :])


@pytest.mark.parametrize("ring", [True, False], ids=["ring", "ulysses"])
@pytest.mark.parametrize("sizes", [(4, 3, 5), (7, 1, 1), (3, 5, 7), (1, 1, 2)])
def test_queries_turn_as_on_one_rank_and_padding_stays(ranks: Ranks, sizes: tuple[int, ...], ring: bool) -> None:
    """FastVideo#894 and sglang#18161: frames do not divide, flattened tokens do once they are padded, after patching.

    TRT-LLM#14012: the size of a shard is that of the padded sequence, and it is tokens that are padded.
    """
    for start in (0, 9):
        assert ranks.run(rotation_of_a_part, sizes, start, ring) == [(True, True)] * WORLD


def chunk_of_a_stream(frames: int) -> tuple[int, bool]:
    """Tokens of all tables, and whether every rank rotates a replicated sequence by the whole chunk's table."""
    grid = Grid(frames, 2, 3, start_frame=5)
    shards = [rope_table(SPEC, grid, shard=Shard(rank, WORLD)).count for rank in range(WORLD)]
    x = torch.ones(1, grid.tokens, 1, 20)
    rotated = rotate(x, rope_table(SPEC, grid))
    return sum(shards), all(torch.equal(rotated, received) for received in gathered(rotated))


def test_tables_count_the_tokens_of_the_grid_once(ranks: Ranks) -> None:
    """FastVideo#1627: tables for frames times ranks, where every rank holds all tokens."""
    assert ranks.run(chunk_of_a_stream, 4) == [(24, True)] * WORLD
    with pytest.raises(ValueError, match=r"x must have as many tokens|tokens"):
        rotate(torch.ones(1, 24, 1, 20), rope_table(SPEC, Grid(4 * WORLD, 2, 3)))


def test_condition_tokens_are_cut_apart_from_the_video() -> None:
    """xDiT#565: one cut through both gives some ranks text at the video's positions."""
    grid, text = Grid(2, 2, 4), torch.randn(1, 8, 2, 20)
    video = torch.randn(1, 16, 2, 20)
    whole = rotate(torch.cat([text, video], dim=1), rope_table(SPEC, grid), prefix=8)
    for rank in range(WORLD):
        local = torch.cat([text.chunk(WORLD, dim=1)[rank], video.chunk(WORLD, dim=1)[rank]], dim=1)
        rotated = rotate(local, rope_table(SPEC, grid, shard=Shard(rank, WORLD)), prefix=2)
        assert torch.equal(rotated[:, :2], whole[:, 2 * rank : 2 * rank + 2])
        assert torch.equal(rotated[:, 2:], whole[:, 8 + 4 * rank : 12 + 4 * rank])


@pytest.mark.parametrize("world", [2, 3, 4])
def test_tables_that_are_split_like_the_models_own_rotate_like_them(world: int) -> None:
    """The recipe of xDiT cuts both rotary tensors of Wan, which a patched model hands out as the model does."""
    from zoo import wan

    model: Any = wan.build("wan")
    whole = model.rope(torch.empty(1, 0, 3, 8, 12))
    hidden = torch.randn(1, 72 // world, 48)
    with torch.no_grad():
        expected = model.blocks[0].attn1(hidden, None, None, tuple(x.chunk(world, dim=1)[1] for x in whole))
        with dit_rope.patch(model):
            actual = model.rope(torch.empty(1, 0, 3, 8, 12))
            assert all_equal(actual, whole)
            parts = tuple(x.chunk(world, dim=1)[1] for x in actual)
            for rotary in (parts, tuple(x.clone() for x in parts)):
                assert torch.equal(model.blocks[0].attn1(hidden, None, None, rotary), expected)


def test_videos_packed_into_one_sequence_keep_positions_of_their_own() -> None:
    """Megatron#5243: a rank's tokens of a packed sequence counted from its start, not from that of their video."""
    first, second = Grid(2, 2, 3), Grid(1, 3, 2)
    x = torch.randn(1, 18, 2, 20)
    parts = [rotate(x[:, :12], rope_table(SPEC, first)), rotate(x[:, 12:], rope_table(SPEC, second))]
    actual = [
        rotate(x[:, :9], rope_table(SPEC, first, shard=Shard.of_tokens(0, 9))),
        rotate(x[:, 9:12], rope_table(SPEC, first, shard=Shard.of_tokens(9, 12))),
        rotate(x[:, 12:], rope_table(SPEC, second, shard=Shard.of_tokens(0, 6))),
    ]
    assert torch.equal(torch.cat(actual, dim=1), torch.cat(parts, dim=1))


def test_chronoedit_with_heads_of_64_channels_keeps_its_own_tables() -> None:
    """diffusers#12538: it builds tables of 24, 20 and 20 channels and reads them as 22, 21 and 21."""
    from diffusers import ChronoEditTransformer3DModel

    from zoo import named, wan

    config = {**named("wan").config, "attention_head_dim": 64}
    torch.manual_seed(0)
    model = ChronoEditTransformer3DModel(**config).eval()
    with torch.no_grad():
        expected = wan.forward(model)
        with dit_rope.patch(model) as handle:
            assert "small array per axis, if these" in handle.report()
            assert torch.equal(wan.forward(model), expected)
            assert "kernels read a row per token" in handle.report()


def does_not_divide(axis: int) -> None:
    rope_table(SPEC, Grid(6, 7, 5), shard=Shard(torch.distributed.get_rank(), WORLD, axis=axis))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_axis_that_does_not_divide_is_an_error_on_every_rank(ranks: Ranks, axis: int) -> None:
    for rank, (good, error) in enumerate(ranks.answers(does_not_divide, axis)):
        size = (6, 7, 5)[axis]
        assert not good
        assert f"rank {rank}: " in error
        assert f"grid's size on axis {axis} ({size}), got {WORLD}" in error
        assert f"rank {rank} of {WORLD}" in error


def dies(failing_rank: int) -> None:
    if torch.distributed.get_rank() == failing_rank:
        os._exit(3)
    table = rope_table(SPEC, Grid(4, 2, 2), shard=Shard(torch.distributed.get_rank(), WORLD))
    gathered(rotate(torch.ones(1, 4, 1, 20), table))


def test_rank_that_dies_is_an_error_on_every_rank_and_no_hang(tmp_path: Path) -> None:
    with Ranks(WORLD, tmp_path, seconds=5) as started:
        answers = started.answers(dies, 2)
        assert [good for good, _ in answers] == [False] * WORLD
        assert answers[2][1] == "Died: rank 2 of 4, exit code 3"
        assert all(f"rank {rank}: " in answers[rank][1] for rank in (0, 1, 3))
        with pytest.raises((RuntimeError, Died, OSError)):
            started.run(does_not_divide, 0)
