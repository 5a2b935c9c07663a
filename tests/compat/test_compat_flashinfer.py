"""FlashInfer's signatures: the grids of its own tests against the oracle, ragged batches, long contexts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pytest
import torch

import dit_rope
from dit_rope.compat import angles, flashinfer
from dit_rope.compat.flashinfer import (
    apply_llama31_rope,
    apply_rope,
    apply_rope_inplace_with_cache,
    apply_rope_pos_ids,
    apply_rope_with_cos_sin_cache,
    apply_rope_with_cos_sin_cache_inplace,
    ragged_positions,
)
from dit_rope.tables import scaling
from serving import angles_at, assert_rotated, cos_sin_cache, frequencies, one_thread  # noqa: F401
from tolerance import all_equal

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

both_pairings = pytest.mark.parametrize("interleave", [True, False], ids=["interleave", "half"])


def llama31_frequencies(rotary_dim: int, theta: float) -> torch.Tensor:
    """``[rotary_dim / 2]`` in float64, wave by wave, as Llama 3.1's model card has them: 8, 1, 4 and 8192."""
    scaled = []
    for frequency in frequencies(rotary_dim, theta).tolist():
        wave = 2 * math.pi / frequency
        if wave < 8192 / 4:
            scaled.append(frequency)
        elif wave > 8192 / 1:
            scaled.append(frequency / 8)
        else:
            share = (8192 / wave - 1) / (4 - 1)
            scaled.append((1 - share) * frequency / 8 + share * frequency)
    return torch.tensor(scaled, dtype=torch.float64)


