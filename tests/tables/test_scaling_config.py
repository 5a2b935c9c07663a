"""Scalings read from configurations, in every form that transformers and others write them."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from transformers import Gemma3TextConfig, LlamaConfig, Qwen2VLConfig

from dit_rope import Scaling, scaling_from_config

LINEAR = Scaling.of("linear", factor=4.0)
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"short_factor": [1.0, 2.0], "long_factor": [2.0, 3.0], "original_max_position_embeddings": 64}


@dataclass
class _LinearConfig:
    rope_type: str = "linear"
    factor: float = 4.0
    attention_factor: float | None = None


@dataclass(slots=True)
class _SlottedConfig:
    type: str = "linear"
    factor: float = 4.0


@dataclass
class _ModelConfig:
    head_dim: int = 64
    max_position_embeddings: int = 4096
    rope_scaling: dict[str, object] | None = field(default_factory=lambda: dict(DYNAMIC))


@pytest.mark.parametrize(
    "config",
    [
        {"type": "linear", "factor": 4.0},
        {"rope_type": "linear", "factor": 4},
        {"type": "yarn", "rope_type": "linear", "factor": 4.0},
        {"type": "linear", "factor": 4.0, "finetuned": True},
        {
            "rope_type": "linear",
            "factor": 4.0,
            "rope_theta": 5e5,
            "partial_rotary_factor": 0.5,
            "attention_factor": None,
        },
        {"hidden_size": 64, "rope_scaling": {"type": "linear", "factor": 4.0}},
        _LinearConfig(),
        _SlottedConfig(),
        SimpleNamespace(rope_scaling=_LinearConfig()),
        LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
        LlamaConfig(rope_scaling={"type": "linear", "factor": 4.0}),
    ],
    ids=lambda config: type(config).__name__,
)
def test_config_may_be_a_dictionary_a_dataclass_or_a_model(config) -> None:
    assert scaling_from_config(config) == LINEAR


@pytest.mark.parametrize(
    "config",
    [
        None,
        {"rope_scaling": None},
        {"rope_type": "default", "rope_theta": 1e6},
        {"type": "none"},
        {"type": "mrope", "mrope_section": [16, 24, 24]},
        {"type": "mrope", "mrope_section": [16, 24, 24], "rope_type": "default"},
        Qwen2VLConfig(rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]}).text_config,
        SimpleNamespace(rope_scaling=None),
        LlamaConfig(),
    ],
    ids=str,
)
def test_config_that_asks_for_nothing_gives_none(config) -> None:
    assert scaling_from_config(config) is None


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ("linear", TypeError, "config must be a rope_scaling dictionary, .*, got str"),
        ([{"type": "linear"}], TypeError, "config must be a rope_scaling dictionary, .*, got list"),
        (4.0, TypeError, "got float"),
        ({"rope_scaling": "linear"}, TypeError, "got str"),
        ({"type": 3}, TypeError, "the type in rope_scaling must be a string, got 3"),
        ({"type": "linear", "factor": "4"}, TypeError, "factor of linear scaling must be a number or numbers, got '4'"),
        ({"factor": 4.0}, ValueError, r"must contain 'rope_type' or 'type', got \{'factor': 4.0\}"),
        ({}, ValueError, r"must contain 'rope_type' or 'type', got \{\}"),
        ({"rope_type": None, "factor": 2.0}, ValueError, "must contain 'rope_type' or 'type'"),
        ({"type": "su", "factor": 2.0}, ValueError, "scaling must be one of default, .*, got 'su'"),
        ({"type": "linear", "factor": 2.0, "alpha": 1.0}, ValueError, "linear scaling must not have alpha"),
        ({"type": "yarn", "rope_type": "default", "factor": 2.0}, ValueError, "default scaling must not have factor"),
        # of Ministral 3 and Phi-3.5-MoE; both change results
        (YARN | {"llama_4_scaling_beta": 0.1}, ValueError, "yarn scaling must not have llama_4_scaling_beta"),
        ({"type": "longrope", **LONG, "seq_len": 1, "short_mscale": 1.2}, ValueError, "must not have short_mscale"),
    ],
)
def test_config_is_refused(config, error, message) -> None:
    with pytest.raises(error, match=message):
        scaling_from_config(config)


@pytest.mark.parametrize("extra", [{"mrope_section": [16, 24, 24]}, {"type": "mrope"}, {"type": "linear"}], ids=str)
def test_rope_type_is_read_before_type(extra) -> None:
    assert scaling_from_config(YARN | extra) == scaling_from_config(YARN)


def test_context_fills_in_what_the_type_takes_and_the_configuration_lacks() -> None:
    expected = Scaling.of("dynamic", factor=2.0, max_position_embeddings=4096, seq_len=9000)
    assert scaling_from_config(DYNAMIC, max_position_embeddings=4096, seq_len=9000) == expected
    assert scaling_from_config(_ModelConfig(), seq_len=9000, original_max_position_embeddings=None) == expected
    assert scaling_from_config({"type": "linear", "factor": 4.0}, seq_len=9000) == LINEAR
    parameters = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    assert dict(scaling_from_config(parameters, original_max_position_embeddings=32).parameters) == {
        "factor": 2.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    longrope = scaling_from_config({"rope_type": "longrope", **LONG}, seq_len=65, max_position_embeddings=128)
    assert longrope == Scaling.of("longrope", **LONG, seq_len=65, max_position_embeddings=128)


@pytest.mark.parametrize("config", [DYNAMIC, _ModelConfig()], ids=["dictionary", "model"])
def test_length_is_never_assumed(config) -> None:
    with pytest.raises(ValueError, match="dynamic scaling must have .*seq_len, got"):
        scaling_from_config(config)


def test_share_of_channels_is_an_option_of_proportional_alone() -> None:
    parameters = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}
    assert scaling_from_config(parameters) == Scaling.of("proportional", partial_rotary_factor=0.25)


def test_layer_types_have_scalings_of_their_own() -> None:
    config = Gemma3TextConfig(
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
        }
    )
    assert scaling_from_config(config, layer_type="full_attention") == LINEAR
    assert scaling_from_config(config, layer_type="sliding_attention") is None
    assert scaling_from_config({"a": None, "b": {"type": "none"}}, layer_type="a") is None
    with pytest.raises(ValueError, match="layer_type must be one of sliding_attention, full_attention, got None"):
        scaling_from_config(config)
