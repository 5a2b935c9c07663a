"""The rotary frequencies of a model, read from the tables that it builds itself.

This module knows how to ask each rope module for the table of a grid, and no formula of a family. It reads the angle
of each pair of channels along each axis, and checks the result against every row. It refuses a model whose angles are
not a fixed number of radians per token of one axis, so that none is drawn wrong. The Wan family is the exception: its
frequencies are those of the spec by which a patch replaces its tables.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from dit_rope.hooks.adapter import ModelTables
from dit_rope.hooks.formats import Format
from dit_rope.models import ModelAdapter
from dit_rope.spec import Scalings
from dit_rope.tables.axes import ROW_BLOCK
from dit_rope.tables.scaling import axis_frequencies
from dit_rope.tables.scaling_types import AxisFrequencies

Sizes = tuple[int, int, int]
"""Tokens along frame, height and width."""
_AXES = {2: ("height", "width"), 3: ("frame", "height", "width"), 4: ("frame", "height", "width", "text")}
_OF_IDS = {2: _AXES[2], 3: ("index", *_AXES[2]), 4: ("index", *_AXES[2], "text")}
_ROWS = 12
"""Of axes whose positions do not depend on the size of the grid: enough to tell frequencies, and to check them."""
_EPS = float(torch.finfo(torch.float32).eps)


@dataclass(frozen=True)
class Axis:
    """How one axis of the token grid rotates queries and keys.

    Attributes:
        name: of the axis.
        pairs: numbers of the pairs of channels that it rotates, int64 ``[P]``.
        radians: per token, of each of them, float64 ``[P]``.
        magnitude: what a scaling multiplies cos and sin by.
    """

    name: str
    pairs: torch.Tensor
    radians: torch.Tensor
    magnitude: float = 1.0

    def size(self, sizes: Sizes) -> int:
        """Tokens of a grid along this axis: 1 where a grid has no such axis."""
        return dict(zip(_AXES[3], sizes, strict=True)).get(self.name, 1)

    def response(self, distances: torch.Tensor) -> torch.Tensor:
        """Mean over the pairs of ``cos(radians * distance)``, float64 ``[N]``: scores of equal queries and keys.

        Scores have a scaling's magnitude twice, once from each side.
        """
        return self.magnitude**2 * (distances.double()[:, None] * self.radians).cos().mean(dim=1)


@dataclass(frozen=True)
class ModelFrequencies:
    """The frequencies of one model.

    Attributes:
        name: of its class.
        axes: as the model has them; ``scaled`` as a scaling makes them, where one is asked for.
        token_bytes: what the dense tables that the model builds take for one token.
        number_bytes: of one number in them.
        keeps_axes: whether a patch keeps rows of axes, or the dense tables.
        note: what the frequencies depend on besides the configuration.
    """

    name: str
    axes: tuple[Axis, ...]
    scaled: tuple[Axis, ...] | None
    token_bytes: int
    number_bytes: int
    keeps_axes: bool
    note: str = ""

    def dense_bytes(self, sizes: Sizes) -> int:
        """Memory of the dense tables of a grid."""
        return self.token_bytes * math.prod(sizes)

    def axis_bytes(self, sizes: Sizes) -> int:
        """Memory of the rows of its axes, as :class:`~dit_rope.tables.table.RopeTable` packs them."""
        rows = sum(-(-axis.size(sizes) // ROW_BLOCK) * ROW_BLOCK for axis in self.axes)
        return 2 * rows * max(len(axis.pairs) for axis in self.axes) * self.number_bytes


def frequencies_of(model: Any, adapter: ModelAdapter, sizes: Sizes, scaling: Scalings = None) -> ModelFrequencies:
    """The frequencies of a model, whose weights may be on the meta device.

    Args:
        model: the transformer.
        adapter: of its class.
        sizes: of the grid that its tables are built for. Some models space their positions by it.
        scaling: as :func:`dit_rope.patch` takes it.

    Raises:
        ValueError: frequencies cannot be read from this model, or it takes no scaling; the message says why.
    """
    grids = [tables for tables in adapter.tables if tables.axes is not None]
    if grids:
        return _of_spec(model, adapter.model_class, grids[0], scaling)
    if scaling is not None:
        raise ValueError(f"scaling must be left out for {adapter.model_class}, which builds its own tables")
    form = adapter.rotations[0].format if adapter.rotations else None
    if form is None:
        raise ValueError(f"{adapter.model_class} must have a rotation that dit_rope knows, got none")
    if min(sizes[1:]) < 2:
        raise ValueError(
            f"grid must have 2 tokens or more along height and width for {adapter.model_class}, got {sizes}"
        )
    table = _table_of(model, adapter, sizes)
    leaves = [leaf for leaf in pytree.tree_leaves(table.rotary) if isinstance(leaf, torch.Tensor)]
    return ModelFrequencies(
        adapter.model_class,
        _axes(adapter.model_class, table, form),
        None,
        sum(leaf.nbytes for leaf in leaves) // math.prod(table.sizes),
        leaves[0].itemsize // (2 if leaves[0].is_complex() else 1),
        keeps_axes=False,
        note=table.note,
    )


def _of_spec(model: Any, name: str, tables: ModelTables, scaling: Scalings) -> ModelFrequencies:
    assert tables.axes is not None
    rope = model.get_submodule(tables.path)
    spec = tables.axes.spec(rope)

    def axes(scaling: Scalings) -> tuple[Axis, ...]:
        scaled = spec.with_scaling(scaling)
        axes_of_spec, first = [], 0
        for axis, (title, pairs) in enumerate(zip(_AXES[len(spec.dims)], spec.pairs, strict=True)):
            numbers: AxisFrequencies = axis_frequencies(scaled, axis)
            radians = numbers.angles(torch.ones(1))[0].double()
            axes_of_spec.append(Axis(title, torch.arange(first, first + pairs), radians, numbers.magnitude))
            first += pairs
        return tuple(axes_of_spec)

    number = next(buffer for buffer in rope.buffers() if buffer.is_floating_point()).itemsize
    scaled = None if scaling is None else axes(scaling)
    return ModelFrequencies(name, axes(None), scaled, 2 * spec.rotary_dim * number, number, keeps_axes=True)


@dataclass(frozen=True)
class _Table:
    """What a model built: rotary tensors as its attention gets them, of a grid of ``sizes``, first axis slowest.

    ``names`` are those of its axes, ``note`` is what it depends on besides the configuration.
    """

    rotary: Any
    sizes: tuple[int, ...]
    names: tuple[str, ...] = _AXES[3]
    note: str = ""


def _table_of(model: Any, adapter: ModelAdapter, sizes: Sizes) -> _Table:
    """The table that the model, or its pipeline, builds for a grid.

    Raises:
        ValueError: it depends on more than a grid, or cannot be built for this one.
    """
    name = adapter.model_class
    if name == "CogVideoXTransformer3DModel":
        return _cogvideox(model, sizes)
    paths = [tables.path for tables in adapter.tables] or ["rope_embedder"]
    rope = getattr(model, paths[0], None) if paths[0] else None
    if rope is None:
        raise ValueError(
            f"{name} must have a module that builds its rotary tables from a grid of frames, height and width; it is "
            "handed them, or makes them in its forward"
        )
    parameters = tuple(inspect.signature(getattr(rope, "forward", rope)).parameters)
    if parameters not in _CALLS:
        raise ValueError(
            f"{name} must build its rotary tables from a grid of frames, height and width alone; its "
            f"{type(rope).__name__} takes {', '.join(parameters)}"
        )
    try:
        return _CALLS[parameters](rope, sizes)
    except (IndexError, RuntimeError) as error:
        raise ValueError(f"grid must be one that {name} has positions for, got {sizes}: {error}") from error


def _latent(rope: Any, sizes: Sizes) -> _Table:
    """Rope modules that are given a latent, before it is cut into patches, and look at its shape."""
    patch = rope.patch_size
    if isinstance(patch, int):
        patch = (getattr(rope, "patch_size_t", 1), patch, patch)
        if type(rope).__name__ in ("CogView4RotaryPosEmbed", "GlmImageRotaryPosEmbed"):
            patch = patch[1:]
    grid = (_ROWS, *sizes[1:])[-len(patch) :]
    shape = [size * side for size, side in zip(grid, patch, strict=True)]
    return _Table(rope(torch.empty(1, 0, *shape)), grid, _AXES[len(grid)])


def _ids(rope: Any, sizes: Sizes) -> _Table:
    """Rope modules that are given the coordinates of every token."""
    axes = len(rope.axes_dim if hasattr(rope, "axes_dim") else rope.axes_dims)
    grid = (_ROWS,) * axes
    ids = torch.cartesian_prod(*(torch.arange(size) for size in grid))
    batched = type(rope).__name__ in ("HiDreamImageEmbedND", "PRXEmbedND")
    return _Table(rope(ids[None] if batched else ids), grid, _OF_IDS[axes])


def _qwen(rope: Any, sizes: Sizes) -> _Table:
    """Separate tables of image and text; rows before the centre of a centred image have negative positions."""
    grid = (_ROWS, *sizes[1:])
    image, _ = rope([grid], max_txt_seq_len=1)
    return _Table(image, grid)


def _grid(rope: Any, sizes: Sizes) -> _Table:
    """Rope modules that are given the size of the grid."""
    grid = (_ROWS, *sizes[1:])
    return _Table(rope(grid, torch.device("cpu")), grid)


def _lumina2(rope: Any, sizes: Sizes) -> _Table:
    """The image's part of a sequence behind one token of text; every image stands at one place of the first axis."""
    grid = sizes[1:]
    latent = torch.empty(1, 0, *(size * rope.patch_size for size in grid))
    return _Table(rope(latent, torch.ones(1, 1, dtype=torch.int64))[2], grid, _AXES[2])


