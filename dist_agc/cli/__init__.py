"""The command `dist-agc`.

One module per subcommand: `dist_agc/cli/NAME.py` holds a function `command` whose signature is its options and whose
docstring is its help; NAME goes into `COMMANDS`, and what its help shows to be pasted into `examples.py`. A module is
imported when its command, or the list of all, is asked for; what is heavy in it is imported inside its functions.
"""

from __future__ import annotations

import platform
from importlib import import_module

import torch

from .. import __version__
from ..lab.console import SETTINGS, application, pasteable, require
from .examples import EXAMPLES, MAIN

# By name, the module. The demo has a room of its own: it needs tasks to train, the others take a user's model.
COMMANDS = {"demo": "..lab.demo"} | {
    name: f".{name}" for name in ("check", "units", "report", "advise", "bench", "plan")
}


def main() -> None:
    """Entry point of `dist-agc`."""
    require("cli", "typer", "rich")
    build()(prog_name="dist-agc")


def build():
    """The typer application. In a function, so that importing dist_agc.cli needs no typer."""
    import typer
    import typer.core

    class Commands(typer.core.TyperGroup):
        def list_commands(self, ctx):
            return list(COMMANDS)

        def get_command(self, ctx, cmd_name):
            if cmd_name not in COMMANDS:
                return None
            command = import_module(COMMANDS[cmd_name], __name__).command
            return typer.main.get_command(application(cmd_name, command, EXAMPLES[cmd_name]))

    def say_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"dist-agc {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
            raise typer.Exit

    app = typer.Typer(cls=Commands, no_args_is_help=True, **SETTINGS)

    @app.callback(epilog=pasteable(MAIN))
    def dist_agc(
        version: bool = typer.Option(False, "--version", is_eager=True, callback=say_version, help="Print versions."),
    ) -> None:
        """Adaptive Gradient Clipping for sharded PyTorch models."""

    return app
