"""Writes everything in the repository that follows from the adapters: after a model was added or changed.

    python scripts/pages/regenerate.py  # known code, and the tables of models in README.md and docs/
    python scripts/pages/regenerate.py FluxTransformer2DModel  # also the operators of this class, which take a minute

The code of the installed diffusers is added to what is known. Operators are counted for the named class alone, by its
first example in ``tests/support/zoo``; the rows of other classes in ``scripts/results/operators.csv`` stay.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import RESULTS, read_csv, write_results
from dit_rope.adapters import adapter_named
from measure import count_operators
from pages import write_known_code, write_measured_tables, write_model_table


def count_operators_of(model_class: str) -> None:
    """Replaces the rows of one class in the results, and draws their picture again."""
    model = adapter_named(model_class).model
    examples = [example for example in count_operators.chosen([model_class], every=False) if example.model == model]
    others = [row for row in read_csv(RESULTS / "operators.csv") if row["model"] != model_class]
    counted = [row for example in examples for row in count_operators.measure(example)]
    count_operators.plot(read_csv(write_results("operators", [*others, *counted])))


def main(model_class: Annotated[str | None, typer.Argument(help="Name of a transformer class.")] = None) -> None:
    """Writes everything that follows from the adapters."""
    print(write_known_code.write(keep=True))
    if model_class is not None:
        count_operators_of(model_class)
    write_model_table.main()
    write_measured_tables.main()


if __name__ == "__main__":
    typer.run(main)
