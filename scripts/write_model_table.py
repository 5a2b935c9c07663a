"""Writes the table of models into README.md and docs/models.md, from the adapters.

python scripts/write_model_table.py
"""

from __future__ import annotations

from pathlib import Path

from dit_rope.models import ADAPTERS, ModelAdapter
from dit_rope.models.adapter import GridTables

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- models: written by scripts/write_model_table.py -->\n", "<!-- end of models -->\n"
HEADER = "| transformer class | tables | queries and keys |\n|---|---|---|\n"


def _tables(adapter: ModelAdapter) -> str:
    if any(isinstance(tables, GridTables) for tables in adapter.tables):
        return "axis tables"
    return "memoized" if adapter.tables else "not its own"


def _turns(adapter: ModelAdapter) -> str:
    """What one pass does, over all kinds of attention modules of a model."""
    kinds = []
    for rotations in adapter.rotations:
        norms = any("norm" in name for name in rotations.turned)
        kind = "norm and rotation" if norms else "rotation"
        if rotations.format is not None and not rotations.format.exact:
            kind += ", fast mode only"
        kinds.append(kind)
    return "; ".join(dict.fromkeys(kinds)) or "left alone"


def rows() -> str:
    """The table: one row per class."""
    return HEADER + "".join(
        f"| `{adapter.model_class}` | {_tables(adapter)} | {_turns(adapter)} |\n" for adapter in ADAPTERS
    )


def left_alone() -> str:
    """What is left alone in each class, and why."""
    return "".join(
        f"- `{adapter.model_class}`: {'; '.join(adapter.left_alone)}.\n" for adapter in ADAPTERS if adapter.left_alone
    )


def with_section(text: str, section: str) -> str:
    """``text`` with ``section`` between the two marks."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return before + START + section + END + after


def main() -> None:
    """Rewrites both files."""
    for path, section in ((ROOT / "README.md", rows()), (ROOT / "docs" / "models.md", left_alone())):
        path.write_text(with_section(path.read_text(), section))


if __name__ == "__main__":
    main()
