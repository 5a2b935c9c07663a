"""vLLM's signature: the grids of its own tests against the oracle, in place, in whatever memory layout and dtype."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import dit_rope
from dit_rope.compat.dense import cache_rows, one_axis_args, prepare_cached
from dit_rope.compat.vllm import rotary_embedding
from dit_rope.rotation import ops
from serving import HEAD_SIZES, HEADS, assert_rotated, cos_sin_cache, naive, one_thread  # noqa: F401
from tolerance import all_equal

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)]
"""Of the query and of the cache: all that are taken, float64 apart."""
ROWS = 97

both_pairings = pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "interleaved"])
all_dtypes = pytest.mark.parametrize(("dtype", "table"), DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def layouts(tokens: int, heads: int, head_size: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The shapes and strides that queries come in; the first dims say which positions they go with."""
    packed = torch.randn(tokens, 3 * heads * head_size).to(dtype)
    padded = torch.randn(1, tokens, heads, head_size + 64).to(dtype)
    return {
        "flat": torch.randn(tokens, heads * head_size).to(dtype),
        "heads": torch.randn(tokens, heads, head_size).to(dtype),
        "batch": torch.randn(1, tokens, heads * head_size).to(dtype),
        "padded": padded[..., :head_size],
        "packed": packed[:, heads * head_size : 2 * heads * head_size],
    }


def as_tokens(x: torch.Tensor, head_size: int) -> torch.Tensor:
    """``[B, S, H, D]`` of a batch of one, in any of the layouts."""
    return x.reshape(1, x.shape[1] if x.shape[0] == 1 else x.shape[0], -1, head_size)


def check(
    layout: str,
    head_size: int,
    cache: torch.Tensor,
    is_neox: bool,
    dtype: torch.dtype,
    tokens: int = 11,
    heads: int = HEADS,
) -> None:
    """Rotates queries, and one head of keys or none, and checks both."""
    query = layouts(tokens, heads, head_size, dtype)[layout]
    key = layouts(tokens, 1, head_size, dtype)[layout] if layout != "heads" else None
    positions = torch.randint(cache.shape[0], query.shape[:2] if layout in ("batch", "padded") else (tokens,))
    before = [x.clone() for x in (query, key) if x is not None]
    assert rotary_embedding(positions, query, key, head_size, cache, is_neox) is None
    cos, sin = cache[positions.flatten()].chunk(2, dim=-1)
    for x, after in zip(before, (query, key), strict=False):
        assert_rotated(as_tokens(after, head_size), as_tokens(x, head_size), cos, sin, interleaved=not is_neox)


@both_pairings
@all_dtypes
@pytest.mark.parametrize("rotary_dim", [None, 32])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_rotation_is_within_the_bound(
    head_size: int, rotary_dim: int | None, dtype: torch.dtype, table: torch.dtype, is_neox: bool
) -> None:
    cache = cos_sin_cache(ROWS, rotary_dim or head_size, table)
    check("flat", head_size, cache, is_neox, dtype)


@both_pairings
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["heads", "batch", "padded", "packed"])
@pytest.mark.parametrize("head_size", [80, 108, 256])
def test_rotation_is_within_the_bound_in_every_layout(
    head_size: int, layout: str, dtype: torch.dtype, is_neox: bool
) -> None:
    check(layout, head_size, cos_sin_cache(ROWS, 32, F32), is_neox, dtype)


@pytest.mark.parametrize(("head_size", "rotary_dim", "is_neox"), [(64, 64, True), (80, 32, False)])
def test_rotation_of_8192_tokens_is_within_the_bound(head_size: int, rotary_dim: int, is_neox: bool) -> None:
    check("flat", head_size, cos_sin_cache(8192, rotary_dim, F32), is_neox, BF16, tokens=8192, heads=3)


