"""What measured rows say, in words: a title for each section, and where nothing is gained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import rope_modules, rotation, table_building
from .end_to_end import UNPATCHED, WITHOUT
from .results import Row

GAIN = 1.05
"""Below this ratio a difference is none worth having."""


def find(rows: Sequence[Row], **values: Any) -> Row | None:
    """The first row with these values."""
    return next((row for row in rows if all(row.get(name) == value for name, value in values.items())), None)


def tables_title(rows: list[Row]) -> str:
    """How much faster the largest grid is built, and what it holds."""
    builds = [row for row in rows if row["quantity"] == table_building.BUILD]
    largest = max(builds, key=lambda row: int(row["tokens"]))["tokens"]
    faster = find(builds, tokens=largest, variant=table_building.AXES)
    axes_row = find(rows, quantity=table_building.BYTES, case="720p", variant=table_building.AXES)
    module_rows = [row for row in rows if row.get("variant") == rope_modules.LATER_PASSES and row["unit"] == "ms"]
    assert faster is not None
    assert axes_row is not None
    return (
        f"Tables: a grid of {largest:,} tokens is built {times(faster['times_better'])} as fast and one of 720p holds "
        f"{times(axes_row['times_better'])} fewer bytes; diffusers' rope modules take "
        f"{max(row['median'] for row in module_rows):.2g} ms or less once patched"
    )


def rotation_title(rows: list[Row]) -> str:
    """The ranges of dit_rope's times and of the models' own code, as multiples of a copy."""
    timed = [row for row in rows if "times_copy" in row and row["shape"] != rotation.GROWTH]
    fast = [row for row in timed if _is_fast(row)]
    model_rows = [row for row in timed if row["variant"] == rotation.MODEL]
    return (
        f"Rotation: {spread([row['times_copy'] for row in fast])} the time of a copy, with the norm or without; the "
        f"models' own code takes {spread([row['times_copy'] for row in model_rows])}"
    )


def operators_title(rows: list[Row]) -> str:
    """Kernels and bytes, over all modules."""
    kernels = [(int(row["kernels_before"]), int(row["kernels_after"])) for row in rows]
    ratios = [float(row["q_units_before"]) / float(row["q_units_after"]) for row in rows]
    before, after = zip(*kernels, strict=True)
    return (
        f"Operators: {min(before)} to {max(before)} kernels in an attention module become {min(after)} to "
        f"{max(after)}, and move {spread(ratios)} fewer bytes"
    )


def step_title(rows: list[Row]) -> str:
    """What the default patch gains of a step, and what any could."""
    default = next(row for row in rows if row["default"])
    most = f", of at most {default['ratio_at_most']:.2f}x" if default["ratio_at_most"] else ""
    return (
        f"Whole step: {default['ratio']:.2f}x as fast with the default patch{most} "
        f"({default['verdict']}: {default['ms_median']:,.0f} ms)"
    )


def table_losses(rows: list[Row]) -> list[str]:
    """Builds and bytes that are not better than upstream's."""
    gaining = (table_building.DENSE, table_building.AXES, rope_modules.FIRST_PASS, rope_modules.LATER_PASSES)
    worse = [row for row in rows if row["variant"] in gaining and row["times_better"] and row["times_better"] < GAIN]
    return [
        f"{row['case']}: {row['variant']}: {1 / row['times_better']:.2f}x the "
        f"{'bytes' if row['unit'] == 'bytes' else 'time'} of what upstream builds"
        for row in worse
    ]


def rotation_losses(rows: list[Row]) -> list[str]:
    """Variants of dit_rope that the model's own code or a peer matches or beats."""
    lines = []
    for row in rows:
        where = f"{row['shape']}, {row['tokens']:,} tokens, {row['dtype']}, {row['operation']}: {row['variant']}"
        if row.get("times_best_peer") and row["times_best_peer"] < GAIN:
            lines.append(f"{where} is {row['times_best_peer']:.2f}x as fast as {row['best_peer']}")
    return lines


def operator_losses(rows: list[Row]) -> list[str]:
    """Modules that move far more than they must even when they are patched, and first passes that run more kernels."""
    lines = []
    for row in rows:
        after, least = float(row["q_units_after"]), float(row["q_units_minimum"])
        if after > 1.5 * least:
            lines.append(
                f"{row['model']}, {row['module']}: patched it still moves {after / least:.1f}x the minimum, such as to "
                "join text and image"
            )
        if int(row["table_kernels_after_first"]) > int(row["table_kernels_before_first"]):
            lines.append(
                f"{row['model']}: the first pass builds tables with {row['table_kernels_after_first']} kernels instead "
                f"of {row['table_kernels_before_first']}; later ones with {row['table_kernels_after_second']}"
            )
    return list(dict.fromkeys(lines))


def step_losses(rows: list[Row]) -> list[str]:
    """Variants that are not faster than the unpatched step by more than the spread."""
    lines = [
        f"{row['variant']}: {row['verdict']} ({row['ratio']:.3f}x)"
        for row in rows
        if row["variant"] not in (UNPATCHED, WITHOUT) and row["verdict"] != "faster"
    ]
    most = rows[0]["ratio_at_most"]
    if most:
        lines.append(f"no patch of the rotary embedding can pass {most:.2f}x here: the rest of a step is the same work")
    return lines


TITLES: dict[str, Callable[[list[Row]], str]] = {
    "tables": tables_title,
    "rotation": rotation_title,
    "operators": operators_title,
    "step": step_title,
}
LOSSES: dict[str, Callable[[list[Row]], list[str]]] = {
    "tables": table_losses,
    "rotation": rotation_losses,
    "operators": operator_losses,
    "step": step_losses,
}


def times(ratio: float) -> str:
    """A ratio with three figures."""
    return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.3g}x"


def spread(ratios: Sequence[float]) -> str:
    """The least and the largest of some ratios."""
    low, high = times(min(ratios)), times(max(ratios))
    return low if low == high else f"{low} to {high}"


def _is_fast(row: Row) -> bool:
    name = str(row["variant"])
    return name.startswith("dit_rope") and not name.endswith(rotation.EXACT)
