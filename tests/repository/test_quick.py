"""``make test ARGS="-m quick"`` runs tests of every module."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from quick import QUICK, is_quick

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    ".".join(path.relative_to(ROOT / "dit_rope").with_suffix("").parts).removesuffix("__init__").rstrip(".")
    for path in (ROOT / "dit_rope").rglob("*.py")
}


def test_every_module_has_quick_tests() -> None:
    families = {name for name in MODULES if name.startswith("models.")}
    assert set(QUICK) == MODULES - families


@pytest.mark.parametrize("beginning", sorted({beginning for tests in QUICK.values() for beginning in tests}))
def test_every_name_is_that_of_a_quick_test(beginning: str) -> None:
    file, _, test = beginning.partition("::")
    functions = [node.name for node in ast.parse((ROOT / "tests" / file).read_text()).body if hasattr(node, "name")]
    names = [f"tests/{file}::{name}[float32]" for name in functions if name.startswith(test.rstrip("[") or "test_")]
    assert any(map(is_quick, names))
