"""What a chunk attends to, under every policy, against a stream that rotates each frame once from scratch."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dit_rope import PositionPolicy, RollingCache, RopeSpec, RopeStream, cache_clear, shift_keys
from dit_rope.streaming.rolling_cache import Window
from stream_by_definition import StreamByDefinition
from tolerance import all_equal, assert_within, bound

DIMS, SIZE, TOKENS = (8, 6, 6), (2, 3), 6
SPEC, WAN = RopeSpec(DIMS), RopeSpec((44, 42, 42))
F32 = torch.float32

POLICIES = pytest.mark.parametrize("policy", list(PositionPolicy), ids=lambda policy: policy.value)


def stream_of(policy: PositionPolicy, window: int = 6, sinks: int = 1, **options: Any) -> RopeStream:
    if policy is PositionPolicy.CLAMP:
        options.setdefault("max_frames", 10)
    return RopeStream(SPEC, SIZE, window_frames=window, sink_frames=sinks, policy=policy, **options)


def cache_of(stream: RopeStream, dtype: torch.dtype = F32, **sizes: int) -> RollingCache:
    return RollingCache(stream, **({"batch": 1, "heads": 2, "head_dim": 20} | sizes), dtype=dtype)


class Layer:
    """A stream and its definition, given the same random chunks."""

    def __init__(self, stream: RopeStream, *, heads: int = 2, queries: int = 2, batch: int = 1, dim: int = 20,
                 dtype: torch.dtype = F32, **changes: int) -> None:  # fmt: skip
        self.stream, self.dtype, self.dim = stream, dtype, dim
        self.shapes = [(batch, queries, dim), (batch, heads, dim), (batch, heads, changes.get("value_dim", dim))]
        self.cache = cache_of(stream, dtype, batch=batch, heads=heads, head_dim=dim, **changes)
        sizes = (stream.policy.value, DIMS, SIZE, stream.window_frames, stream.sink_frames, stream.max_frames)
        self.exact, self.naive = StreamByDefinition(*sizes), StreamByDefinition(*sizes, dtype=F32)

    def run_chunk(self, frames: int, forwards: int = 1) -> Window:
        """Forwards of noise and a last one of the chunk itself, compared with the definition."""
        stream = self.stream
        stream.begin_chunk(frames)
        for _ in range(forwards):
            queries, keys, values = (
                torch.randn(batch, frames * TOKENS, heads, dim).to(self.dtype) for batch, heads, dim in self.shapes
            )
            first = stream.start_frame
            values[..., 0] = torch.arange(first, first + frames).repeat_interleave(TOKENS)[None, :, None]
            window = self.cache.append(keys, values)
        rotated = stream.rotate(queries)
        for definition in (self.exact, self.naive):
            definition.add_chunk(keys)
        self.compare(queries, rotated, window, frames)
        stream.commit()
        return window

    def compare(self, queries: torch.Tensor, rotated: torch.Tensor, window: Window, frames: int) -> None:
        held = window.values[0, ::TOKENS, 0, 0].int().tolist()  # the frame in each slot, which its values name
        assert sorted(held) == self.exact.window_frames()
        assert list(window.positions) == [self.exact.position(frame) for frame in held]
        rotated_keys = {}
        for definition in (self.exact, self.naive):
            keys = definition.keys()
            in_order = torch.cat([keys[frame] for frame in held], dim=1)
            rotated_keys[definition.dtype] = definition.rotate_queries(queries, frames), in_order
        (exact_q, exact_k), (naive_q, naive_k) = rotated_keys[torch.float64], rotated_keys[F32]
        assert_within(rotated, exact_q, naive_q)
        assert_within(window.keys, exact_k, naive_k)
        off_q, off_k = bound(exact_q, naive_q, self.dtype), bound(exact_k, naive_k, self.dtype)
        allowed = scores(off_q, exact_k.abs() + off_k) + scores(exact_q.abs(), off_k)
        assert ((scores(rotated, window.keys) - scores(exact_q, exact_k)).abs() <= allowed).all()


def scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Logits in float64, queries of several heads sharing those of a key."""
    grouped = queries.double().unflatten(2, (keys.shape[2], -1))
    return torch.einsum("bqhgd,bkhd->bhgqk", grouped, keys.double())


@POLICIES
@pytest.mark.parametrize("sinks", [0, 1, 3])
def test_window_is_that_of_the_definition(policy: PositionPolicy, sinks: int) -> None:
    layer = Layer(stream_of(policy, window=7, sinks=sinks), batch=2)
    for frames in (3, 3, 3, 3, 3):
        layer.run_chunk(frames)