def _frames(rope: Any, sizes: Sizes) -> _Table:
    """Frame numbers besides the size of a frame: of latents in Framepack, of tokens in Helios."""
    grid = (_ROWS, *sizes[1:])
    frames, cpu = torch.arange(_ROWS), torch.device("cpu")
    if hasattr(rope, "patch_size"):
        return _Table(rope(frames, *(size * rope.patch_size for size in grid[1:]), cpu), grid)
    return _Table(rope(frames[None], *grid[1:], cpu).flatten(2).transpose(1, 2), grid)


def _ltx(rope: Any, sizes: Sizes) -> _Table:
    """Positions are seconds and pixels: those of LTXPipeline's defaults, 25 frames per second, 8 to a latent one."""
    grid = (_ROWS,) * 3
    note = "positions of 25 frames per second, 8 to a token, and of tokens of 32 pixels, as LTXPipeline has them"
    return _Table(rope(torch.empty(1, 0), *grid, (8 / 25, 32, 32)), grid, note=note)


def _cogvideox(model: Any, sizes: Sizes) -> _Table:
    """The pipeline's method, which reads only the transformer's configuration and the size."""
    from diffusers import CogVideoXPipeline

    config = model.config
    if not config.use_rotary_positional_embeddings:
        raise ValueError("CogVideoXTransformer3DModel must have rotary embeddings: its configuration turns them off")
    pipe = SimpleNamespace(transformer=SimpleNamespace(config=config), vae_scale_factor_spatial=1)
    grid = (_ROWS, *sizes[1:])
    height, width = (size * config.patch_size for size in grid[1:])
    frames, cpu = _ROWS * (config.patch_size_t or 1), torch.device("cpu")
    return _Table(CogVideoXPipeline._prepare_rotary_positional_embeddings(pipe, height, width, frames, cpu), grid)


