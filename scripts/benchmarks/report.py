"""The report: one page of HTML that says what was found, shows it, and names what brings nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import descriptions, figures, report_text
from .report_tables import Table, operator_table, rotation_table, step_table, table_tables
from .results import Row
from .rotation import GROWTH
from .sections import Settings

TEMPLATE = "report.html"


@dataclass(frozen=True)
class Part:
    """One section of the page.

    Attributes:
        name: of the section, which its CSV file has too.
        title: the finding, in a sentence.
        text: what was measured, and how.
        plots: captions and SVG.
        tables: of every figure.
        descriptions: the names of variants, and what each is.
        losses: where dit_rope gains nothing or is slower.
    """

    name: str
    title: str
    text: str
    plots: Sequence[tuple[str, str]]
    tables: Sequence[Table]
    descriptions: Mapping[str, str]
    losses: Sequence[str] = field(default=())


def write_report(path: Path, rows: Mapping[str, list[Row]], settings: Settings, machine: Row) -> Path:
    """Writes the page, which refers to no other file, and returns ``path``.

    Args:
        path: of the page; its folder is made.
        rows: of each section that was measured.
        settings: of the run.
        machine: what it ran on.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template(TEMPLATE).render(
        parts=list(parts(rows)), summary=summary(rows), machine=machine, settings=settings
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def summary(rows: Mapping[str, list[Row]]) -> list[str]:
    """One sentence for each section."""
    return [report_text.TITLES[name](section_rows) for name, section_rows in rows.items()]


def parts(rows: Mapping[str, list[Row]]) -> Iterator[Part]:
    """The sections that were measured, in order."""
    for name, section_rows in rows.items():
        plots, tables = _SHOWN[name](section_rows)
        variants = {str(row.get("variant", "")) for row in section_rows}
        described = {
            key: text for key, text in descriptions.VARIANTS[name].items() if key in variants or not variants - {""}
        }
        yield Part(
            name,
            report_text.TITLES[name](section_rows),
            descriptions.SECTIONS[name],
            plots,
            tables,
            described,
            report_text.LOSSES[name](section_rows),
        )


Shown = tuple[list[tuple[str, str]], list[Table]]


def _show_tables(rows: list[Row]) -> Shown:
    plots = [
        (
            "Building a table takes time with every token; axis tables take it with every line",
            figures.growth_of_builds(rows),
        ),
        (
            "diffusers' rope modules run in every forward pass; with the memo only the first builds",
            figures.rope_module_bars(rows),
        ),
        ("Axis tables grow with the sides of a video, dense ones with its volume", figures.cache_bytes(rows)),
    ]
    return plots, table_tables(rows)


def _show_rotation(rows: list[Row]) -> Shown:
    plots = [("Time over that of a copy, which nothing that writes its result can pass", figures.copy_ratios(rows))]
    if any(row["shape"] == GROWTH for row in rows):
        plots.append(
            (
                "Time grows with tokens for all; the distance between the lines is the gain",
                figures.growth_of_rotation(rows),
            )
        )
    return plots, [rotation_table(rows)]


def _show_operators(rows: list[Row]) -> Shown:
    return [("What an attention module moves besides its products", figures.operator_bars(rows))], [
        operator_table(rows)
    ]


def _show_step(rows: list[Row]) -> Shown:
    return [("A step, by what is patched; the line is the 20th to the 80th percentile", figures.step_bars(rows))], [
        step_table(rows)
    ]


_SHOWN = {"tables": _show_tables, "rotation": _show_rotation, "operators": _show_operators, "step": _show_step}
