"""Draws the figure of docs/how-it-works.md: axis tables, and where a patched model rotates queries and keys.

    python scripts/pages/draw_how_it_works.py

Writes ``docs/how-it-works.svg``, the same at every run. On white, so that it can be read on a dark page as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "how-it-works.svg"
AXES = (("frame", 21, "#3b6fb6"), ("height", 45, "#c8702a"), ("width", 80, "#4a8f4e"))
"""The grid of a 720p Wan video of 81 frames, in tokens."""
TOKEN = (13, 30, 52)
INK, PALE, PACKAGE = "#24292f", "#e7eaee", "#dbe7f7"


def box(axes: Axes, x: float, y: float, size: tuple[float, float], text: str, colour: str = PALE) -> None:
    """A rectangle around its centre, with a text in it."""
    width, height = size
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(Rectangle(corner, width, height, facecolor=colour, edgecolor=INK, linewidth=0.8))
    axes.text(x, y, text, ha="center", va="center", color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    """From one point to another."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=colour, linewidth=1))


def draw_tables(axes: Axes) -> None:
    """The rows of three axes, the three that one token takes, and the dense table that they stand for."""
    axes.set(xlim=(0, 100), ylim=(-14, 110))
    left, scale, column = 4.0, 0.95, 16.0
    row = 20.0
    for number, ((name, size, colour), index) in enumerate(zip(AXES, TOKEN, strict=True)):
        x, tall = left + number * (column + 5), size * scale
        axes.add_patch(Rectangle((x, 98 - tall), column, tall, facecolor=colour, alpha=0.25))
        place = 98 - (index + 1) * scale
        axes.add_patch(Rectangle((x, place), column, scale, facecolor=colour))
        axes.text(x + column / 2, 100, f"{name}\n{size} rows", ha="center", color=colour)
        start = 8.0 + number * 18
        axes.add_patch(Rectangle((start, row - 16), 18, 5, facecolor=colour))
        arrow(axes, (x + column / 2, place), (start + 9, row - 10.5), colour)
    axes.text(35, -4, f"cos and sin of token {TOKEN}", ha="center", color=INK)
    axes.text(35, -11, "axis tables: 21 + 45 + 80 = 146 rows", ha="center", color=INK, weight="bold")
    axes.add_patch(Rectangle((76, 3), 20, 95, facecolor="white", edgecolor=INK, hatch="----", linewidth=0.8, alpha=0.6))
    for number, (_, _, colour) in enumerate(AXES):
        axes.add_patch(Rectangle((76 + number * 20 / 3, 3), 20 / 3, 95, facecolor=colour, alpha=0.25))
    axes.text(86, 100, "dense table", ha="center", color=INK)
    axes.text(86, -4, "21 x 45 x 80", ha="center", color=INK)
    axes.text(86, -11, "75,600 rows", ha="center", color=INK, weight="bold")


def draw_chain(axes: Axes, y: float, names: Sequence[str], replaced: Sequence[int]) -> None:
    """What queries go through, from left to right."""
    for number, name in enumerate(names):
        x = 12 + number * 25.0
        box(axes, x, y, (20, 13), name, PACKAGE if number in replaced else PALE)
        if number:
            arrow(axes, (x - 14.8, y), (x - 10.2, y))


def draw_attention(axes: Axes) -> None:
    """An attention module before and after the patch."""
    axes.set(xlim=(0, 100), ylim=(-14, 110))
    axes.text(2, 102, "unpatched, in each block and step", color=INK, weight="bold")
    draw_chain(axes, 62, ("to_q,\nto_k", "norm_q,\nnorm_k", "rotate\nmany passes", "attention"), ())
    box(axes, 62, 86, (40, 9), "dense table, built in each step")
    arrow(axes, (62, 81.3), (62, 69))
    axes.plot([0, 100], [48, 48], color=PALE)
    axes.text(2, 39, "patched", color=INK, weight="bold")
    draw_chain(axes, 3, ("to_q,\nto_k", "norm + rotate\none pass", "no table:\nskips", "attention"), (1,))
    box(axes, 62, 27, (62, 9), "processor runs on a proxy, without a table", PACKAGE)
    arrow(axes, (52, 22.3), (37, 10))
    axes.text(50, -11, "blue: dit_rope; all else is the model's own code", ha="center", color=INK)


def main() -> None:
    """Draws and writes the figure."""
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "how-it-works", "font.size": 9})
    figure, (tables, attention) = pyplot.subplots(1, 2, figsize=(10, 3.9), layout="constrained", width_ratios=(4, 5))
    for axes in (tables, attention):
        axes.axis("off")
    draw_tables(tables)
    draw_attention(attention)
    figure.savefig(PICTURE, metadata={"Date": None})
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
