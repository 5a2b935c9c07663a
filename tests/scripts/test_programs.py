"""Every program in scripts/ imports: what it uses of the package, of other scripts and of tests/support exists."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
MODULES = sorted(
    ".".join(path.relative_to(SCRIPTS).with_suffix("").parts)
    for path in SCRIPTS.rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py", "interventions_preload.py")  # the last compiles code for forks
)


@pytest.mark.parametrize("name", MODULES)
def test_module_imports(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS.joinpath(*name.split(".")[:-1]))  # as Python does for a program
    importlib.import_module(name)
