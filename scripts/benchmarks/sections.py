"""What every section of the benchmark is made of: cases, one after the other, that give rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .results import Row


class Wrong(Exception):
    """dit_rope gave a wrong result: there are no figures."""


@dataclass(frozen=True)
class Settings:
    """How a run measures.

    Attributes:
        device: a torch device, ``cpu`` or one of CUDA.
        rounds: timed calls of each variant, in turn; half as many, and 3 at least, of a whole step.
        quick: small sizes, which show that everything works rather than how fast it is.
    """

    device: str
    rounds: int
    quick: bool = False


@dataclass(frozen=True)
class Case:
    """Something to measure: what the progress bar calls it, and the function that measures it.

    ``run`` raises :class:`Wrong` where dit_rope gives a wrong result.
    """

    label: str
    run: Callable[[], list[Row]]
