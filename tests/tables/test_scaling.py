"""Scaled frequencies against transformers 5.23's initialisers, and against the video models that scale theirs."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.transformers.transformer_cosmos import CosmosRotaryPosEmbed
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5RoPE3D
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dit_rope import AxisFrequencies, Grid, Pairing, RopeSpec, Scaling, cache_clear, known_scalings, rope_table
from dit_rope.tables.scaling import axis_frequencies, register_scaling, scaled_frequencies, scaling_from_config
from dit_rope.tables.scaling_types import base_frequencies, intrinsic_pair

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

# (scaling, frequencies of 16 channels at theta 10,000, factor of cos and sin), computed by transformers in float32.
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

# rope_parameters as transformers takes them, and a length for the types that depend on it.
PARAMETERS = {
    "linear": ({"rope_type": "linear", "factor": 3.0}, None),
    "dynamic past the trained length": ({"rope_type": "dynamic", "factor": 1.7}, 20_000),
    "dynamic within the trained length": ({"rope_type": "dynamic", "factor": 1.7}, 700),
    "yarn": ({"rope_type": "yarn", "factor": 6.0, "original_max_position_embeddings": 2048, "beta_fast": 20}, None),
    "yarn without a factor": ({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 2048}, None),
    "longrope without a factor": (
        {"rope_type": "longrope", "original_max_position_embeddings": 2048} | {
            f"{name}_factor": [start + j / 9 for j in range(32)] for name, start in (("short", 1.0), ("long", 2.0))
        },
        2049,
    ),
    "longrope with an attention factor": (
        {"rope_type": "longrope", "original_max_position_embeddings": 2048, "attention_factor": 1.25} | {
            f"{name}_factor": [start + j / 9 for j in range(32)] for name, start in (("short", 1.0), ("long", 2.0))
        },
        2048,
    ),
    "llama3": ({"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 2048}, None),
    "proportional": ({"rope_type": "proportional", "partial_rotary_factor": 0.3}, None),
}  # fmt: skip


@pytest.mark.parametrize(("scaling", "frequencies", "magnitude"), GOLDEN.values(), ids=GOLDEN.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scaling_gives_stored_frequencies_of_transformers(scaling, frequencies, magnitude, dtype) -> None:
    actual = scaled_frequencies(scaling, 16, 10_000.0, dtype)
    assert actual.inverse.dtype == dtype
    torch.testing.assert_close(actual.inverse.double(), torch.tensor(frequencies).double(), rtol=1e-6, atol=0)
    assert math.isclose(actual.magnitude, magnitude, rel_tol=1e-12)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize(("parameters", "seq_len"), PARAMETERS.values(), ids=PARAMETERS.keys())
def test_scaling_from_a_model_configuration_is_transformers_own(parameters, seq_len, theta) -> None:
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=8192,
        rope_parameters={**parameters, "rope_theta": theta},
    )  # fmt: skip
    expected, magnitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"), seq_len=seq_len)
    actual = scaled_frequencies(scaling_from_config(config, seq_len=seq_len), 64, theta, torch.float32)
    # Roundings of float32 in another order: a power and three more operations on each side.
    torch.testing.assert_close(actual.inverse, expected, rtol=8 * 2**-24, atol=0)
    assert math.isclose(actual.magnitude, magnitude, rel_tol=1e-12)


def test_llama3_gives_the_frequencies_of_transformers_at_both_thresholds() -> None:
    actual = scaled_frequencies(Scaling.of("llama3", **LLAMA3), 128, 500_000.0, torch.float64)
    expected = torch.tensor(LLAMA3_28_TO_34, dtype=torch.float64)
    torch.testing.assert_close(actual.inverse[28:35], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(actual.inverse[:28], base_frequencies(128, 500_000.0, torch.float64)[:28])
    assert math.isclose(actual.inverse[63].item(), 3.06892588e-07, rel_tol=1e-6)
    assert actual.magnitude == 1.0


def test_yarn_takes_an_attention_factor_of_its_own() -> None:
    assert scaled_frequencies(Scaling.of("yarn", **YARN, attention_factor=1.5), 16, 1e4, torch.float64).magnitude == 1.5


@pytest.mark.parametrize("scaling", [None, Scaling.of("default"), Scaling.of("none")], ids=str)
def test_no_scaling_is_the_plain_formula(scaling) -> None:
    actual = scaled_frequencies(scaling, 16, 10_000.0, torch.float64)
    expected = torch.tensor([10_000.0 ** (-2 * j / 16) for j in range(8)], dtype=torch.float64)
    torch.testing.assert_close(actual.inverse, expected, rtol=1e-15, atol=0)
    assert actual.numbers[2:] == (1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(("linear_factor", "ntk_factor"), [(2.0, 1.0), (1.0, 2.0), (1.0, 1.7)])
def test_linear_and_ntk_with_exponent_one_are_luminas_bitwise(linear_factor, ntk_factor) -> None:
    expected = get_1d_rotary_pos_embed(36, 40, linear_factor=linear_factor, ntk_factor=ntk_factor, use_real=False)
    linear, ntk = Scaling.of("linear", factor=linear_factor), Scaling.of("ntk", factor=ntk_factor, exponent=1.0)
    scaling = linear if ntk_factor == 1.0 else ntk
    table = rope_table(RopeSpec((36,), scaling=scaling, frequency_dtype=torch.float32), Grid(40))
    frequencies = axis_frequencies(table.spec, 0).inverse[:4].tolist()
    golden = {1.0: [0.5, 0.29974210, 0.17969070, 0.10772168], 2.0: [1, 0.57683802, 0.33274215, 0.19193830]}
    assert frequencies == pytest.approx(golden.get(ntk_factor, frequencies), rel=1e-6)
    # torch.polar takes cos and sin of scalars; they round up to one unit in the last place apart from those of vectors.
    torch.testing.assert_close(table.complex(), expected, rtol=0, atol=2**-23)


def test_ntk_is_hunyuans_theta_rescale() -> None:
    assert math.isclose(256.0 * 2.0 ** (16 / 14), 565.2938310, rel_tol=1e-9)
    actual = scaled_frequencies(Scaling.of("ntk", factor=2.0), 16, 256.0, torch.float32)
    assert torch.equal(actual.inverse, base_frequencies(16, 256.0 * 2.0 ** (16 / 14), torch.float32))


@pytest.mark.parametrize(("scale", "fps"), [((2.0, 1.0, 1.0), 30), ((1.0, 3.0, 3.0), 16), ((20 / 24, 2.0, 2.0), None)])
def test_fps_and_ntk_are_cosmos_bitwise(scale, fps) -> None:
    upstream = CosmosRotaryPosEmbed(128, (60, 60, 60), (1, 1, 1), base_fps=24, rope_scale=scale)
    expected = upstream(torch.empty(1, 0, 50, 4, 6), fps=fps)
    first = Scaling.of("fps", fps=fps, factor=scale[0]) if fps else Scaling.of("ntk", factor=scale[0])
    spec = RopeSpec(
        (44, 42, 42), pairing=Pairing.HALF, frequency_dtype=torch.float32,
        scaling=(first, *(Scaling.of("ntk", factor=factor) for factor in scale[1:])),
    )  # fmt: skip
    for actual, exact in zip(rope_table(spec, Grid(50, 4, 6)).cos_sin(), expected, strict=True):
        assert torch.equal(actual, exact)


def test_fps_and_ntk_give_stored_numbers_of_cosmos() -> None:
    scaling = (Scaling.of("fps", fps=16), Scaling.of("ntk", factor=3.0), Scaling.of("ntk", factor=3.0))
    spec = RopeSpec((44, 42, 42), frequency_dtype=torch.float32, scaling=scaling)
    cos, _ = rope_table(spec, Grid(5, 4, 6)).cos_sin(repeat=False)
    token = cos[2 * 24 + 3 * 6 + 5, [0, 1, 22, 23, 43, 44]]
    golden = [-0.98999250, -0.39218289, -0.98999250, -0.25768730, 0.28366220, -0.99602264]
    torch.testing.assert_close(token, torch.tensor(golden), rtol=0, atol=1e-7)


@pytest.mark.parametrize("scale", [(1.0, 2.0, 2.0), (1.0, 3.16, 3.16)])
def test_kandinsky5_is_its_models_bitwise(scale) -> None:
    positions = [torch.arange(size) for size in (5, 4, 6)]
    expected = Kandinsky5RoPE3D((16, 24, 24))((1, 5, 4, 6), positions, scale).squeeze(4).reshape(120, 32, 2, 2)
    scaling = tuple(Scaling.of("kandinsky5", scale=factor) for factor in scale)
    table = rope_table(RopeSpec((16, 24, 24), scaling=scaling, frequency_dtype=torch.float32), Grid(5, 4, 6))
    cos, sin = table.cos_sin(repeat=False)
    assert torch.equal(cos, expected[..., 0, 0])
    assert torch.equal(sin, expected[..., 1, 0])


def test_riflex_finds_the_intrinsic_pair_of_upstreams_example() -> None:
    assert intrinsic_pair(16, 256.0, 48) == (4, 50)
    assert [intrinsic_pair(16, 256.0, period)[1] for period in (6, 13, 25, 50, 101, 201, 402, 804)] == [
        6, 13, 25, 50, 101, 201, 402, 804,
    ]  # fmt: skip


@pytest.mark.parametrize("options", [{"k": 4}, {"repetition": 48}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_riflex_slows_that_pair_alone_to_less_than_one_turn(options, dtype) -> None:
    actual = scaled_frequencies(Scaling.of("riflex", frames=66, **options), 16, 256.0, dtype).inverse
    trained = base_frequencies(16, 256.0, dtype)
    assert actual[3] == torch.tensor(0.9 * 2 * math.pi / 66, dtype=dtype)
    assert actual[3].item() == pytest.approx(0.0856797996, rel=1e-7)
    assert torch.equal(torch.cat((actual[:3], actual[4:])), torch.cat((trained[:3], trained[4:])))


def test_riflex_leaves_a_video_that_fits_its_period_as_trained() -> None:
    actual = scaled_frequencies(Scaling.of("riflex", frames=33, k=4), 16, 256.0, torch.float32).inverse
    assert torch.equal(actual, base_frequencies(16, 256.0, torch.float32))


@pytest.mark.parametrize("options", [{"k": 4}, {"k": 4.0}, {"repetition": 50}], ids=str)
@pytest.mark.parametrize("frames", [1, 45, 46, 48, 50, 51, 66])
def test_riflex_slows_only_videos_longer_than_the_pair_s_period(frames, options) -> None:
    """HunyuanVideo's pair 4 comes round in 50 frames; upstream asks ``L_test > N_k``."""
    cache_clear()  # 4.0 is equal to 4
    actual = scaled_frequencies(Scaling.of("riflex", frames=frames, **options), 16, 256.0, torch.float64).inverse
    trained = scaled_frequencies(None, 16, 256.0, torch.float64).inverse
    expected = trained.clone()
    if frames > 50:
        expected[3] = 0.9 * 2 * math.pi / frames
    assert torch.equal(actual, expected)


