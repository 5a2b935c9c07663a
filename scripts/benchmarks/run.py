"""The sections of the benchmark, by the name that ``--only`` takes, and a run of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import torch

from dit_rope.tables.caches import cache_clear

from . import operator_counts, rope_modules, rotation, table_building
from .end_to_end import ARCHITECTURES, Mismatch, architecture_step, measure_step
from .results import Row
from .sections import Case, Settings, Wrong
from .timing import keep_freed_memory

STEP_MODEL, STEP_LAYERS = "wan-1.3b", 2
NARROW = {"num_attention_heads": 2, "ffn_dim": 64, "text_dim": 16, "freq_dim": 16}
"""Of the model in a quick run."""


def table_cases(settings: Settings) -> Iterator[Case]:
    """Ours against FastVideo's way to build, and diffusers' own rope modules."""
    yield from table_building.cases(settings)
    yield from rope_modules.cases(settings)


def step_cases(settings: Settings) -> Iterator[Case]:
    """A denoising step of Wan 1.3B: on a GPU all its layers at 480p and 81 frames, on a CPU two at a small grid."""
    yield Case(f"step of {STEP_MODEL}", functools.partial(_step_rows, settings))


TABLES = "tables"
SECTIONS: dict[str, Callable[[Settings], Iterator[Case]]] = {
    TABLES: table_cases,
    "rotation": rotation.cases,
    "operators": operator_counts.cases,
    "step": step_cases,
}


def cases(sections: Iterable[str], settings: Settings) -> list[tuple[str, Case]]:
    """Everything that a run of ``sections`` measures, in order, each with the name of its section."""
    return [(name, case) for name in sections for case in SECTIONS[name](settings)]


def measure(todo: Iterable[tuple[str, Case]], device: str, begin: Callable[[str], object]) -> dict[str, list[Row]]:
    """Runs cases one after the other, with no gradients, and leaves the caches empty.

    Tables get their memory as the C library hands it out, since those that are kept are built on fresh pages; from the
    first case of another section on, what is freed is kept for the next call.

    Args:
        todo: as :func:`cases` gives it.
        device: of its settings, which becomes the current one where it is a GPU: events and graphs are of that.
        begin: called with the label of each case before it runs.

    Returns:
        The rows of each section.

    Raises:
        Wrong: dit_rope gave a wrong result; nothing measured is returned.
    """
    if device != "cpu":
        torch.cuda.set_device(torch.device(device).index or 0)
    rows: dict[str, list[Row]] = {}
    try:
        with torch.no_grad():
            for name, case in todo:
                if name != TABLES:
                    keep_freed_memory()
                begin(case.label)
                rows.setdefault(name, []).extend(case.run())
    finally:
        cache_clear()
    return rows


def _step_rows(settings: Settings) -> list[Row]:
    architecture = ARCHITECTURES[STEP_MODEL]
    layers, grid = (None, (21, 30, 52)) if settings.device != "cpu" else (STEP_LAYERS, architecture.grid)
    if settings.quick:
        layers, grid = 1, (2, 4, 6)
    config = NARROW if settings.quick else None
    step = architecture_step(architecture, device=settings.device, layers=layers, grid=grid, config=config)
    try:
        rows = measure_step(step, rounds=max(3, settings.rounds // 2))
    except Mismatch as error:
        raise Wrong(str(error)) from error
    where = {"model": STEP_MODEL, "layers": layers or "all", "grid": "x".join(map(str, grid)), "dtype": "bfloat16"}
    return [{**where, **row} for row in rows]