def packed(tokens: int, heads: int, key_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Queries and keys of one packed tensor: tokens further apart than their heads."""
    qk = torch.randn(tokens, heads + 2 * key_heads, head_dim).to(dtype)
    return qk[:, :heads], qk[:, heads : heads + key_heads]


def call(
    name: str, q: torch.Tensor, k: torch.Tensor, segments: tuple[torch.Tensor, ...], inplace: bool, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Calls the function of ``name``, or its version in place, and returns what is rotated."""
    if not inplace:
        before = q.clone(), k.clone()
        rotated = getattr(flashinfer, name)(q, k, *segments, **options)
        assert torch.equal(q, before[0])
        assert torch.equal(k, before[1])
        return rotated
    assert getattr(flashinfer, f"{name}_inplace")(q, k, *segments, **options) is None
    return q, k


@both_pairings
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("factor", [0.25, 0.75, 1.0])
@pytest.mark.parametrize("llama31", [False, True], ids=["llama", "llama31"])
@pytest.mark.parametrize(
    ("head_dim", "batch", "length", "offset"), [(64, 19, 4, 0), (128, 3, 19, 15), (256, 1, 1, 99), (80, 2, 4, 8000)]
)
def test_ragged_rotation_is_within_the_bound(
    head_dim: int, batch: int, length: int, offset: int, llama31: bool, factor: float, inplace: bool, interleave: bool
) -> None:
    rotary_dim, theta, heads = int(head_dim * factor), 5e5 if llama31 else 1e4, 8
    q, k = packed(batch * length, heads, 2, head_dim, F16)
    before = q.clone(), k.clone()
    indptr = torch.arange(batch + 1, dtype=torch.int32) * length
    offsets = torch.full((batch,), offset, dtype=torch.int32)
    name = "apply_llama31_rope" if llama31 else "apply_rope"
    options = {"rotary_dim": rotary_dim, "interleave": interleave, "rope_theta": theta}
    rotated = call(name, q, k, (indptr, offsets), inplace, **options)
    table = llama31_frequencies(rotary_dim, theta) if llama31 else frequencies(rotary_dim, theta)
    cos, sin = angles_at(torch.arange(offset, offset + length).repeat(batch), table)
    for x, after in zip(before, rotated, strict=True):
        assert_rotated(after[None], x[None], cos, sin, interleaved=interleave)


@both_pairings
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", ["apply_rope", "apply_llama31_rope"])
def test_positions_and_segments_give_the_same_bits(
    name: str, index: torch.dtype, inplace: bool, interleave: bool
) -> None:
    positions = torch.tensor([4, 6, 7, 8, 9, 3, 4, 5, 6, 7], dtype=index)
    indptr, offsets = torch.tensor([0, 1, 5, 10], dtype=index), torch.tensor([4, 6, 3], dtype=index)
    q, k = packed(10, 3, 1, 64, BF16)
    copies = q.clone(), k.clone()
    by_position = call(f"{name}_pos_ids", *copies, (positions,), inplace, interleave=interleave)
    by_segment = call(name, q, k, (indptr, offsets), inplace, interleave=interleave)
    assert all_equal(by_position, by_segment)
    if not inplace:
        listed = getattr(flashinfer, name)(q, k, [0, 1, 5, 10], [4, 6, 3], interleave=interleave)
        assert all_equal(listed, by_segment)


@pytest.mark.parametrize(
    ("indptr", "offsets", "expected"),
    [
        ([0, 1, 5, 10], [4, 6, 3], [4, 6, 7, 8, 9, 3, 4, 5, 6, 7]),
        ([0, 0, 2, 2, 3], [9, -1, 5, 0], [-1, 0, 0]),
        ([0, 4], [0], [0, 1, 2, 3]),
        ([0], [], []),
        ([0, 0], [7], []),
    ],
)
def test_segments_become_positions(indptr: list[int], offsets: list[int], expected: list[int]) -> None:
    for index in (torch.int32, torch.int64):
        tensors = torch.tensor(indptr, dtype=index), torch.tensor(offsets, dtype=index)
        assert ragged_positions(*tensors, len(expected)).tolist() == expected
    if offsets:
        assert ragged_positions(indptr, offsets, len(expected)).tolist() == expected


@pytest.mark.gpu
def test_segments_become_positions_without_a_wait() -> None:
    indptr, offsets = torch.tensor([0, 1, 5, 10], device="cuda"), torch.tensor([4, 6, 3], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        positions = ragged_positions(indptr, offsets, 10)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert positions.tolist() == [4, 6, 7, 8, 9, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("scale", [4, 0.5, 1.7])
def test_scale_divides_positions(scale: float) -> None:
    q, k = packed(8, 2, 1, 64, F32)
    rotated, _ = apply_rope_pos_ids(q, k, torch.arange(8), rope_scale=scale)
    assert_rotated(rotated[None], q[None], *angles_at(torch.arange(8) / scale, frequencies(64)), interleaved=False)


CACHED = [
    (64, 64, 32, True, 32 * 32, (1, 1)),
    (256, 128, 4096, True, 2 * 51, (4, 2)),
    (64, 32, 2048, True, 199, (4, 1)),
    (64, 64, 32, False, 32, (17, 17)),
    (256, 128, 4096, False, 23, (4, 2)),
    (192, 128, 4096, True, 23, (3, 2)),
    (80, 64, 1024, False, 64, (2, 2)),
    (112, 64, 2048, True, 77, (2, 1)),
    (160, 96, 8192, False, 128, (6, 3)),
    (108, 32, 8192, True, 11, (17, 1)),
    (128, 128, 8192, False, 8192, (1, 1)),
]
"""Head size, rotary_dim, rows, neox, tokens, heads of queries and keys."""


@pytest.mark.parametrize(("dtype", "table"), [(BF16, F32), (F16, F16), (F32, F32)], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("head_size", "rotary_dim", "rows", "is_neox", "tokens", "heads"), CACHED)
def test_cached_rotation_is_within_the_bound(
    head_size: int,
    rotary_dim: int,
    rows: int,
    is_neox: bool,
    tokens: int,
    heads: tuple[int, int],
    dtype: torch.dtype,
    table: torch.dtype,
) -> None:
    cache, positions = cos_sin_cache(rows, rotary_dim, table), torch.arange(tokens) % rows
    query, key = (torch.randn(tokens, count * head_size).to(dtype) for count in heads)
    before = query.clone(), key.clone()
    rotated = apply_rope_with_cos_sin_cache(positions, query, key, head_size, cache, is_neox)
    assert torch.equal(query, before[0])
    assert torch.equal(key, before[1])
    cos, sin = cache[positions].chunk(2, dim=-1)
    for x, after in zip(before, rotated, strict=True):
        shape = (1, tokens, -1, head_size)
        assert after.shape == x.shape
        assert_rotated(after.view(shape), x.view(shape), cos, sin, interleaved=not is_neox)
    assert apply_rope_with_cos_sin_cache_inplace(positions, query, key, head_size, cache, is_neox) is None
    assert torch.equal(query, rotated[0])
    assert torch.equal(key, rotated[1])


def test_cached_function_in_place_has_vllms_arguments() -> None:
    parameters = inspect.signature(apply_rope_inplace_with_cache).parameters
    assert list(parameters)[:6] == ["positions", "query", "key", "head_size", "cos_sin_cache", "is_neox"]
    assert parameters["is_neox"].default is True
    assert parameters["backend"].kind is inspect.Parameter.KEYWORD_ONLY


def test_cached_rotation_takes_views_of_packed_memory_and_three_dims() -> None:
    q, k = packed(7, 3, 2, 80, BF16)
    cache, positions = cos_sin_cache(50, 80, F32), torch.arange(7, dtype=torch.int32)
    expected = apply_rope_with_cos_sin_cache(positions, q.flatten(1), k.flatten(1), 80, cache)
    rotated = apply_rope_with_cos_sin_cache(positions, q, k, 80, cache)
    apply_rope_inplace_with_cache(positions, q, k, 80, cache)
    for after, new, exact in zip((q, k), rotated, expected, strict=True):
        assert torch.equal(after, exact.view(after.shape))
        assert torch.equal(new, exact.view(after.shape))


@both_pairings
def test_rotation_without_a_cache_equals_that_with_one(interleave: bool) -> None:
    """Values of at most 1, so that an absolute 1e-6 is above the rounding of a rotation in float32."""
    q, k = (torch.rand(64, heads, 128) * 2 - 1 for heads in (4, 2))
    positions, cache = torch.randint(8192, (64,)), cos_sin_cache(8192, 128, F32)
    cached = apply_rope_with_cos_sin_cache(positions, q, k, 128, cache, not interleave)
    for actual, expected in zip(apply_rope_pos_ids(q, k, positions, interleave=interleave), cached, strict=True):
        assert (actual - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("position", [0, 1, 1000, 10**5, 10**6, 2**24 + 1, -5, -(10**6)])
def test_angles_stay_exact_at_any_position(position: int) -> None:
    """A float32 in cos or sin rounded once, wherever: half a step below 1, which 1e-5 is far above."""
    positions = torch.full((33,), position)
    for count in (1, 33):  # a row for each token, and where there are tokens enough, a shared table
        rows, indices = angles.token_rows(positions[:count], dit_rope.RopeSpec((128,)), torch.device("cpu"), F32)
        at = 0 if indices is None else int(indices[0, 0, 0])
        assert (indices is None) == (count == 1 or not 0 <= position < 2**24)
        expected = torch.stack(angles_at(torch.tensor(position), frequencies(128)))
        # Frequencies of another float64 power differ in their last place, which is 1e-9 of an angle at position 10**6.
        assert (rows[:, at] - expected).abs().max() <= 2**-25 + abs(position) * 2**-51


@pytest.mark.parametrize(("table", "bound"), [(F32, 1e-5), (F16, 2**-11)], ids=["float32", "float16"])
def test_cached_rotation_at_position_100000_is_off_by_the_caches_rounding_alone(
    table: torch.dtype, bound: float
) -> None:
    """float16 keeps eleven digits: half a step below 1 is 2**-12, in cos and in sin."""
    dtype = F32 if table == F32 else F16
    query = torch.zeros(2, 16).to(dtype)
    query[:, :8] = 1.0
    positions = torch.tensor([10**5, 99_999])
    rotated, _ = apply_rope_with_cos_sin_cache(positions, query, query, 16, cos_sin_cache(10**5 + 1, 16, table))
    expected = torch.cat(angles_at(positions, frequencies(16)), dim=-1)
    error = (rotated.double() - expected).abs().max()
    assert error <= bound
    assert table == F32 or error > 1e-5


def test_layers_share_one_table_and_decoding_steps_share_axis_rows() -> None:
    q, k = packed(64, 2, 1, 64, F32)
    for _ in range(3):
        apply_rope(q, k, [0, 64], [0])
    info = dit_rope.cache_info()
    assert (info.tables.entries, info.tables.hits, info.expanded.entries) == (1, 2, 0)
    apply_rope(q, k, [0, 64], [64])
    apply_rope(q[:1], k[:1], [0, 1], [700])
    assert dit_rope.cache_info().tables.entries == 2


def test_far_apart_positions_make_no_table() -> None:
    q, k = packed(40, 2, 1, 64, F32)
    positions = torch.arange(40) * 10_000
    rotated, _ = apply_rope_pos_ids(q, k, positions)
    info = dit_rope.cache_info()
    assert (info.tables.entries, info.expanded.entries) == (0, 0)
    assert_rotated(rotated[None], q[None], *angles_at(positions, frequencies(64)), interleaved=False)


def test_devices_without_float64_form_angles_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "WITHOUT_FLOAT64_OR_COMPLEX", frozenset({"cpu"}))
    q, k = packed(3, 2, 1, 64, F32)
    positions = torch.tensor([0, 10_000, 3])
    rotated, _ = apply_rope_pos_ids(q, k, positions)
    narrow = positions.float()[:, None] * frequencies(64).float()
    # Half a step of a float32 angle, twice: the frequency and the product are rounded.
    allowed = 2 * 10_000 * 2**-24 + 8 * 2**-24
    expected = apply_rope_with_cos_sin_cache(
        torch.arange(3), q.flatten(1), k.flatten(1), 64, torch.cat((narrow.cos(), narrow.sin()), -1)
    )[0]
    assert (rotated - expected.view(rotated.shape)).abs().max() <= allowed * q.abs().max() * math.sqrt(2)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_rotation_without_a_cache_is_within_the_bound_on_every_device(device: str, dtype: torch.dtype) -> None:
    q, k = packed(10, 17, 1, 112, dtype)
    positions = torch.tensor([4, 6, 7, 8, 9, 3, 4, 5, 6, 7])
    cos, sin = angles_at(positions, frequencies(32))
    indptr, offsets = (torch.tensor(x, device=device) for x in ([0, 1, 5, 10], [4, 6, 3]))
    for segments in ((indptr, offsets), ([0, 1, 5, 10], [4, 6, 3])):
        rotated = apply_rope(q.to(device), k.to(device), *segments, rotary_dim=32)
        for x, after in zip((q, k), rotated, strict=True):
            assert_rotated(after.cpu()[None], x[None], cos, sin, interleaved=False)


def test_compiled_call_equals_the_plain_one_without_a_graph_break() -> None:
    torch._dynamo.reset()
    q, k = packed(10, 2, 1, 64, F32)
    positions = torch.arange(10)
    compiled = torch.compile(apply_rope_pos_ids, backend="aot_eager", fullgraph=True)(q, k, positions)
    assert all_equal(compiled, apply_rope_pos_ids(q, k, positions))


def test_gradients_are_those_of_the_inverse_rotation() -> None:
    q, k = (torch.randn(3, heads, 6, dtype=F64, requires_grad=True) for heads in (2, 1))
    assert torch.autograd.gradcheck(lambda q, k: apply_rope(q, k, [0, 1, 3], [5, 1], rotary_dim=4), (q, k))


RAGGED = {"q": torch.ones(4, 2, 16), "k": torch.ones(4, 1, 16), "indptr": [0, 1, 4], "offsets": [3, 5]}
CACHE = {
    "positions": torch.arange(4),
    "query": torch.ones(4, 32),
    "key": torch.ones(4, 16),
    "head_size": 16,
    "cos_sin_cache": torch.ones(9, 16),
}


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (
            apply_rope,
            RAGGED | {"q": torch.ones(4, 32)},
            ValueError,
            r"q must be a tensor \[nnz, heads, head_dim\], got",
        ),
        (apply_rope, RAGGED | {"q": None}, ValueError, "q must be a tensor .* got NoneType"),
        (apply_rope, RAGGED | {"k": torch.ones(5, 1, 16)}, ValueError, "k must have shape"),
        (apply_rope, RAGGED | {"k": torch.ones(4, 1, 8)}, ValueError, "head_size must fit the last dim of k"),
        (
            apply_rope,
            RAGGED | {"rotary_dim": 18},
            ValueError,
            "rotary_dim must be even, .* at most head_dim 16, got 18",
        ),
        (apply_rope, RAGGED | {"rotary_dim": 7}, ValueError, "rotary_dim must be even"),
        (apply_rope, RAGGED | {"rotary_dim": 0}, ValueError, "rotary_dim must be even, at least 2"),
        (apply_rope, RAGGED | {"indptr": [0, 1, 5]}, ValueError, r"rise from 0 to the 4 tokens of q, got \[0, 1, 5\]"),
        (apply_rope, RAGGED | {"indptr": [1, 1, 4]}, ValueError, "indptr must rise from 0"),
        (apply_rope, RAGGED | {"indptr": [0, 5, 4]}, ValueError, "indptr must rise from 0"),
        (apply_rope, RAGGED | {"indptr": [0, 4]}, ValueError, r"one value more than offsets \(2\), got 2 values"),
        (apply_rope, RAGGED | {"offsets": torch.ones(2)}, TypeError, "offsets must be an int32 or int64 tensor"),
        (apply_rope, RAGGED | {"indptr": torch.zeros(2, 2).int()}, ValueError, r"indptr must have shape \[tokens\]"),
        (apply_rope, RAGGED | {"rope_scale": 0}, ValueError, "rope_scale must be positive and finite, got 0"),
        (apply_rope, RAGGED | {"rope_theta": -1.0}, ValueError, "theta must be positive and finite, got -1.0"),
        (apply_rope, RAGGED | {"backend": "fastest"}, ValueError, "backend must be one of"),
        (apply_llama31_rope, RAGGED | {"high_freq_factor": 1}, ValueError, "high_freq_factor must be above"),
        (
            apply_rope_pos_ids,
            {"q": RAGGED["q"], "k": RAGGED["k"], "pos_ids": [0]},
            TypeError,
            "pos_ids must be an int32",
        ),
        (apply_rope_with_cos_sin_cache, CACHE | {"positions": torch.tensor([0, 1, 2, 9])}, ValueError, "0 to 8, got 9"),
        (
            apply_rope_with_cos_sin_cache,
            CACHE | {"positions": torch.zeros(2, 2).int()},
            ValueError,
            r"positions must have shape \[tokens\], got \(2, 2\)",
        ),
        (
            apply_rope_with_cos_sin_cache,
            CACHE | {"cos_sin_cache": torch.ones(9, 16).half()},
            TypeError,
            "float32 or of",
        ),
        (apply_rope_with_cos_sin_cache, CACHE | {"head_size": 5}, ValueError, "leave 16 of head_size 5 channels"),
    ],
)
def test_wrong_arguments_are_refused(
    function: Callable[..., object], arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(**arguments)


def test_in_place_refuses_what_shares_memory_or_wants_gradients() -> None:
    x = torch.randn(4, 2, 16)
    with pytest.raises(ValueError, match="q and k must not share memory"):
        flashinfer.apply_rope_inplace(x, x, [0, 4], [0])
    with pytest.raises(ValueError, match="q must not require grad where it is overwritten"):
        flashinfer.apply_rope_inplace(x.clone().requires_grad_(), x, [0, 4], [0])
