"""What a rotation is: channels, frequencies, token grid and shard, as immutable values that check themselves."""

from __future__ import annotations

import enum
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .scalars import as_number, integer, positive

MAX_AXES = 4
FREQUENCY_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Pairing(enum.Enum):
    """Which two channels of a head rotate together.

    ``INTERLEAVED``: channels (0, 1), (2, 3), ... (GPT-J, Wan, Flux). ``HALF``: channels (i, i + rotary_dim / 2)
    (GPT-NeoX, Llama, Cosmos).

    Example:
        >>> import torch
        >>> from dit_rope import Grid, Pairing, RopeSpec, rope_table, rotate
        >>> x = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]])
        >>> tables = [rope_table(RopeSpec((4,), pairing=pairing), Grid(1, start_frame=1)) for pairing in Pairing]
        >>> [rotate(x, table).nonzero()[:, 3].tolist() for table in tables]
        [[0, 1], [0, 2]]
    """

    INTERLEAVED = "interleaved"
    HALF = "half"

    # The hash of Enum is a Python function, which would run in every lookup of a cache. Members are singletons.
    __hash__ = object.__hash__


class NormKind(enum.Enum):
    """The norm of queries or keys before the rotation, and the channels that it averages over.

    ``PER_HEAD`` is an RMSNorm over the D channels of each head (HunyuanVideo, Flux, Mochi). ``ACROSS_HEADS`` is an
    RMSNorm over all H * D channels of a token (Wan, LTX). ``LAYER_PER_HEAD`` (CogVideoX) and ``LAYER_ACROSS_HEADS`` are
    LayerNorms (Ba, Kiros and Hinton, arXiv:1607.06450) over the same channels: they subtract the mean, divide by the
    root of the biased variance plus eps, and may add a bias after the weight.

    Example:
        >>> from dit_rope import NormKind
        >>> NormKind.ACROSS_HEADS.across_heads, NormKind.ACROSS_HEADS.centred
        (True, False)
    """

    PER_HEAD = "per_head"
    ACROSS_HEADS = "across_heads"
    LAYER_PER_HEAD = "layer_per_head"
    LAYER_ACROSS_HEADS = "layer_across_heads"

    __hash__ = object.__hash__

    @property
    def across_heads(self) -> bool:
        """Whether all heads of a token share one average and weights are ``[H * D]``; otherwise they are ``[D]``."""
        return self in (NormKind.ACROSS_HEADS, NormKind.LAYER_ACROSS_HEADS)

    @property
    def centred(self) -> bool:
        """Whether this is a LayerNorm: it subtracts the mean. Only a LayerNorm may have a bias."""
        return self in (NormKind.LAYER_PER_HEAD, NormKind.LAYER_ACROSS_HEADS)


ScalingValue = float | int | bool | tuple[float, ...] | None


