"""The positions of a stream of chunks: plans, tables of any start frame, and what a compiler sees of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import oracle
from dit_rope import (
    Grid,
    PositionPolicy,
    RollingCache,
    RopeSpec,
    RopeStream,
    cache_clear,
    cache_info,
    rope_table,
    rotate,
    rotate_qk,
)
from dit_rope.streaming.stream import Chunk, runs

SIZE, TOKENS = (2, 3), 6
SPEC, WAN = RopeSpec((8, 6, 6)), RopeSpec((44, 42, 42))
ABSOLUTE, FOLLOW, RELATIVE, CLAMP = (
    PositionPolicy.ABSOLUTE,
    PositionPolicy.SINK_FOLLOW,
    PositionPolicy.WINDOW_RELATIVE,
    PositionPolicy.CLAMP,
)


def stream_of(policy: PositionPolicy = ABSOLUTE, window: int = 6, sinks: int = 1, **options: Any) -> RopeStream:
    return RopeStream(SPEC, SIZE, window_frames=window, sink_frames=sinks, policy=policy, **options)


def plans(stream: RopeStream, *frames: int) -> list[Chunk]:
    """The plan of each chunk of so many frames."""
    chunks = []
    for count in frames:
        chunks.append(stream.begin_chunk(count))
        stream.commit()
    return chunks


def queries(frames: int, dtype: torch.dtype = torch.float32, dim: int = 20) -> torch.Tensor:
    return torch.randn(1, frames * TOKENS, 2, dim, dtype=dtype)


@pytest.mark.parametrize(
    ("policy", "positions", "windows", "moved"),
    [
        (ABSOLUTE, [(0, 1), (2, 3), (4, 5)], [(0, 1), (0, 1, 2, 3), (0, 4, 5, 3)], [None, None, None]),
        (FOLLOW, [(0, 1), (2, 3), (4, 5)], [(0, 1), (0, 1, 2, 3), (2, 4, 5, 3)], [None, None, (2,)]),
        (RELATIVE, [(0, 1), (2, 3), (2, 3)], [(0, 1), (0, 1, 2, 3), (0, 2, 3, 1)], [None, None, None]),
        (CLAMP, [(0, 1), (1, 2), (1, 2)], [(0, 1), (0, 1, 1, 2), (0, 1, 2, 2)], [None, None, None]),
    ],
    ids=lambda value: getattr(value, "value", None),
)
def test_plan_of_three_chunks_in_a_window_of_four(
    policy: PositionPolicy, positions: Any, windows: Any, moved: Any
) -> None:
    """Frame 3 stays in its slot while frames 4 and 5 go round the ring to those of frames 1 and 2."""
    stream = stream_of(policy, window=4, sinks=1, max_frames=3 if policy is CLAMP else None)
    chunks = plans(stream, 2, 2, 2)
    assert [chunk.positions for chunk in chunks] == positions
    assert [chunk.window for chunk in chunks] == windows
    assert [chunk.moved_sinks for chunk in chunks] == moved
    assert [chunk.slots for chunk in chunks] == [((0, 0, 2),), ((2, 0, 2),), ((1, 0, 2),)]
    assert [chunk.start_frame for chunk in chunks] == [0, 2, 4]


def test_plan_stays_until_it_is_committed() -> None:
    stream = stream_of()
    chunk = stream.begin_chunk(3)
    assert stream.chunk is chunk
    for _ in range(5):
        stream.rotate(queries(3))
        assert stream.chunk is chunk
        assert stream.start_frame == 0
    stream.commit()
    assert stream.start_frame == 3


def test_plan_of_a_full_relative_window_repeats() -> None:
    """After as many chunks as it takes their slots to come round: what graphs that were captured once rely on."""
    stream = stream_of(RELATIVE, window=11, sinks=1)
    chunks = plans(stream, *[4] * 20)[4:]
    replayed = [(chunk.positions, chunk.slots, chunk.window) for chunk in chunks]
    assert replayed[5:] == replayed[:-5]
    assert len(set(replayed)) == 5


def test_runs_of_consecutive_numbers() -> None:
    assert list(runs([4, 5, 1, 2, 3, 9])) == [(4, 0, 2), (1, 2, 3), (9, 5, 1)]
    assert list(runs([])) == []


@pytest.mark.parametrize("start", [0, 1021, 5_000, 100_000, 1_000_000])
def test_queries_far_from_the_start_are_those_of_float64(start: int) -> None:
    stream = RopeStream(WAN, SIZE, window_frames=6, policy=ABSOLUTE)
    stream.start_frame = start
    stream.begin_chunk(4)
    x = queries(4, torch.float64, 128).clamp(-2, 2)
    cos, sin = oracle.full_grid_table(
        (4, *SIZE), WAN.dims, WAN.theta, dtype=torch.float64, start_frame=start, repeat=False
    )
    exact = oracle.rotate(x, cos, sin, interleaved=True)
    assert (stream.rotate(x) - exact).abs().max() <= 1e-6
    assert (stream.rotate(x.float()) - exact).abs().max() <= 1e-6


def test_stream_rotates_as_the_table_of_its_start_frame_does() -> None:
    """Bit for bit, over both of the tables that it has at a time."""
    stream = stream_of(window=5)
    stream.start_frame = 505
    for _ in range(5):
        stream.begin_chunk(3)
        x = queries(3)
        table = rope_table(SPEC, Grid(3, *SIZE, start_frame=stream.start_frame))
        assert torch.equal(stream.rotate(x), rotate(x, table))
        stream.commit()


@pytest.mark.parametrize("policy", [ABSOLUTE, FOLLOW, RELATIVE])
def test_tables_of_a_long_stream_take_the_memory_of_a_short_one(policy: PositionPolicy) -> None:
    cache_clear()
    stream = stream_of(policy)
    held = []
    for chunk in range(10_000):
        stream.begin_chunk(3)
        for positions in filter(None, (stream.chunk.positions, stream.chunk.moved_sinks)):
            stream.args(positions)
        stream.commit()
        if chunk in (400, 4_000, 9_999):
            info = cache_info()
            held.append((info.tables.bytes, info.axes.bytes, info.expanded.bytes))
    assert stream.start_frame == 30_000
    assert held[0] == held[1] == held[2]


def test_layers_and_forwards_of_a_chunk_share_one_table() -> None:
    stream = stream_of()
    stream.begin_chunk(3)
    arguments = [stream.args(stream.chunk.positions) for _ in range(30)]
    assert len({args.rows.data_ptr() for args in arguments}) == 1


@pytest.mark.parametrize("spec", [RopeSpec((16,)), RopeSpec((8, 8))], ids=["text", "rows"])
def test_stream_of_fewer_axes(spec: RopeSpec) -> None:
    size = (5,) * (len(spec.dims) - 1)
    stream = RopeStream(spec, size, window_frames=8, policy=ABSOLUTE)
    for start in (0, 4):
        stream.begin_chunk(4)
        x = torch.randn(1, 4 * stream.frame_tokens, 2, 16)
        assert torch.equal(stream.rotate(x), rotate(x, rope_table(spec, Grid(4, *size, start_frame=start))))
        stream.commit()


def test_position_rows_are_those_of_the_chunk() -> None:
    stream = stream_of(FOLLOW)
    stream.start_frame = 511
    stream.begin_chunk(3)
    table, rows = stream.position_rows()
    assert rows.dtype == torch.int32
    assert rows.shape == (1, 3 * TOKENS, 3)
    x = queries(3)
    assert torch.equal(rotate(x, table, positions=rows), stream.rotate(x))


def test_compiled_code_takes_start_frames_as_data() -> None:
    """Six chunks, two tables, one graph."""
    counter = CompileCounter()
    compiled = torch.compile(
        lambda q, k, table, rows: rotate_qk(q, k, table, positions=rows), backend=counter, fullgraph=True
    )
    stream = stream_of()
    stream.start_frame = 504
    for _ in range(6):
        stream.begin_chunk(3)
        q, k = queries(3), queries(3)
        turned_q, turned_k = compiled(q, k, *stream.position_rows())
        assert torch.equal(turned_q, stream.rotate(q))
        assert torch.equal(turned_k, stream.rotate(k))
        stream.commit()
    assert stream.start_frame > 512 + 6
    assert counter.frame_count == 1


def test_compiled_code_around_a_stream_is_not_compiled_again_for_a_chunk() -> None:
    counter = CompileCounter()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        window = cache.append(2 * k, 2 * v)
        parts = (x.transpose(1, 2) for x in (stream.rotate(2 * q), window.keys, window.values))
        return torch.nn.functional.scaled_dot_product_attention(*parts) + 1

    compiled = torch.compile(attend, backend=counter)
    stream = stream_of(FOLLOW)
    cache = RollingCache(stream, batch=1, heads=2, head_dim=20, dtype=torch.float32)
    counts = []
    for _ in range(8):
        stream.begin_chunk(3)
        qkv = queries(3), queries(3), queries(3)
        for _ in range(2):
            out = compiled(*qkv)
        assert torch.allclose(out, attend(*qkv), atol=1e-6)
        counts.append(counter.frame_count)
        stream.commit()
    assert counts[2:] == counts[2:3] * 6  # a window that grows is one more shape, and it grows until the third chunk


def test_chunk_begins_once_and_is_committed_once() -> None:
    stream = stream_of()
    for use in (stream.commit, lambda: stream.rotate(queries(3)), stream.position_rows, lambda: stream.chunk):
        with pytest.raises(RuntimeError, match="a chunk must be begun before it is used, got none; call begin_chunk"):
            use()
    stream.begin_chunk(3)
    with pytest.raises(RuntimeError, match=r"at frame 0 must be committed .* got begin_chunk\(2\); call commit\(\)"):
        stream.begin_chunk(2)


def test_reset_starts_again() -> None:
    stream = stream_of(FOLLOW)
    first = plans(stream, 3, 3, 3)
    stream.begin_chunk(1)
    stream.reset()
    assert plans(stream, 3, 3, 3) == first


@pytest.mark.parametrize(
    ("committed", "frames", "room"), [((), 7, 6), ((3,), 6, 5), ((3, 3), 6, 5), ((1,), 6, 5)], ids=str
)
def test_chunk_longer_than_the_window_is_refused(committed: tuple[int, ...], frames: int, room: int) -> None:
    stream = stream_of(FOLLOW, window=6, sinks=1)
    plans(stream, *committed)
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        stream.begin_chunk(frames)
    assert str(refusal.value) == (
        f"frames must fit the window beside the sinks, {room} frames (window_frames 6, sink_frames 1), got {frames}"
    )
    stream.begin_chunk(room)


def test_frames_past_what_float32_counts_are_refused() -> None:
    last = 2**24
    for policy in (ABSOLUTE, FOLLOW):
        stream = stream_of(policy)
        stream.start_frame = last - 3
        stream.begin_chunk(3)
        stream.commit()
        with pytest.raises(ValueError, match="frames must end at or before position 16777216, .* got 16777217; reset"):
            stream.begin_chunk(1)
    stream = stream_of(RELATIVE)
    stream.start_frame = last
    stream.begin_chunk(3)


@pytest.mark.parametrize(
    ("error", "frames", "message"),
    [
        (ValueError, 0, "frames must be at least 1, got 0"),
        (TypeError, 1.0, "frames must be an int, got 1.0"),
        (TypeError, True, "frames must be an int, got True"),
        (ValueError, 3, "frames must be at most max_frames 2, got 3"),
    ],
)
def test_chunk_refusals(error: type[Exception], frames: Any, message: str) -> None:
    with pytest.raises(error) as refusal:
        stream_of(CLAMP, max_frames=2).begin_chunk(frames)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [
        (TypeError, {"spec": None}, "spec must be a RopeSpec, got NoneType"),
        (TypeError, {"policy": "absolute"}, "policy must be a PositionPolicy, got 'absolute'"),
        (ValueError, {"frame_size": (2,)}, "frame_size must have one size for each axis but the first of (8, 6, 6), "),
        (ValueError, {"frame_size": (2, 0)}, "frame_size must be at least 1, got 0"),
        (ValueError, {"window_frames": 0}, "window_frames must be at least 1, got 0"),
        (ValueError, {"sink_frames": -1}, "sink_frames must be at least 0, got -1"),
        (ValueError, {"sink_frames": 4}, "sink_frames must be below window_frames 4, got 4"),
        (ValueError, {"policy": CLAMP}, "max_frames must be given with CLAMP and only there, got None with CLAMP"),
        (ValueError, {"max_frames": 9}, "max_frames must be given with CLAMP and only there, got 9 with SINK_FOLLOW"),
        (ValueError, {"policy": CLAMP, "max_frames": 0}, "max_frames must be at least 1, got 0"),
    ],
)
def test_stream_refusals(error: type[Exception], changes: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"spec": SPEC, "frame_size": SIZE, "window_frames": 4} | changes
    with pytest.raises(error) as refusal:
        RopeStream(call.pop("spec"), call.pop("frame_size"), **call)
    assert message in str(refusal.value)


QUERIES_OF_THREE = "queries must be [B, 3 frames * 6 tokens = 18, H, at least 20], got "


@pytest.mark.parametrize(
    ("error", "x", "message"),
    [
        (TypeError, [0.0], "queries must be a torch.Tensor, got list"),
        (ValueError, torch.zeros(1, 12, 2, 20), QUERIES_OF_THREE + "(1, 12, 2, 20)"),
        (ValueError, torch.zeros(18, 2, 20), QUERIES_OF_THREE + "(18, 2, 20)"),
        (ValueError, torch.zeros(1, 18, 2, 18), QUERIES_OF_THREE + "(1, 18, 2, 18)"),
        (ValueError, torch.zeros(1, 18, 2, 20, device="meta"), "queries must be on the stream's device cpu, got meta"),
    ],
    ids=["type", "frames", "dims", "channels", "device"],
)
def test_query_refusals(error: type[Exception], x: Any, message: str) -> None:
    stream = stream_of()
    stream.begin_chunk(3)
    with pytest.raises(error) as refusal:
        stream.rotate(x)
    assert message in str(refusal.value)
