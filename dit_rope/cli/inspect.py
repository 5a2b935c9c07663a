"""``dit-rope inspect``: what the patch would do to a model, and a picture of its frequencies, without its weights."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .. import patching
from ..hooks.report import declared
from ..models import ADAPTERS
from ..spec import Scaling, Scalings
from ..tables.scaling import scaling_from_config
from ..tables.scaling_types import TYPES
from .model_frequencies import EmptyOnMeta, frequencies_of
from .options import parse_sizes

_WORDS = ("frames", "height", "width")
_VIDEO, _IMAGE = "21x30x52", "1x64x64"


def run(
    model: Annotated[
        str, typer.Argument(help="Folder or hub id of a pipeline, or of one transformer; or the name of a class.")
    ],
    plot: Annotated[
        Path | None, typer.Option(help="Draw the model's rotary frequencies into this .svg or .png file.")
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(help=f"With --plot: tokens of {' x '.join(_WORDS)}. Default: {_VIDEO}, {_IMAGE} for images."),
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, max=1024, help="With --plot: ranks that share the tokens.")] = 4,
    scaling: Annotated[
        list[str] | None,
        typer.Option(
            help="With --plot: a scaling to compare with, such as riflex:frames=33,repetition=21, or the JSON of a "
            "configuration. One alone is for every axis, or for frames if it is made for them; else give one for each "
            "axis, and none where an axis has none.",
        ),
    ] = None,
) -> None:
    """Print what dit_rope.patch would replace in a model, and what it would leave alone and why.

    Reads configurations only: the model is built without weights, on torch's meta device. The name of a class needs no
    folder; it prints what dit_rope declares for it.

    With --plot it also draws the model's frequencies on the axes of a grid, what they make of distance, which tokens
    each rank of a sharded grid holds, and the memory of the tables; for a class, of its default configuration.
    """
    draw = None if plot is None else _drawing(plot, grid, ranks, scaling or [])
    if plot is None and (grid or scaling):
        raise typer.BadParameter("must be given with --grid and --scaling, which say what to draw", param_hint="--plot")
    if model.isidentifier() and not Path(model).exists():
        typer.echo(_declared(model))
        if draw is not None:
            draw(_default(model), "")
        return
    for name, transformer in build_transformers(model).items():
        typer.echo(f"{name}:" if name else f"{model}:")
        try:
            typer.echo(patching.inspect(transformer))
        except patching.UnsupportedModelError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from error
    if draw is not None:
        transformers = build_transformers(model, EmptyOnMeta)
        for name, transformer in transformers.items():
            draw(transformer, name if len(transformers) > 1 else "")


def _drawing(plot: Path, grid: str | None, ranks: int, scaling: list[str]) -> Callable[[Any, str], None]:
    """What draws one transformer, and prints where; several of one pipeline get files of their own, by name.

    Raises:
        typer.BadParameter: naming the option.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter("matplotlib must be installed: pip install 'dit-rope[bench]'", param_hint="--plot")
    from . import inspect_plot

    if plot.suffix not in inspect_plot.SUFFIXES:
        raise typer.BadParameter(f"must end in {' or '.join(inspect_plot.SUFFIXES)}, got {plot}", param_hint="--plot")
    if not plot.parent.is_dir():
        raise typer.BadParameter(f"must lie in a folder that exists, got {plot}", param_hint="--plot")
    sizes = None if grid is None else parse_sizes(grid, "--grid", _WORDS)
    try:
        scalings = parse_scalings(scaling)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--scaling") from error

    def draw(transformer: Any, name: str) -> None:
        adapter = patching.adapter_named(type(transformer).__name__)
        usual = _IMAGE if "2D" in adapter.model_class else _VIDEO
        frames, height, width = sizes or parse_sizes(usual, "--grid", _WORDS)
        try:
            found = frequencies_of(transformer, adapter, (frames, height, width), scalings)
        except ValueError as error:
            typer.echo(f"no picture: {error}", err=True)
            raise typer.Exit(1) from error
        path = plot.with_stem(f"{plot.stem}-{name}") if name else plot
        words = ", ".join(scaling)
        inspect_plot.draw(found, inspect_plot.Setting((frames, height, width), ranks, words), path)
        typer.echo(f"Wrote {path}")

    return draw


def parse_scalings(texts: list[str]) -> Scalings:
    """The scalings of ``--scaling``: none, one for all axes, or one per axis; one of frames alone is for frames.

    Raises:
        TypeError, ValueError: a text is no scaling.
    """
    given = tuple(map(_parse_scaling, texts))
    if len(given) > 1:
        return given
    only = given[0] if given else None
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


def _default(name: str) -> Any:
    """The transformer of a class in its default configuration, without weights."""
    module, _, _ = patching.adapter_named(name).model.rpartition(".")
    try:
        with EmptyOnMeta():
            return getattr(importlib.import_module(module), name)()
    except (AttributeError, TypeError, ValueError) as error:
        raise typer.BadParameter(
            f"must be a folder or hub id for --plot: {name} has no configuration of its own that builds a model",
            param_hint="MODEL",
        ) from error


def _declared(name: str) -> str:
    try:
        return declared(patching.adapter_named(name))
    except patching.UnsupportedModelError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error


def _on_meta() -> AbstractContextManager[object]:
    return torch.device("meta")


def build_transformers(model: str, context: Callable[[], AbstractContextManager[object]] = _on_meta) -> dict[str, Any]:
    """The transformers of a pipeline by component name, or one under ``""``; within ``context``, on the meta device.

    Raises:
        typer.BadParameter: when the model has no configuration, or a class that diffusers does not know.
    """
    from diffusers import DiffusionPipeline

    try:
        index = DiffusionPipeline.load_config(model)
    except (OSError, ValueError):
        return {"": _build(model, None, context)}
    known = {adapter.model_class for adapter in ADAPTERS}
    names = [name for name, part in index.items() if isinstance(part, (list, tuple)) and part[-1] in known]
    if not names:
        raise typer.BadParameter(
            f"must have a component of a supported class, got a {index.get('_class_name')} without; supported models: "
            + ", ".join(sorted(known)),
            param_hint="MODEL",
        )
    return {name: _build(model, name, context) for name in names}


def _build(model: str, subfolder: str | None, context: Callable[[], AbstractContextManager[object]]) -> Any:
    import diffusers

    try:
        config = diffusers.AutoModel.load_config(model, subfolder=subfolder)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"must be a folder or hub id with a model_index.json or a config.json, got {model!r}: {error}",
            param_hint="MODEL",
        ) from error
    class_name = config.get("_class_name", "")
    model_class = getattr(diffusers, class_name, None) if isinstance(class_name, str) and class_name else None
    is_model = isinstance(model_class, type) and issubclass(model_class, diffusers.ModelMixin)
    if model_class is None or not is_model:
        raise typer.BadParameter(
            f"must be of a class that diffusers {diffusers.__version__} has, got {class_name or 'no class name'}",
            param_hint="MODEL",
        )
    with context():
        return model_class.from_config(config)
