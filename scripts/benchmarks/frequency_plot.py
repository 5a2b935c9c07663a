"""The picture of ``dit-rope inspect --plot``: frequencies, response, shards and memory of one model on one grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_rope.spec import Grid, RopeSpec, Shard
from dit_rope.tables.shards import TokenRange

from .model_frequencies import ModelFrequencies, Sizes

SUFFIXES = (".svg", ".png")
_MAX_TILES = 10
_NAMED_RANKS = 16
_COLOURS = {"frame": "tab:blue", "index": "tab:blue", "height": "tab:orange", "width": "tab:green", "text": "tab:red"}
_ABOVE: dict[str, Any] = {
    "loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 6, "frameon": False, "borderaxespad": 0.2,
    "handletextpad": 0.4, "columnspacing": 1.5,
}  # fmt: skip
_ANY_SPEC = RopeSpec((2, 2, 2))  # layouts are those of any rotation of three axes


Ranks = np.ndarray[tuple[int, int, int], np.dtype[np.float64]]
"""The rank that holds each token, ``[F, H, W]``."""


@dataclass(frozen=True)
class Setting:
    """Options of a picture: tokens along frame, height and width, ranks, and a scaling in words."""

    sizes: Sizes
    ranks: int
    scaling: str = ""


def draw(frequencies: ModelFrequencies, setting: Setting, path: Path) -> None:
    """Writes the picture; the suffix of ``path`` says which kind, one of :data:`SUFFIXES`."""
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text, and the same picture is the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dit-rope", "font.size": 9}):
        figure = Figure(figsize=(10, 10), layout="constrained", dpi=120)
        rows: Any = figure.subfigures(3, 1, height_ratios=(3.4, 2.8, 3.6), hspace=0.04)
        above, middle, below = rows
        frames, height, width = setting.sizes
        figure.suptitle(
            f"{frequencies.name}, a grid of {frames} x {height} x {width} tokens"
            + (f", scaled by {setting.scaling}" if setting.scaling else "")
            + (f"\n{frequencies.note}" if frequencies.note else ""),
            fontsize=12,
        )
        left, right = above.subplots(1, 2, width_ratios=(1.7, 1))
        _draw_wavelengths(left, frequencies, setting.sizes)
        _draw_memory(right, frequencies, setting.sizes)
        _draw_responses(middle, frequencies, setting.sizes)
        _draw_shards(below, setting)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_wavelengths(plot: Any, frequencies: ModelFrequencies, sizes: Sizes) -> None:
    """Tokens of a full turn, of each pair of channels; dotted where a full turn takes the whole axis."""
    scaled = frequencies.scaled or (None,) * len(frequencies.axes)
    for axis, other in zip(frequencies.axes, scaled, strict=True):
        colour, size = _COLOURS[axis.name], axis.size(sizes)
        plot.plot(axis.pairs, math.tau / axis.radians.abs(), ".", markersize=4, color=colour, label=axis.name)
        if other is not None and (moved := axis.radians != other.radians).any():
            wavelengths = math.tau / other.radians[moved].abs()
            plot.plot(axis.pairs[moved], wavelengths, "x", markersize=5, color="black", label=f"{axis.name}, scaled")
        if size > 1:
            plot.hlines(size, axis.pairs.min(), axis.pairs.max(), color=colour, linestyle=":", linewidth=1.5)
    if any((axis.radians.abs() > math.pi).any() for axis in frequencies.axes):
        plot.axhline(2, color="grey", linewidth=0.8, linestyle="--", label="2 tokens: half a turn each")
    plot.set(yscale="log", xlabel="pair of channels", ylabel="wavelength, tokens")
    plot.set_title("Wavelength of each pair (dotted: the size of the grid)", loc="left", fontsize=10, pad=24)
    plot.legend(**_ABOVE)
    plot.grid(alpha=0.25)


def _draw_memory(plot: Any, frequencies: ModelFrequencies, sizes: Sizes) -> None:
    """Bytes of dense and of axis tables, over frames at three resolutions; of an image over its height."""
    moving = 0 if sizes[0] > 1 else 1
    ticks = np.unique(np.linspace(1, 2 * sizes[moving], 40).astype(int)).tolist()
    for kind, colour, count in (
        ("dense", "tab:red", frequencies.dense_bytes),
        ("rows of the axes", "tab:purple", frequencies.axis_bytes),
    ):
        for scale, style in ((0.5, "--"), (1, "-"), (2, ":")) if moving == 0 else ((1, "-"),):
            shape = [max(1, round(scale * size)) for size in sizes]
            sizes_of_ticks = [count((tick, shape[1], shape[2])) for tick in ticks]
            if moving == 1:
                sizes_of_ticks = [count((1, tick, max(1, round(tick * sizes[2] / sizes[1])))) for tick in ticks]
            note = ", kept" if frequencies.keeps_axes == (kind != "dense") else ""
            plot.plot(ticks, sizes_of_ticks, style, color=colour, label=kind + note if scale == 1 else None)
            if moving == 0 and kind == "dense":
                plot.text(
                    1.02 * ticks[-1],
                    sizes_of_ticks[-1],
                    f"{shape[1]}x{shape[2]}",
                    color=colour,
                    va="center",
                    fontsize=8,
                )
        plot.plot([sizes[moving]], [count(sizes)], "o", color=colour)
        above = {"textcoords": "offset points", "xytext": (0, 7), "ha": "center"}
        plot.annotate(_bytes(count(sizes)), (sizes[moving], count(sizes)), color=colour, **above)
    plot.set(yscale="log", xlabel=("frames" if moving == 0 else "height, at this aspect") + ", tokens")
    plot.set_xlim(0, ticks[-1] * (1.2 if moving == 0 else 1.05))
    plot.margins(y=0.12)
    plot.minorticks_off()
    plot.yaxis.set_major_formatter(lambda value, _: _bytes(value))
    plot.set_title("Memory of the tables (kept: by a patch)", loc="left", fontsize=10, pad=24)
    plot.legend(**_ABOVE)
    plot.grid(alpha=0.25)


def _bytes(number: float) -> str:
    power = min(3, max(0, int(math.log10(number) // 3))) if number >= 1 else 0
    return f"{number / 1000**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"


def _draw_responses(figure: Any, frequencies: ModelFrequencies, sizes: Sizes) -> None:
    """Scores of equal queries and keys over their distance, axis by axis."""
    plots = figure.subplots(1, len(frequencies.axes), sharey=True, squeeze=False)[0]
    figure.suptitle(
        "Response to distance: mean of cos(radians x distance) over the pairs of an axis (dotted: the last token)",
        fontsize=10,
    )
    for number, (plot, axis) in enumerate(zip(plots, frequencies.axes, strict=True)):
        size = axis.size(sizes)
        distances = torch.arange(2 * size if size > 1 else 64)
        other = None if frequencies.scaled is None else frequencies.scaled[number].response(distances)
        plot.plot(distances, axis.response(distances), color=_COLOURS[axis.name], label="unscaled")
        if other is not None and not torch.equal(other, axis.response(distances)):
            plot.plot(distances, other, "k--", linewidth=1, label="scaled")
            plot.legend(**_ABOVE)
        if size > 1:
            plot.axvline(size - 1, color="grey", linewidth=0.8, linestyle=":")
        plot.axhline(0, color="grey", linewidth=0.5)
        plot.set(xlabel=f"distance in tokens, {axis.name}")
        plot.grid(alpha=0.25)
    plots[0].set_ylabel("response")


def _draw_shards(figure: Any, setting: Setting) -> None:
    """Frames from left to right, in the colours of the ranks that hold their tokens, cut in each way there is."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    ways = _ways(setting)
    missing = [
        f"{name} ({size})"
        for name, size in zip(("frame", "height", "width"), setting.sizes, strict=True)
        if size > 1 and f"by {name}" not in ways
    ]
    note = f"; not divided by {setting.ranks}: {', '.join(missing)}" if missing else ""
    figure.suptitle(f"Tokens that each of {setting.ranks} ranks holds{note}", fontsize=10)
    video = setting.sizes[0] > 1
    shown = _frames_shown(ways["flattened"][0])
    colours = _colours(setting.ranks)
    plots = figure.subplots(*((len(ways), 1) if video else (1, len(ways))), squeeze=False).flatten()
    gap = np.full((setting.sizes[1], max(1, setting.sizes[2] // 16)), np.nan)
    for plot, (name, (ranks, count)) in zip(plots, ways.items(), strict=True):
        tiles = [tile for frame in shown for tile in (ranks[frame], gap)][:-1]
        plot.imshow(
            np.concatenate(tiles, axis=1), cmap=ListedColormap(colours), vmin=-0.5, vmax=setting.ranks - 0.5,
            aspect="auto" if video else "equal", interpolation="nearest",
        )  # fmt: skip
        plot.spines[:].set_visible(False)
        plot.set(xticks=[], yticks=[])
        padding = count * setting.ranks - ranks.size
        label = f"{name}\n{count:,} tokens each" + (f"\n({padding} of padding)" if padding else "")
        if video:
            plot.set_ylabel(label, rotation=0, ha="right", va="center")
        else:
            plot.set_title(label, fontsize=9)
    if video:
        step = setting.sizes[2] + gap.shape[1]
        plots[-1].set_xticks([step * tile + setting.sizes[2] / 2 for tile in range(len(shown))])
        plots[-1].set_xticklabels([f"frame {frame}" for frame in shown])
        plots[-1].tick_params(length=0)
    if setting.ranks <= _NAMED_RANKS:
        patches = [Patch(color=colour, label=f"rank {rank}") for rank, colour in enumerate(colours)]
        figure.legend(handles=patches, loc="outside lower center", ncols=min(8, setting.ranks), frameon=False)


def _frames_shown(ranks: Ranks) -> list[int]:
    """Some frames: the first and the last, those of several ranks, and as many others as there is room for."""
    flat = ranks.reshape(len(ranks), -1)
    frames = {0, len(ranks) - 1, *np.flatnonzero(flat.min(axis=1) < flat.max(axis=1)).tolist()}
    if len(frames) > _MAX_TILES:
        frames = set()
    while len(frames) < min(len(ranks), _MAX_TILES):
        even = np.linspace(0, len(ranks) - 1, _MAX_TILES).round().astype(int).tolist()
        frames |= {next(frame for frame in (*even, *range(len(ranks))) if frame not in frames)}
    return sorted(frames)


def _colours(count: int) -> list[Any]:
    """One colour for each rank: told apart by hue where they are few, in order of the rainbow where they are many."""
    import matplotlib

    if count <= 8:
        return [matplotlib.colormaps["Set2"](number) for number in range(count)]
    return list(matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, count)))


def _ways(setting: Setting) -> dict[str, tuple[Ranks, int]]:
    """By name of the cut, the rank of every token and the rows of each rank, padding included."""
    ways = {"flattened": _ranks_of_tokens(setting, None)}
    for axis, (name, size) in enumerate(zip(("frame", "height", "width"), setting.sizes, strict=True)):
        if size > 1 and size % setting.ranks == 0:
            ways[f"by {name}"] = _ranks_of_tokens(setting, axis)
    return ways


def _ranks_of_tokens(setting: Setting, axis: int | None) -> tuple[Ranks, int]:
    ranks, count = np.full(setting.sizes, np.nan), 0
    for rank in range(setting.ranks):
        layout = TokenRange.of(_ANY_SPEC, Grid(*setting.sizes), Shard(rank, setting.ranks, axis))
        places = zip(layout.coordinates(torch.device("cpu")), layout.starts, strict=True)
        ranks[tuple((place + start).numpy() for place, start in places)] = rank
        count = layout.count
    return ranks, count
