"""Counts the operators of attention modules, and the bytes they move, before and after a patch.

    python scripts/measure/count_operators.py  # every supported class, by its first example in tests/support/zoo
    python scripts/measure/count_operators.py --all  # every example; writes nothing
    python scripts/measure/count_operators.py Wan Flux  # classes whose name holds one of these; writes nothing

Models have released widths with one layer of each kind, run in bfloat16 on CPU, unpatched and with
``dit_rope.patch(model, exact=False)``, as on a GPU. Counted is the second of two forward passes, in one attention
module of each path that rotates: all of it but GEMMs and the attention product, as
``scripts/benchmarks/operator_counter.py`` says. The building of tables, and what converts them to axis tables, is
counted apart, in both passes.

The unit of bytes is one query of the module in bfloat16, as the attention product is given it, or, in linear attention,
as it is when it rotates. The minimum beside it is to read and write queries and keys once, and to read the tables once.
What else happens in the module, such as the concatenation of text and image, is in the counts and not in the minimum.
Sizes are those of the examples, mostly two samples of 30 tokens of image and 7 of text: a longer video has a smaller
part of text, which many models do not rotate.

Writes ``scripts/results/operators.csv`` and ``docs/operators.svg``; both come out the same at every run.
"""

from __future__ import annotations

import re
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib import pyplot
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils import _pytree as pytree

import dit_rope
from dit_rope.adapters import adapter_of
from dit_rope.models import ADAPTERS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from benchmarks.operator_counts import FIGURES, TABLE_FIGURES, constant_weights, count_patched
from benchmarks.results import Row, write_results
from zoo import EXAMPLES, Example, Noise, wan

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "operators.svg"
DTYPE = torch.bfloat16
LONGEST_BAR = 150  # units; a longer bar is cut off
NEW_IN_EACH_STEP = ("hidden_states", "audio_hidden_states", "x", "timestep", "t")


def measure(example: Example) -> list[Row]:
    """One row for each path of attention modules that rotates; one without figures where none does.

    Raises:
        ValueError: no adapter knows the example's class.
    """
    dit_rope.cache_clear()
    with constant_weights():
        model = example.build(DTYPE, released=True)
    adapter = adapter_of(model)
    if adapter is None:
        raise ValueError(f"example must be of a class that an adapter knows, got {example.name}")
    inputs = inputs_of(example, model)

    def forward() -> None:
        new = {name: inputs[name] for name in NEW_IN_EACH_STEP if name in inputs}
        example.run(model, {**inputs, **pytree.tree_map_only(torch.Tensor, torch.clone, new)})

    counted = count_patched(model, forward)
    tables = dict(zip(TABLE_FIGURES, counted.tables, strict=True))
    return [
        {"model": adapter.model_class, "example": example.name, "module": stem, **figures, **tables,
         "diffusers": version("diffusers")}
        for stem, figures in (counted.modules or {"": dict.fromkeys(FIGURES, "")}).items()
    ]  # fmt: skip


def inputs_of(example: Example, model: torch.nn.Module) -> dict[str, Any]:
    """Inputs of one forward pass: 480 tokens of the Wan family, whose small examples have one prompt and few tokens."""
    sizes = {"frames": 5, "height": 16, "width": 24}
    return wan.inputs(model, Noise(DTYPE), **sizes) if example in wan.EXAMPLES else example.inputs(model, Noise(DTYPE))


def chosen(names: list[str], every: bool) -> list[Example]:
    """Examples of supported classes whose name holds one of ``names``, the first of each class or all of them.

    Raises:
        typer.BadParameter: there are none.
    """
    supported = [adapter.model for adapter in ADAPTERS]
    examples = [
        example
        for example in EXAMPLES
        if example.model in supported
        and (not names or any(name.lower() in example.model.rpartition(".")[2].lower() for name in names))
    ]
    if not examples:
        raise typer.BadParameter(f"NAMES must be parts of supported classes' names, got {', '.join(names)}")
    first = {example.model: example for example in reversed(examples)}
    return [example for example in examples if every or first[example.model] is example]