@pytest.mark.parametrize(("dtype", "table"), [(F32, F32), (BF16, BF16)], ids=["float32", "bfloat16"])
def test_rotation_is_within_the_bound_on_every_device(device: str, dtype: torch.dtype, table: torch.dtype) -> None:
    cache, positions = cos_sin_cache(ROWS, 80, table), torch.randint(ROWS, (2, 11))
    query, key = torch.randn(2, 11, HEADS * 112).to(dtype), torch.randn(2, 11, 112).to(dtype)
    rotated = [x.to(device, copy=True) for x in (query, key)]
    rotary_embedding(positions.to(device), *rotated, 112, cache.to(device), is_neox=True)
    cos, sin = cache[positions].chunk(2, dim=-1)
    for x, after in zip((query, key), rotated, strict=True):
        assert_rotated(after.cpu().unflatten(-1, (-1, 112)), x.unflatten(-1, (-1, 112)), cos, sin, interleaved=False)


@pytest.mark.gpu
def test_positions_past_the_cache_leave_their_tokens_alone_on_a_gpu() -> None:
    x = torch.randn(4, 128, device="cuda")
    before = x.clone()
    rotary_embedding(
        torch.tensor([-1, 3, 8, 2**30], device="cuda"), x, None, 64, cos_sin_cache(8, 64, F32).cuda(), True
    )
    assert torch.equal(x[[0, 2, 3]], before[[0, 2, 3]])
    assert not torch.equal(x[1], before[1])


def test_signature_is_vllms() -> None:
    expected = ["positions", "query", "key", "head_size", "cos_sin_cache", "is_neox", "rope_dim_offset", "inverse"]
    parameters = inspect.signature(rotary_embedding).parameters
    assert list(parameters) == [*expected, "backend"]
    assert (parameters["rope_dim_offset"].default, parameters["inverse"].default) == (0, False)
    assert parameters["backend"].kind is inspect.Parameter.KEYWORD_ONLY


@both_pairings
@all_dtypes
@pytest.mark.parametrize("offset", [1, 8, 64])
def test_offset_turns_the_middle_of_each_head_and_leaves_the_rest_in_bits(
    offset: int, dtype: torch.dtype, table: torch.dtype, is_neox: bool
) -> None:
    cache, positions = cos_sin_cache(ROWS, 32, table), torch.randint(ROWS, (11,))
    query, key = torch.randn(11, HEADS, 96).to(dtype), torch.randn(11, 2 * 96).to(dtype)
    before = query.clone(), key.clone()
    rotary_embedding(positions, query, key, 96, cache, is_neox, rope_dim_offset=offset)
    cos, sin = cache[positions].chunk(2, dim=-1)
    for x, after in zip(
        (before[0], before[1].unflatten(1, (-1, 96))), (query, key.unflatten(1, (-1, 96))), strict=True
    ):
        assert torch.equal(after[..., :offset], x[..., :offset])
        assert_rotated(after[None, ..., offset:], x[None, ..., offset:], cos, sin, interleaved=not is_neox)


def test_rotation_in_place_touches_nothing_but_its_channels() -> None:
    """Query and key are neighbours in packed memory, with values beside them and unrotated channels."""
    packed = torch.randn(11, 5 * 80)
    before, address = packed.clone(), packed.data_ptr()
    query, key = packed[:, : 2 * 80], packed[:, 2 * 80 : 3 * 80]
    rotary_embedding(torch.arange(1, 12), query, key, 80, cos_sin_cache(ROWS, 32, F32), True)
    changed = (packed != before).view(11, 5, 80)
    assert packed.data_ptr() == address
    assert changed[:, :3, :32].all()
    assert not changed[:, :3, 32:].any()
    assert not changed[:, 3:].any()