def test_numbers_of_numpy_are_options_like_others() -> None:
    actual = Scaling.of("longrope", factor=np.float32(2), seq_len=np.int64(9), short_factor=[np.float64(1)])
    assert actual == Scaling.of("longrope", factor=2.0, seq_len=9, short_factor=[1.0])
    assert {type(value) for name, value in actual.parameters if name != "short_factor"} == {float, int}


@pytest.mark.parametrize("kind", ["riflex", "fps"])
def test_scaling_of_frames_is_refused_on_another_axis(kind) -> None:
    options = {"frames": 66, "k": 1} if kind == "riflex" else {"fps": 16}
    scaling = Scaling.of(kind, **options)
    spec = RopeSpec((8, 6, 4), scaling=(scaling, None, None))
    assert axis_frequencies(spec, 0).numbers != axis_frequencies(spec.with_scaling(None), 0).numbers
    with pytest.raises(ValueError, match=rf"scaling must have {kind} on the frame axis alone, .* None, None\)"):
        rope_table(spec.with_scaling(scaling), Grid(2, 3, 4))


@pytest.mark.parametrize(("rescale", "interpolation"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.25), (2.0, 0.25)])
def test_fastvideo_scales_theta_and_positions(rescale, interpolation) -> None:
    spec = RopeSpec((8,), scaling=Scaling.of("fastvideo", theta_rescale=rescale, interpolation=interpolation))
    angles = axis_frequencies(spec, 0).angles(torch.arange(5.0, dtype=torch.float64))
    theta = 1e4 * rescale ** (8 / 6)
    expected = torch.outer(torch.arange(5.0).double() * interpolation, base_frequencies(8, theta, torch.float64))
    assert torch.equal(angles, expected)


