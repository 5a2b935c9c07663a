"""Counts the graphs that torch.compile makes of every supported model, with and without the patch.

    python scripts/measure/count_graphs.py               # one example in tests/support/zoo of every class
    python scripts/measure/count_graphs.py flux wan      # these examples; writes nothing

Each model, and its repeated blocks where it names some, is compiled twice from the same weights and called at three
widths, where the example can be widened. A row holds the graphs there were after each call, as ``1 2 2``: a new width
that compiles nothing repeats the number before. Operators run one by one, without fusion, so that outputs of both are
the same to the bit where the patch leaves the model's own code to the compiler. Rows are written as they come, and a
run that was stopped goes on where it was, if versions and commit are the same. Writes
``scripts/results/compiled-graphs.csv``.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import torch
import typer

from dit_rope.models import ADAPTERS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from benchmarks.results import RESULTS, Row, environment, read_csv, write_results
from compiled_graphs import Compiled, compiled, equal
from zoo import EXAMPLES, Example

NAME = "compiled-graphs"
WIDTHS = (1, 2, 3)


def chosen(names: list[str]) -> list[Example]:
    """The examples called ``names``, or the first of every class that a patch knows."""
    supported = [example for example in EXAMPLES if any(adapter.model == example.model for adapter in ADAPTERS)]
    if names:
        return [example for example in supported if example.name in names]
    return list({example.model: example for example in reversed(supported)}.values())[::-1]


def both(example: Example, blocks: bool) -> tuple[Compiled, Compiled]:
    """Without and with the patch, at as many widths as the example has."""
    try:
        return compiled(example, WIDTHS, patched=False, blocks=blocks), compiled(
            example, WIDTHS, patched=True, blocks=blocks
        )
    except Exception:  # of a width that this model cannot have; what is wrong at its own width is raised below
        widths = WIDTHS[:1]
        return compiled(example, widths, patched=False, blocks=blocks), compiled(
            example, widths, patched=True, blocks=blocks
        )


def compiles(example: Example, blocks: bool) -> bool:
    """Whether the unpatched model runs compiled at the width of its example."""
    try:
        compiled(example, patched=False, blocks=blocks)
    except Exception:
        return False
    return True


def row(example: Example, blocks: bool) -> dict[str, object]:
    """Graphs and breaks of one example."""
    unpatched, patched = both(example, blocks)
    return {
        "example": example.name,
        "compiled": "repeated blocks" if blocks else "model",
        "graphs_unpatched": " ".join(map(str, unpatched.graphs)),
        "graphs_patched": " ".join(map(str, patched.graphs)),
        "break_reasons_unpatched": len(unpatched.breaks),
        "break_reasons_of_the_patch": len(patched.breaks - unpatched.breaks),
        "bitwise_equal": equal(patched, unpatched),
    }


def recorded_rows() -> list[Row]:
    """The rows that an interrupted run wrote on this machine, with these versions and this commit."""
    path, machine = RESULTS / f"{NAME}.csv", {name: str(value) for name, value in environment("cpu").items()}
    return [
        {name: value for name, value in row.items() if name not in machine}
        for row in (read_csv(path) if path.exists() else [])
        if machine.items() <= row.items()
    ]


def main(names: list[str] = typer.Argument(None)) -> None:  # noqa: B008
    """Counts, and writes a row for each model where none is named."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = [] if names else recorded_rows()
    for example in chosen(names or []):
        for blocks in (False, True) if getattr(example.model_class, "_repeated_blocks", None) else (False,):
            kind = "repeated blocks" if blocks else "model"
            if any((row["example"], row["compiled"]) == (example.name, kind) for row in rows):
                continue
            try:
                rows.append(row(example, blocks))
            except Exception as error:
                if not compiles(example, blocks):
                    typer.echo(f"{example.name}, {kind}, is not compiled without the patch either: {error!s:.80}")
                    continue
                raise
            typer.echo(", ".join(map(str, rows[-1].values())))
            if not names:
                write_results(NAME, rows)


if __name__ == "__main__":
    typer.run(main)
