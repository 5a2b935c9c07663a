"""Writes the tables of models into README.md and docs/models.md, from the adapters and the examples of the tests.

python scripts/pages/write_model_table.py
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
from pathlib import Path

from dit_rope.hooks.adapter import EVERY
from dit_rope.models import ADAPTERS, ModelAdapter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from zoo import EXAMPLES

ROOT = Path(__file__).resolve().parents[2]
HEADER = "| transformer class | tables | queries and keys |\n|---|---|---|\n"
COLUMNS = ("transformer class", "tables", "in one pass", "exact mode", "context parallel", "gradients")
NOT_HERE = ("CosmosControlNetModel",)
"""Its forward needs torchvision, which the pinned environment lacks: the table is not to depend on it."""

READ = frozenset(
    {"attention_mask", "coords", "frame_indices", "ids", "image_pad_mask", "pos", "pos_frequencies", "position_ids"}
)
"""Arguments of rope modules that are tensors where the model computes, and whose values decide its tables."""


def _tables(adapter: ModelAdapter) -> str:
    if any(tables.axes is not None for tables in adapter.tables):
        return "memoized, axis tables"
    return "not its own" if not adapter.tables else "memoized on a CPU" if reads_values(adapter) else "memoized"


def reads_values(adapter: ModelAdapter) -> bool:
    """Whether tables depend on values that a GPU would have to be asked for, so that they are built in every pass."""
    names: set[str] = set()
    for tables in adapter.tables:
        for builder in tables.builders if tables.keyed_by_shape != EVERY else ():
            method = getattr(_builders()[builder], tables.method)
            names |= set(inspect.signature(method).parameters) - set(tables.keyed_by_shape)
    return not names.isdisjoint(READ)


@functools.cache
def _builders() -> dict[str, type]:
    """The classes that build tables, by name, from the files of models that define them: some borrow another's."""
    modules = {adapter.model.rpartition(".")[0] for adapter in ADAPTERS}
    classes = (cls for name in modules for cls in vars(importlib.import_module(name)).values() if isinstance(cls, type))
    return {cls.__name__: cls for cls in classes if cls.__module__ in modules}


def _kinds(adapter: ModelAdapter) -> dict[tuple[str, str], None]:
    """What one pass does, over all kinds of attention modules of a model, and whether exact mode rotates there."""
    kinds: dict[tuple[str, str], None] = {}
    for rotations in adapter.rotations:
        norms = any("norm" in name for name in rotations.norms)
        form = rotations.format
        exact = "yes" if form.exact else "no" if form.formula is None else "if shown"
        kinds["norm and rotation" if norms else "rotation", exact] = None
    return kinds


def _rotates(adapter: ModelAdapter) -> str:
    kinds = [f"{kind}, not in exact mode" if exact == "no" else kind for kind, exact in _kinds(adapter)]
    return "; ".join(dict.fromkeys(kinds)) or "not patched"


def _single_pass(adapter: ModelAdapter) -> str:
    return "; ".join(dict.fromkeys(kind for kind, _ in _kinds(adapter))) or "nothing"


def _exact(adapter: ModelAdapter) -> str:
    return "; ".join(dict.fromkeys(exact for _, exact in _kinds(adapter))) or "no"


def _context_parallel(adapter: ModelAdapter) -> str:
    module, _, name = adapter.model.rpartition(".")
    return "yes" if getattr(getattr(importlib.import_module(module), name), "_cp_plan", None) else "no"


def _gradients(adapter: ModelAdapter) -> str:
    trained = {example.model for example in EXAMPLES if example.trains}
    return "same" if adapter.model in trained and adapter.model_class not in NOT_HERE else "not tested"


def rows() -> str:
    """The table of the README: one row per class."""
    return HEADER + "".join(
        f"| `{adapter.model_class}` | {_tables(adapter)} | {_rotates(adapter)} |\n" for adapter in ADAPTERS
    )


def compatibility() -> str:
    """The table of docs/models.md: one row per class."""
    columns = (_tables, _single_pass, _exact, _context_parallel, _gradients)
    lines = [(f"`{adapter.model_class}`", *(column(adapter) for column in columns)) for adapter in ADAPTERS]
    return "".join(f"| {' | '.join(line)} |\n" for line in (COLUMNS, ["---"] * len(COLUMNS), *lines))


def not_patched() -> str:
    """What is not patched in each class, and why."""
    return "".join(
        f"- `{adapter.model_class}`: {'; '.join(adapter.not_patched)}.\n" for adapter in ADAPTERS if adapter.not_patched
    )


def with_section(text: str, section: str, name: str = "models") -> str:
    """``text`` with ``section`` between the two marks called ``name``.

    Raises:
        ValueError: for a text without these marks.
    """
    marks = re.compile(rf"(<!-- {name}: written by [\w/.]+ -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    if not marks.search(text):
        raise ValueError(f"text must have the marks of {name!r}, got none")
    return marks.sub(lambda match: match[1] + section + match[2], text)


def main() -> None:
    """Rewrites both files."""
    readme, models = ROOT / "README.md", ROOT / "docs" / "models.md"
    readme.write_text(with_section(readme.read_text(), rows()))
    models.write_text(with_section(with_section(models.read_text(), not_patched()), compatibility(), "compatibility"))


if __name__ == "__main__":
    main()
