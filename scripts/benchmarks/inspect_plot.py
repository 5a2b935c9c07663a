"""What ``dit-rope inspect --plot`` draws: options read and checked, and one picture for each transformer."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import typer

from dit_rope.adapters import adapter_named
from dit_rope.cli.inspect import build_transformers
from dit_rope.cli.options import parse_sizes
from dit_rope.spec import Scaling, Scalings
from dit_rope.tables.scaling import scaling_from_config
from dit_rope.tables.scaling_types import TYPES

from . import frequency_plot
from .model_frequencies import frequencies_of
from .random_models import EmptyOptions

_WORDS = ("frames", "height", "width")
_VIDEO, _IMAGE = "21x30x52", "1x64x64"


class Picture:
    """The picture of a model: options checked, and drawn for each of its transformers.

    Raises:
        typer.BadParameter: naming the option.
    """

    def __init__(self, path: Path, grid: str | None, ranks: int, scaling: list[str]) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            raise typer.BadParameter("matplotlib must be installed: pip install 'dit-rope[bench]'", param_hint="--plot")
        if path.suffix not in frequency_plot.SUFFIXES:
            raise typer.BadParameter(
                f"must end in {' or '.join(frequency_plot.SUFFIXES)}, got {path}", param_hint="--plot"
            )
        if not path.parent.is_dir():
            raise typer.BadParameter(f"must lie in a folder that exists, got {path}", param_hint="--plot")
        self.path, self.ranks, self.scaling_words = path, ranks, ", ".join(scaling)
        self.sizes = None if grid is None else parse_sizes(grid, "--grid", _WORDS)
        try:
            self.scalings = parse_scalings(scaling)
        except (TypeError, ValueError) as error:
            raise typer.BadParameter(str(error), param_hint="--scaling") from error

    def draw_class(self, name: str) -> None:
        """Draws the class of that name in its default configuration."""
        self._draw(_default_model(name), self.path)

    def draw_model(self, model: str) -> None:
        """Draws the transformers of a folder or hub id; each of several gets a file with its name."""
        transformers = build_transformers(model, functools.partial(EmptyOptions, device="meta"))
        for name, transformer in transformers.items():
            several = len(transformers) > 1
            self._draw(transformer, self.path.with_stem(f"{self.path.stem}-{name}") if several else self.path)

    def _draw(self, transformer: Any, path: Path) -> None:
        adapter = adapter_named(type(transformer).__name__)
        usual = _IMAGE if "2D" in adapter.model_class else _VIDEO
        frames, height, width = self.sizes or parse_sizes(usual, "--grid", _WORDS)
        try:
            frequencies = frequencies_of(transformer, adapter, (frames, height, width), self.scalings)
        except ValueError as error:
            typer.echo(f"no picture: {error}", err=True)
            raise typer.Exit(1) from error
        setting = frequency_plot.Setting((frames, height, width), self.ranks, self.scaling_words)
        frequency_plot.draw(frequencies, setting, path)
        typer.echo(f"Wrote {path}")


def parse_scalings(texts: list[str]) -> Scalings:
    """The scalings of ``--scaling``: none, one for all axes, or one per axis; one of frames alone is for frames.

    Raises:
        TypeError, ValueError: a text does not describe a scaling.
    """
    scalings = tuple(map(_parse_scaling, texts))
    if len(scalings) > 1:
        return scalings
    only = scalings[0] if scalings else None
    if only is not None and TYPES[only.kind].frame_axis_only:
        return (only, None, None)
    return only


def _parse_scaling(text: str) -> Scaling | None:
    if text == "none":
        return None
    if text.startswith("{"):
        return scaling_from_config(json.loads(text))
    kind, _, rest = text.partition(":")
    pairs = [option.partition("=") for option in rest.split(",") if option]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError(f"must be TYPE:NAME=NUMBER,..., JSON or none, got {text!r}")
    return scaling_from_config({"type": kind, **{name: json.loads(value) for name, _, value in pairs}})


def _default_model(name: str) -> Any:
    """The transformer of a class in its default configuration, without weights."""
    module, _, _ = adapter_named(name).model.rpartition(".")
    try:
        with EmptyOptions(device="meta"):
            return getattr(importlib.import_module(module), name)()
    except (AttributeError, TypeError, ValueError) as error:
        raise typer.BadParameter(
            f"must be a folder or hub id for --plot: {name} has no default configuration",
            param_hint="MODEL",
        ) from error