@both_pairings
def test_inverse_undoes_the_rotation(is_neox: bool) -> None:
    """Values are at most 1, so that 1e-6 is more than two rotations round off.

    Each rounds three times, at a magnitude of at most sqrt(2), and its float32 table is off by at most 2**-24 a number.
    """
    x = torch.rand(11, HEADS * 128) * 2 - 1
    rotated, cache, positions = x.clone(), cos_sin_cache(ROWS, 128, F32), torch.randint(1, ROWS, (11,))
    rotary_embedding(positions, rotated, None, 128, cache, is_neox)
    assert not torch.allclose(rotated, x, atol=1e-2)
    rotary_embedding(positions, rotated, None, 128, cache, is_neox, inverse=True)
    assert (rotated - x).abs().max() <= 1e-6


def test_inverse_is_within_the_bound() -> None:
    cache, positions, x = cos_sin_cache(ROWS, 64, F32), torch.randint(ROWS, (11,)), torch.randn(11, 3, 64).to(BF16)
    rotated = x.clone()
    rotary_embedding(positions, rotated, None, 64, cache, True, inverse=True)
    assert_rotated(rotated[None], x[None], *cache[positions].chunk(2, -1), interleaved=False, inverse=True)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
def test_cache_is_float32_or_of_the_querys_dtype_and_nothing_else(dtype: torch.dtype) -> None:
    accepted = []
    for table in (F32, BF16, F16, F64):
        x, cache = torch.randn(3, 64).to(dtype), cos_sin_cache(ROWS, 32, table)
        try:
            rotary_embedding(torch.arange(3), x, None, 32, cache, True)
        except TypeError as refusal:
            assert f"must be float32 or of the query's dtype {dtype}, got {table}" in str(refusal)  # noqa: PT017
        else:
            accepted.append(table)
    assert accepted == ([F32] if dtype == F32 else [table for table in (F32, BF16, F16, F64) if table in (F32, dtype)])


@both_pairings
def test_bfloat16_cache_is_read_into_float32_arithmetic(is_neox: bool) -> None:
    """At most one step of bfloat16 from the float32 result of the same cache; products in bfloat16 are further off."""
    cache, positions, x = cos_sin_cache(8192, 128, BF16), torch.randint(8192, (64,)), torch.randn(64, 8, 128).to(BF16)
    rotated, (cos, sin) = x.clone(), cache[positions].chunk(2, dim=-1)
    rotary_embedding(positions, rotated, None, 128, cache, is_neox)
    expected = naive(x[None], cos, sin, interleaved=not is_neox)[0].to(BF16)
    up, down = (torch.nextafter(expected, torch.full_like(expected, end)) for end in (torch.inf, -torch.inf))
    assert ((rotated >= down) & (rotated <= up)).all()
    first, second = (x[..., :64], x[..., 64:]) if is_neox else (x[..., ::2], x[..., 1::2])
    rounded = first * cos[:, None] - second * sin[:, None]
    channels = slice(0, 64) if is_neox else slice(0, 128, 2)
    assert ((rounded < down[..., channels]) | (rounded > up[..., channels])).any()