@POLICIES
def test_chunks_may_differ_in_length(policy: PositionPolicy) -> None:
    layer = Layer(stream_of(policy, window=6, sinks=2, max_frames=9 if policy is PositionPolicy.CLAMP else None))
    for frames in (1, 4, 2, 4, 1, 3, 4, 1, 1):
        layer.run_chunk(frames)


@POLICIES
@pytest.mark.parametrize(("window", "sinks", "frames"), [(3, 0, 3), (4, 1, 3), (5, 3, 2), (12, 2, 1)])
def test_windows_just_hold_a_chunk_or_many(policy: PositionPolicy, window: int, sinks: int, frames: int) -> None:
    layer = Layer(stream_of(policy, window=window, sinks=sinks))
    for _ in range(window // frames + 4):
        layer.run_chunk(frames)


@POLICIES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_window_in_other_dtypes(policy: PositionPolicy, dtype: torch.dtype) -> None:
    layer = Layer(stream_of(policy), dtype=dtype)
    for _ in range(4):
        layer.run_chunk(3)


@POLICIES
def test_queries_may_share_heads(policy: PositionPolicy) -> None:
    layer = Layer(stream_of(policy), heads=2, queries=6, dim=26, batch=2)
    for _ in range(4):
        layer.run_chunk(2)


def test_values_of_another_size_are_deprecated() -> None:
    with pytest.warns(DeprecationWarning, match="value_dim of RollingCache goes in 0.3"):
        layer = Layer(stream_of(PositionPolicy.ABSOLUTE), value_dim=5)
    assert layer.run_chunk(2).values.shape[-1] == 5


@pytest.mark.parametrize("policy", [PositionPolicy.SINK_FOLLOW, PositionPolicy.WINDOW_RELATIVE])
def test_window_of_the_cuda_kernels(policy: PositionPolicy, cuda_on_cpu: object) -> None:
    layer = Layer(stream_of(policy, sinks=2, backend="cuda"))
    for frames in (3, 2, 3, 3):
        layer.run_chunk(frames)


def test_following_sinks_give_the_logits_of_a_relative_window() -> None:
    """To 1e-6 of the longest query times the longest key: a few roundings of float32."""
    logits: dict[PositionPolicy, list[torch.Tensor]] = {}
    for policy in (PositionPolicy.SINK_FOLLOW, PositionPolicy.WINDOW_RELATIVE):
        stream = stream_of(policy, sinks=2)
        cache = cache_of(stream)
        torch.manual_seed(1)
        for _ in range(6):
            stream.begin_chunk(3)
            queries, keys, values = torch.randn(3, 1, 3 * TOKENS, 2, 20)
            logits.setdefault(policy, []).append(scores(stream.rotate(queries), cache.append(keys, values).keys))
            stream.commit()
    for follow, relative in zip(*logits.values(), strict=True):
        assert (follow - relative).abs().max() <= 1e-6 * queries.norm(dim=-1).max() * keys.norm(dim=-1).max()


@POLICIES
def test_repeated_forwards_leave_the_cache_of_one(policy: PositionPolicy) -> None:
    """Noise in all forwards but the last, with sinks, an overflowing ring and a chunk that is cut in two by its end."""
    caches = []
    for forwards in (5, 1):
        stream = stream_of(policy, window=6, sinks=2)
        cache = cache_of(stream)
        generator = torch.Generator().manual_seed(0)
        for _ in range(6):
            stream.begin_chunk(3)
            clean = torch.randn(2, 1, 3 * TOKENS, 2, 20, generator=generator)
            for _ in range(forwards - 1):
                cache.append(*torch.randn(2, 1, 3 * TOKENS, 2, 20))
            window = cache.append(*clean)
            stream.commit()
            caches.append((stream.start_frame, forwards, *map(torch.clone, window[:2]), window.positions))
    for several, once in zip(caches[:6], caches[6:], strict=True):
        assert torch.equal(several[2], once[2])
        assert torch.equal(several[3], once[3])
        assert several[4] == once[4]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [(PositionPolicy.ABSOLUTE, 30), (PositionPolicy.SINK_FOLLOW, 31), (PositionPolicy.WINDOW_RELATIVE, 120)],
    ids=lambda value: str(getattr(value, "value", value)),
)
def test_frames_rotated_in_a_chunk(policy: PositionPolicy, expected: int) -> None:
    """Self-Forcing's sizes: 3 frames a chunk, a window of 21, one sink, four denoising forwards and a clean one."""
    stream = stream_of(policy, window=21, sinks=1)
    cache = cache_of(stream)
    for _ in range(12):
        stream.begin_chunk(3)
        keys_before, queries = cache.rotated_frames, 0
        for _ in range(5):
            q, k, v = torch.randn(3, 1, 3 * TOKENS, 2, 20)
            queries += stream.rotate(q).shape[1] // TOKENS
            cache.append(k, v)
        stream.commit()
    assert cache.rotated_frames - keys_before + queries == expected