def without_example() -> list[Row]:
    """Rows without figures for classes that cannot run here, such as one that needs torchvision."""
    run = {example.model for example in EXAMPLES}
    blank = dict.fromkeys(("example", "module", *FIGURES, *TABLE_FIGURES), "")
    missing = [adapter.model_class for adapter in ADAPTERS if adapter.model not in run]
    return [{"model": name, **blank, "diffusers": version("diffusers")} for name in missing]


def show(rows: list[Row]) -> None:
    """Prints what changes, and to what."""
    table = Table("class", "example", "module", title="from unpatched to patched")
    for heading in ("kernels", "q-units", "minimum", "table kernels, first step", "second step"):
        table.add_column(heading, justify="right")
    for row in rows:
        pairs = [f"{row[a]} → {row[b]}" for a, b in ((FIGURES[0], FIGURES[1]), (FIGURES[2], FIGURES[3]))]
        tables = [f"{row[a]} → {row[b]}" for a, b in zip(TABLE_FIGURES[:2], TABLE_FIGURES[2:], strict=True)]
        named = [str(row[column]) for column in ("model", "example", "module")]
        table.add_row(*named, *(pairs if row["module"] else ["", ""]), str(row[FIGURES[4]]), *tables)
    console = Console()
    (console if console.is_terminal else Console(width=210)).print(table)


def plot(rows: list[Row]) -> None:
    """Draws one module of each class, that which moves most; classes with the same figures share a bar."""
    most: dict[str, Row] = {}
    for row in rows:
        if row["module"] and _moved(most.get(row["model"], row)) <= _moved(row):
            most[row["model"]] = row
    bars: dict[tuple[Any, ...], list[str]] = {}
    for name, row in most.items():
        bars.setdefault(tuple(row[column] for column in FIGURES[:5]), []).append(_short(name))
    figures = sorted(bars, key=lambda bar: (float(bar[2]), bars[bar]))
    labels = [textwrap.fill(", ".join(bars[bar]), 60) for bar in figures]
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "operators", "font.size": 9})
    figure, axes = pyplot.subplots(figsize=(9, 1.4 + 0.24 * len(figures)), layout="constrained")
    before, after, least = ([float(bar[index]) for bar in figures] for index in (2, 3, 4))
    end = 1.05 * max(size for size in before if size <= LONGEST_BAR)
    axes.barh(labels, before, height=0.8, color="#d5d9e0", label="unpatched")
    axes.barh(labels, after, height=0.8, color="#2f6db5", label="patched")
    axes.scatter(least, labels, marker="|", s=90, color="black", linewidths=1.6, label="minimum", zorder=3)
    for label, size, bar in zip(labels, before, figures, strict=True):
        text = f"{bar[0]} → {bar[1]} kernels" + (f", {bar[2]} → {bar[3]} units" if size > end else "")
        inside = {"ha": "right", "color": "white"} if size > end else {}
        axes.annotate(text, (min(size, end), label), (4, 0), textcoords="offset points", va="center", **inside)
    axes.set(xlabel="bytes moved in an attention module\nbesides projections and product, in units of one query")
    axes.set(xlim=(0, 1.2 * end), ylim=(-0.7, len(figures) - 0.3))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(*([legend[1], legend[2], legend[0]] for legend in axes.get_legend_handles_labels()), loc="lower right")
    figure.savefig(PICTURE, metadata={"Date": None})
    pyplot.close(figure)


def _moved(row: Row) -> float:
    return float(row["q_units_before"]) * int(row["unit_bytes"])


def _short(model_class: str) -> str:
    return re.sub(r"(Transformer)?(1D|2D|3D)?(Transformer)?(Model)?$", "", model_class)


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Parts of class names. Default: all.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every example, not the first of each class.")] = False,
) -> None:
    """Counts operators and bytes of attention modules, unpatched and patched."""
    examples = chosen(names or [], every)
    progress = track(examples, "counting", transient=True, console=Console(stderr=True))
    rows = [row for example in progress for row in measure(example)]
    show(rows)
    if not names and not every:
        rows += without_example()
        plot(rows)
        print(f"wrote {PICTURE} and {write_results('operators', rows)}")


if __name__ == "__main__":
    typer.run(main)