def peak_bytes(call: object) -> int:
    """The most memory on CPU that ``call()`` held at once beyond what was held before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    held = peak = 0
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert events
    return peak


@pytest.mark.parametrize("table", [BF16, F32], ids=["bfloat16", "float32"])
@both_pairings
def test_cache_is_not_copied_or_converted(is_neox: bool, table: torch.dtype) -> None:
    cache, x = torch.zeros(2**17, 128, dtype=table), torch.zeros(4, 2 * 128, dtype=BF16)
    positions = torch.tensor([0, 5, 2**16, 2**17 - 1])
    peak = peak_bytes(lambda: rotary_embedding(positions, x, None, 128, cache, is_neox))
    assert peak < cache.nbytes / 1000


def test_cache_reaches_the_backend_as_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    monkeypatch.setattr(ops, "rotate", lambda xs, args, **_: rows.append((xs, args)))
    cache, query = cos_sin_cache(ROWS, 32, F32), torch.randn(5, 4 * 64)
    positions = torch.arange(5, dtype=torch.int32)
    rotary_embedding(positions, query, query[:, :0], 64, cache, True)
    ((xs, args),) = rows
    assert args.rows.data_ptr() == cache.data_ptr()
    assert args.positions.data_ptr() == positions.data_ptr()
    assert xs[0].data_ptr() == query.data_ptr()


@both_pairings
def test_negative_row_of_a_long_table_does_not_rotate(is_neox: bool) -> None:
    """Few tokens of a long table: their rows are taken out of it first, and negative ones are none of them."""
    rows, x = cache_rows(cos_sin_cache(ROWS, 32, F32), F32), torch.randn(2, 3, 2, 32)
    positions = torch.tensor([[5, -1, 96], [-7, 0, 96]], dtype=torch.int32)[..., None]
    args = one_axis_args(rows, positions, 3, interleaved=not is_neox)
    (rotated,) = ops.rotate([x], args)
    unrotated = torch.tensor([[False, True, False], [True, False, False]])
    cos, sin = (table[positions[..., 0].clamp(min=0)].clone() for table in rows)
    cos[unrotated], sin[unrotated] = 1.0, 0.0
    assert_rotated(rotated, x, cos, sin, interleaved=not is_neox)
    assert torch.equal(rotated[unrotated], x[unrotated])
    with pytest.raises(IndexError):
        ops.rotate([x], one_axis_args(rows, positions + 1, 3, interleaved=not is_neox))


def test_calls_leave_nothing_in_the_caches() -> None:
    """Positions differ from call to call: what was remembered for one would serve none."""
    dit_rope.cache_clear()
    for _ in range(3):
        rotary_embedding(torch.randint(ROWS, (5,)), torch.randn(5, 64), None, 64, cos_sin_cache(ROWS, 64, F32), False)
    info = dit_rope.cache_info()
    assert (info.tables.entries, info.axes.entries, info.expanded.entries) == (0, 0, 0)


@pytest.mark.parametrize("head_size", [32, 108])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@both_pairings
def test_operator_passes_opcheck(is_neox: bool, dtype: torch.dtype, head_size: int) -> None:
    query, key = torch.randn(2, 11, 4 * head_size).to(dtype), torch.randn(2, 11, head_size).to(dtype)
    positions, cache = torch.randint(ROWS, (2, 11)), cos_sin_cache(ROWS, 32, dtype)
    xs, args = prepare_cached(positions, {"query": query, "key": key}, head_size, cache, is_neox=is_neox)
    torch.library.opcheck(torch.ops.dit_rope.rotate_.default, (xs, *ops._flatten(args), "eager"))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_compiled_call_equals_the_plain_one_without_a_graph_break(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    cache, positions = cos_sin_cache(ROWS, 32, dtype), torch.randint(ROWS, (11,))
    plain = [torch.randn(11, heads * 64).to(dtype) for heads in (4, 2)]
    compiled = [x.clone() for x in plain]
    rotary_embedding(positions, *plain, 64, cache, True)
    torch.compile(rotary_embedding, backend="aot_eager", fullgraph=True)(positions, *compiled, 64, cache, True)
    assert all_equal(compiled, plain)


def test_kernel_reads_the_cache_where_it_lies() -> None:
    """In Triton's interpreter: rows further apart than cos and sin, channels and heads at odd places."""
    pytest.importorskip("triton", exc_type=ImportError)
    program = """
import torch
from dit_rope.rotation.backends import triton_kernels
from dit_rope.compat.vllm import rotary_embedding
torch.manual_seed(0)
for table in (torch.float32, torch.float16):
    for is_neox in (True, False):
        cache, positions = torch.randn(9, 20).to(table), torch.randint(9, (2, 5))
        x = torch.randn(2, 5, 3, 37).half()[..., :30]
        other = x.clone()
        rotary_embedding(positions, x, None, 30, cache, is_neox, rope_dim_offset=7, backend="triton")
        rotary_embedding(positions, other, None, 30, cache, is_neox, rope_dim_offset=7, backend="eager")
        assert torch.allclose(x, other, rtol=2**-10, atol=2**-20), (x - other).abs().max()
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_tokens_are_taken() -> None:
    rotary_embedding(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 64), None, 32, cos_sin_cache(4, 32, F32), True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"positions": torch.tensor([0, 1, 97])},
            ValueError,
            "positions must be rows of cos_sin_cache, 0 to 96, got 97",
        ),
        ({"positions": torch.tensor([0, -1, 5])}, ValueError, "0 to 96, got -1"),
        ({"positions": torch.zeros(3)}, TypeError, "positions must be an int32 or int64 tensor, got torch.float32"),
        ({"positions": [0, 1, 2]}, TypeError, "positions must be an int32 or int64 tensor, got list"),
        ({"positions": torch.zeros(1, 1, 3).long()}, ValueError, r"must have shape \[tokens\] or \[batch, tokens\]"),
        ({"positions": torch.arange(4)}, ValueError, r"query must have shape \[4, heads \* head_size\]"),
        ({"query": torch.zeros(3, 2, 2, 32)}, ValueError, "query must have shape"),
        ({"query": torch.zeros(3, 65)}, ValueError, r"head_size must fit the last dim of query \(65\), got 32"),
        ({"key": torch.zeros(3, 2, 16)}, ValueError, r"head_size must fit the last dim of key \(16\), got 32"),
        ({"key": torch.zeros(3, 64).half()}, TypeError, "key must have the dtype of query"),
        ({"query": torch.zeros(64, 3).T}, ValueError, "query must be contiguous in its last dim"),
        ({"query": torch.zeros(3, 64).int()}, TypeError, "query must be float32, float16, bfloat16 or float64"),
        ({"query": torch.zeros(3, 64, requires_grad=True)}, ValueError, "query must not require grad where it is over"),
        ({"query": torch.zeros(1, 64).expand(3, 64)}, ValueError, "query must not share memory"),
        ({"query": None}, TypeError, "query must be a torch.Tensor, got NoneType"),
        ({"head_size": 0}, ValueError, "head_size must be a positive int, got 0"),
        ({"cos_sin_cache": torch.zeros(97, 31)}, ValueError, r"shape \[positions, even rotary_dim\], got \(97, 31\)"),
        ({"cos_sin_cache": torch.zeros(97)}, ValueError, r"shape \[positions, even rotary_dim\]"),
        ({"cos_sin_cache": None}, TypeError, "cos_sin_cache must be a torch.Tensor, got NoneType"),
        ({"cos_sin_cache": torch.zeros(97, 32).double()}, TypeError, "cos_sin_cache must be float32 or of the query's"),
        ({"cos_sin_cache": torch.zeros(32, 97).T}, ValueError, "cos_sin_cache must be contiguous in its last dim"),
        ({"cos_sin_cache": torch.zeros(97, 64)}, ValueError, "leave 64 of head_size 32 channels to rotate, got 0"),
        ({"rope_dim_offset": 1}, ValueError, "leave 32 of head_size 32 channels to rotate, got 1"),
        ({"rope_dim_offset": -1}, ValueError, "rope_dim_offset must be at least 0"),
        ({"backend": "fastest"}, ValueError, "backend must be one of"),
        ({"cos_sin_cache": torch.zeros(97, 32, device="meta")}, ValueError, "positions must be on the device"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_written(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments = {
        "positions": torch.arange(3),
        "query": torch.ones(3, 64),
        "key": None,
        "head_size": 32,
        "cos_sin_cache": cos_sin_cache(ROWS, 32, F32),
        "is_neox": True,
    }
    with pytest.raises(error, match=message):
        rotary_embedding(**arguments | change)
    assert (arguments["query"] == 1).all()