class NoWaiting(TorchDispatchMode):
    """Fails on operators whose result the host has to wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2"}, name
        return func(*args, **(kwargs or {}))


@POLICIES
def test_forwards_never_wait_for_the_device(policy: PositionPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(*_: Any) -> Any:
        raise AssertionError("a value of a tensor was asked for")

    stream = stream_of(policy, sinks=2)
    cache = cache_of(stream)
    for name in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    for _ in range(5):
        q, k, v = torch.randn(3, 1, 3 * TOKENS, 2, 20).unbind()
        with NoWaiting():
            stream.begin_chunk(3)
            stream.rotate(q)
            cache.append(k, v)
            stream.position_rows()
            stream.commit()


def live_bytes() -> int:
    """Memory of all tensors that Python can reach, those of the package's caches included."""
    storages = {}
    for candidate in gc.get_objects():
        if type(candidate) is torch.Tensor and candidate.layout is torch.strided:
            with contextlib.suppress(NotImplementedError):  # torch 2.9 keeps tensors that are undefined
                storage = candidate.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@POLICIES
def test_memory_is_there_from_the_start_and_stays(policy: PositionPolicy) -> None:
    cache_clear()
    stream = stream_of(policy, sinks=2)
    cache = cache_of(stream)
    pointers, most = set(), [0, 0]
    bytes_before = cache.bytes
    keys, values = torch.randn(2, 1, 3 * TOKENS, 2, 20).unbind()
    for chunk in range(2 * 640):  # tables move on every 512 frames
        stream.begin_chunk(3)
        window = cache.append(keys, values)
        pointers.add((window.keys.data_ptr(), window.values.data_ptr()))
        stream.commit()
        if chunk % 640 > 636:
            most[chunk // 640] = max(most[chunk // 640], live_bytes())
    assert len(pointers) == 1
    assert most[0] == most[1]
    assert cache.bytes == bytes_before
    sinks = 2 if policy is PositionPolicy.SINK_FOLLOW else 0
    assert bytes_before == (6 + 6 + sinks) * TOKENS * 2 * 20 * 4


def test_layers_share_the_scratch_of_a_relative_window() -> None:
    stream = stream_of(PositionPolicy.WINDOW_RELATIVE)
    layers = [cache_of(stream), cache_of(stream), cache_of(stream, torch.bfloat16)]
    stream.begin_chunk(3)
    pointers = []
    for layer, dtype in zip(layers, (F32, F32, torch.bfloat16), strict=True):
        pointers.append(layer.append(*torch.randn(2, 1, 3 * TOKENS, 2, 20).to(dtype)).keys.data_ptr())
    assert pointers[0] == pointers[1] != pointers[2]


def test_a_thousand_sink_moves_in_bfloat16_do_not_drift() -> None:
    """Relative error of the sink's frame channels; the same moves made in place, one upon another, ruin them."""
    stream = RopeStream(WAN, SIZE, window_frames=4, sink_frames=1)
    cache = RollingCache(stream, batch=1, heads=2, head_dim=128)
    raw = torch.randn(1, TOKENS, 2, 128).bfloat16()
    values = torch.zeros_like(raw)
    moved_in_place, before = None, 0
    for _ in range(1024 + 4):
        stream.begin_chunk(1)
        window = cache.append(raw, values)
        stream.commit()
        sink_at = window.positions[0]
        if moved_in_place is None:
            moved_in_place = window.keys[:, :TOKENS].clone()
        elif sink_at != before:
            shift_keys(moved_in_place, WAN, delta_frames=sink_at - before, inplace=True, allow_lossy=True)
        before = sink_at
    assert sink_at == 1024
    exact = StreamByDefinition("absolute", WAN.dims, SIZE, 1, 0)
    exact.add_chunk(raw)
    exact.born = [sink_at]
    expected = exact.rotate(raw, 0)

    def error(keys: torch.Tensor) -> float:
        channels = slice(0, WAN.dims[0])
        return float((keys.double() - expected)[..., channels].norm() / expected[..., channels].norm())

    assert error(window.keys[:, :TOKENS]) <= 2e-3
    assert error(moved_in_place) > 0.2


@pytest.mark.parametrize("chunks", [3, 5], ids=["a sink just moved", "a sink moved on"])
def test_cache_follows_a_reset(chunks: int) -> None:
    stream = stream_of(PositionPolicy.SINK_FOLLOW, sinks=1)
    cache = cache_of(stream)
    data, runs = torch.randn(chunks, 2, 1, 3 * TOKENS, 2, 20), []
    for _ in range(2):
        for chunk in data:
            stream.begin_chunk(3)
            runs.append([tensor.clone() for tensor in cache.append(*chunk)[:2]])
            stream.commit()
        stream.begin_chunk(3)  # left unfinished
        stream.reset()
    for before, after in zip(runs[:chunks], runs[chunks:], strict=True):
        assert all_equal(before, after)


@pytest.mark.parametrize("reset", [False, True], ids=["at once", "after a reset"])
def test_cache_that_missed_a_chunk_is_refused(reset: bool) -> None:
    stream = stream_of(PositionPolicy.ABSOLUTE)
    complete, missed = cache_of(stream), cache_of(stream)
    chunk = torch.randn(2, 1, 3 * TOKENS, 2, 20)
    if reset:
        for _ in range(2):
            stream.begin_chunk(3)
            complete.append(*chunk)
            missed.append(*chunk)
            stream.commit()
        stream.reset()
    stream.begin_chunk(3)
    complete.append(*chunk)
    stream.commit()
    stream.begin_chunk(3)
    complete.append(*chunk)
    with pytest.raises(RuntimeError, match="must be given every chunk, got frame 3 after 0 frames; append in every"):
        missed.append(*chunk)


def test_append_needs_a_chunk() -> None:
    cache = cache_of(stream_of(PositionPolicy.ABSOLUTE))
    with pytest.raises(RuntimeError, match="a chunk must be begun before it is used, got none; call begin_chunk"):
        cache.append(*torch.randn(2, 1, 3 * TOKENS, 2, 20))


@pytest.mark.parametrize(
    ("error", "keys", "values", "message"),
    [
        (ValueError, (1, 12, 2, 20), None, "keys must be (1, 18, 2, 20), [B, 3 frames * 6 tokens, H, D], got (1, 12,"),
        (ValueError, (2, 18, 2, 20), None, "keys must be (1, 18, 2, 20)"),
        (ValueError, (1, 18, 3, 20), None, "keys must be (1, 18, 2, 20)"),
        (ValueError, None, (1, 18, 2, 22), "values must be (1, 18, 2, 20)"),
    ],
)
def test_append_refuses_other_sizes(error: type[Exception], keys: Any, values: Any, message: str) -> None:
    stream = stream_of(PositionPolicy.ABSOLUTE)
    stream.begin_chunk(3)
    right = (1, 18, 2, 20)
    with pytest.raises(error) as refusal:
        cache_of(stream).append(torch.zeros(keys or right), torch.zeros(values or right))
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("error", "keys", "message"),
    [
        (TypeError, torch.zeros(1, 18, 2, 20, dtype=torch.float64), "keys must be torch.float32 on cpu, got torch.fl"),
        (TypeError, torch.zeros(1, 18, 2, 20, device="meta"), "keys must be torch.float32 on cpu, got torch.float32 o"),
        (TypeError, [0.0], "keys must be torch.float32 on cpu, got list"),
        (
            ValueError,
            torch.zeros(1, 18, 2, 20, requires_grad=True),
            "keys must not require grad, got a tensor that does; stream under torch.no_grad()",
        ),
    ],
    ids=["dtype", "device", "type", "grad"],
)
def test_append_refuses_other_tensors(error: type[Exception], keys: Any, message: str) -> None:
    stream = stream_of(PositionPolicy.ABSOLUTE)
    stream.begin_chunk(3)
    with pytest.raises(error) as refusal:
        cache_of(stream).append(keys, torch.zeros(1, 18, 2, 20))
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [
        (ValueError, {"batch": 0}, "batch must be at least 1, got 0"),
        (TypeError, {"heads": 2.0}, "heads must be an int, got 2.0"),
        (ValueError, {"head_dim": 18}, "head_dim must be at least the spec's 20 channels, got 18"),
        (TypeError, {"dtype": torch.int8}, "dtype must be float32, float16, bfloat16 or float64, got torch.int8"),
    ],
)
def test_cache_refusals(error: type[Exception], changes: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"batch": 1, "heads": 2, "head_dim": 20} | changes
    with pytest.raises(error) as refusal:
        RollingCache(stream_of(PositionPolicy.ABSOLUTE), **call)
    assert str(refusal.value) == message
