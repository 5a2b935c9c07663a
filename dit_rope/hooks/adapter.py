"""Declarations of model classes: where a model builds rotary tables, and where it rotates queries and keys."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..spec import RopeSpec
from .formats import Format
from .packed_tables import Align, PackedTable, UnfitTable


class Layout(enum.Enum):
    """Order of dimensions in the result of a norm or projection: batch B, tokens S, heads H, head size D, C = H * D."""

    BSC = "[B, S, H * D]"
    BSHD = "[B, S, H, D]"
    BHSD = "[B, H, S, D]"
    BHDS = "[B, H, D, S]"
    SHD = "[S, H, D]"

    __hash__ = object.__hash__


class CastTo(enum.Enum):
    """Dtype to which a model casts normed queries and keys before it rotates them."""

    INPUT = "dtype of the attention's input"
    PROJECTION = "dtype of the projections (autocast may differ from the input's)"

    __hash__ = object.__hash__


@dataclass(frozen=True)
class ForwardGrid:
    """The grid of one forward pass: ``sizes`` is (T, H, W), in patches.

    ``frames`` holds the frame positions of the video, each below T. None means 0, 1, ..., T - 1.
    """

    sizes: tuple[int, int, int]
    frames: tuple[int, ...] | None = None


@dataclass(frozen=True)
class AxisTables:
    """Tables ``[1, S, 1, D]`` of a grid. Kernels read one small array per axis instead of a row per token.

    Attributes:
        spec: computes the rotation from the module that builds the tables.
        grid: computes the grid from that module and the arguments of its forward.
    """

    spec: Callable[[Any], RopeSpec]
    grid: Callable[..., ForwardGrid]


EVERY = ("*",)
"""All arguments."""


@dataclass(frozen=True)
class ModelTables:
    """An object of a model that builds rotary tables. The patch memoizes its results.

    The cache key holds the arguments of the call and everything that the code reads: attributes, buffers and
    configuration of the object. Tensors count by value if that needs no wait for a device. Otherwise the tables are
    built in every call, as without a patch.

    Attributes:
        path: path of the object in the model; empty if a method of the model itself builds the tables.
        builder: name of its class, or names of the classes that it may have.
        method: name of the method that builds the tables.
        keyed_by_shape: arguments whose tensors count by shape, dtype and device, because the tables depend on nothing
            else in them; :data:`EVERY` for all arguments.
        sets: attributes and buffers that ``method`` itself sets. A cache hit sets them too.
        to_device: whether ``method`` builds on the host and the model moves the tables in every use. The cache keeps
            them on the device of the model.
        axes: the grid of the tables, of which kernels read axis tables; None if kernels read a row per token.
    """

    path: str
    builder: str | tuple[str, ...]
    method: str = "forward"
    keyed_by_shape: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    to_device: bool = False
    axes: AxisTables | None = None

    @property
    def builders(self) -> tuple[str, ...]:
        """Names of the classes that the object may have."""
        return (self.builder,) if isinstance(self.builder, str) else self.builder

    def not_cached(self, target: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Computes the leading results that depend on data: recomputed in every call, never cached.

        ``target`` is the object that builds the tables; the other arguments are those of ``method``.
        """
        return ()


@dataclass(frozen=True)
class Tokens:
    """The tokens that have one table.

    Attributes:
        names: arguments of the attention, ``[B, S, C]`` or, in layout SHD, ``[S, C]``. An argument that is None has no
            tokens.
        first_of: counts the first of these arguments that is not None, instead of the sum of all.
    """

    names: tuple[str, ...] = ("hidden_states",)
    first_of: bool = False

    def count(self, arguments: Mapping[str, Any], dim: int) -> int:
        """Number of tokens along ``dim``; 0 without tokens, or if an argument has another number of dimensions."""
        tensors = [arguments[name] for name in self.names if arguments.get(name) is not None]
        if not all(isinstance(x, torch.Tensor) and x.ndim == 2 + dim for x in tensors):
            return 0
        counts = [int(x.shape[dim]) for x in tensors]
        return sum(counts[:1] if self.first_of else counts)

    def fit(self, arguments: Mapping[str, Any], dim: int, rows: int) -> bool:
        """Whether a table of ``rows`` rows has one row for each token along ``dim``."""
        return 0 < self.count(arguments, dim) == rows


@dataclass(frozen=True)
class NormRotation:
    """How the result of one norm, or of one projection, of an attention module rotates.

    Attributes:
        table: index of the table among those of the attention module; a larger index means the last table.
        align: the end that the tokens and the table have in common.
        projection: the projection that rotates if the attention module lacks the norm; it returns ``[B, S, H * D]``.
        repeats: whether the code may call the norm any number of times, zero included, and rotates each result.
        only_with: a submodule; an attention module without it does not need this norm. None: it is always needed.
    """

    table: int = 0
    align: Align = Align.START
    projection: str | None = None
    repeats: bool = False
    only_with: str | None = None

    def fits(self, table: PackedTable, tokens: int) -> bool:
        """Whether ``tokens`` tokens may rotate by ``table``, whose other properties fit."""
        return True


