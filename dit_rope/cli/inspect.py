"""``dit-rope inspect``: what the patch would do to a model, without its weights."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer

from .. import patching

TRANSFORMERS = ("transformer", "transformer_2")
"""Components of a pipeline that rotate."""


def run(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a pipeline, or of one transformer.")],
) -> None:
    """Print what dit_rope.patch would replace in a model, and what it would leave alone and why.

    Reads configurations only: the model is built without weights, on torch's meta device.
    """
    for name, transformer in build_transformers(model).items():
        typer.echo(f"{name}:" if name else f"{model}:")
        try:
            typer.echo(patching.inspect(transformer))
        except patching.UnsupportedModelError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from error


def build_transformers(model: str) -> dict[str, Any]:
    """The transformers of a pipeline by component name, or one transformer under ``""``, all on the meta device.

    Raises:
        typer.BadParameter: when the model has no configuration, or a class that diffusers does not know.
    """
    from diffusers import DiffusionPipeline

    try:
        index = DiffusionPipeline.load_config(model)
    except (OSError, ValueError):
        return {"": _build(model, None)}
    names = [name for name in TRANSFORMERS if (index.get(name) or (None, None))[1] is not None]
    if not names:
        raise typer.BadParameter(
            f"must have one of {', '.join(TRANSFORMERS)}, got a {index.get('_class_name')} without", param_hint="MODEL"
        )
    return {name: _build(model, name) for name in names}


def _build(model: str, subfolder: str | None) -> Any:
    import diffusers

    try:
        config = diffusers.AutoModel.load_config(model, subfolder=subfolder)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"must be a folder or hub id with a model_index.json or a config.json, got {model!r}: {error}",
            param_hint="MODEL",
        ) from error
    class_name = config.get("_class_name", "")
    model_class = getattr(diffusers, class_name, None) if class_name else None
    if model_class is None:
        raise typer.BadParameter(
            f"must be of a class that diffusers {diffusers.__version__} has, got {class_name or 'no class name'}",
            param_hint="MODEL",
        )
    with torch.device("meta"):
        return model_class.from_config(config)