_CALLS: dict[tuple[str, ...], Callable[[Any, Sizes], _Table]] = {
    ("hidden_states",): _latent,
    ("hidden_states", "fps"): _latent,
    ("ids",): _ids,
    ("video_fhw", "device", "max_txt_seq_len"): _qwen,
    ("hidden_states", "attention_mask"): _lumina2,
    ("frame_indices", "height", "width", "device"): _frames,
    ("hidden_states", "num_frames", "height", "width", "rope_interpolation_scale", "video_coords"): _ltx,
    ("fhw", "device"): _grid,
}
"""By the names of its parameters, how a rope module is asked for the table of a grid."""


def _axes(name: str, table: _Table, form: Format) -> tuple[Axis, ...]:
    """The axes of a table. Every row of the table must follow from them.

    Raises:
        ValueError: a pair rotates with two axes, or not by a fixed angle per token, or no pair rotates.
    """
    rotations = _rotations(table.rotary, form, table.sizes)
    start = rotations[(0,) * len(table.sizes)]
    whole, axes = start.expand_as(rotations).clone(), []
    for axis, title in enumerate(table.names):
        line = _line(rotations, axis)
        pairs = (line != line[0]).any(dim=0).nonzero()[:, 0]
        shape = [-1 if other == axis else 1 for other in range(len(table.sizes))]
        if len(pairs) > 0:
            whole[..., pairs] = line[:, pairs].reshape(*shape, len(pairs)).expand(*table.sizes, -1)
            axes.append(Axis(title, pairs, _radians(name, line[:, pairs])))
    if not axes:
        raise ValueError(f"{name} must rotate by more than 0 radians per token; its tables rotate nothing")
    if not torch.equal(whole, rotations):
        raise ValueError(f"{name} must rotate each pair of channels with one axis; some rotate with several")
    return tuple(axes)


