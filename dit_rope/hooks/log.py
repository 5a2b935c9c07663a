"""Why a module runs its own code, logged at debug level by the logger ``dit_rope.hooks``."""

from __future__ import annotations

import logging

_logger = logging.getLogger(__package__)


def log_not_patched(name: str, reason: str, logged: set[str]) -> None:
    """Logs that the module called ``name`` runs its own code, unless ``logged`` holds ``reason``, and adds it there."""
    if _logger.isEnabledFor(logging.DEBUG) and reason not in logged:
        logged.add(reason)
        _logger.debug("%s is not patched: %s", name, reason)
