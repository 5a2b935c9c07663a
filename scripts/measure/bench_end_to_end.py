"""Times whole denoising steps unpatched and patched, by what is patched, and the most that a patch can gain.

    python scripts/measure/bench_end_to_end.py                   # five architectures, full width, a layer of each kind
    python scripts/measure/bench_end_to_end.py wan-1.3b --grid 5x30x52 --layers 2 --dtype bfloat16
    python scripts/measure/bench_end_to_end.py samples/tiny-wan --prompt "a red circle" --size 96x96 --frames 17
    python scripts/measure/bench_end_to_end.py wan-1.3b flux --device cuda --released   # all layers, the released size

A name of an architecture stands for random weights, which take as long as trained ones; anything else is the folder or
the hub id of a pipeline, whose own calls are recorded and run again. Outputs are compared before anything is timed:
exact variants, and tables alone, must give the bits of the unpatched model, fast ones must be as close as roundings of
queries and keys allow. ``without rope`` is the model without tables, rotation and norms of queries and keys: no patch
of these can be faster. Runs of 50 steps with guidance and of 4 without are computed from one pass that finds no table
and the others that do.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dit_rope.cli.options import DType, parse_sizes
from dit_rope.patching import UnsupportedModelError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.end_to_end import (
    ARCHITECTURES,
    Mismatch,
    Step,
    architecture_step,
    measure_step,
    pipeline_step,
    runs,
    whole_run,
)
from benchmarks.results import write_results
from benchmarks.step_profile import KINDS
from benchmarks.timing import keep_freed_memory

SECOND_GRIDS = {"wan-1.3b": (3, 15, 26)}
RELEASED_GRIDS = {
    "wan-1.3b": (21, 30, 52),
    "hunyuan-video": (33, 45, 80),
    "flux": (1, 64, 64),
    "ltx": (21, 16, 24),
    "qwen-image": (1, 64, 64),
}
"""480p and 81 frames; 720p and 129; 1,024 x 1,024 pixels; 512 x 768 and 161 frames; 1,024 x 1,024."""
RELEASED_TEXT = {"wan-1.3b": 512, "hunyuan-video": 256, "flux": 512, "ltx": 128, "qwen-image": 128}
SCENARIOS = ((50, True), (4, False))
"""Steps, and whether they are guided."""


@dataclass(frozen=True)
class Options:
    """What to run of each target."""

    device: str
    layers: int | None
    grid: tuple[int, ...] | None
    released: bool
    rounds: int
    compiled: tuple[bool, ...]
    call: dict[str, Any]


def main(
    targets: Annotated[
        list[str] | None, typer.Argument(help=f"Of {', '.join(ARCHITECTURES)}; or folders or hub ids of pipelines.")
    ] = None,
    device: Annotated[str, typer.Option(help="Torch device.")] = "cpu",
    dtype: Annotated[list[DType] | None, typer.Option(help="Default: bfloat16 and float32.")] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers of each kind.")] = 1,
    grid: Annotated[str | None, typer.Option(help="Tokens: FRAMESxHEIGHTxWIDTH after patching.")] = None,
    released: Annotated[bool, typer.Option("--released", help="All layers, and the size of the release.")] = False,
    rounds: Annotated[int, typer.Option(min=3, help="Timed passes of each variant.")] = 5,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Also under torch.compile.")] = True,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    prompt: Annotated[str, typer.Option(help="Of pipelines.")] = "a red circle moving right",
    size: Annotated[str | None, typer.Option(help="Of pipelines, in pixels: HEIGHTxWIDTH.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Of pipelines.")] = None,
) -> None:
    """Compare, time and print every variant; write results/end-to-end-<cpu or cuda>.csv."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device).index or 0)  # which the clock waits for
    call: dict[str, Any] = {"prompt": prompt}
    if size is not None:
        call |= dict(zip(("height", "width"), parse_sizes(size, "--size", ("HEIGHT", "WIDTH")), strict=True))
    if frames is not None:
        call["num_frames"] = frames
    if grid is not None and released:
        raise typer.BadParameter(
            f"must not stand beside --released, which has its own, got {grid}", param_hint="--grid"
        )
    tokens = None if grid is None else parse_sizes(grid, "--grid", ("FRAMES", "HEIGHT", "WIDTH"))
    both = (False, True) if compiled else (False,)
    options = Options(device, None if released else layers, tokens, released, rounds, both, call)
    dtypes = dtype or [DType.bfloat16, DType.float32]
    rows: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    with Progress(*columns, console=console, transient=True) as bar:
        for target in targets or ARCHITECTURES:
            for dtype in dtypes:
                rows_of_target = measure(target, dtype, options, bar)
                rows += rows_of_target
                show(rows_of_target, console)
    console.print(str(write_results(f"end-to-end-{device.partition(':')[0]}", rows, device)), highlight=False)


