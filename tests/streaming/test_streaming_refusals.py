"""What a stream refuses, and that a refusal leaves it as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dit_rope import PositionPolicy, RollingCache, RopeSpec, RopeStream, Scaling, cache_clear
from dit_rope.streaming import stream as streaming

SPEC, SIZE = RopeSpec((8, 6, 6)), (2, 3)
OF_TWO = (1, 12, 2, 20)


def stream_of(policy: PositionPolicy = PositionPolicy.SINK_FOLLOW, **changes: Any) -> RopeStream:
    limit = {"max_frames": 4} if policy is PositionPolicy.CLAMP else {}
    return RopeStream(SPEC, SIZE, **{"window_frames": 6, "sink_frames": 1, "policy": policy} | limit | changes)


def begun(policy: PositionPolicy = PositionPolicy.SINK_FOLLOW) -> tuple[RopeStream, RollingCache]:
    stream = stream_of(policy)
    stream.begin_chunk(2)
    return stream, RollingCache(stream, batch=1, heads=2, head_dim=20, dtype=torch.float32)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x: x.long(), TypeError, "must be float32, float16, bfloat16 or float64, got torch.int64"),
        (lambda x: x > 0, TypeError, "must be float32, float16, bfloat16 or float64, got torch.bool"),
        (lambda x: x.to(torch.complex64), TypeError, "bfloat16 or float64, got torch.complex64"),
        (lambda x: x.to(torch.float8_e4m3fn), TypeError, "bfloat16 or float64, got torch.float8_e4m3fn"),
        (lambda x: x.to_sparse(), TypeError, "must be a strided tensor, got torch.sparse_coo; call queries.to_dense()"),
        (
            torch._neg_view,
            ValueError,
            "must hold its own values, got a lazily negated view; call queries.resolve_neg()",
        ),
    ],
    ids=["int64", "bool", "complex", "float8", "sparse", "negated"],
)
def test_queries_that_rotate_refuses_are_refused_by_a_stream(make: Any, error: type[Exception], message: str) -> None:
    stream, _ = begun()
    with pytest.raises(error) as refusal:
        stream.rotate(make(torch.randn(OF_TWO)))
    assert str(refusal.value).startswith("queries must ")
    assert message in str(refusal.value)


@pytest.mark.parametrize("policy", PositionPolicy)
@pytest.mark.parametrize("argument", ["keys", "values"])
def test_sparse_and_negated_keys_and_values_are_refused(argument: str, policy: PositionPolicy) -> None:
    _, cache = begun(policy)
    arguments = {"keys": torch.randn(OF_TWO), "values": torch.randn(OF_TWO)}
    for make, error, remedy in (
        (torch._neg_view, ValueError, "resolve_neg"),
        (torch.Tensor.to_sparse, TypeError, "to_dense"),
    ):
        with pytest.raises(error, match=f"{argument} must .* call {argument}.{remedy}"):
            cache.append(**arguments | {argument: make(arguments[argument])})
    assert cache.append(**arguments).keys.shape == OF_TWO


@pytest.mark.parametrize("policy", PositionPolicy)
@pytest.mark.parametrize("before", [0, 1, 5])
def test_chunk_whose_tables_could_not_be_built_can_be_begun_again(
    policy: PositionPolicy, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, twin = stream_of(policy), stream_of(policy)
    for target in (stream, twin):
        for _ in range(before):
            target.begin_chunk(2)
            target.commit()
    with monkeypatch.context() as patch:
        patch.setattr(RopeStream, "_table_of", lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
        for _ in range(2):
            with pytest.raises(MemoryError):
                stream.begin_chunk(2)
            with pytest.raises(RuntimeError, match="a chunk must be begun before it is used"):
                stream.commit()
    assert stream.begin_chunk(2) == twin.begin_chunk(2)
    x = torch.randn(OF_TWO)
    assert torch.equal(stream.rotate(x), twin.rotate(x))


def test_build_that_fails_in_the_cache_leaves_the_chunk_to_be_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    cache_clear()
    stream = stream_of()
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "rope_table", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            stream.begin_chunk(2)
    assert stream.begin_chunk(2).start_frame == 0


def test_refused_chunk_leaves_the_stream_where_it_was() -> None:
    stream = stream_of()
    for frames in (0, 7, 1.5):
        with pytest.raises((TypeError, ValueError)):
            stream.begin_chunk(frames)  # type: ignore[arg-type]
    assert stream.begin_chunk(2).positions == (0, 1)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (Scaling.of("nothing"), "scaling must be one of"),
        (Scaling.of("linear"), "linear scaling must have factor"),
        ((None, Scaling.of("fps", fps=16), None), "scaling must have fps on the frame axis alone"),
    ],
)
def test_scaling_that_does_not_exist_is_refused_when_the_stream_is_made(scaling: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeStream(RopeSpec((8, 6, 6), scaling=scaling), SIZE, window_frames=6)


def test_numbers_of_numpy_are_numbers() -> None:
    two = np.int64(2)
    stream = RopeStream(SPEC, (two, two), window_frames=np.int64(6), sink_frames=np.int32(1))
    assert repr(stream.begin_chunk(two)) == repr(
        RopeStream(SPEC, (2, 2), window_frames=6, sink_frames=1).begin_chunk(2)
    )
    cache = RollingCache(stream, batch=np.int64(1), heads=two, head_dim=np.int64(20), dtype=torch.float32)
    x = torch.randn(1, 8, 2, 20)
    assert cache.append(x, x).values.shape == x.shape


@pytest.mark.parametrize("policy", PositionPolicy)
def test_keys_and_queries_of_any_strides_are_taken(policy: PositionPolicy) -> None:
    (stream, cache), (twin, twin_cache) = begun(policy), begun(policy)
    for _ in range(5):
        x = torch.randn(1, 12, 20, 2).transpose(2, 3)  # channels are not neighbours in memory
        assert torch.equal(stream.rotate(x), twin.rotate(x.contiguous()))
        actual, expected = cache.append(x, -x), twin_cache.append(x.contiguous(), -x.contiguous())
        assert torch.equal(actual.keys, expected.keys)
        assert torch.equal(actual.values, expected.values)
        for target in (stream, twin):
            target.commit()
            target.begin_chunk(2)
