"""The functions of diffusers and transformers: their bits in exact mode, the oracle's bound in fast mode."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models import embeddings
from diffusers.models.transformers import transformer_flux
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import dit_rope
import oracle
from dit_rope.compat.huggingface import apply_rotary_emb, apply_rotary_pos_emb
from serving import HEAD_SIZES, HEADS, angles_at, assert_rotated, frequencies, one_thread  # noqa: F401
from tolerance import all_equal, assert_within

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = [F32, BF16, F16]
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in (*DTYPES, F64)}

both_modes = pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])


def repeated(half: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """``[..., 2 n]`` of ``[..., n]``, as models keep their tables."""
    return half.repeat_interleave(2, dim=-1) if interleaved else torch.cat((half, half), dim=-1)


def tables(tokens: int, width: int, dtype: torch.dtype, interleaved: bool) -> tuple[torch.Tensor, ...]:
    """Cos and sin ``[tokens, width]``."""
    return tuple(
        repeated(table, interleaved).to(dtype) for table in angles_at(torch.arange(tokens), frequencies(width))
    )


@pytest.mark.parametrize(("dtype", "table"), [(F32, F32), (BF16, F32), (F16, BF16), (BF16, F64)], ids=NAMES.get)
@pytest.mark.parametrize("sequence_dim", [1, 2])
@pytest.mark.parametrize("unbind", [-1, -2])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_exact_rotation_equals_diffusers(
    head_size: int, unbind: int, sequence_dim: int, dtype: torch.dtype, table: torch.dtype
) -> None:
    x = torch.randn(2, 11, 3, head_size).to(dtype)
    freqs = tables(x.shape[sequence_dim], head_size, table, unbind == -1)
    rotated = apply_rotary_emb(x, freqs, True, unbind, sequence_dim)
    assert torch.equal(rotated, embeddings.apply_rotary_emb(x, freqs, True, unbind, sequence_dim))
    assert rotated.dtype == dtype
    assert rotated.is_contiguous()


@both_modes
@pytest.mark.parametrize("unbind", [-1, -2])
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=NAMES.get)
@pytest.mark.parametrize(("head_size", "width", "tokens"), [(108, 108, 11), (80, 32, 11), (32, 32, 8192)])
def test_rotation_like_diffusers_is_within_the_bound(
    head_size: int, width: int, tokens: int, dtype: torch.dtype, unbind: int, exact: bool
) -> None:
    x = torch.randn(1, HEADS if tokens < 8192 else 2, tokens, head_size).to(dtype)
    freqs = tables(tokens, width, F32, unbind == -1)
    rotated = apply_rotary_emb(x, freqs, use_real_unbind_dim=unbind, exact=exact)
    cos, sin = (table[:, ::2] if unbind == -1 else table[:, : width // 2] for table in freqs)
    assert_rotated(rotated.transpose(1, 2), x.transpose(1, 2), cos, sin, interleaved=unbind == -1)


@both_modes
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_complex_tables_rotate_tokens_of_dim_one(dtype: torch.dtype, batches: int, dims: int, exact: bool) -> None:
    """Lumina's call. The bound is the error of PyTorch's complex product, which may fuse."""
    x = torch.randn(2, 11, 3, 64).to(dtype)
    angles = torch.arange(11.0)[:, None] * frequencies(64).float() + torch.arange(float(batches))[:, None, None]
    freqs = torch.polar(torch.ones_like(angles), angles)
    table = freqs[0] if dims == 2 and batches == 1 else freqs
    rotated = apply_rotary_emb(x, table, use_real=False, exact=exact)
    truth = oracle.rotate(x, freqs.real, freqs.imag, interleaved=True)
    assert_within(rotated, truth, embeddings.apply_rotary_emb(x.float(), freqs, use_real=False))
    assert rotated.dtype == dtype


@pytest.mark.parametrize(
    ("dtype", "table"), [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16), (F16, BF16)], ids=NAMES.get
)
@pytest.mark.parametrize(("unsqueeze_dim", "batches"), [(1, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_exact_rotation_equals_transformers(
    head_size: int, batches: int, unsqueeze_dim: int, dtype: torch.dtype, table: torch.dtype
) -> None:
    q, k = torch.randn(2, 5, 7, head_size).to(dtype), torch.randn(2, 5, 7, head_size).to(dtype)
    k = k[:, :2] if unsqueeze_dim == 1 else k[:, :, :2]
    tokens = q.shape[3 - unsqueeze_dim]
    positions = torch.arange(tokens) + 100 * torch.arange(batches)[:, None]
    cos, sin = (repeated(angle_table, False).to(table) for angle_table in angles_at(positions, frequencies(head_size)))
    rotated = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
    upstream = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
    for actual, expected in zip(rotated, upstream, strict=True):
        assert torch.equal(actual, expected.to(dtype))
        assert actual.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(("head_size", "width", "tokens"), [(112, 112, 11), (80, 32, 11), (32, 32, 8192)])
def test_fast_rotation_like_transformers_is_within_the_bound_of_float32(
    head_size: int, width: int, tokens: int, dtype: torch.dtype
) -> None:
    q, k = (torch.randn(1, heads, tokens, head_size).to(dtype) for heads in (HEADS if tokens < 8192 else 2, 1))
    cos, sin = (table[None] for table in tables(tokens, width, dtype, False))
    rotated = apply_rotary_pos_emb(q, k, cos, sin, exact=False)
    halves = cos[0, :, : width // 2], sin[0, :, : width // 2]
    for x, after in zip((q, k), rotated, strict=True):
        assert_rotated(after.transpose(1, 2), x.transpose(1, 2), *halves, interleaved=False)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=NAMES.get)
def test_exact_gradients_equal_the_originals(dtype: torch.dtype) -> None:
    x, y, grad = (torch.randn(2, 3, 11, 32).to(dtype) for _ in range(3))
    x.requires_grad_()
    y.requires_grad_()
    freqs = tables(11, 32, F32, True)
    (actual,) = torch.autograd.grad(apply_rotary_emb(x, freqs), x, grad)
    (expected,) = torch.autograd.grad(embeddings.apply_rotary_emb(x, freqs), x, grad)
    assert torch.equal(actual, expected)
    cos, sin = (table[None].to(dtype) for table in tables(11, 32, F32, False))
    actual = torch.autograd.grad(apply_rotary_pos_emb(x, y, cos, sin), (x, y), (grad, grad))
    expected = torch.autograd.grad(modeling_llama.apply_rotary_pos_emb(x, y, cos, sin), (x, y), (grad, grad))
    assert all_equal(actual, expected)


@pytest.mark.parametrize(
    ("function", "original"),
    [
        (apply_rotary_emb, embeddings.apply_rotary_emb),
        (apply_rotary_pos_emb, inspect.unwrap(modeling_llama.apply_rotary_pos_emb)),
    ],
    ids=["diffusers", "transformers"],
)
def test_signatures_are_the_originals(function: Callable[..., object], original: Callable[..., object]) -> None:
    actual, expected = (list(inspect.signature(signed).parameters.values()) for signed in (function, original))
    assert [(p.name, p.default) for p in actual[: len(expected)]] == [(p.name, p.default) for p in expected]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in actual[len(expected) :])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=NAMES.get)
def test_llama_gives_the_same_logits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50,
    )  # fmt: skip
    model, tokens = LlamaForCausalLM(config).to(dtype).eval(), torch.randint(50, (2, 9))
    calls = []
    with torch.no_grad():
        expected = model(tokens).logits
        monkeypatch.setattr(
            modeling_llama, "apply_rotary_pos_emb", lambda *args: calls.append(1) or apply_rotary_pos_emb(*args)
        )
        assert torch.equal(model(tokens).logits, expected)
    assert len(calls) == 2


def test_flux_gives_the_same_image_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(2.0))
    inputs = {
        "hidden_states": torch.randn(1, 6, 4),
        "encoder_hidden_states": torch.randn(1, 5, 8),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }
    calls = []
    with torch.no_grad():
        (expected,) = model(**inputs)
        monkeypatch.setattr(
            transformer_flux,
            "apply_rotary_emb",
            lambda *args, **options: calls.append(1) or apply_rotary_emb(*args, **options),
        )
        (patched,) = model(**inputs)
    assert torch.equal(patched, expected)
    assert len(calls) == 4


@pytest.mark.parametrize("dtype", [F32, BF16], ids=NAMES.get)
def test_rotations_are_exact_on_every_device(device: str, dtype: torch.dtype) -> None:
    x, freqs = torch.randn(2, 3, 11, 48).to(dtype), tables(11, 48, F32, True)
    rotated = apply_rotary_emb(x.to(device), freqs)
    assert torch.equal(rotated.cpu(), embeddings.apply_rotary_emb(x, freqs))
    cos, sin = (table[None].to(dtype) for table in tables(11, 48, F32, False))
    actual = apply_rotary_pos_emb(*(t.to(device) for t in (x, x, cos, sin)))
    expected = modeling_llama.apply_rotary_pos_emb(x, x, cos, sin)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(actual, expected, strict=True))


def test_calls_leave_nothing_in_the_caches() -> None:
    """Rows are put together for each call: what was remembered of them would serve none."""
    dit_rope.cache_clear()
    x = torch.randn(2, 3, 11, 32)
    apply_rotary_emb(x, tables(11, 32, F32, True))
    apply_rotary_pos_emb(x, x, *(table.expand(2, 11, 32) for table in tables(11, 32, F32, False)))
    assert dit_rope.cache_info().expanded.entries == 0


def test_compiled_calls_equal_the_plain_ones_without_a_graph_break() -> None:
    torch._dynamo.reset()
    x, freqs = torch.randn(2, 3, 11, 32), tables(11, 32, F32, True)
    cos, sin = (table[None] for table in tables(11, 32, F32, False))

    def rotations(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (apply_rotary_emb(x, freqs), *apply_rotary_pos_emb(x, x * 2, cos, sin))

    compiled = torch.compile(rotations, backend="aot_eager", fullgraph=True)
    assert all_equal(compiled(x), rotations(x))


PAIR = (torch.ones(5, 8), torch.ones(5, 8))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"use_real_unbind_dim": 1}, ValueError, "use_real_unbind_dim must be -1 or -2, got 1"),
        ({"sequence_dim": 3}, ValueError, "sequence_dim must be 1 or 2, got 3"),
        ({"x": torch.ones(2, 3, 8)}, ValueError, r"x must be a tensor of 4 dims, .* got \(2, 3, 8\)"),
        ({"x": torch.ones(2, 3, 5, 16)[..., ::2]}, ValueError, "x must be contiguous in its last dim"),
        ({"x": torch.ones(2, 3, 5, 6)}, ValueError, "x must have at least the table's 8 channels per head, got 6"),
        ({"x": torch.ones(2, 3, 5, 8).int()}, TypeError, "x must be float32, float16, bfloat16 or float64"),
        ({"x": torch.ones(2, 5, 3, 8)}, ValueError, "freqs_cis must have the 3 tokens of x, .* got 5 tokens"),
        ({"freqs_cis": PAIR[0]}, TypeError, r"freqs_cis must be \(cos, sin\) with use_real=True, got Tensor"),
        ({"freqs_cis": (PAIR[0], None)}, TypeError, r"freqs_cis\[1\] must be a floating point tensor, got NoneType"),
        ({"freqs_cis": (PAIR[0], PAIR[0][:4])}, ValueError, r"freqs_cis\[1\] must have the shape, dtype and device"),
        ({"freqs_cis": (torch.ones(5, 7), torch.ones(5, 7))}, ValueError, r"must have shape \[S, even D\]"),
        ({"freqs_cis": PAIR, "use_real": False}, TypeError, "freqs_cis must be a complex tensor with use_real=False"),
        ({"freqs_cis": torch.ones(5).cfloat(), "use_real": False}, ValueError, r"shape \[S, D / 2\] or \[1 or B"),
        (
            {"freqs_cis": torch.ones(3, 5, 4).cfloat(), "use_real": False, "x": torch.ones(2, 5, 3, 8)},
            ValueError,
            "1 or its 2 batch entries, got 5 tokens and 3 entries",
        ),
        ({"freqs_cis": (PAIR[0].clone().requires_grad_(), PAIR[1])}, ValueError, "must not require grad"),
        ({"backend": "fastest"}, ValueError, "backend must be one of"),
    ],
)
def test_wrong_arguments_like_diffusers_are_refused(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        apply_rotary_emb(**{"x": torch.ones(2, 3, 5, 8), "freqs_cis": PAIR} | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"unsqueeze_dim": 0}, ValueError, "unsqueeze_dim must be 1 or 2, got 0"),
        ({"q": torch.ones(3, 5, 8)}, ValueError, "q must be a tensor of 4 dims"),
        ({"k": torch.ones(2, 1, 4, 8)}, ValueError, "k must have the B, S and D of q"),
        ({"k": torch.ones(2, 1, 5, 8).half()}, TypeError, "k must have the dtype of q"),
        ({"cos": torch.ones(5, 8)}, ValueError, r"cos must have shape \[1 or B, S, even D\], got \(5, 8\)"),
        ({"sin": torch.ones(1, 5, 8).half()}, ValueError, "sin must have the shape, dtype and device of cos"),
        (
            {"cos": torch.ones(3, 5, 8), "sin": torch.ones(3, 5, 8)},
            ValueError,
            "cos and sin must have the 5 tokens of q",
        ),
        ({"sin": torch.ones(1, 5, 8, requires_grad=True)}, ValueError, "sin must not require grad"),
    ],
)
def test_wrong_arguments_like_transformers_are_refused(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    table = torch.ones(1, 5, 8)
    arguments = {"q": torch.ones(2, 3, 5, 8), "k": torch.ones(2, 1, 5, 8), "cos": table, "sin": table}
    with pytest.raises(error, match=message):
        apply_rotary_pos_emb(**arguments | change)
