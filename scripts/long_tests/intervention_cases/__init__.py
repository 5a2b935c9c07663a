"""What people do around patched models, by theme: each module registers small declared interventions."""

from __future__ import annotations

import importlib
import pkgutil

from .core import INTERVENTIONS, Intervention, NotApplicable, Subject

_NO_THEME = {"core", "judge", "parts", "runner", "forked", "tables"}

for _module in pkgutil.iter_modules(__path__):
    if _module.name not in _NO_THEME:
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["INTERVENTIONS", "Intervention", "NotApplicable", "Subject"]
