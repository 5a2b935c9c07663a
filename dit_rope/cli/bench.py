"""``dit-rope bench``: runs the benchmark, which a checkout holds in ``scripts/benchmarks``."""

from __future__ import annotations

import typer

from .checkout import from_checkout


def run(context: typer.Context) -> None:
    """Measure tables, rotation, operators and a whole step on this machine; write CSV files and an HTML report.

    Needs a checkout: the benchmark is not part of the installed package.
    """
    from_checkout("benchmarks.__main__", "bench").app(args=context.args, prog_name="dit-rope bench")
