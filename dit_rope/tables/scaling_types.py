"""The types of frequency scaling that come with the package: one function for each type.

A function takes the channels of one axis, theta, the dtype of frequencies and the options of the type. It returns the
:class:`AxisFrequencies` of the axis. Formulas and names of options are those of the source of each type. For language
models this is transformers' ``modeling_rope_utils.py`` (5.23), so a model's ``rope_parameters`` work unchanged. Two
types depend on the sequence length at run time there; here it is the option ``seq_len``.

Example:
    >>> import torch
    >>> linear(4, 10_000.0, torch.float64, factor=4.0).inverse.tolist()
    [0.25, 0.0025]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..scalars import positive

ROUNDED_POSITIONS = 4096
"""Scaled positions below it are rounded to float32, as in the code of models. Tables of models end before it."""


@dataclass(frozen=True, eq=False)
class AxisFrequencies:
    """The frequencies of one axis, and the factors of its positions, angles, cos and sin.

    Attributes:
        inverse: radians per position of each pair, ``[dim / 2]`` on CPU, in the dtype of frequencies.
        magnitude: factor of cos and sin.
        position_divisor, position_scale: positions are divided by the first, then multiplied by the second.
        angle_divisor: angles are divided by it.

    In exact arithmetic one factor of the angles would be enough. There are three because each model's code rounds at
    a different place.

    Raises:
        TypeError, ValueError: naming the field, the rule and the value.

    Example:
        >>> import torch
        >>> from dit_rope import AxisFrequencies
        >>> AxisFrequencies(torch.tensor([1.0, 0.5]), position_divisor=2.0).angles(torch.tensor([4.0])).tolist()
        [[2.0, 1.0]]
    """

    inverse: torch.Tensor
    magnitude: float = 1.0
    position_divisor: float = 1.0
    position_scale: float = 1.0
    angle_divisor: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.inverse, torch.Tensor) or not self.inverse.is_floating_point():
            raise TypeError(f"inverse must be a floating point tensor, got {self.inverse!r}")
        for name in ("magnitude", "position_divisor", "position_scale", "angle_divisor"):
            positive(name, getattr(self, name))

    @property
    def numbers(self) -> tuple[object, ...]:
        """All fields as one hashable value, so that equal frequencies of different types are equal."""
        divisors = self.position_divisor, self.position_scale, self.angle_divisor
        return self.inverse.dtype, tuple(self.inverse.tolist()), self.magnitude, *divisors

    def angles(self, positions: torch.Tensor) -> torch.Tensor:
        """Radians ``[n, dim / 2]`` of ``positions`` ``[n]``, in the wider dtype of positions and frequencies.

        Scaled float32 positions are rounded to float32 again, as in the code of FastVideo and Cosmos. The relative
        error is up to 2^-23. From :data:`ROUNDED_POSITIONS` on, where the error is 5e-4, positions are scaled in
        float64 if frequencies are float64.

        Example:
            >>> import torch
            >>> AxisFrequencies(torch.tensor([1.0, 0.5])).angles(torch.tensor([0.0, 2.0])).tolist()
            [[0.0, 0.0], [2.0, 1.0]]
        """
        angles = torch.outer(self._scaled(positions), self.inverse)
        return angles if self.angle_divisor == 1.0 else angles / self.angle_divisor

    def _scaled(self, positions: torch.Tensor) -> torch.Tensor:
        if self.position_divisor == self.position_scale == 1.0:
            return positions
        scaled = positions / self.position_divisor if self.position_divisor != 1.0 else positions
        scaled = scaled * self.position_scale
        if positions.dtype != torch.float32 or self.inverse.dtype != torch.float64:
            return scaled
        exact = positions.double() / self.position_divisor * self.position_scale
        return torch.where(positions < ROUNDED_POSITIONS, scaled.double(), exact)


ScalingFunction = Callable[..., AxisFrequencies]
"""``(dim, theta, dtype, *, options...) -> AxisFrequencies``"""


@dataclass(frozen=True)
class ScalingType:
    """A registered type: its function, and whether only the frame axis may have it."""

    function: ScalingFunction
    frame_axis_only: bool = False


TYPES: dict[str, ScalingType] = {}


def _scaling_type(*names: str, frame_axis_only: bool = False) -> Callable[[ScalingFunction], ScalingFunction]:
    """Registers a function under ``names``, or under its own."""

    def register(function: ScalingFunction) -> ScalingFunction:
        TYPES.update(dict.fromkeys(names or (function.__name__,), ScalingType(function, frame_axis_only)))
        return function

    return register


def base_frequencies(dim: int, theta: float, dtype: torch.dtype) -> torch.Tensor:
    """``theta ** (-2 j / dim)`` for pairs j: ``[dim / 2]`` in ``dtype``, on CPU (RoFormer, arXiv:2104.09864).

    Rounded step by step in ``dtype``, as FastVideo and diffusers round it.
    """
    exponents = torch.arange(0, dim, 2, device="cpu").to(dtype) / dim
    return 1.0 / (theta**exponents)


def ntk_theta(dim: int, theta: float, factor: float) -> float:
    """``theta * factor ** (dim / (dim - 2))``: the slowest pair gets slower by ``factor``, the fastest stays as it is.

    Raises:
        ValueError: an axis of 2 channels, for which the exponent is not defined.
    """
    if dim == 2:
        raise ValueError("NTK scaling must have more than 2 channels per axis, got 2; dim / (dim - 2) is undefined")
    try:
        scaled = float(theta * factor ** (dim / (dim - 2)))
    except OverflowError:
        scaled = math.inf
    if not scaled < math.inf:
        raise ValueError(f"theta must stay finite, got {theta} times {factor} ** ({dim} / {dim - 2})")
    return scaled


@_scaling_type("default", "none")
def default(dim: int, theta: float, dtype: torch.dtype) -> AxisFrequencies:
    """Frequencies as trained."""
    return AxisFrequencies(base_frequencies(dim, theta, dtype))


@_scaling_type()
def linear(dim: int, theta: float, dtype: torch.dtype, *, factor: float) -> AxisFrequencies:
    """Every frequency divided by ``factor`` (position interpolation, arXiv:2306.15595)."""
    return AxisFrequencies(base_frequencies(dim, theta, dtype) / positive("factor", factor))


@_scaling_type()
def ntk(dim: int, theta: float, dtype: torch.dtype, *, factor: float, exponent: float | None = None) -> AxisFrequencies:
    """NTK-aware: theta times ``factor ** exponent``, which is ``dim / (dim - 2)`` unless given.

    Per axis this is HunyuanVideo's ``theta_rescale_factor`` and Cosmos' ``rope_scale`` (diffusers 0.42.1
    ``transformer_cosmos.py``). Lumina-Next has exponent 1: ``theta * ntk_factor`` in ``get_1d_rotary_pos_embed`` of
    diffusers' ``embeddings.py``; its other branch, ``linear_factor``, is the type ``linear``.
    """
    positive("factor", factor)
    scaled = ntk_theta(dim, theta, factor) if exponent is None else theta * factor**exponent
    return AxisFrequencies(base_frequencies(dim, scaled, dtype))


@_scaling_type()
def fastvideo(
    dim: int, theta: float, dtype: torch.dtype, *, theta_rescale: float = 1.0, interpolation: float = 1.0
) -> AxisFrequencies:
    """Theta scaled as by ``ntk`` with ``theta_rescale``, and positions multiplied by ``interpolation``.

    ``theta_rescale_factor`` and ``interpolation_factor`` of FastVideo's ``get_1d_rotary_pos_embed``
    (fastvideo/layers/rotary_embedding.py at 2f3d4074), which takes one of each per axis.
    """
    theta = theta if positive("theta_rescale", theta_rescale) == 1.0 else ntk_theta(dim, theta, theta_rescale)
    scale = float(positive("interpolation", interpolation))
    return AxisFrequencies(base_frequencies(dim, theta, dtype), position_scale=scale)


@_scaling_type()
def dynamic(
    dim: int, theta: float, dtype: torch.dtype, *, factor: float, max_position_embeddings: float, seq_len: float
) -> AxisFrequencies:
    """NTK-aware: theta grows with ``seq_len / max_position_embeddings`` where this is above 1."""
    ratio = max(1.0, positive("seq_len", seq_len) / positive("max_position_embeddings", max_position_embeddings))
    growth = positive("factor", factor) * ratio - (factor - 1.0)
    return AxisFrequencies(base_frequencies(dim, ntk_theta(dim, theta, growth), dtype))


@_scaling_type()
def yarn(
    dim: int,
    theta: float,
    dtype: torch.dtype,
    *,
    original_max_position_embeddings: float,
    factor: float | None = None,
    max_position_embeddings: float | None = None,
    attention_factor: float | None = None,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    mscale: float = 0.0,
    mscale_all_dim: float = 0.0,
    truncate: bool = True,
) -> AxisFrequencies:
    """YaRN (arXiv:2309.00071): slow pairs are interpolated, fast pairs kept, with a ramp between; cos and sin grow.

    ``factor`` is ``max_position_embeddings / original_max_position_embeddings`` by default. ``beta_fast`` and
    ``beta_slow``, in rotations over the original length, bound the ramp; the bounds are rounded to whole pairs unless
    ``truncate`` is False. ``mscale`` and ``mscale_all_dim``, both or neither, replace the factor of cos and sin.
    """
    length = positive("original_max_position_embeddings", original_max_position_embeddings)
    factor = _growth("yarn", factor, max_position_embeddings, length)

    def pair_with(rotations: float) -> float:
        """The pair, as a fraction, that makes ``rotations`` rotations over the original length."""
        return dim * math.log(length / (positive("beta", rotations) * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with(beta_fast), pair_with(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = (high - low) or 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float64, device="cpu") - low) / width).clamp(0, 1).to(dtype)
    frequencies = base_frequencies(dim, theta, dtype)

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    if attention_factor is None:
        both = mscale and mscale_all_dim
        attention_factor = magnitude(mscale) / magnitude(mscale_all_dim) if both else magnitude(1.0)
    return AxisFrequencies(frequencies * (1 - ramp) + frequencies / factor * ramp, attention_factor)


@_scaling_type()
def longrope(
    dim: int,
    theta: float,
    dtype: torch.dtype,
    *,
    short_factor: Sequence[float],
    long_factor: Sequence[float],
    original_max_position_embeddings: float,
    seq_len: float,
    max_position_embeddings: float | None = None,
    attention_factor: float | None = None,
    factor: float | None = None,
) -> AxisFrequencies:
    """LongRoPE (arXiv:2402.13753): one divisor per pair: ``short_factor``, or ``long_factor`` for longer sequences.

    ``attention_factor`` is the factor of cos and sin. By default it follows from ``factor``, which is
    ``max_position_embeddings / original_max_position_embeddings`` by default.
    """
    length = positive("original_max_position_embeddings", original_max_position_embeddings)
    name, divisors = ("long_factor", long_factor) if seq_len > length else ("short_factor", short_factor)
    if not isinstance(divisors, Sequence) or len(divisors) != dim // 2:
        raise ValueError(f"{name} must have one value per channel pair of an axis ({dim // 2}), got {divisors!r}")
    if attention_factor is None:
        growth = _growth("longrope", factor, max_position_embeddings, length)
        attention_factor = math.sqrt(1.0 + math.log(growth) / math.log(length)) if growth > 1.0 else 1.0
    slowed = base_frequencies(dim, theta, dtype) / torch.tensor(divisors, dtype=dtype, device="cpu")
    return AxisFrequencies(slowed, attention_factor)


@_scaling_type()
def llama3(
    dim: int,
    theta: float,
    dtype: torch.dtype,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> AxisFrequencies:
    """Llama 3.1: waves longer than ``length / low_freq_factor`` are interpolated, short waves kept, with a blend."""
    if high_freq_factor <= low_freq_factor:
        raise ValueError(f"high_freq_factor must be above low_freq_factor ({low_freq_factor}), got {high_freq_factor}")
    frequencies = base_frequencies(dim, theta, dtype)
    length = positive("original_max_position_embeddings", original_max_position_embeddings)
    rotations = length * frequencies / (2 * math.pi)
    trained = ((rotations - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return AxisFrequencies(frequencies * trained + frequencies / positive("factor", factor) * (1 - trained))


@_scaling_type()
def proportional(
    dim: int, theta: float, dtype: torch.dtype, *, partial_rotary_factor: float = 1.0, factor: float = 1.0
) -> AxisFrequencies:
    """The first ``partial_rotary_factor`` of the pairs rotate as on the whole axis; the others do not rotate."""
    if not 0.0 < partial_rotary_factor <= 1.0:
        raise ValueError(f"partial_rotary_factor must be above 0 and at most 1, got {partial_rotary_factor}")
    frequencies = base_frequencies(dim, theta, dtype) / positive("factor", factor)
    frequencies[int(partial_rotary_factor * dim // 2) :] = 0.0
    return AxisFrequencies(frequencies)


@_scaling_type(frame_axis_only=True)
def riflex(
    dim: int,
    theta: float,
    dtype: torch.dtype,
    *,
    frames: float,
    k: int | None = None,
    repetition: float | None = None,
    margin: float = 0.9,
) -> AxisFrequencies:
    """RIFLEx (arXiv:2502.15894): slows the pair whose period makes long videos repeat to less than one rotation.

    ``frames`` is the length to generate, in latent frames (``L_test`` upstream). The pair is number ``k``, counted from
    1, or the pair whose period is nearest to ``repetition``, the latent frame at which videos of this model begin to
    repeat. Its frequency becomes ``margin * 2 pi / frames`` if that is slower. A video of no more frames than the
    pair's period, rounded to whole frames, keeps the trained frequencies, as with ``L_test > N_k`` upstream.
    Source: ``riflex_utils.py`` and ``hunyuanvideo.py`` of thu-ml/DiT-Extrapolation (d54e1e2).
    """
    if (k is None) == (repetition is None):
        raise ValueError(f"riflex scaling must have k or repetition, and not both, got {k} and {repetition}")
    if k is None:
        k, _ = intrinsic_pair(dim, theta, positive("repetition", repetition))
    if k not in range(1, dim // 2 + 1):  # 4.0 is accepted, because as a cache key it equals 4
        raise ValueError(f"k must be an int from 1 to the number of pairs of the axis ({dim // 2}), got {k}")
    frequencies = base_frequencies(dim, theta, dtype)
    slowed = positive("margin", margin) * 2 * math.pi / positive("frames", frames)
    pair = int(k) - 1
    if frames > _period(dim, theta, pair):
        frequencies[pair : pair + 1].clamp_(max=slowed)
    return AxisFrequencies(frequencies)


def intrinsic_pair(dim: int, theta: float, repetition: float) -> tuple[int, int]:
    """Number, from 1, and period of the pair whose period in positions is nearest to ``repetition``.

    ``identify_k`` of RIFLEx: periods are rounded to whole positions, and the first of equal distances is taken.
    """
    periods = [_period(dim, theta, pair) for pair in range(dim // 2)]
    nearest = min(range(len(periods)), key=lambda pair: abs(periods[pair] - repetition))
    return nearest + 1, periods[nearest]


def _period(dim: int, theta: float, pair: int) -> int:
    """The period of pair number ``pair``, from 0, rounded to whole positions."""
    frequency: float = 1.0 / theta ** (2 * pair / dim)
    return round(2 * math.pi / frequency)


@_scaling_type(frame_axis_only=True)
def fps(
    dim: int, theta: float, dtype: torch.dtype, *, fps: float, base_fps: float = 24.0, factor: float = 1.0
) -> AxisFrequencies:
    """Frames by time: positions ``i / fps * base_fps``, and theta scaled as by ``ntk`` with ``factor``.

    The frame axis of Cosmos (diffusers 0.42.1 ``transformer_cosmos.py``), whose height and width have ``ntk``.
    """
    theta = theta if positive("factor", factor) == 1.0 else ntk_theta(dim, theta, factor)
    frequencies = base_frequencies(dim, theta, dtype)
    return AxisFrequencies(
        frequencies, position_divisor=positive("fps", fps), position_scale=positive("base_fps", base_fps)
    )


@_scaling_type()
def kandinsky5(dim: int, theta: float, dtype: torch.dtype, *, scale: float = 1.0) -> AxisFrequencies:
    """Angles divided by ``scale``, frequencies as ``exp(-ln(theta) j / (dim / 2))``.

    Rounded as in Kandinsky 5 (diffusers 0.42.1 ``transformer_kandinsky.py``), whose ``scale_factor`` is one per axis.
    """
    pairs = dim // 2
    frequencies = torch.exp(-math.log(theta) * torch.arange(pairs, device="cpu").to(dtype) / pairs)
    return AxisFrequencies(frequencies, angle_divisor=positive("scale", scale))


def _growth(kind: str, factor: float | None, longest: float | None, original: float) -> float:
    """``factor`` by which sequences grow; ``longest / original`` if it is None."""
    if factor is None and longest is None:
        raise ValueError(f"{kind} scaling must have factor, or max_position_embeddings in its place, got neither")
    if factor is None:
        return positive("max_position_embeddings", longest) / original
    return positive("factor", factor)
