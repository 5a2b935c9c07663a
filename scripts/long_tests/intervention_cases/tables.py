"""The tables of a run: counts by intervention and outcome, and the reasons of refusals."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from . import judge
from .core import INTERVENTIONS
from .runner import Row

_VARIES = re.compile(r"\b[\w.]*\.\d+[\w.]*|\d+(\.\d+)?|\bgot .*")


def counts(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One row for each intervention and mode: cases by outcome, and in how many something was rotated here."""
    all_rows = list(rows)
    table = []
    for intervention in INTERVENTIONS:
        intervention_rows = [row for row in all_rows if row.intervention == intervention.name]
        changed = {row.example for row in intervention_rows if row.changed}
        for mode in ("exact", "fast"):
            cases = [row for row in intervention_rows if row.mode in (mode, "")]
            if not cases:
                continue
            kinds = Counter(row.outcome for row in cases)
            table.append(
                {
                    "group": intervention.group,
                    "intervention": intervention.name,
                    "mode": mode,
                    "examples": len({row.example for row in cases}),
                    "cases": len(cases),
                    **{outcome: kinds[outcome] for outcome in judge.OUTCOMES},
                    "rotated here": sum(row.rotated > 0 for row in cases),
                    "changes the unpatched model on": len(changed) if intervention.changes else "",
                }
            )
    return table


def reasons(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Why cases were refused, not judged, or not applicable, and how many."""
    kinds = (judge.REFUSED, judge.REFUSED_LATE, judge.NOT_JUDGED, judge.NOT_APPLICABLE)
    counts = Counter(
        (row.outcome, row.intervention, row.when, _VARIES.sub("*", row.detail)[:160])
        for row in rows
        if row.outcome in kinds
    )
    return [
        {"outcome": outcome, "intervention": name, "when": when, "reason": reason, "cases": count}
        for (outcome, name, when, reason), count in sorted(counts.items())
    ]


def blind(rows: Iterable[Row]) -> list[str]:
    """Interventions that are meant to change results, and change none of the examples that they were put onto."""
    all_rows = list(rows)
    return [
        intervention.name
        for intervention in INTERVENTIONS
        if intervention.changes
        and (
            intervention_rows := [
                row for row in all_rows if row.intervention == intervention.name and row.changed is not None
            ]
        )
        and not any(row.changed for row in intervention_rows)
    ]


def line(row: Row) -> str:
    """One case on one line."""
    return f"{row.example}, {row.intervention}, {row.when}, {row.mode}, {row.outcome}, {row.detail}"
