"""The command `dist-agc`.

One module per subcommand: `dist_agc/cli/NAME.py` holds a function `command` whose signature is its options and whose
docstring is its help; NAME goes into `COMMANDS`. A module is imported when its command, or the list of all, is asked
for; what is heavy in it is imported inside its functions.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec

COMMANDS = ("demo", "check", "report", "advise", "bench", "plan", "study")


def main() -> None:
    """Entry point of `dist-agc`."""
    require("cli", "typer", "rich")
    build()(prog_name="dist-agc")


def require(extra: str, *modules: str) -> None:
    """Leave with the right pip command where an optional dependency of a command is not installed."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        sys.exit(f"dist-agc needs {' and '.join(missing)} for this: pip install 'dist-agc[{extra}]'")


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
            single = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
            single.command(cmd_name)(import_module(f"{__name__}.{cmd_name}").command)
            return typer.main.get_command(single)

    app = typer.Typer(
        cls=Commands,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def dist_agc() -> None:
        """Adaptive Gradient Clipping for sharded PyTorch models. Start here: [bold]dist-agc demo[/bold]"""

    app.callback()(dist_agc)
    return app
