"""The plots of the report, as SVG that stands in a page of HTML."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from . import rope_modules, rotation, table_building
from .end_to_end import UNPATCHED, WITHOUT
from .results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PACKAGE, PACKAGE_EXACT, THEIRS, COMPILED, LIMIT = "#1f5fae", "#7fb2e5", "#b9bec7", "#7d8590", "#111111"
OTHERS = ("#d98b2b", "#4f9d69", "#a4558c", "#c2574b", "#8a7a3d")


def growth_of_builds(rows: Sequence[Row]) -> str:
    """Time to build against tokens, log axes."""
    figure, (axes,) = _figure(1, 3.6)
    builds = [row for row in rows if row["quantity"] == table_building.BUILD]
    styles = {table_building.FULL: THEIRS, table_building.DENSE: PACKAGE_EXACT, table_building.AXES: PACKAGE}
    for name, color in styles.items():
        _line(axes, [row for row in builds if row["variant"] == name], "tokens", "", color, name)
    _log(axes, "x", "y")
    axes.set(xlabel="tokens of the grid", ylabel="ms to build")
    axes.legend(frameon=False)
    return _svg(figure)


def cache_bytes(rows: Sequence[Row]) -> str:
    """Bytes by resolution, and by the number of entries."""
    figure, panels = _figure(2, 3.4)
    kinds = ((table_building.BYTES, "resolution, 81 frames"), (table_building.ENTRIES, "grids in the cache"))
    for axes, (quantity, label) in zip(panels, kinds, strict=True):
        for name, color in ((table_building.FULL, THEIRS), (table_building.AXES, PACKAGE)):
            variant_rows = [row for row in rows if (row["quantity"], row["variant"]) == (quantity, name)]
            shown = "as dense tables" if name == table_building.FULL else "as axis tables"
            axes.plot(
                [row["case"] for row in variant_rows],
                [row["median"] for row in variant_rows],
                "o-",
                color=color,
                label=shown,
            )
        _log(axes, "y", text=lambda count: f"{count / 1e6:,g} MB")
        axes.set(xlabel=label)
    panels[0].legend(frameon=False)
    return _svg(figure)


def rope_module_bars(rows: Sequence[Row]) -> str:
    """Time of diffusers' rope modules, unpatched, in the first patched pass and in later ones."""
    names = (rope_modules.EVERY_PASS, rope_modules.FIRST_PASS, rope_modules.LATER_PASSES)
    module_rows = [row for row in rows if row["quantity"] == rope_modules.MODULE]
    values = {name: {r["case"]: r["median"] for r in module_rows if r["variant"] == name} for name in names}
    figure, (axes,) = _figure(1, 4.0)
    _bars(axes, values, dict(zip(names, (THEIRS, PACKAGE_EXACT, PACKAGE), strict=True)))
    _log(axes, "x")
    axes.set(xlabel="ms in a forward pass")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return _svg(figure)


