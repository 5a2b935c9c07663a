"""What a rotation is: channels, frequencies, token grid and shard, as immutable values that check themselves."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .scalars import as_number, integer, positive

MAX_AXES = 4
FREQUENCY_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Pairing(enum.Enum):
    """Which two channels of a head turn together.

    ``INTERLEAVED`` turns channels (0, 1), (2, 3), ... (GPT-J, Wan, Flux); ``HALF`` turns channels
    (i, i + rotary_dim / 2) (GPT-NeoX, Llama, Cosmos).
    """

    INTERLEAVED = "interleaved"
    HALF = "half"

    # Enum's own hash is a Python function, which would run in every lookup of a cache; members are singletons.
    __hash__ = object.__hash__


class NormKind(enum.Enum):
    """Which norm of queries or keys comes before the rotation, and what it averages over.

    ``PER_HEAD`` is an RMSNorm over the D channels of each head (HunyuanVideo, Flux, Mochi), ``ACROSS_HEADS`` one over
    all H * D channels of a token (Wan, LTX). ``LAYER_PER_HEAD`` (CogVideoX) and ``LAYER_ACROSS_HEADS`` are LayerNorms
    (Ba, Kiros and Hinton, arXiv:1607.06450) over the same channels: they subtract the mean, divide by the root of the
    biased variance plus eps, and may add a bias after the weight.
    """

    PER_HEAD = "per_head"
    ACROSS_HEADS = "across_heads"
    LAYER_PER_HEAD = "layer_per_head"
    LAYER_ACROSS_HEADS = "layer_across_heads"

    __hash__ = object.__hash__

    @property
    def across_heads(self) -> bool:
        """Whether all heads of a token are normed together, by weights ``[H * D]``; else each by weights ``[D]``."""
        return self in (NormKind.ACROSS_HEADS, NormKind.LAYER_ACROSS_HEADS)

    @property
    def centred(self) -> bool:
        """Whether this is a LayerNorm, which subtracts the mean and alone may have a bias."""
        return self in (NormKind.LAYER_PER_HEAD, NormKind.LAYER_ACROSS_HEADS)


class Fusion(enum.Enum):
    """What :func:`dit_rope.patch` takes over of a model's queries and keys; tables are memoized in any case.

    ``NORM_AND_ROTATION`` does both in one pass, in fast mode and where the kernels know the norm; else, and where there
    is no norm, it is ``ROTATION``, which leaves the norm to the model. ``NOTHING`` leaves it both: what is gained then
    is gained by the tables alone.
    """

    NOTHING = "nothing"
    ROTATION = "rotation"
    NORM_AND_ROTATION = "norm_and_rotation"

    __hash__ = object.__hash__


ScalingValue = float | int | bool | tuple[float, ...] | None


@dataclass(frozen=True)
class Scaling:
    """A frequency scaling of one axis, by the name of its type and its options: make one with :meth:`of`.

    The types are those of :func:`~dit_rope.known_scalings`; :mod:`dit_rope.tables.scaling_types` has formulas and
    options. Whether a type is known and takes the options is checked when a table is made.

    ``parameters`` is a sorted tuple of (name, value) pairs, so that equal scalings are equal and hashable.

    Raises:
        TypeError: for a type that is no string, or an option that is neither a number nor numbers.
    """

    kind: str
    parameters: tuple[tuple[str, ScalingValue], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str):
            raise TypeError(f"kind must be the name of a scaling type, got {self.kind!r}")
        if not isinstance(self.parameters, tuple) or not all(
            isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str) for entry in self.parameters
        ):
            raise TypeError(f"parameters must be a tuple of (name, value) pairs, got {self.parameters!r}")
        for name, value in self.parameters:
            values = value if isinstance(value, tuple) else (value,)
            if value is not None and not all(isinstance(number, (int, float)) for number in values):
                raise TypeError(f"{name} of {self.kind} scaling must be a number or numbers, got {value!r}")

    @classmethod
    def of(cls, kind: str, **parameters: ScalingValue | Sequence[float]) -> Scaling:
        """Makes a scaling from keyword parameters: ``Scaling.of("linear", factor=4.0)``."""
        frozen = {
            name: tuple(map(_plain, value))
            if isinstance(value, Sequence) and not isinstance(value, str)
            else _plain(value)
            for name, value in parameters.items()
        }
        return cls(kind, tuple(sorted(frozen.items())))

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(f'{name}={value}' for name, value in self.parameters)})"


def _plain(value: Any) -> Any:
    """A number of numpy as an int or a float; everything else as it is."""
    number = as_number(value)
    return value if number is None else number


Scalings = Scaling | Sequence[Scaling | None] | None


def _scalings(given: Scalings, axes: int) -> Scaling | tuple[Scaling | None, ...] | None:
    """One spelling for equal choices: what all axes share on its own, else a tuple of one Scaling or None per axis."""
    if given is None or isinstance(given, Scaling):
        return given
    if not isinstance(given, (tuple, list)) or not all(one is None or isinstance(one, Scaling) for one in given):
        raise TypeError(f"scaling must be a Scaling, None, or a tuple of them, one per axis, got {given!r}")
    if len(given) != axes:
        raise ValueError(f"scaling must be one for all axes or have one per axis ({axes}), got {len(given)}")
    return given[0] if all(one == given[0] for one in given) else tuple(given)


def _per_axis(name: str, value: float | Sequence[float], axes: int) -> tuple[float, ...]:
    """One positive finite float per axis; a number, or a sequence of one, serves every axis."""
    values = list(value) if isinstance(value, Sequence) else [value]
    if any(as_number(v) is None for v in values):
        raise TypeError(f"{name} must be a number or numbers, got {value!r}")
    if len(values) == 1:
        values = values * axes
    if len(values) != axes:
        raise ValueError(f"{name} must be a number or have one value per axis ({axes}), got {value!r}")
    return tuple(float(positive(name, v)) for v in values)


@dataclass(frozen=True)
class RopeSpec:
    """Everything about a rotation that does not depend on the size of the video.

    Args:
        dims: rotary channels of each axis (frame, height, width), each even; 1 to 4 axes. Their sum is
            ``rotary_dim``, at most the head dim D; channels past it do not turn.
        theta: base of the frequencies, ``theta ** (-2 j / dim)`` for pair j (RoFormer, arXiv:2104.09864).
        pairing: which channels turn together.
        theta_rescale: per axis, or one for all: theta is multiplied by ``theta_rescale ** (dim / (dim - 2))``
            (NTK-aware scaling, as FastVideo's and HunyuanVideo's builders have it).
        interpolation: per axis, or one for all: positions are multiplied by it (position interpolation,
            arXiv:2306.15595).
        scaling: a frequency scaling for all axes, or a tuple of one Scaling or None per axis. A tuple of equals is kept
            as that one; :meth:`axis_scaling` reads either form.
        frequency_dtype: dtype in which frequencies are formed. Angles take the wider of it and float32, the
            dtype of positions. float64 for Wan, float32 for HunyuanVideo.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
    """

    dims: tuple[int, ...]
    theta: float = 10_000.0
    pairing: Pairing = Pairing.INTERLEAVED
    theta_rescale: tuple[float, ...] = field(default=(1.0,))
    interpolation: tuple[float, ...] = field(default=(1.0,))
    scaling: Scaling | tuple[Scaling | None, ...] | None = None
    frequency_dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        if not isinstance(self.dims, Sequence):
            raise TypeError(f"dims must be a tuple of ints, one per axis, got {self.dims!r}")
        dims = tuple(integer("dims", dim, 2) for dim in self.dims)
        if not 1 <= len(dims) <= MAX_AXES:
            raise ValueError(f"dims must have 1 to {MAX_AXES} axes, got {len(dims)}: {dims}")
        if any(dim % 2 for dim in dims):
            raise ValueError(f"dims must be even, got {dims}; two channels turn together")
        if not isinstance(self.pairing, Pairing):
            raise TypeError(f"pairing must be a Pairing, got {self.pairing!r}")
        if not (isinstance(self.frequency_dtype, torch.dtype) and self.frequency_dtype in FREQUENCY_DTYPES):
            raise TypeError(
                "frequency_dtype must be a floating point torch.dtype of 16, 32 or 64 bits, "
                f"got {self.frequency_dtype!r}"
            )
        rescale = _per_axis("theta_rescale", self.theta_rescale, len(dims))
        if any(factor != 1.0 and dim == 2 for factor, dim in zip(rescale, dims, strict=True)):
            raise ValueError(
                f"theta_rescale must be 1 on an axis of 2 channels, got {rescale} for dims {dims}; "
                "the exponent dim / (dim - 2) does not exist there"
            )
        object.__setattr__(self, "dims", dims)
        if isinstance(self.theta, Sequence) and len(self.theta) != 1:
            raise TypeError(f"theta must be one number for all axes, got {self.theta!r}; scale axes by theta_rescale")
        object.__setattr__(self, "theta", _per_axis("theta", self.theta, 1)[0])
        object.__setattr__(self, "theta_rescale", rescale)
        object.__setattr__(self, "interpolation", _per_axis("interpolation", self.interpolation, len(dims)))
        object.__setattr__(self, "scaling", _scalings(self.scaling, len(dims)))

    def axis_scaling(self, axis: int) -> Scaling | None:
        """The scaling of one axis."""
        return self.scaling[axis] if isinstance(self.scaling, tuple) else self.scaling

    def with_scaling(self, scaling: Scalings) -> RopeSpec:
        """The same rotation with another scaling, or with none."""
        return replace(self, scaling=_scalings(scaling, len(self.dims)))

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that turn."""
        return sum(self.dims)

    @property
    def pairs(self) -> tuple[int, ...]:
        """Channel pairs of each axis."""
        return tuple(dim // 2 for dim in self.dims)


@dataclass(frozen=True, init=False)
class Grid:
    """A token grid after patching, first axis slowest: ``Grid(T, H, W, start_frame=0)``, 1 to 4 axes.

    ``start_frame`` is the position of the first row of axis 0, for autoregressive video that continues.

    Raises:
        TypeError, ValueError: for sizes that are not positive ints, or a negative start_frame.
    """

    sizes: tuple[int, ...]
    start_frame: int

    def __init__(self, *sizes: int, start_frame: int = 0) -> None:
        if not 1 <= len(sizes) <= MAX_AXES:
            raise ValueError(f"Grid must have 1 to {MAX_AXES} sizes, got {len(sizes)}: {sizes}")
        object.__setattr__(self, "sizes", tuple(integer("Grid size", size, 1) for size in sizes))
        object.__setattr__(self, "start_frame", integer("start_frame", start_frame, 0))

    def __repr__(self) -> str:
        return f"Grid({', '.join(map(str, self.sizes))}, start_frame={self.start_frame})"

    @property
    def tokens(self) -> int:
        """Number of tokens of the whole grid."""
        return math.prod(self.sizes)


@dataclass(frozen=True)
class Shard:
    """The part of a grid's tokens that one sequence-parallel rank holds.

    With ``axis`` the rank holds ``chunk(world)[rank]`` of that grid axis, which must divide evenly. Without, the
    flattened tokens are cut into ``world`` equal slices of ``ceil(tokens / world)``; rows past the last token are
    padding and do not turn. :meth:`of_tokens` gives any contiguous slice of the flattened tokens instead.

    Raises:
        TypeError, ValueError: naming the field, the rule and the value.
    """

    rank: int = 0
    world: int = 1
    axis: int | None = None
    tokens: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "world", integer("world", self.world, 1))
        object.__setattr__(self, "rank", integer("rank", self.rank, 0))
        if self.rank >= self.world:
            raise ValueError(f"rank must be below world ({self.world}), got {self.rank}")
        if self.axis is not None:
            object.__setattr__(self, "axis", integer("axis", self.axis, 0))
        if self.tokens is not None:
            if self.axis is not None or self.world != 1:
                raise ValueError("tokens must not be combined with axis or world; use Shard.of_tokens(start, stop)")
            if not isinstance(self.tokens, tuple) or len(self.tokens) != 2:
                raise TypeError(f"tokens must be a tuple (start, stop), got {self.tokens!r}")
            start = integer("tokens start", self.tokens[0], 0)
            object.__setattr__(self, "tokens", (start, integer("tokens stop", self.tokens[1], start + 1)))

    @classmethod
    def of_tokens(cls, start: int, stop: int) -> Shard:
        """The flattened tokens ``start <= i < stop``; those past the end of the grid are padding and do not turn."""
        return cls(tokens=(start, stop))