def test_registered_scaling_is_called_once_per_distinct_axis() -> None:
    calls = []

    def halved(dim, theta, dtype, *, by):
        calls.append(dim)
        return AxisFrequencies(base_frequencies(dim, theta, dtype) / by)

    cache_clear()
    register_scaling("halved_for_a_test", halved)
    spec = RopeSpec((8, 4, 4), scaling=Scaling.of("halved_for_a_test", by=2.0))
    table = rope_table(spec, Grid(3, 5, 5))
    assert rope_table(spec, Grid(3, 5, 5)) is table
    assert torch.equal(table.rows, rope_table(spec.with_scaling(Scaling.of("linear", factor=2.0)), table.grid).rows)
    assert calls == [8, 4]
    assert "halved_for_a_test" in known_scalings()
    with pytest.raises(ValueError, match="name must not be that of a registered scaling, got 'halved_for_a_test'"):
        register_scaling("halved_for_a_test", halved)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (torch.ones(4), TypeError, "must return AxisFrequencies, got Tensor"),
        (AxisFrequencies(torch.ones(3)), ValueError, r"must return 4 frequencies on CPU, got \[3\] on cpu"),
        (AxisFrequencies(torch.ones(4, device="meta")), ValueError, r"got \[4\] on meta"),
    ],
)
def test_registered_scaling_that_returns_something_else_is_refused(returned, error, message) -> None:
    name = f"returns_{message[:30]}"
    register_scaling(name, lambda dim, theta, dtype: returned)
    with pytest.raises(error, match=message):
        scaled_frequencies(Scaling.of(name), 8, 1e4, torch.float32)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"inverse": [1.0]}, TypeError, "inverse must be a floating point tensor"),
        ({"inverse": torch.ones(2, dtype=torch.int64)}, TypeError, "inverse must be a floating point tensor"),
        ({"magnitude": 0.0}, ValueError, "magnitude must be positive and finite, got 0.0"),
        ({"position_scale": math.inf}, ValueError, "position_scale must be positive and finite, got inf"),
    ],
)
def test_axis_frequencies_refuses(fields, error, message) -> None:
    with pytest.raises(error, match=message):
        AxisFrequencies(**{"inverse": torch.ones(2)} | fields)


