"""Programs of a checkout, which an installed package does not contain."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import typer

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def from_checkout(module: str, command: str) -> ModuleType:
    """A module of the folder ``scripts/`` of the checkout that this package is in.

    Raises:
        typer.BadParameter: the package is not in a checkout; the message names the ``command`` that needs one.
    """
    if not (SCRIPTS / module.partition(".")[0]).is_dir():
        raise typer.BadParameter(
            f"dit-rope {command} must run from a checkout of the repository, whose scripts/ do the work, "
            f"got an installed package in {SCRIPTS.parent}; clone the repository, and pip install -e '.[bench]' there"
        )
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    return importlib.import_module(module)