def measure(target: str, dtype: DType, options: Options, bar: Progress) -> list[dict[str, Any]]:
    """The rows of one target in one dtype.

    Raises:
        typer.BadParameter: the target does not exist, or has no model that can be patched.
        SystemExit: outputs differ.
    """
    rows: list[dict[str, Any]] = []
    for about, step, scenarios in steps_of(target, dtype, options):
        # Compiled, a patched model runs the same code at any size, and one is enough to see it.
        for compiled in options.compiled if not rows else (False,):
            mode = "compiled" if compiled else "eager"
            task = bar.add_task(f"{target} {dtype} {mode}", total=runs(step, options.rounds, compiled))
            try:
                timed = measure_step(
                    step, rounds=options.rounds, compiled=compiled, advance=lambda task=task: bar.advance(task)
                )
            except Mismatch as error:
                raise SystemExit(f"{target} in {dtype}, {mode}: {error}: no figures") from error
            bar.remove_task(task)
            for scenario, passes in scenarios:
                rows += [
                    {**about, "dtype": str(dtype), "mode": mode, **scenario, "passes": passes, **row}
                    for row in whole_run(timed, passes)
                ]
    return rows


def steps_of(
    target: str, dtype: DType, options: Options
) -> Iterator[tuple[dict[str, Any], Step, list[tuple[dict[str, Any], int]]]]:
    """What rows say of a step, the step, and the runs it stands for, each with its number of passes."""
    architecture = ARCHITECTURES.get(target)
    if architecture is None:
        step = recorded(target, dtype, options)
        about = {"model": target, "layers": "", "grid": "", "batch": ""}
        yield about, step, [({"steps": count, "guided": "as called"}, count) for count, _ in SCENARIOS]
        return
    grids = [options.grid or (RELEASED_GRIDS[target] if options.released else architecture.grid)]
    if options.grid is None and not options.released and target in SECOND_GRIDS:
        grids.append(SECOND_GRIDS[target])
    for grid in grids:
        scenarios: dict[int, list[tuple[dict[str, Any], int]]] = {}
        for count, guided in SCENARIOS:
            passes, batch = architecture.guided(guided)
            scenarios.setdefault(batch, []).append(({"steps": count, "guided": guided}, count * passes))
        for batch, scenarios_of_batch in scenarios.items():
            step = architecture_step(
                architecture,
                device=options.device,
                dtype=dtype.torch,
                layers=options.layers,
                grid=grid,
                text=RELEASED_TEXT[target] if options.released else None,
                batch=batch,
            )
            layers = options.layers or "all"
            yield (
                {"model": target, "layers": layers, "grid": "x".join(map(str, grid)), "batch": batch},
                step,
                scenarios_of_batch,
            )


def recorded(target: str, dtype: DType, options: Options) -> Step:
    """The calls of a pipeline.

    Raises:
        typer.BadParameter: there is none, it brings code, or nothing in it can be patched.
    """
    from diffusers import DiffusionPipeline

    code = sorted(path.name for pattern in ("*.py", "*/*.py") for path in Path(target).glob(pattern))
    if code:
        raise typer.BadParameter(f"must have no code of its own, got {', '.join(code)}", param_hint="TARGETS")
    try:
        pipe = DiffusionPipeline.from_pretrained(
            target, torch_dtype=dtype.torch, use_safetensors=True, trust_remote_code=False
        ).to(options.device)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator("cpu").manual_seed(0)
        return pipeline_step(pipe, **options.call, generator=generator)
    except (OSError, UnsupportedModelError) as error:
        raise typer.BadParameter(
            f"must be of {', '.join(ARCHITECTURES)}, or a folder or hub id of a pipeline, got {target}: {error}",
            param_hint="TARGETS",
        ) from error


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Prints a table for each step and mode, and where the time of the unpatched step goes."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("model", "dtype", "mode", "layers", "grid", "batch"))
        groups.setdefault(key, []).append(row)
    for (model, dtype, mode, layers, grid, batch), group in groups.items():
        size = f", layers: {layers}, {grid} tokens, batch {batch}" if grid else ""
        title = f"{model}, {dtype}, {mode}{size}"
        table = Table("", "ms a pass", "p20 to p80", "times as fast", "", title=title, title_justify="left")
        runs_of = {(row["steps"], row["guided"]): row for row in group if row["default"]}
        first = group[: len(group) // len(runs_of)]
        for row in first:
            ratio = f"{row['ratio']:.3f}" + (" (no patch gains more)" if row["variant"] == "without rope" else "")
            spread = f"{row['ms_p20']:.1f} to {row['ms_p80']:.1f}"
            name = row["variant"] + (", the default" if row["default"] else "")
            table.add_row(name, f"{row['ms_median']:.1f}", spread, ratio, row["verdict"])
        console.print(table)
        whole = [f"{count} steps{_guided(guided)}: {row['run_ratio']:.3f}" for (count, guided), row in runs_of.items()]
        console.print(f"whole runs by default, times as fast: {'; '.join(whole)}", highlight=False)
        shares = {kind: first[0][f"share_{kind.replace(' ', '_')}"] for kind in KINDS}
        if None not in shares.values():
            words = ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in shares.items())
            console.print(f"unpatched: {words}", highlight=False)
            rope = first[0]["share_rope"]
            console.print(f"rope: {100 * rope:.1f} %, so at most {_most(rope)} times as fast\n", highlight=False)


def _guided(guided: bool | str) -> str:
    return f" ({guided})" if isinstance(guided, str) else f" {'with' if guided else 'without'} guidance"


def _most(share: float) -> str:
    return f"{1 / (1 - share):.3f}" if share < 1 else str(math.inf)


if __name__ == "__main__":
    typer.run(main)