def test_unknown_scaling_is_refused_naming_those_that_import_registered() -> None:
    names = r"default, dynamic, fastvideo, fps, .*kandinsky5, linear, llama3, longrope, none, ntk, .*riflex, yarn"
    with pytest.raises(ValueError, match=f"scaling must be one of {names}, got 'su'"):
        rope_table(RopeSpec((8,), scaling=Scaling.of("su")), Grid(2))


def test_import_alone_registers_every_type(repository) -> None:
    program = "import json, dit_rope; print(json.dumps(dit_rope.known_scalings()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=repository, check=True)
    assert {
        "default", "none", "linear", "ntk", "dynamic", "yarn", "longrope", "llama3", "proportional", "riflex", "fps",
        "kandinsky5", "fastvideo",
    } == set(json.loads(done.stdout))  # fmt: skip


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (Scaling.of("default", factor=2.0), "default scaling must not have factor, got .*; it takes no options"),
        (Scaling.of("linear"), r"linear scaling must have factor, got \{\}"),
        (Scaling.of("linear", factor=2.0, base=3.0), "linear scaling must not have base, got .*; it takes factor"),
        (Scaling.of("linear", factor=0.0), "factor must be positive and finite, got 0.0"),
        (Scaling.of("ntk", factor=-1.0, exponent=1.0), "factor must be positive and finite, got -1.0"),
        (Scaling.of("yarn", original_max_position_embeddings=64), "yarn scaling must have factor, or max_position_emb"),
        (Scaling.of("yarn", **YARN, beta=2.0), "yarn scaling must not have beta, got .*; it takes .*beta_fast"),
        (
            Scaling.of("longrope", **LONGROPE, seq_len=1, scale=1),
            "longrope scaling must not have scale, got .*; it takes .*attention_factor",
        ),
        (Scaling.of("longrope", **LONGROPE | {"short_factor": [1.0]}, seq_len=1), r"per .* \(8\), got \(1.0,\)"),
        (Scaling.of("longrope", **LONGROPE | {"long_factor": 2.0}, seq_len=9000), r"long_factor must have .* got 2.0"),
        (Scaling.of("llama3", **LLAMA3 | {"high_freq_factor": 1.0}), r"must be above low_freq_factor \(1.0\), got 1.0"),
        (Scaling.of("proportional", partial_rotary_factor=1.5), "above 0 and at most 1, got 1.5"),
        (Scaling.of("riflex", frames=60), "riflex scaling must have k or repetition, and not both, got None and None"),
        (Scaling.of("riflex", frames=60, k=9), r"k must be an int from 1 to .* pairs of the axis \(8\), got 9"),
        (Scaling.of("riflex", frames=60, k=2.5), r"k must be an int from 1 to .* got 2.5"),
        (Scaling.of("fps", fps=0), "fps must be positive and finite, got 0"),
    ],
    ids=str,
)
def test_scaling_refuses_options(scaling, message) -> None:
    with pytest.raises(ValueError, match=message):
        scaled_frequencies(scaling, 16, 10_000.0, torch.float64)


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        ("linear", "factor"),
        ("ntk", "factor"),
        ("dynamic", "factor, max_position_embeddings, seq_len"),
        ("yarn", "original_max_position_embeddings"),
        ("longrope", "short_factor, long_factor, original_max_position_embeddings, seq_len"),
        ("llama3", "factor, low_freq_factor, high_freq_factor, original_max_position_embeddings"),
        ("riflex", "frames"),
        ("fps", "fps"),
    ],
)
def test_scaling_names_every_option_it_lacks(kind, missing) -> None:
    with pytest.raises(ValueError, match=f"{kind} scaling must have {missing}, got"):
        scaled_frequencies(Scaling.of(kind), 16, 10_000.0, torch.float64)
    with pytest.raises(ValueError, match=f"{kind} scaling must have {missing}, got"):
        scaling_from_config({"rope_type": kind})


@pytest.mark.parametrize("kind", ["ntk", "dynamic"])
def test_ntk_refuses_an_axis_of_two_channels(kind) -> None:
    options = {"factor": 2.0} if kind == "ntk" else DYNAMIC | {"seq_len": 1}
    with pytest.raises(ValueError, match=r"dim / \(dim - 2\) is undefined"):
        scaled_frequencies(Scaling.of(kind, **options), 2, 10_000.0, torch.float64)
