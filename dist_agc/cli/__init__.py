"""The command `dist-agc`.

One module per subcommand: `dist_agc/cli/NAME.py` holds a function `command` whose signature is its options and whose
docstring is its help; NAME goes into `COMMANDS`. A module is imported when its command, or the list of all, is asked
for; what is heavy in it is imported inside its functions.
"""

from __future__ import annotations

from importlib import import_module

from ..lab.console import SETTINGS, application, require

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
            return typer.main.get_command(application(cmd_name, command))

    app = typer.Typer(cls=Commands, no_args_is_help=True, **SETTINGS)

    @app.callback()
    def dist_agc() -> None:
        """Adaptive Gradient Clipping for sharded PyTorch models. Start here: [bold]dist-agc demo[/bold]"""

    return app
