"""One fault in the source, for ``mutations.py``, which lists them, and ``mutation_check.py``, which tries them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One fault.

    Attributes:
        name: unique, of letters, digits and dashes.
        file: in which it is made, relative to the root.
        old, new: text that is in the file exactly once, and what takes its place.
        tests: files that guard the module.
        k: which of their tests, as pytest's ``-k`` takes it; all when empty.
        equivalent: why no test can see it; empty for a fault that has to be caught.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    k: str = ""
    equivalent: str = ""

    @property
    def command(self) -> tuple[tuple[str, ...], str]:
        """What guards it, which several faults share."""
        return self.tests, self.k

    def applied(self, source: str) -> str:
        """The file with the fault.

        Raises:
            ValueError: its text is not there exactly once, or would not change.
        """
        count = source.count(self.old)
        if count != 1 or self.old == self.new:
            raise ValueError(f"{self.name} must find its text once in {self.file}, found it {count} times")
        return source.replace(self.old, self.new)
