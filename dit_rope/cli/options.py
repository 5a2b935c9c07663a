"""Options of several commands: device, dtype, sizes."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import torch
import typer

Device = Annotated[str | None, typer.Option(help="Torch device. Default: cuda if available, else cpu.")]


class DType(StrEnum):
    """Dtypes of a model."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"

    @property
    def torch(self) -> torch.dtype:
        """The dtype of that name."""
        return torch.__dict__[self.value]  # type: ignore[no-any-return]


def pick_device(device: str | None) -> str:
    """``device`` if it is given, else cuda if this machine has it, else cpu."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def parse_sizes(text: str, option: str, words: tuple[str, ...]) -> tuple[int, ...]:
    """Positive numbers between ``x``, one for each word.

    Raises:
        typer.BadParameter: naming the option and the words.
    """
    numbers = text.lower().split("x")
    if len(numbers) != len(words) or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise typer.BadParameter(f"must be {'x'.join(words)}, got {text!r}", param_hint=option)
    return tuple(map(int, numbers))
