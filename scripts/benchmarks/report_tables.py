"""The tables of the report: measured rows as cells of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from . import rope_modules, rotation, table_building
from .operator_counts import TABLE_FIGURES
from .report_text import find, times
from .results import Row


@dataclass(frozen=True)
class Table:
    """A caption, headings, lines of cells, of which the first ``words`` are text, and remarks below."""

    caption: str
    headings: Sequence[str]
    lines: Sequence[Sequence[str]]
    words: int = 1
    remarks: Sequence[str] = field(default=())


def table_tables(rows: list[Row]) -> list[Table]:
    """Builds, hits, rope modules and bytes."""
    return [_builds(rows), _hits(rows), _rope_modules(rows), *_bytes(rows)]


def rotation_table(rows: list[Row]) -> Table:
    """A line for each operation at each shape, and a column for each variant."""
    timed = [row for row in rows if "ms_median" in row]
    variants = list(dict.fromkeys(row["variant"] for row in timed))
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in timed:
        where = f"{row['shape']}\n{row['tokens']:,} x {row['heads']} x {row['head_dim']}"
        cell = f"{milliseconds(row, 'ms_')}\n{row['times_copy']:.2f}"
        if row.get("times_model") and row["variant"] not in (rotation.COPY, rotation.MODEL):
            cell += f" · {times(row['times_model'])}"
        lines.setdefault((where, row["dtype"], row["operation"]), {})[row["variant"]] = cell
    reasons = dict.fromkeys(f"{row['variant']}: {row['note']}" for row in rows if row.get("note"))
    return Table(
        "ms of q and k together; below, the multiple of the copy's time · times as fast as the model's code",
        ["shape\ntokens x heads x channels", "dtype", "operation", *variants],
        [[*where, *(cells.get(name, "") for name in variants)] for where, cells in lines.items()],
        words=3,
        remarks=[f"Left out: {reason}" for reason in reasons],
    )


def operator_table(rows: list[Row]) -> Table:
    """A line for each attention module."""
    first_before, before, first_after, after = TABLE_FIGURES
    return Table(
        "Kernels and bytes of one attention module, unpatched → patched",
        ["model", "module", "kernels", "bytes in queries", "minimum", "table kernels, first pass", "later passes"],
        [
            [
                row["model"],
                row["module"],
                f"{row['kernels_before']} → {row['kernels_after']}",
                f"{row['q_units_before']} → {row['q_units_after']}",
                row["q_units_minimum"],
                f"{row[first_before]} → {row[first_after]}",
                f"{row[before]} → {row[after]}",
            ]
            for row in rows
        ],
        words=2,
    )


def step_table(rows: list[Row]) -> Table:
    """A line for each variant of a step; the shares of the unpatched one below."""
    unpatched = rows[0]
    shares = {
        name.removeprefix("share_").replace("_", " "): unpatched[name]
        for name in unpatched
        if name.startswith("share_")
    }
    share_words = ", ".join(
        f"{name} {share:.1%}" for name, share in shares.items() if share is not None and name != "rope"
    )
    return Table(
        f"A denoising step of {unpatched['model']}, {unpatched['layers']} layers, {unpatched['grid']} tokens, "
        f"{unpatched['dtype']}",
        ["variant", "ms", "times as fast", "verdict", "first step, ms"],
        [
            [
                row["variant"] + (" (default)" if row["default"] else ""),
                milliseconds(row, "ms_"),
                f"{row['ratio']:.3f}",
                row["verdict"],
                number(row["ms_first"]),
            ]
            for row in rows
        ],
        remarks=[f"The unpatched step is: {share_words}."] if share_words else [],
    )


def milliseconds(row: Row, prefix: str = "") -> str:
    """A median with its 20th and 80th percentile."""
    low, middle, high = (number(row[f"{prefix}{which}"]) for which in ("p20", "median", "p80"))
    return f"{middle} ({low} to {high})"


def number(value: float | None) -> str:
    """Three figures, without an exponent; nothing for what was not measured."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def size(count: float) -> str:
    """Bytes in a unit that suits them."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= power:
            return f"{number(count / power)} {unit}"
    return f"{count:,.0f} B"


def _builds(rows: list[Row]) -> Table:
    names = (table_building.FULL, table_building.DENSE, table_building.AXES)
    builds = [row for row in rows if row["quantity"] == table_building.BUILD]
    lines = []
    for case in dict.fromkeys(row["case"] for row in builds):
        variant_rows = [row for name in names if (row := find(builds, case=case, variant=name))]
        cells = [
            milliseconds(row) + (f"\n{times(row['times_better'])}" if row is not variant_rows[0] else "")
            for row in variant_rows
        ]
        lines.append([case, f"{variant_rows[0]['tokens']:,}", *cells])
    return Table("Built from empty caches, ms, and how many times as fast", ["grid", "tokens", *names], lines)


def _hits(rows: list[Row]) -> Table:
    hit_rows = [row for row in rows if row["quantity"] in (table_building.HIT, table_building.RATE)]
    lines = [[row["variant"], f"{milliseconds(row)} {row['unit']}"] for row in hit_rows]
    return Table(
        "Found in the cache: one call, and calls per second of threads that share a table", ["call", ""], lines
    )


def _rope_modules(rows: list[Row]) -> Table:
    modules = [row for row in rows if row["quantity"] in (rope_modules.MODULE, rope_modules.MODULE_BYTES)]
    lines = []
    for case in dict.fromkeys(row["case"] for row in modules):
        unpatched, first, later = (
            find(modules, case=case, variant=name, unit="ms")
            for name in (rope_modules.EVERY_PASS, rope_modules.FIRST_PASS, rope_modules.LATER_PASSES)
        )
        dense, axes_row = (
            find(modules, case=case, variant=name, unit="bytes")
            for name in (rope_modules.EVERY_PASS, rope_modules.LATER_PASSES)
        )
        assert unpatched is not None
        assert first is not None
        assert later is not None
        assert dense is not None
        assert axes_row is not None
        speeds = [
            milliseconds(unpatched),
            milliseconds(first),
            f"{milliseconds(later)}\n{times(later['times_better'])}",
        ]
        lines.append([case, f"{unpatched['tokens']:,}", *speeds, size(dense["median"]), size(axes_row["median"])])
    headings = [
        "model", "tokens", rope_modules.EVERY_PASS, rope_modules.FIRST_PASS, rope_modules.LATER_PASSES,
        "bytes of its tables", "bytes held when patched",
    ]  # fmt: skip
    return Table("diffusers' own rope modules, ms in a forward pass", headings, lines)


def _bytes(rows: list[Row]) -> list[Table]:
    captions = {
        table_building.BYTES: ("Bytes of a table of 81 frames", "resolution"),
        table_building.ENTRIES: ("Bytes of a cache of 720p grids that differ in width", "grids"),
    }
    tables = []
    for quantity, (caption, heading) in captions.items():
        quantity_rows = [row for row in rows if row["quantity"] == quantity]
        lines = []
        for case in dict.fromkeys(row["case"] for row in quantity_rows):
            dense, axes_row = (
                find(quantity_rows, case=case, variant=v) for v in (table_building.FULL, table_building.AXES)
            )
            assert dense is not None
            assert axes_row is not None
            per_token = f"{axes_row['median'] / axes_row['tokens']:.2f}" if quantity == table_building.BYTES else ""
            lines.append(
                [case, size(dense["median"]), size(axes_row["median"]), times(axes_row["times_better"]), per_token]
            )
        headings = [heading, "dense", "axis tables", "times fewer", "bytes a token"]
        if quantity == table_building.ENTRIES:
            headings, lines = headings[:-1], [line[:-1] for line in lines]
        tables.append(Table(caption, headings, lines))
    return tables