QK: Mapping[str, NormRotation] = {"norm_q": NormRotation(projection="to_q"), "norm_k": NormRotation(projection="to_k")}
"""Queries and keys that share one table and its start."""


@dataclass(frozen=True)
class ReplacedFunction:
    """A function that rotates, which a processor looks up among the globals of its module: ``name(x, rotary)``.

    The patch runs the code of the processor with another function under that one name. A subclass describes a function
    with other parameters.
    """

    name: str

    def tensors(self, args: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        """The arguments that it rotates and returns."""
        return args[:1]

    def rotary(self, args: tuple[Any, ...]) -> Any:
        """What it rotates by, as the format takes it; None if the call has another number of arguments."""
        return args[1] if len(args) == 2 else None


class ResultRotation(NamedTuple):
    """The rotation of the result of one norm or projection.

    Attributes:
        table: the table that it rotates by.
        rounds_as_model: whether it rounds where the model does, not in fast mode.
        rotate: rotates a result in the layout of the norm.
        rotate_heads: rotates heads ``[B, S, H, D]``.
    """

    table: PackedTable
    rounds_as_model: bool
    rotate: Callable[[torch.Tensor], torch.Tensor]
    rotate_heads: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class AttentionRotation:
    """Attention modules of one kind, and how their queries and keys rotate: in their norms, or in their projections.

    A model with a rule that no field expresses overrides a method in a subclass beside its adapter.

    Attributes:
        attention: regular expression that the paths of the attention modules match in full.
        attention_class: name of their class.
        format: form of the rotary tensors that they get.
        layout: layout of the results of ``norms``.
        norms: by attribute name of the attention module. A norm that is absent or None gives way to its projection.
        rotary: names of the rotary arguments of the processor, or of the attention's forward without one.
        covers: the tokens of each table; the last entry serves all further tables.
        processors: class names of the processors that the adapter was written for; empty for attention modules that
            attend in their own forward.
        replaced_function: for code that rotates even if it gets None: the function that rotates. If norms rotate, it
            returns its arguments unchanged.
        unrotated: for code that rotates even if it gets None, without calling a function: the same attention without
            the rotation. It gets the processor, the attention module, the processor's method and the arguments by name.
        head_dim: computes the channels of a head from the attention module, if not all of them rotate and the results
            of norms are not split into heads yet.
        partial: whether tables may be narrower than heads. The other channels of a head do not rotate.
        cast_to: the dtype to which the model casts the results of norms before it rotates them.
        when: selects among the modules at such paths, from the model and the attention module.
    """

    attention: str
    attention_class: str
    format: Format
    layout: Layout
    norms: Mapping[str, NormRotation] = field(default_factory=lambda: QK)
    rotary: tuple[str, ...] = ("image_rotary_emb",)
    covers: tuple[Tokens, ...] = (Tokens(),)
    processors: tuple[str, ...] = ()
    replaced_function: ReplacedFunction | None = None
    unrotated: Callable[..., Any] | None = None
    head_dim: Callable[[Any], int] | None = None
    partial: bool = False
    cast_to: CastTo | None = None
    when: Callable[[Any, Any], bool] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> AttentionRotation:
        return self  # copies of a patched model share the adapter

    def rotary_tensors(self, arguments: Mapping[str, Any]) -> list[Any]:
        """The values of the rotary arguments in one call of the attention.

        Raises:
            UnfitTable: an argument is absent or None, so that the model's own code must run.
        """
        values = [arguments.get(name) for name in self.rotary]
        if any(value is None for value in values):
            raise UnfitTable
        return values

    def check_called(self, attention: Any, rotating: Set[str], not_called: Set[str]) -> None:
        """Raises RuntimeError if a call left out norms.

        ``rotating`` names the norms that must rotate once in each call, ``not_called`` those that did not.
        """
        if not_called:
            raise RuntimeError(
                f"{type(attention).__name__} must call {' and '.join(sorted(not_called))} once each where dit_rope has "
                "patched it, but left them out, so that queries or keys were not rotated; undo the patch before this "
                "call"
            )

    def keeps_dtype(self, dtype: torch.dtype) -> bool:
        """Whether the model returns data of ``dtype`` in that dtype, so that norm and rotation may be one pass."""
        return True

    def rotate_result(self, y: torch.Tensor, rotation: ResultRotation) -> torch.Tensor:
        """Rotates the result ``y`` of a norm or projection, where norm and rotation are two passes."""
        return rotation.rotate(y)


@dataclass(frozen=True)
class ModelAdapter:
    """One transformer class.

    Attributes:
        model: dotted name of the class. Classes that derive from it are patched too.
        tables: the objects that build rotary tables.
        rotations: the attention modules that rotate.
        not_patched: operations that the patch leaves to the model, with the reasons, as reports print them.
    """

    model: str
    tables: tuple[ModelTables, ...] = ()
    rotations: tuple[AttentionRotation, ...] = ()
    not_patched: tuple[str, ...] = ()

    @property
    def model_class(self) -> str:
        """The name of the class, without its module."""
        return self.model.rpartition(".")[2]
