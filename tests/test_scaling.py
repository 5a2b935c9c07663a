"""Scaled frequencies against numbers computed by transformers 5.23 (``modeling_rope_utils.py``) in float32."""

from __future__ import annotations

import math

import pytest
import torch

from dit_rope import Grid, RopeSpec, Scaling, cache_clear, rope_table
from dit_rope.scaling import base_frequencies, inverse_frequencies, register_scaling

LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
LONGROPE = {
    "factor": 8.0,
    "original_max_position_embeddings": 4096,
    "short_factor": [1.0 + 0.1 * j for j in range(8)],
    "long_factor": [1.0 + j for j in range(8)],
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 4096}
DYNAMIC = {"factor": 2.0, "max_position_embeddings": 4096}

# (scaling, frequencies of 16 channels at theta 10,000, factor of cos and sin)
GOLDEN = {
    "linear": (
        Scaling.of("linear", factor=4.0),
        [0.25, 0.079056941, 0.025, 0.0079056947, 0.0025, 0.00079056947, 0.00025, 7.9056947e-05],
        1.0,
    ),
    "dynamic past the trained length": (
        Scaling.of("dynamic", **DYNAMIC, seq_len=8192),
        [1.0, 0.27029613, 0.073059998, 0.019747833, 0.0053377626, 0.0014427766, 0.00038997692, 0.00010540926],
        1.0,
    ),
    "dynamic within the trained length": (
        Scaling.of("dynamic", **DYNAMIC, seq_len=1024),
        [1.0, 0.31622776, 0.1, 0.031622779, 0.01, 0.0031622779, 0.001, 0.00031622779],
        1.0,
    ),
    "yarn": (
        Scaling.of("yarn", **YARN),
        [1.0, 0.31622776, 0.1, 0.025693506, 0.00625, 0.0013834966, 0.00025, 7.9056947e-05],
        1.138629436111989,
    ),
    "yarn not truncated": (
        Scaling.of("yarn", **YARN, truncate=False),
        [1.0, 0.31622776, 0.1, 0.02861361, 0.006556971, 0.0012856319, 0.00025, 7.9056947e-05],
        1.138629436111989,
    ),
    "yarn with mscale": (
        Scaling.of("yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=0.707),
        [1.0, 0.31622776, 0.1, 0.023914725, 0.005125, 0.00084986218, 2.5e-05, 7.9056945e-06],
        1.0857263992561355,
    ),
    "longrope up to the trained length": (
        Scaling.of("longrope", **LONGROPE, seq_len=4096),
        [1.0, 0.28747976, 0.083333336, 0.024325214, 0.0071428572, 0.0021081853, 0.000625, 0.00018601633],
        1.118033988749895,
    ),
    "longrope past the trained length": (
        Scaling.of("longrope", **LONGROPE, seq_len=4097),
        [1.0, 0.15811388, 0.033333335, 0.0079056947, 0.002, 0.00052704633, 0.00014285714, 3.9528473e-05],
        1.118033988749895,
    ),
    "proportional": (
        Scaling.of("proportional", partial_rotary_factor=0.25),
        [1.0, 0.31622776, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        1.0,
    ),
}
LLAMA3_28_TO_34 = [
    0.0032114461, 0.0021665706, 0.0013718937, 0.00085675146, 0.00052484602, 0.00031269365, 0.00017850779,
]  # fmt: skip


@pytest.mark.parametrize(("scaling", "frequencies", "magnitude"), GOLDEN.values(), ids=GOLDEN.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scaling_gives_the_frequencies_of_transformers(scaling, frequencies, magnitude, dtype):
    ours, factor = inverse_frequencies(scaling, 16, 10_000.0, dtype)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), torch.tensor(frequencies, dtype=torch.float64), rtol=1e-6, atol=0)
    assert math.isclose(factor, magnitude, rel_tol=1e-12)


def test_llama3_gives_the_frequencies_of_transformers_at_both_thresholds():
    ours, factor = inverse_frequencies(Scaling.of("llama3", **LLAMA3), 128, 500_000.0, torch.float64)
    expected = torch.tensor(LLAMA3_28_TO_34, dtype=torch.float64)
    torch.testing.assert_close(ours[28:35], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours[:28], base_frequencies(128, 500_000.0, torch.float64)[:28])
    assert math.isclose(ours[63].item(), 3.06892588e-07, rel_tol=1e-6)
    assert factor == 1.0


def test_yarn_takes_an_attention_factor_of_its_own():
    _, factor = inverse_frequencies(Scaling.of("yarn", **YARN, attention_factor=1.5), 16, 1e4, torch.float64)
    assert factor == 1.5


def test_no_scaling_is_the_plain_formula():
    ours, factor = inverse_frequencies(None, 16, 10_000.0, torch.float64)
    expected = torch.tensor([10_000.0 ** (-2 * j / 16) for j in range(8)], dtype=torch.float64)
    torch.testing.assert_close(ours, expected, rtol=1e-15, atol=0)
    assert factor == 1.0


def test_table_uses_the_scaling_and_its_magnitude():
    cos, sin = rope_table(RopeSpec((16,), scaling=Scaling.of("yarn", **YARN)), Grid(5), dtype=torch.float64).axis(0)
    frequencies, magnitude = inverse_frequencies(Scaling.of("yarn", **YARN), 16, 1e4, torch.float64)
    angles = torch.outer(torch.arange(5.0, dtype=torch.float64), frequencies)
    torch.testing.assert_close(cos, angles.cos() * magnitude, rtol=0, atol=1e-15)
    torch.testing.assert_close(sin, angles.sin() * magnitude, rtol=0, atol=1e-15)


def test_registered_scaling_is_called_once_per_distinct_axis():
    calls = []

    def halved(dim, theta, dtype, *, by):
        calls.append(dim)
        return base_frequencies(dim, theta, dtype) / by, 1.0

    cache_clear()
    register_scaling("halved_for_a_test", halved)
    spec = RopeSpec((8, 4, 4), scaling=Scaling.of("halved_for_a_test", by=2.0))
    table = rope_table(spec, Grid(3, 5, 5))
    assert rope_table(spec, Grid(3, 5, 5)) is table
    assert calls == [8, 4]
    with pytest.raises(ValueError, match="name must not be that of a registered scaling, got 'halved_for_a_test'"):
        register_scaling("halved_for_a_test", halved)


def test_unknown_scaling_is_refused_naming_those_that_import_registered():
    known = "dynamic, .*linear, llama3, longrope, proportional, yarn"
    with pytest.raises(ValueError, match=f"scaling must be one of {known}, got 'ntk'"):
        rope_table(RopeSpec((8,), scaling=Scaling.of("ntk")), Grid(2))


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (Scaling.of("linear"), r"linear scaling must have its own parameters, got \{\}: missing .* 'factor'"),
        (Scaling.of("linear", factor=2.0, base=3.0), "unexpected keyword argument 'base'"),
        (Scaling.of("linear", factor=0.0), "factor must be positive and finite, got 0.0"),
        (Scaling.of("yarn", factor=2.0), "missing .* 'original_max_position_embeddings'"),
        (Scaling.of("yarn", **YARN, beta=2.0), r"yarn scaling must not have parameters \['beta'\]; it knows"),
        (Scaling.of("longrope", **LONGROPE | {"short_factor": [1.0]}, seq_len=1), r"one value per .* \(8\), got 1"),
        (Scaling.of("llama3", **LLAMA3 | {"high_freq_factor": 1.0}), r"must be above low_freq_factor \(1.0\), got 1.0"),
        (Scaling.of("proportional", partial_rotary_factor=1.5), "above 0 and at most 1, got 1.5"),
    ],
)
def test_scaling_refuses_parameters(scaling, message):
    with pytest.raises(ValueError, match=message):
        inverse_frequencies(scaling, 16, 10_000.0, torch.float64)


def test_dynamic_scaling_refuses_an_axis_of_two_channels():
    with pytest.raises(ValueError, match=r"dim / \(dim - 2\) is undefined"):
        inverse_frequencies(Scaling.of("dynamic", **DYNAMIC, seq_len=1), 2, 10_000.0, torch.float64)
