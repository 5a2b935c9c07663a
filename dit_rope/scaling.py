"""Frequency scaling: how a named scaling changes the frequencies of one axis, one function per name.

The formulas and parameter names are those of transformers' ``modeling_rope_utils.py`` (5.23), so that a model's
``rope_scaling`` values can be passed on as they are. ``seq_len`` stands for the length that the two types which
depend on it see there at run time.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence

import torch

from .spec import Scaling

# (dim, theta, dtype, **parameters) -> (inverse frequencies [dim / 2] on CPU, factor of cos and sin)
ScalingFunction = Callable[..., tuple[torch.Tensor, float]]


def base_frequencies(dim: int, theta: float, dtype: torch.dtype) -> torch.Tensor:
    """``theta ** (-2 j / dim)`` for pairs j: ``[dim / 2]`` in ``dtype``, on CPU (RoFormer, arXiv:2104.09864).

    Rounded step by step in ``dtype``, as FastVideo and diffusers round it.
    """
    exponents = torch.arange(0, dim, 2, device="cpu").to(dtype) / dim
    return 1.0 / (theta**exponents)


def linear(dim: int, theta: float, dtype: torch.dtype, *, factor: float) -> tuple[torch.Tensor, float]:
    """Every frequency divided by ``factor`` (position interpolation, arXiv:2306.15595)."""
    return base_frequencies(dim, theta, dtype) / _positive("factor", factor), 1.0


def dynamic(
    dim: int, theta: float, dtype: torch.dtype, *, factor: float, max_position_embeddings: float, seq_len: float
) -> tuple[torch.Tensor, float]:
    """NTK-aware: theta grows with ``seq_len / max_position_embeddings``, not at all up to a ratio of 1."""
    if dim == 2:
        raise ValueError("dynamic scaling must have more than 2 channels per axis, got 2; dim / (dim - 2) is undefined")
    ratio = max(1.0, _positive("seq_len", seq_len) / _positive("max_position_embeddings", max_position_embeddings))
    growth = _positive("factor", factor) * ratio - (factor - 1.0)
    return base_frequencies(dim, theta * growth ** (dim / (dim - 2)), dtype), 1.0


def yarn(
    dim: int,
    theta: float,
    dtype: torch.dtype,
    *,
    factor: float,
    original_max_position_embeddings: float,
    attention_factor: float | None = None,
    truncate: bool = True,
    **settings: float,
) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv:2309.00071): slow pairs interpolated, fast ones kept, a ramp between, cos and sin scaled up.

    ``settings``: ``beta_fast`` (32) and ``beta_slow`` (1), in turns over the original length, bound the ramp;
    ``mscale`` and ``mscale_all_dim``, both or neither, replace the scale of cos and sin by their ratio.
    """
    known = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0}
    if unknown := settings.keys() - known.keys():
        raise ValueError(f"yarn scaling must not have parameters {sorted(unknown)}; it knows {sorted(known)}")
    values = known | settings
    _positive("factor", factor)

    def pair_that_turns(turns: float) -> float:
        length = _positive("original_max_position_embeddings", original_max_position_embeddings)
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(values["beta_fast"]), pair_that_turns(values["beta_slow"])
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = (high - low) or 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float64, device="cpu") - low) / width).clamp(0, 1).to(dtype)
    frequencies = base_frequencies(dim, theta, dtype)

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    if attention_factor is None:
        scales = values["mscale"], values["mscale_all_dim"]
        attention_factor = magnitude(scales[0]) / magnitude(scales[1]) if all(scales) else magnitude(1.0)
    return frequencies * (1 - ramp) + frequencies / factor * ramp, attention_factor


