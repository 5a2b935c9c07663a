"""Nothing at all, which every other intervention is compared with."""

from __future__ import annotations

from .core import Subject, intervention


@intervention("nothing")
def nothing(subject: Subject) -> None:
    """The model is left alone."""
