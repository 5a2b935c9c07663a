"""The benchmark behind ``dit-rope bench`` and ``make bench``: CSV files, and one HTML report."""

from __future__ import annotations

import importlib.util
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dit_rope.cli.options import Device, pick_device

REQUIRED = ("jinja2", "matplotlib")
REPORT = "report.html"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


class Section(StrEnum):
    """What can be measured on its own."""

    tables = "tables"
    rotation = "rotation"
    operators = "operators"
    step = "step"


@app.command()
def run(
    device: Device = None,
    out: Annotated[Path, typer.Option(help="Folder for the report and a CSV file of each section.")] = Path(
        "bench-output"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: shows that it works, not how fast.")] = False,
    only: Annotated[
        list[Section] | None,
        typer.Option(metavar="SECTION", help=f"One of {', '.join(Section)}; repeat it for several. Default: all."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Timed rounds; half as many of a whole step.")] = 10,
) -> None:
    """Measure tables, rotation, operators and a whole step on this machine; write CSV files and an HTML report.

    Every variant is checked before it is timed: if one of dit_rope's is wrong, the run ends without a figure. Variants
    take turns.
    """
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise typer.BadParameter(f"{', '.join(missing)} must be installed: pip install 'dit-rope[bench]'")
    device = _usable(pick_device(device))
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"must be a folder, got the file {out}", param_hint="--out")
    from .report import summary, write_report
    from .results import environment, write_csv
    from .run import cases, measure
    from .sections import Settings, Wrong

    console = Console()
    settings = Settings(device, rounds, quick)
    chosen = [section for section in Section if not only or section in only]
    todo = cases(chosen, settings)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(todo))
        begun = iter(range(len(todo)))
        try:
            rows = measure(todo, device, lambda label: bar.update(task, completed=next(begun), description=label))
        except Wrong as error:
            bar.stop()
            console.print(f"{error}: no figures", style="red", markup=False, highlight=False)
            raise typer.Exit(1) from error
        bar.update(task, completed=len(todo), description="done")
    for name, section_rows in rows.items():
        write_csv(out / f"{name}.csv", section_rows, device)
    report = write_report(out / REPORT, rows, settings, environment(device))
    for line in summary(rows):
        console.print(line, markup=False, highlight=False)
    console.print(f"Wrote {', '.join(f'{name}.csv' for name in rows)} and {report}", highlight=False, soft_wrap=True)


def _usable(device: str) -> str:
    """The device, if it is a CPU or a CUDA device that is here; a CPU has no number."""
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise typer.BadParameter(f"must be cpu or a cuda device, got {device!r}", param_hint="--device") from error
    if kind.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"must be cpu or a cuda device, got {device!r}", param_hint="--device")
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(
            f"must be a device that torch sees, got {device!r}; it sees {torch.cuda.device_count()} CUDA devices",
            param_hint="--device",
        )
    return "cpu" if kind.type == "cpu" else device


if __name__ == "__main__":
    app(prog_name="benchmarks")
