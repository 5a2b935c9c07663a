"""``dit-rope inspect``: what the patch would do to a model, without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .. import patching
from ..models import ADAPTERS
from ..patch_report import declared


def run(
    model: Annotated[
        str, typer.Argument(help="Folder or hub id of a pipeline, or of one transformer; or the name of a class.")
    ],
) -> None:
    """Print what dit_rope.patch would replace in a model, and what it would leave alone and why.

    Reads configurations only: the model is built without weights, on torch's meta device. Of a class, which needs no
    folder, it prints what is declared.
    """
    if model.isidentifier() and not Path(model).exists():
        typer.echo(_declared(model))
        return
    for name, transformer in build_transformers(model).items():
        typer.echo(f"{name}:" if name else f"{model}:")
        try:
            typer.echo(patching.inspect(transformer))
        except patching.UnsupportedModelError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from error


def _declared(name: str) -> str:
    try:
        return declared(patching.adapter_named(name))
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
    known = {adapter.model_class for adapter in ADAPTERS}
    names = [name for name, part in index.items() if isinstance(part, (list, tuple)) and part[-1] in known]
    if not names:
        raise typer.BadParameter(
            f"must have a component of a supported class, got a {index.get('_class_name')} without; supported models: "
            + ", ".join(sorted(known)),
            param_hint="MODEL",
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
    model_class = getattr(diffusers, class_name, None) if isinstance(class_name, str) and class_name else None
    is_model = isinstance(model_class, type) and issubclass(model_class, diffusers.ModelMixin)
    if model_class is None or not is_model:
        raise typer.BadParameter(
            f"must be of a class that diffusers {diffusers.__version__} has, got {class_name or 'no class name'}",
            param_hint="MODEL",
        )
    with torch.device("meta"):
        return model_class.from_config(config)
