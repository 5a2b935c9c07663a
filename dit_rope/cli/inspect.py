"""``dit-rope inspect``: what the patch would do to a model, and a picture of its frequencies, without its weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .. import patching
from ..adapters import UnsupportedModelError, adapter_named
from ..hooks.report import describe_adapter
from ..models import ADAPTERS
from .checkout import from_checkout


def run(
    model: Annotated[
        str, typer.Argument(help="Folder or hub id of a pipeline, or of one transformer; or the name of a class.")
    ],
    plot: Annotated[
        Path | None, typer.Option(help="Draw the model's rotary frequencies into this .svg or .png file.")
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(help="With --plot: tokens of frames x height x width. Default: 21x30x52, 1x64x64 for images."),
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
    """Print what dit_rope.patch would replace in a model, and what it would not patch and why.

    Reads configurations only: the model is built without weights, on torch's meta device. The name of a class needs no
    folder; it prints the adapter of the class.

    With --plot it also draws the model's frequencies on the axes of a grid, what they make of distance, which tokens
    each rank of a sharded grid holds, and the memory of the tables; for a class, of its default configuration.
    """
    if plot is None and (grid or scaling):
        raise typer.BadParameter("must be given with --grid and --scaling, which say what to draw", param_hint="--plot")
    picture = None
    if plot is not None:
        picture = from_checkout("benchmarks.inspect_plot", "inspect --plot").Picture(plot, grid, ranks, scaling or [])
    if model.isidentifier() and not Path(model).exists():
        typer.echo(_adapter_text(model))
        if picture is not None:
            picture.draw_class(model)
        return
    for name, transformer in build_transformers(model).items():
        typer.echo(f"{name}:" if name else f"{model}:")
        try:
            typer.echo(patching.inspect(transformer))
        except UnsupportedModelError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from error
    if picture is not None:
        picture.draw_model(model)


def _adapter_text(name: str) -> str:
    try:
        return describe_adapter(adapter_named(name))
    except UnsupportedModelError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error


def _on_meta() -> AbstractContextManager[object]:
    return torch.device("meta")


def build_transformers(model: str, context: Callable[[], AbstractContextManager[object]] = _on_meta) -> dict[str, Any]:
    """The transformers of a pipeline by component name, or one under ``""``; within ``context``, on the meta device.

    Raises:
        typer.BadParameter: the model has no configuration, or its class is not in diffusers.
    """
    from diffusers import DiffusionPipeline

    try:
        index = DiffusionPipeline.load_config(model)
    except (OSError, ValueError):
        return {"": _build(model, None, context)}
    supported = {adapter.model_class for adapter in ADAPTERS}
    names = [name for name, value in index.items() if isinstance(value, (list, tuple)) and value[-1] in supported]
    if not names:
        raise typer.BadParameter(
            f"must have a component of a supported class, got a {index.get('_class_name')} without; supported models: "
            + ", ".join(sorted(supported)),
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
