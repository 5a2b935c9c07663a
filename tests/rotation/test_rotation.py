"""The public functions: they agree with one another, honour their options, and refuse what they cannot do right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import dit_rope
from dit_rope import Grid, NormKind, Pairing, RopeSpec, RopeTable, norm_rotate, norm_rotate_qk, rotate, rotate_qk
from dit_rope.rotation.choice import choose_backend, explain_backends

H, D = 3, 10


@pytest.fixture
def table() -> RopeTable:
    return dit_rope.rope_table(RopeSpec((4, 2, 2)), Grid(2, 3, 2))


def qk(tokens: int = 12, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, tokens, H, D, **kwargs), torch.randn(2, tokens, 1, D, **kwargs)


def test_rotate_equals_rotate_qk(table: RopeTable) -> None:
    q, k = qk(15)
    rotated = rotate_qk(q, k, table, prefix=1, suffix=2)
    for x, expected in zip((q, k), rotated, strict=True):
        assert torch.equal(rotate(x, table, prefix=1, suffix=2), expected)


@pytest.mark.parametrize("norm", NormKind)
def test_norm_rotate_equals_norm_rotate_qk(table: RopeTable, norm: NormKind) -> None:
    q, k = qk()
    weights = [torch.randn(x.shape[2] * D if norm.across_heads else D) for x in (q, k)]
    biases = [weight.flip(0) if norm.centred else None for weight in weights]
    rotated = norm_rotate_qk(q, k, table, *weights, q_bias=biases[0], k_bias=biases[1], norm=norm)
    for x, weight, bias, expected in zip((q, k), weights, biases, rotated, strict=True):
        assert torch.equal(norm_rotate(x, table, weight, bias=bias, norm=norm), expected)


def test_norm_rotate_qk_takes_one_weight_of_two(table: RopeTable) -> None:
    q, k = qk()
    weight = torch.randn(D)
    _, rotated = norm_rotate_qk(q, k, table, None, weight)
    assert torch.equal(rotated, norm_rotate(k, table, weight))


@pytest.mark.parametrize("exact", [False, True])
def test_norm_rotate_qk_takes_one_bias_of_two(table: RopeTable, exact: bool) -> None:
    q, k = qk()
    bias = torch.randn(D)
    norm = NormKind.LAYER_PER_HEAD
    without, rotated = norm_rotate_qk(q, k, table, k_bias=bias, norm=norm, exact=exact)
    assert torch.equal(rotated, norm_rotate(k, table, bias=bias, norm=norm, exact=exact))
    assert torch.equal(without, norm_rotate(q, table, norm=norm, exact=exact))


@pytest.mark.parametrize("exact", [False, True])
def test_inverse_undoes_rotation(table: RopeTable, exact: bool) -> None:
    q, k = qk(dtype=torch.float64)
    back = rotate_qk(*rotate_qk(q, k, table, exact=exact), table, inverse=True, exact=exact)
    for x, y in zip((q, k), back, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("exact", [False, True])
def test_inplace_overwrites_and_returns_the_same_objects(table: RopeTable, exact: bool) -> None:
    q, k = qk()
    expected = rotate_qk(q, k, table, exact=exact)
    rotated = rotate_qk(q, k, table, inplace=True, exact=exact)
    assert rotated[0] is q
    assert rotated[1] is k
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])


@pytest.mark.parametrize("exact", [False, True])
def test_norm_rotate_inplace_overwrites(table: RopeTable, exact: bool) -> None:
    x = torch.randn(2, 12, H, D)
    weight = torch.randn(D)
    expected = norm_rotate(x, table, weight, exact=exact)
    assert norm_rotate(x, table, weight, exact=exact, inplace=True) is x
    assert torch.equal(x, expected)


def test_exact_norm_is_torchs_own_norm(table: RopeTable) -> None:
    x, weight = torch.randn(2, 12, H, D), torch.randn(H * D)
    normed = torch.nn.functional.rms_norm(x.flatten(2), (H * D,), weight, 1e-6).view(x.shape)
    rotated = norm_rotate(x, table, weight, norm=NormKind.ACROSS_HEADS, exact=True)
    assert torch.equal(rotated, rotate(normed, table, exact=True))


@pytest.mark.parametrize("across_heads", [False, True])
def test_exact_layer_norm_is_torchs_own_norm(table: RopeTable, across_heads: bool) -> None:
    norm = NormKind.LAYER_ACROSS_HEADS if across_heads else NormKind.LAYER_PER_HEAD
    size = H * D if across_heads else D
    x, weight, bias = torch.randn(2, 12, H, D), torch.randn(size), torch.randn(size)
    flat = x.flatten(2) if across_heads else x
    normed = torch.nn.functional.layer_norm(flat, (size,), weight, bias, 1e-5).view(x.shape)
    expected = rotate(normed, table, exact=True)
    options = {"bias": bias, "norm": norm, "eps": 1e-5, "exact": True}
    assert torch.equal(norm_rotate(x, table, weight, **options), expected)
    assert norm_rotate(x, table, weight, inplace=True, **options) is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize("packing", ["[B, S, 3, H, D]", "[B, S, H, 3, D]", "[B, 3, H, S, D]"])
def test_inplace_takes_packed_qkv_views(table: RopeTable, packing: str) -> None:
    if packing == "[B, S, 3, H, D]":
        packed = torch.randn(2, 12, 3, H, D)
        q, k, v = packed.unbind(2)
    elif packing == "[B, S, H, 3, D]":
        packed = torch.randn(2, 12, H, 3, D)
        q, k, v = packed.unbind(3)
    else:
        packed = torch.randn(2, 3, H, 12, D)
        q, k, v = (x.transpose(1, 2) for x in packed.unbind(1))
    expected = rotate_qk(q.clone(), k.clone(), table, exact=True)
    values = v.clone()
    rotate_qk(q, k, table, inplace=True, exact=True)
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])
    assert torch.equal(v, values)


def test_inplace_refuses_overlapping_queries_and_keys(table: RopeTable) -> None:
    buffer = torch.randn(2, 12, 2 * H, D)
    with pytest.raises(ValueError, match="q and k must not share memory"):
        rotate_qk(buffer[:, :, :H], buffer[:, :, 1 : H + 1], table, inplace=True)
    with pytest.raises(ValueError, match="q and k must not share memory"):
        rotate_qk(buffer[:, :, :H], buffer[:, :, :H], table, inplace=True)


def test_inplace_refuses_a_tensor_that_overlaps_itself(table: RopeTable) -> None:
    with pytest.raises(ValueError, match="q must not share memory between its own elements"):
        rotate_qk(torch.randn(1, 12, H, D).expand(2, 12, H, D), qk()[1], table, inplace=True)


@pytest.mark.parametrize("leaf", [True, False])
def test_inplace_refuses_tensors_that_require_grad(table: RopeTable, leaf: bool) -> None:
    q, k = qk()
    q.requires_grad_()
    q = q if leaf else q * 1
    with pytest.raises(ValueError, match="inplace must be False when q or k or a weight requires grad"):
        rotate_qk(q, k, table, inplace=True)
    with torch.no_grad():
        rotate_qk(q.detach(), k, table, inplace=True)


def test_inplace_refuses_a_weight_that_requires_grad(table: RopeTable) -> None:
    with pytest.raises(ValueError, match="inplace must be False"):
        norm_rotate(qk()[0], table, torch.ones(D, requires_grad=True), inplace=True)


def test_inplace_refuses_a_bias_that_requires_grad(table: RopeTable) -> None:
    bias = torch.ones(D, requires_grad=True)
    with pytest.raises(ValueError, match="inplace must be False"):
        norm_rotate(qk()[0], table, bias=bias, norm=NormKind.LAYER_PER_HEAD, inplace=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k: (q.numpy(), k), TypeError, r"q must be a torch.Tensor, got ndarray"),
        (lambda q, k: (q.int(), k.int()), TypeError, r"q must be float32, .* got torch.int32"),
        (lambda q, k: (q, k.bfloat16()), TypeError, r"k must have the dtype of q"),
        (lambda q, k: (q.flatten(2), k), ValueError, r"q must have shape \[B, S, H, D\], got \(2, 12, 30\)"),
        (lambda q, k: (q[..., :6], k[..., :6]), ValueError, r"at least the table's 8 channels per head, got 6"),
        (lambda q, k: (q, k[:1]), ValueError, r"k must have the B, S and D of q"),
        (lambda q, k: (q, k[:, :6]), ValueError, r"k must have the B, S and D of q"),
        (lambda q, k: (q.transpose(2, 3).contiguous().transpose(2, 3), k), ValueError, r"call q.contiguous\(\)"),
        (lambda q, k: (q.to("meta"), k), ValueError, r"q must be on the table's device cpu, got meta"),
        (lambda q, k: (q[:, :6], k[:, :6]), ValueError, r"0 \+ 12 \+ 0 = 12 tokens, got 6; pass the grid"),
    ],
)
def test_rotate_qk_refuses_tensors_that_do_not_fit(
    table: RopeTable, change: Callable[..., tuple[object, object]], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        rotate_qk(*change(*qk()), table)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"prefix": 2, "suffix": 1},
        {"inverse": True},
        {"rounding": dit_rope.Rounding.EXACT},
        {"rounding": dit_rope.Rounding.MODEL},
    ],
    ids=str,
)
def test_a_table_that_remembers_a_call_tells_it_from_others(table: RopeTable, change: dict[str, object]) -> None:
    x, weight = torch.randn(2, 15, H, D).bfloat16(), torch.randn(D).bfloat16()
    plain = {"prefix": 1, "suffix": 2}
    expected = norm_rotate(x, dit_rope.rope_table(table.spec, table.grid), weight, **plain | change)  # type: ignore[arg-type]
    dit_rope.cache_clear()
    table = dit_rope.rope_table(table.spec, table.grid)
    assert not table.validated
    others = norm_rotate(x, table, weight, **plain)  # type: ignore[arg-type]
    assert torch.equal(norm_rotate(x, table, weight, **plain | change), expected)  # type: ignore[arg-type]
    assert not torch.equal(others, expected)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"prefix": -1, "suffix": 1}, ValueError, "prefix must be at least 0, got -1"),
        ({"prefix": 1.0}, TypeError, "prefix must be an int, got 1.0"),
        ({"suffix": 3}, ValueError, r"0 \+ 12 \+ 3 = 15 tokens, got 12"),
        ({"backend": "cutlass"}, ValueError, "got 'cutlass'"),
        ({"positions": torch.zeros(1, 12, 3)}, TypeError, "positions must be an int32 tensor, got torch.float32"),
        (
            {"positions": torch.zeros(12, 3, dtype=torch.int32)},
            ValueError,
            r"positions must have shape \[1 or 2, 12, 3\]",
        ),
    ],
)
def test_rotate_qk_refuses_options_that_do_not_fit(
    table: RopeTable, kwargs: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        rotate_qk(*qk(), table, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"norm": "per_head"}, TypeError, "norm must be a NormKind, got 'per_head'"),
        ({"eps": -1e-6}, ValueError, "eps must be finite and at least 0, got -1e-06"),
        ({"eps": "small"}, TypeError, "eps must be a float, got 'small'"),
        ({"q_weight": torch.ones(D + 1)}, ValueError, r"q_weight must have shape \[10\] for NormKind.PER_HEAD"),
        ({"k_weight": torch.ones(D, dtype=torch.int32)}, TypeError, "k_weight must be floating point"),
        ({"q_weight": [1.0] * D}, TypeError, "q_weight must be a torch.Tensor or None, got list"),
        ({"q_weight": torch.ones(D, device="meta")}, ValueError, "q_weight must be on the device of q"),
        (
            {"k_bias": torch.ones(D)},
            ValueError,
            r"k_bias must be None for NormKind.PER_HEAD, got tensor\(.*; only a LayerNorm has a bias",
        ),
        (
            {"q_bias": torch.ones(D), "norm": NormKind.LAYER_ACROSS_HEADS},
            ValueError,
            r"q_bias must have shape \[30\] for NormKind.LAYER_ACROSS_HEADS, got \(10,\)",
        ),
        (
            {"q_bias": 1.0, "norm": NormKind.LAYER_PER_HEAD},
            TypeError,
            "q_bias must be a torch.Tensor or None, got float",
        ),
    ],
)
def test_norm_rotate_qk_refuses_norms_that_do_not_fit(
    table: RopeTable, kwargs: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        norm_rotate_qk(*qk(), table, **kwargs)  # type: ignore[arg-type]


def test_norm_rotate_refuses_a_bias_of_an_rms_norm_after_one_of_a_layer_norm(table: RopeTable) -> None:
    """What is remembered as valid tells the two calls apart."""
    x, bias = qk()[0], torch.ones(D)
    norm_rotate(x, table, bias=bias, norm=NormKind.LAYER_PER_HEAD)
    norm_rotate(x, table)
    with pytest.raises(ValueError, match="bias must be None for NormKind.PER_HEAD"):
        norm_rotate(x, table, bias=bias)


def test_rotate_refuses_other_objects_than_tables() -> None:
    with pytest.raises(TypeError, match="table must be a RopeTable, got tuple; make one with dit_rope.rope_table"):
        rotate(qk()[0], (torch.ones(12, 8), torch.zeros(12, 8)))  # type: ignore[arg-type]


def test_a_named_backend_is_used_or_refused(table: RopeTable) -> None:
    x = torch.randn(2, 12, H, D, dtype=torch.float64)
    assert choose_backend([x], table.args(), "eager") == "eager"
    with pytest.raises(ValueError, match="got 'triton', which declines: "):
        rotate(x, table, backend="triton")


def test_explain_backends_names_one_as_chosen() -> None:
    lines = dict(explain_backends("cpu"))
    assert lines["eager"] == "chosen"
    assert lines["triton"] != "chosen"


@pytest.mark.parametrize("pairing", Pairing)
def test_scores_depend_on_position_differences_alone(pairing: Pairing) -> None:
    """Queries at a start frame against keys rotated on their own: the property that RoPE exists for."""
    spec = RopeSpec((44, 42, 42), pairing=pairing)
    q, k = torch.randn(1, 1, 1, 128, dtype=torch.float64), torch.randn(1, 1, 1, 128, dtype=torch.float64)

    def score(query_frame: int, key_frame: int) -> float:
        tables = [
            dit_rope.rope_table(spec, Grid(1, 1, 1, start_frame=frame), dtype=torch.float64)
            for frame in (query_frame, key_frame)
        ]
        return (rotate(q, tables[0]) * rotate(k, tables[1])).sum().item()

    assert score(9, 2) == pytest.approx(score(1007, 1000), abs=1e-10)
    assert score(9, 2) != pytest.approx(score(9, 3), abs=1e-3)