def _rotations(rotary: Any, form: Format, sizes: tuple[int, ...]) -> torch.Tensor:
    """Complex128 ``[*sizes, H * P]`` of the table that the attention gets."""
    cos, sin = form.split(rotary)[0]
    rotations: torch.Tensor = torch.complex(cos[0].double(), sin[0].double()).flatten(1).unflatten(0, sizes)
    return rotations


def _line(rotations: torch.Tensor, axis: int) -> torch.Tensor:
    """``[N, P]`` of the tokens that stand at 0 on every other axis."""
    return rotations[tuple(slice(None) if other == axis else 0 for other in range(rotations.ndim - 1))]


def _radians(name: str, line: torch.Tensor) -> torch.Tensor:
    """Radians per token ``[P]`` of consecutive tokens, which must give back the line up to the rounding of its angles.

    Raises:
        ValueError: they do not, or pairs that rotate by more than half a turn per token may have been misread.
    """
    radians_per_token, distance = torch.zeros(line.shape[1], dtype=torch.float64), 1
    while distance < len(line):  # twice as far each time, by as many turns as fit what is known
        measured = (line[distance] * line[0].conj()).angle()
        radians_per_token = (
            measured + ((radians_per_token * distance - measured) / math.tau).round() * math.tau
        ) / distance
        distance = len(line) if distance == len(line) - 1 else min(2 * distance, len(line) - 1)
    tokens = torch.arange(len(line), dtype=torch.float64)[:, None]
    expected = line[0] * torch.polar(torch.ones_like(radians_per_token), tokens * radians_per_token)
    for slow_first in (radians_per_token.flip(0), radians_per_token):
        radians = _with_full_turns(slow_first)
        if radians is not None:
            break
    else:
        raise ValueError(
            f"{name} must rotate by frequencies in geometric progression on this grid, got others; pass --grid"
        )
    # Float32 angles are rounded by their size. Those of an axis start up to 64 tokens before 0 where it is scaled.
    allowed = 4 * _EPS * (1 + radians.max() * (len(line) + 64))
    if ((expected - line).abs() > allowed).any():
        raise ValueError(f"grid must be one on which {name} spaces its tokens evenly, got another; pass --grid")
    return radians.flip(0) if slow_first is not radians_per_token else radians


def _with_full_turns(radians: torch.Tensor) -> torch.Tensor | None:
    """Radians per token, known but for full turns, of pairs that rotate faster and faster; None where they do not.

    Full turns per token do not show in a table. Every family's frequencies are a geometric progression, so that two
    pairs tell about how fast the next one rotates, and the table then how fast exactly.
    """
    corrected = radians.clone()
    for pair in range(2, len(corrected)):
        expected = corrected[pair - 1] ** 2 / corrected[pair - 2]
        corrected[pair] += ((expected - corrected[pair]) / math.tau).round() * math.tau
    ratios = corrected[1:] / corrected[:-1]
    fits = bool((corrected > 0).all()) and bool(((ratios / ratios.mean() - 1).abs() < 1e-3).all())
    return corrected if fits else None
