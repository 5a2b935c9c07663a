"""The ``dit-rope`` command: one file per subcommand."""

from typing import Annotated

import typer

from .. import __version__
from . import bench, demo, doctor, inspect

_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Arguments and options that a command does not read itself, ``--help`` among them."""

app = typer.Typer(
    name="dit-rope",
    help="Rotary position embedding for diffusion transformers: see it work, measure it, ask what it would do.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.run)
app.command("inspect")(inspect.run)
app.command("bench", add_help_option=False, context_settings=_PASSED_ON)(bench.run)
app.command("doctor")(doctor.run)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dit-rope {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line."""
    app()