def longrope(
    dim: int,
    theta: float,
    dtype: torch.dtype,
    *,
    short_factor: Sequence[float],
    long_factor: Sequence[float],
    factor: float,
    original_max_position_embeddings: float,
    seq_len: float,
) -> tuple[torch.Tensor, float]:
    """LongRoPE (arXiv:2402.13753): a divisor per pair, from one list up to the original length, another past it."""
    length = _positive("original_max_position_embeddings", original_max_position_embeddings)
    name, divisors = ("long_factor", long_factor) if seq_len > length else ("short_factor", short_factor)
    if len(divisors) != dim // 2:
        raise ValueError(f"{name} must have one value per channel pair of an axis ({dim // 2}), got {len(divisors)}")
    magnitude = math.sqrt(1.0 + math.log(_positive("factor", factor)) / math.log(length)) if factor > 1.0 else 1.0
    return base_frequencies(dim, theta, dtype) / torch.tensor(divisors, dtype=dtype, device="cpu"), magnitude


def llama3(
    dim: int,
    theta: float,
    dtype: torch.dtype,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> tuple[torch.Tensor, float]:
    """Llama 3.1: waves longer than ``length / low_freq_factor`` are interpolated, short ones kept, a blend between."""
    if high_freq_factor <= low_freq_factor:
        raise ValueError(f"high_freq_factor must be above low_freq_factor ({low_freq_factor}), got {high_freq_factor}")
    frequencies = base_frequencies(dim, theta, dtype)
    length = _positive("original_max_position_embeddings", original_max_position_embeddings)
    turns = length * frequencies / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequencies * kept + frequencies / _positive("factor", factor) * (1 - kept), 1.0


def proportional(
    dim: int, theta: float, dtype: torch.dtype, *, partial_rotary_factor: float = 1.0, factor: float = 1.0
) -> tuple[torch.Tensor, float]:
    """The first ``partial_rotary_factor`` of the pairs turn as on the whole axis, the others do not turn."""
    if not 0.0 < partial_rotary_factor <= 1.0:
        raise ValueError(f"partial_rotary_factor must be above 0 and at most 1, got {partial_rotary_factor}")
    frequencies = base_frequencies(dim, theta, dtype) / _positive("factor", factor)
    frequencies[int(partial_rotary_factor * dim // 2) :] = 0.0
    return frequencies, 1.0


_REGISTRY: dict[str, ScalingFunction] = {
    function.__name__: function for function in (linear, dynamic, yarn, longrope, llama3, proportional)
}


def register_scaling(name: str, function: ScalingFunction) -> None:
    """Makes ``Scaling.of(name, ...)`` call ``function(dim, theta, dtype, **parameters)``.

    It returns the axis' inverse frequencies, ``[dim / 2]`` on CPU, and the factor of cos and sin. It must depend on
    nothing else: tables are cached under the name and the parameters.

    Raises:
        ValueError: for a name that is taken; cached tables would keep the old meaning.
    """
    if name in _REGISTRY:
        raise ValueError(f"name must not be that of a registered scaling, got {name!r}")
    _REGISTRY[name] = function


def inverse_frequencies(
    scaling: Scaling | None, dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, float]:
    """Frequencies ``[dim / 2]`` of one axis on CPU, and the factor its cos and sin are multiplied by.

    Raises:
        ValueError: for an unknown scaling, naming the known ones, or parameters that it does not take.
    """
    if scaling is None:
        return base_frequencies(dim, theta, dtype), 1.0
    function = _REGISTRY.get(scaling.kind)
    if function is None:
        raise ValueError(f"scaling must be one of {', '.join(sorted(_REGISTRY))}, got {scaling.kind!r}")
    parameters = dict(scaling.parameters)
    try:
        inspect.signature(function).bind(dim, theta, dtype, **parameters)
    except TypeError as error:
        raise ValueError(f"{scaling.kind} scaling must have its own parameters, got {parameters}: {error}") from None
    frequencies, magnitude = function(dim, theta, dtype, **parameters)
    if frequencies.shape != (dim // 2,):
        raise ValueError(f"{scaling.kind} scaling must return {dim // 2} frequencies, got {list(frequencies.shape)}")
    return frequencies, magnitude


def _positive(name: str, value: float) -> float:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return value
