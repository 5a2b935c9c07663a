"""Unusual calls of the other libraries' signatures: nobody's fault, or named by the argument that the caller has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dit_rope.compat import flashinfer, huggingface, vllm
from dit_rope.compat.fastvideo import get_rotary_pos_embed

ROWS = 16
CACHE = torch.randn(ROWS, 32)


def rotated(positions: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    out = query.clone()
    vllm.rotary_embedding(positions, out, None, 32, CACHE, True)
    return out


FAR = (-1, -(2**40), ROWS, 2**31 - 1, 2**31 + 3, 2**32 + 5, 2**33, -(2**32) + 5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("data", [torch.float32, torch.float64], ids=str)
def test_unknown_positions_keep_their_values_in_compiled_code(
    dtype: torch.dtype, inplace: bool, data: torch.dtype
) -> None:
    def call(positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cache = CACHE.to(data)
        if not inplace:
            return flashinfer.apply_rope_with_cos_sin_cache(positions, query, key, 32, cache)
        query, key = query.clone(), key.clone()
        vllm.rotary_embedding(positions, query, key, 32, cache, True)
        return query, key

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    limits = torch.iinfo(dtype)
    far = [position for position in FAR if limits.min <= position <= limits.max]
    positions = torch.tensor([3, *far, 5], dtype=dtype)
    query, key = torch.randn(len(positions), 64).to(data), torch.randn(len(positions), 32).to(data)
    known = torch.tensor([3, 5], dtype=dtype)
    for out, x, expected in zip(
        compiled(positions, query, key), (query, key), call(known, query[[0, -1]], key[[0, -1]]), strict=True
    ):
        assert torch.equal(out[1:-1], x[1:-1])
        assert torch.equal(out[[0, -1]], expected)


@pytest.mark.parametrize("position", FAR)
def test_unknown_positions_are_refused_where_looking_costs_no_wait(position: int) -> None:
    with pytest.raises(ValueError, match=f"positions must be rows of cos_sin_cache, 0 to {ROWS - 1}, got {position}"):
        rotated(torch.tensor([1, position]), torch.randn(2, 64))


@pytest.mark.parametrize("exact", [True, False])
def test_batch_of_nothing_is_rotated_to_nothing(exact: bool) -> None:
    for heads, batch in ((2, 0), (3, 1)):
        q, k, table = torch.randn(0, heads, 5, 8), torch.randn(0, 1, 5, 8), torch.randn(batch, 5, 8)
        for dim, order in ((1, [0, 1, 2, 3]), (2, [0, 2, 1, 3])):
            xs = q.permute(order), k.permute(order)
            outs = huggingface.apply_rotary_pos_emb(*xs, table, table, unsqueeze_dim=dim, exact=exact)
            assert [out.shape for out in outs] == [x.shape for x in xs]
        freqs = torch.randn(batch, 5, 4, dtype=torch.complex64)
        x = torch.randn(0, 5, heads, 8)
        assert huggingface.apply_rotary_emb(x, freqs, use_real=False, exact=exact).shape == x.shape
    x = torch.randn(0, 2, 5, 8, requires_grad=True)
    out = huggingface.apply_rotary_emb(x, (torch.randn(5, 8), torch.randn(5, 8)), exact=exact)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_no_tokens_and_no_heads_are_rotated_to_nothing() -> None:
    q, table = torch.randn(2, 3, 0, 8), torch.randn(2, 0, 8)
    assert huggingface.apply_rotary_pos_emb(q, q, table, table)[0].shape == q.shape
    empty = torch.empty(0, dtype=torch.int64)
    assert rotated(empty, torch.randn(0, 64)).shape == (0, 64)
    assert rotated(torch.empty(0, 5, dtype=torch.int64), torch.randn(0, 5, 64)).shape == (0, 5, 64)
    q = torch.randn(0, 2, 32)
    assert flashinfer.apply_rope_pos_ids(q, q[:, :1], empty)[0].shape == q.shape
    assert flashinfer.apply_rope(q, q, [0], [])[0].shape == q.shape


def in_place(name: str, q: torch.Tensor, k: torch.Tensor) -> None:
    positions, cache = torch.arange(q.shape[0]), torch.randn(9, 16)
    if name == "vllm":
        vllm.rotary_embedding(positions, q, k, 16, cache, True)
    elif name == "cached":
        flashinfer.apply_rope_with_cos_sin_cache_inplace(positions, q, k, 16, cache)
    elif name == "ragged":
        flashinfer.apply_rope_inplace(q, k, [0, q.shape[0]], [0])
    elif name == "llama":
        flashinfer.apply_llama31_rope_pos_ids_inplace(q, k, positions)
    else:
        flashinfer.apply_rope_pos_ids_inplace(q, k, positions)


@pytest.mark.parametrize("name", ["vllm", "cached", "ragged", "llama", "pos_ids"])
def test_functions_that_overwrite_name_no_argument_that_they_do_not_have(name: str) -> None:
    query, key = ("query", "key") if name in ("vllm", "cached") else ("q", "k")
    x = torch.randn(4, 2, 16)
    wrong = {
        f"{query} must not require grad where it is overwritten": (x.clone().requires_grad_(), x.clone()),
        f"{key} must not require grad where it is overwritten": (x.clone(), x.clone().requires_grad_()),
        f"{query} and {key} must not share memory as they are overwritten": (x, x),
        f"{key} must not share memory between its own elements as it is overwritten": (x, x[:1].expand(4, 2, 16)),
    }
    for message, (q, k) in wrong.items():
        with pytest.raises(ValueError, match=message) as refusal:
            in_place(name, q, k)
        assert "inplace" not in str(refusal.value)


@pytest.mark.parametrize("negated", ["positions", "query", "key", "cache"])
def test_lazily_negated_tensors_are_refused(negated: str) -> None:
    arguments: dict[str, Any] = {"positions": torch.arange(3), "query": torch.randn(3, 32), "key": torch.randn(3, 32)}
    arguments |= {"cache": torch.randn(9, 16)}
    arguments[negated] = torch._neg_view(arguments[negated])
    name = {"cache": "cos_sin_cache"}.get(negated, negated)
    for function in (vllm.rotary_embedding, flashinfer.apply_rope_with_cos_sin_cache):
        with pytest.raises(ValueError, match=f"{name} must hold its own values, got a lazily negated view"):
            function(arguments["positions"], arguments["query"], arguments["key"], 16, arguments["cache"], True)
    q = torch.randn(3, 2, 16)
    with pytest.raises(ValueError, match="pos_ids must hold its own values"):
        flashinfer.apply_rope_pos_ids(q, q, torch._neg_view(torch.arange(3)))
    with pytest.raises(ValueError, match="q must hold its own values"):
        flashinfer.apply_rope_pos_ids(torch._neg_view(q), q, torch.arange(3))


def test_lazily_negated_tables_of_a_copy_are_read_as_they_are() -> None:
    x, cos, sin = torch.randn(1, 2, 5, 8), torch.randn(5, 8), torch.randn(5, 8)
    assert torch.equal(
        huggingface.apply_rotary_emb(x, (cos, torch._neg_view(sin))), huggingface.apply_rotary_emb(x, (cos, -sin))
    )
    freqs = torch.randn(5, 4, dtype=torch.complex64)
    actual = huggingface.apply_rotary_emb(x.transpose(1, 2), freqs.conj(), use_real=False)
    assert torch.equal(
        actual, huggingface.apply_rotary_emb(x.transpose(1, 2), freqs.conj().resolve_conj(), use_real=False)
    )


def test_sparse_tables_are_refused_by_name() -> None:
    x, table = torch.randn(1, 2, 5, 8), torch.randn(5, 8)
    with pytest.raises(TypeError, match=r"freqs_cis\[1\] must be a strided tensor, got torch.sparse_coo"):
        huggingface.apply_rotary_emb(x, (table, table.to_sparse()))
    with pytest.raises(TypeError, match=r"cos must be a strided tensor, got torch.sparse_coo"):
        huggingface.apply_rotary_pos_emb(x, x, table[None].to_sparse(), table[None])
    with pytest.raises(TypeError, match=r"freqs_cis must be a strided tensor"):
        huggingface.apply_rotary_emb(x, torch.randn(5, 4, dtype=torch.complex64).to_sparse(), use_real=False)
    with pytest.raises(TypeError, match=r"cos_sin_cache must be a strided tensor"):
        vllm.rotary_embedding(torch.arange(3), torch.randn(3, 32), None, 16, torch.randn(9, 16).to_sparse(), True)


def test_lists_stay_in_host_memory_whatever_the_default_device() -> None:
    expected = flashinfer.ragged_positions([0, 1, 5], [4, 6], 5)
    with torch.device("meta"):
        positions = flashinfer.ragged_positions([0, 1, 5], [4, 6], 5)
    assert positions.device.type == "cpu"
    assert torch.equal(positions, expected)


def test_numbers_of_numpy_are_numbers() -> None:
    two, q = np.int64(2), torch.randn(5, 2, 16)
    indptr, offsets = [np.int64(n) for n in (0, 2, 5)], [np.int32(7), two]
    actual = flashinfer.apply_rope(q, q, indptr, offsets, rotary_dim=np.int64(8), rope_theta=np.float32(100))
    expected = flashinfer.apply_rope(q, q, [0, 2, 5], [7, 2], rotary_dim=8, rope_theta=100.0)
    assert torch.equal(actual[0], expected[0])
    llama = flashinfer.apply_llama31_rope(q, q, indptr, offsets, rope_scale=two, old_context_len=np.int64(64))
    assert torch.equal(
        llama[0], flashinfer.apply_llama31_rope(q, q, [0, 2, 5], [7, 2], rope_scale=2, old_context_len=64)[0]
    )
    x, offset = torch.randn(3, 64), np.int64(0)
    copy, positions = x.clone(), torch.tensor([1, 2, 3])
    vllm.rotary_embedding(positions, x, None, np.int64(32), CACHE, True, rope_dim_offset=offset)
    vllm.rotary_embedding(positions, copy, None, 32, CACHE, True)
    assert torch.equal(x, copy)
    x, table = torch.randn(1, 2, 5, 8), torch.randn(5, 8)
    assert huggingface.apply_rotary_emb(x, (table, table), True, np.int64(-1), np.int64(2)).shape == x.shape
    assert huggingface.apply_rotary_pos_emb(x, x, table[None], table[None], np.int64(1))[0].shape == x.shape
    sizes = (np.int64(2), np.int64(4), 6)
    settings = {"do_sp_sharding": True, "shard_dim": np.int64(0), "sp_rank": np.int64(1), "sp_world_size": np.int64(2)}
    actual = get_rotary_pos_embed(
        sizes, np.int64(16), two, [np.int64(4), 2, two], np.int64(100), np.float32(1), **settings
    )
    plain = get_rotary_pos_embed((2, 4, 6), 16, 2, [4, 2, 2], 100, 1.0, do_sp_sharding=True, sp_rank=1, sp_world_size=2)
    assert torch.equal(actual[0], plain[0])
