"""`python docs/study`, from any folder: Python finds this file in the folder, and this file the package around it."""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dist_agc.lab.console import application, require

if __name__ == "__main__":
    require("cli", "typer", "rich")
    from study.command import command

    application("study", command)(prog_name="python docs/study")