@dataclass(frozen=True)
class Scaling:
    """A frequency scaling of one axis: the name of a type and its options. :meth:`of` makes one.

    :func:`~dit_rope.known_scalings` lists the types; :mod:`dit_rope.tables.scaling_types` has their formulas and
    options. Type and options are checked when a table is made.

    ``parameters`` is a sorted tuple of (name, value) pairs, so that equal scalings are equal and hashable.

    Raises:
        TypeError: a type that is not a string, or an option that is not a number, numbers or None.

    Example:
        >>> from dit_rope import Scaling
        >>> Scaling.of("linear", factor=4.0)
        Scaling(kind='linear', parameters=(('factor', 4.0),))
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
        """Makes a scaling from keyword parameters; lists become tuples, numbers of numpy those of Python.

        Example:
            >>> print(Scaling.of("longrope", short_factor=[1.0, 2.0], seq_len=64))
            longrope(seq_len=64, short_factor=(1.0, 2.0))
        """
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
    """A number of numpy as an int or a float; any other value unchanged."""
    number = as_number(value)
    return value if number is None else number


Scalings = Scaling | Sequence[Scaling | None] | None


_DEPRECATED = (
    "theta_rescale and interpolation of RopeSpec are options of a scaling type now; pass "
    'scaling=Scaling.of("fastvideo", theta_rescale=..., interpolation=...); the old names go in 0.3'
)


def _fastvideo(
    theta_rescale: float | Sequence[float] | None,
    interpolation: float | Sequence[float] | None,
    scaling: Scalings,
    axes: int,
) -> Scalings:
    """The scaling that two deprecated arguments of :class:`RopeSpec` stand for."""
    if scaling is not None:
        raise ValueError(
            f"scaling must be None with theta_rescale or interpolation, got {scaling}; register_scaling adds a type "
            "that does both"
        )
    numbers = [
        _per_axis(name, 1.0 if value is None else value, axes)
        for name, value in (("theta_rescale", theta_rescale), ("interpolation", interpolation))
    ]
    return [
        None if rescale == factor == 1.0 else Scaling.of("fastvideo", theta_rescale=rescale, interpolation=factor)
        for rescale, factor in zip(*numbers, strict=True)
    ]


def _per_axis(name: str, value: float | Sequence[float], axes: int) -> tuple[float, ...]:
    """One positive finite float per axis. A single number, or a sequence of one number, is for every axis."""
    values = list(value) if isinstance(value, Sequence) else [value]
    if any(as_number(v) is None for v in values):
        raise TypeError(f"{name} must be a number or numbers, got {value!r}")
    if len(values) == 1:
        values = values * axes
    if len(values) != axes:
        raise ValueError(f"{name} must be a number or have one value per axis ({axes}), got {value!r}")
    return tuple(float(positive(name, v)) for v in values)


def _scalings(scaling: Scalings, axes: int) -> Scaling | tuple[Scaling | None, ...] | None:
    """One form for equal scalings: the scaling itself if all axes share it, else a tuple of one or None per axis."""
    if scaling is None or isinstance(scaling, Scaling):
        return scaling
    if not isinstance(scaling, (tuple, list)) or not all(s is None or isinstance(s, Scaling) for s in scaling):
        raise TypeError(f"scaling must be a Scaling, None, or a tuple of them, one per axis, got {scaling!r}")
    if len(scaling) != axes:
        raise ValueError(f"scaling must be one for all axes or have one per axis ({axes}), got {len(scaling)}")
    return scaling[0] if all(axis == scaling[0] for axis in scaling) else tuple(scaling)


@dataclass(frozen=True, init=False)
class RopeSpec:
    """Everything about a rotation that does not depend on the size of the video.

    Args:
        dims: rotary channels of each axis (frame, height, width), each even; 1 to 4 axes. Their sum is
            ``rotary_dim``, at most the head dim D; channels past it are not rotated.
        theta: base of the frequencies, ``theta ** (-2 j / dim)`` for pair j (RoFormer, arXiv:2104.09864).
        pairing: which two channels rotate together.
        scaling: a frequency scaling for all axes, or a tuple of one Scaling or None per axis. A tuple of equal entries
            is stored as that entry; :meth:`axis_scaling` reads either form.
        frequency_dtype: dtype in which frequencies are formed. Angles take the wider of it and float32, the
            dtype of positions. float64 for Wan, float32 for HunyuanVideo.
        theta_rescale, interpolation: deprecated, gone in 0.3; options of the scaling type
            :func:`~dit_rope.tables.scaling_types.fastvideo`, one number for all axes or one per axis.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.

    Example:
        >>> from dit_rope import RopeSpec, Scaling
        >>> wan = RopeSpec((44, 42, 42))
        >>> wan.rotary_dim, wan.pairs
        (128, (22, 21, 21))
        >>> longer = wan.with_scaling((Scaling.of("linear", factor=2.0), None, None))
    """

    dims: tuple[int, ...]
    theta: float
    pairing: Pairing
    scaling: Scaling | tuple[Scaling | None, ...] | None
    frequency_dtype: torch.dtype

    def __init__(
        self,
        dims: Sequence[int],
        theta: float = 10_000.0,
        pairing: Pairing = Pairing.INTERLEAVED,
        theta_rescale: float | Sequence[float] | None = None,
        interpolation: float | Sequence[float] | None = None,
        scaling: Scalings = None,
        frequency_dtype: torch.dtype = torch.float64,
    ) -> None:
        if not isinstance(dims, Sequence):
            raise TypeError(f"dims must be a tuple of ints, one per axis, got {dims!r}")
        dims = tuple(integer("dims", dim, 2) for dim in dims)
        if not 1 <= len(dims) <= MAX_AXES:
            raise ValueError(f"dims must have 1 to {MAX_AXES} axes, got {len(dims)}: {dims}")
        if any(dim % 2 for dim in dims):
            raise ValueError(f"dims must be even, got {dims}; two channels rotate together")
        if isinstance(theta, Sequence):
            raise TypeError(f"theta must be one number for all axes, got {theta!r}; scale axes by scaling")
        if not isinstance(pairing, Pairing):
            raise TypeError(f"pairing must be a Pairing, got {pairing!r}")
        if not (isinstance(frequency_dtype, torch.dtype) and frequency_dtype in FREQUENCY_DTYPES):
            raise TypeError(
                f"frequency_dtype must be a floating point torch.dtype of 16, 32 or 64 bits, got {frequency_dtype!r}"
            )
        if theta_rescale is not None or interpolation is not None:
            warnings.warn(_DEPRECATED, DeprecationWarning, stacklevel=2)
            scaling = _fastvideo(theta_rescale, interpolation, scaling, len(dims))
        object.__setattr__(self, "dims", dims)
        object.__setattr__(self, "theta", float(positive("theta", theta)))
        object.__setattr__(self, "pairing", pairing)
        object.__setattr__(self, "scaling", _scalings(scaling, len(dims)))
        object.__setattr__(self, "frequency_dtype", frequency_dtype)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also loads pickles of 0.1, in which ``theta_rescale`` and ``interpolation`` are fields."""
        fields = dict(state)
        rescale, factor = fields.pop("theta_rescale", None), fields.pop("interpolation", None)
        if {*(rescale or ()), *(factor or ())} - {1.0}:
            axes = len(fields["dims"])
            fields["scaling"] = _scalings(_fastvideo(rescale, factor, fields["scaling"], axes), axes)
        vars(self).update(fields)

    @property
    def theta_rescale(self) -> tuple[float, ...]:
        """Deprecated: that option of the ``fastvideo`` scaling, of each axis."""
        return self._option("theta_rescale")

    @property
    def interpolation(self) -> tuple[float, ...]:
        """Deprecated: that option of the ``fastvideo`` scaling, of each axis."""
        return self._option("interpolation")

    def _option(self, name: str) -> tuple[float, ...]:
        warnings.warn(_DEPRECATED, DeprecationWarning, stacklevel=3)
        scalings: list[Any] = [self.axis_scaling(axis) for axis in range(len(self.dims))]
        return tuple(dict(s.parameters).get(name, 1.0) if s and s.kind == "fastvideo" else 1.0 for s in scalings)

    def axis_scaling(self, axis: int) -> Scaling | None:
        """The scaling of one axis."""
        return self.scaling[axis] if isinstance(self.scaling, tuple) else self.scaling

    def with_scaling(self, scaling: Scalings) -> RopeSpec:
        """The same rotation with another scaling; None for no scaling."""
        return replace(self, scaling=_scalings(scaling, len(self.dims)))

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated."""
        return sum(self.dims)

    @property
    def pairs(self) -> tuple[int, ...]:
        """Channel pairs of each axis."""
        return tuple(dim // 2 for dim in self.dims)


@dataclass(frozen=True, init=False)
class Grid:
    """A token grid after patching, first axis slowest: ``Grid(T, H, W, start_frame=0)``, 1 to 4 axes.

    ``start_frame`` is the position of the first index of axis 0, for autoregressive video that continues.

    Raises:
        TypeError, ValueError: sizes that are not positive ints, or a negative start_frame.

    Example:
        >>> from dit_rope import Grid
        >>> Grid(21, 45, 80).tokens
        75600
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
    """The tokens of a grid that one sequence-parallel rank holds.

    With ``axis``, the rank holds ``chunk(world)[rank]`` of that grid axis, which must divide evenly. Without it, the
    flattened tokens are cut into ``world`` slices of ``ceil(tokens / world)`` each; indices past the last token are
    padding and are not rotated. :meth:`of_tokens` makes any contiguous slice of the flattened tokens.

    Raises:
        TypeError, ValueError: naming the field, the rule and the value.

    Example:
        >>> from dit_rope import Grid, RopeSpec, Shard, rope_table
        >>> spec, grid = RopeSpec((8, 4, 4)), Grid(3, 4, 5)
        >>> [rope_table(spec, grid, shard=Shard(rank, 4, axis=1)).sizes for rank in range(2)]
        [(3, 1, 5), (3, 1, 5)]
        >>> rope_table(spec, grid, shard=Shard(0, 8)).count
        8
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
        """The flattened tokens ``start <= i < stop``; indices past the end of the grid are padding, not rotated.

        Example:
            >>> Shard.of_tokens(100, 200).tokens
            (100, 200)
        """
        return cls(tokens=(start, stop))
