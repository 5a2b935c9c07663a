#!/usr/bin/env python3
"""Writes ``dit_rope/hooks/known_code.json``: digests of the diffusers code that patches were written against.

Run it after an adapter was written or checked against a version of diffusers, whose tests must pass: what it finds in
the installed diffusers becomes known code. ``--keep`` adds to what the file holds, so that several versions are known.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

from dit_rope.hooks.adapter import AttentionRotation
from dit_rope.hooks.fused_norms import KNOWN_NORMS
from dit_rope.hooks.known_code import Walk, source_digest
from dit_rope.models import ADAPTERS, ModelAdapter

TARGET = Path(__file__).parents[2] / "dit_rope" / "hooks" / "known_code.json"


class Collection(Walk):
    """Digests of everything that a method of diffusers runs."""

    def __init__(self, cls: type, method: str) -> None:
        self.digests: dict[str, str] = {}
        super().__init__(cls, method)

    def wants(self, slot: str, found: Any) -> bool:
        """Whether it is a function of diffusers."""
        return isinstance(found, FunctionType) and found.__module__.startswith("diffusers.")

    def accepts(self, slot: str, found: Any, function: Any) -> bool:
        """Takes every function as known, and notes its digest."""
        digest = source_digest(function) if isinstance(function, FunctionType) else None
        if digest is None:
            raise SystemExit(f"{slot} has no source: {found!r}")
        self.digests[slot] = digest
        return True


def methods_of(adapter: ModelAdapter) -> Iterator[tuple[type, str]]:
    """Classes of diffusers, and methods of theirs, on which the declaration of one model depends."""
    module = importlib.import_module(adapter.model.rpartition(".")[0])
    for tables in adapter.tables:
        yield from ((each, tables.method) for name in tables.builders for each in named(name, module))
    for rotations in adapter.rotations:
        yield from owners_of(rotations, module)


def owners_of(rotations: AttentionRotation, module: Any) -> Iterator[tuple[type, str]]:
    """The processors of one kind of attention module, or its own class where it has none."""
    if not rotations.processors:
        yield from ((each, "forward") for each in named(rotations.attention_class, module))
    for name in rotations.processors:
        yield from ((each, "__call__") for each in named(name, module))


def named(name: str, module: Any) -> list[type]:
    """The class that ``module`` knows by ``name``, or those of diffusers' general attention code."""
    places = (
        module,
        *(importlib.import_module(f"diffusers.models.{each}") for each in ("attention_processor", "attention")),
    )
    found = [cls for cls in (getattr(place, name, None) for place in places) if cls is not None]
    if not found:  # a model that borrows a class from another's file under no name of its own
        found = [getattr(each, name) for each in list(sys.modules.values()) if _is_models(each) and hasattr(each, name)]
    return found[:1]


def _is_models(module: Any) -> bool:
    return getattr(module, "__name__", "").startswith("diffusers.models.")


def norm_classes() -> Iterator[tuple[type, str]]:
    """The norms of diffusers that kernels compute."""
    for name in KNOWN_NORMS:
        module, _, cls = name.rpartition(".")
        if module.startswith("diffusers."):
            yield getattr(importlib.import_module(module), cls), "forward"


def collect() -> tuple[dict[str, str], list[str]]:
    """Digests by slot, and the models that the installed diffusers does not have."""
    digests: dict[str, str] = {}
    missing: list[str] = []
    for adapter in ADAPTERS:
        try:
            found = list(methods_of(adapter))
        except ModuleNotFoundError:
            missing.append(adapter.model_class)
            continue
        for cls, method in found:
            if hasattr(cls, method):
                digests |= Collection(cls, method).digests
    for cls, method in norm_classes_here():
        digests |= Collection(cls, method).digests
    return digests, missing


def norm_classes_here() -> Iterator[tuple[type, str]]:
    """Those norms that the installed diffusers has."""
    try:
        yield from norm_classes()
    except (ModuleNotFoundError, AttributeError):
        return


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="add to what the file holds")
    arguments = parser.parse_args()
    known: dict[str, list[str]] = json.loads(TARGET.read_text()) if arguments.keep and TARGET.exists() else {}
    digests, missing = collect()
    for slot, digest in digests.items():
        known[slot] = sorted({*known.get(slot, []), digest})
    TARGET.write_text(json.dumps(dict(sorted(known.items())), indent=0) + "\n")
    print(f"{len(known)} functions, {sum(map(len, known.values()))} sources; without {len(missing)} models")


if __name__ == "__main__":
    main()