def copy_ratios(rows: Sequence[Row]) -> str:
    """Time as a multiple of the copy's, a panel for each operation."""
    timed = [row for row in rows if "times_copy" in row and row["shape"] != rotation.GROWTH]
    variants = list(dict.fromkeys(row["variant"] for row in timed if row["variant"] != rotation.COPY))
    colors = variant_colors(variants)
    panels = {"rotation alone": False, "norm and rotation": True}
    shapes = max(
        len({_shape(row) for row in timed if ("norm" in row["operation"]) == norm}) for norm in panels.values()
    )
    figure, both = _figure(2, 1.4 + 0.17 * shapes * (len(variants) + 1))
    for axes, (title, norm) in zip(both, panels.items(), strict=True):
        chosen = [row for row in timed if ("norm" in row["operation"]) == norm]
        values = {n: {_shape(row): row["times_copy"] for row in chosen if row["variant"] == n} for n in variants}
        _bars(axes, {name: bars for name, bars in values.items() if bars}, colors)
        axes.axvline(1.0, color=LIMIT, linewidth=1.2)
        _log(axes, "x")
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("times a copy of q and k (line: the copy)")
    handles = {name: bar for axes in both for bar, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    return _svg(figure)


def growth_of_rotation(rows: Sequence[Row]) -> str:
    """Time to rotate against tokens, log axes."""
    growth = [row for row in rows if row["shape"] == rotation.GROWTH and "ms_median" in row]
    names = list(dict.fromkeys(row["variant"] for row in growth))
    colors = variant_colors(names)
    figure, (axes,) = _figure(1, 3.6)
    for name in names:
        _line(axes, [row for row in growth if row["variant"] == name], "tokens", "ms_", colors[name], name)
    _log(axes, "x", "y")
    axes.set(xlabel="tokens of 12 heads of 128 channels, bfloat16", ylabel="ms for q and k")
    axes.legend(frameon=False)
    return _svg(figure)


def operator_bars(rows: Sequence[Row]) -> str:
    """Bytes that attention modules move besides products, before and after, and the least possible."""
    labels = [f"{row['model']}\n{row['module'].replace('.*.', ' ')}" for row in rows]
    before, after = ([float(row[f"q_units_{which}"]) for row in rows] for which in ("before", "after"))
    least = [float(row["q_units_minimum"]) for row in rows]
    figure, (axes,) = _figure(1, 1.3 + 0.5 * len(rows))
    axes.barh(labels, before, height=0.7, color=THEIRS, label="unpatched")
    axes.barh(labels, after, height=0.7, color=PACKAGE, label="patched")
    axes.scatter(least, labels, marker="|", s=160, color=LIMIT, linewidths=2, label="minimum", zorder=3)
    for row, size, label in zip(rows, before, labels, strict=True):
        text = f"{row['kernels_before']} → {row['kernels_after']} kernels"
        axes.annotate(text, (size, label), (5, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.set(xlabel="bytes moved besides projections and product, in units of one query", xlim=(0, 1.25 * max(before)))
    axes.legend(frameon=False, loc="lower right")
    return _svg(figure)


def step_bars(rows: Sequence[Row]) -> str:
    """Time of a step by what is patched, with the 20th to 80th percentile."""
    labels = [row["variant"] + (" (default)" if row["default"] else "") for row in rows]
    medians = [row["ms_median"] for row in rows]
    spread = [[row["ms_median"] - row["ms_p20"] for row in rows], [row["ms_p80"] - row["ms_median"] for row in rows]]
    figure, (axes,) = _figure(1, 1.2 + 0.4 * len(rows))
    special = {UNPATCHED: THEIRS, WITHOUT: "#e4e7ec"}
    axes.barh(labels, medians, height=0.65, color=[special.get(row["variant"], PACKAGE) for row in rows])
    axes.errorbar(medians, labels, xerr=spread, fmt="none", ecolor=LIMIT, elinewidth=1, capsize=3)
    for label, row in zip(labels, rows, strict=True):
        axes.annotate(f"{row['ratio']:.2f}x", (row["ms_p80"], label), (7, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.set(xlabel="ms of a denoising step", xlim=(0, 1.12 * max(row["ms_p80"] for row in rows)))
    return _svg(figure)


def variant_colors(names: Sequence[str]) -> dict[str, str]:
    """One color for each variant: blue for dit_rope, grey for the models' own code, black for the copy."""
    fixed = {rotation.COPY: LIMIT, rotation.MODEL: THEIRS, rotation.COMPILED: COMPILED}
    others = iter(OTHERS * (1 + len(names) // len(OTHERS)))
    colors = {}
    for name in names:
        color = PACKAGE_EXACT if name.endswith(rotation.EXACT) else PACKAGE
        colors[name] = fixed.get(name) or (color if name.startswith("dit_rope") else next(others))
    return colors


def _shape(row: Row) -> str:
    return f"{row['shape']}\n{row['tokens']:,} x {row['heads']} x {row['head_dim']}, {row['dtype']}"


def _line(axes: Axes, rows: Sequence[Row], x: str, prefix: str, color: str, label: str) -> None:
    ordered = sorted(rows, key=lambda row: float(row[x]))
    points = [row[x] for row in ordered]
    axes.plot(points, [row[f"{prefix}median"] for row in ordered], "o-", color=color, label=label, markersize=4)
    low, high = ([row[f"{prefix}{which}"] for row in ordered] for which in ("p20", "p80"))
    axes.fill_between(points, low, high, color=color, alpha=0.2, linewidth=0)


def _bars(axes: Axes, values: Mapping[str, Mapping[str, float]], colors: Mapping[str, str]) -> None:
    """Groups of horizontal bars, from the top: one group for each key of the inner mappings."""
    groups = list(dict.fromkeys(group for lengths in values.values() for group in lengths))
    height = 0.84 / max(1, len(values))
    for number, (name, lengths) in enumerate(values.items()):
        places = [groups.index(group) - 0.42 + height * (number + 0.5) for group in lengths]
        bars = axes.barh(places, list(lengths.values()), height=0.92 * height, color=colors[name], label=name)
        axes.bar_label(bars, [f"{value:.3g}" for value in lengths.values()], padding=3, fontsize=7.5)
    axes.set_yticks(range(len(groups)), groups)
    axes.invert_yaxis()
    axes.margins(x=0.12)


def _log(axes: Axes, *which: str, text: Callable[[float], str] = lambda value: f"{value:,g}") -> None:
    """Makes axes logarithmic, with powers of ten written out."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for letter in which:
        getattr(axes, f"set_{letter}scale")("log")
        axis = getattr(axes, f"{letter}axis")
        axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
        axis.set_minor_formatter(NullFormatter())


def _figure(columns: int, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, height), layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8.5)
    return figure, list(panels)


def _svg(figure: Figure) -> str:
    """The figure as one ``<svg>`` element without a fixed size, with texts as text and without references to files."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )
