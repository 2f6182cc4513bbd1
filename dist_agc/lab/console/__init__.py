"""What every command that prints, draws or starts processes uses: the terminal, the look of plots, the launcher.

Nothing here knows AGC: `dist_agc.cli`, `dist_agc.lab` and the study in `docs/study` stand on it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from inspect import cleandoc
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import typer

# What all typer applications have in common.
SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": "rich",
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}


def require(extra: str, *modules: str) -> None:
    """Leave with the right pip command where an optional dependency of a command is not installed."""
    if missing := [name for name in modules if find_spec(name) is None]:
        sys.exit(f"dist-agc needs {' and '.join(missing)} for this: pip install 'dist-agc[{extra}]'")


def application(name: str, command: Callable[..., object], examples: Mapping[str, str] | None = None) -> typer.Typer:
    """An application of one command: a function whose signature is its options and whose docstring is its help."""
    import typer

    app = typer.Typer(**SETTINGS)
    app.command(name, help=unwrapped(command.__doc__ or ""), epilog=pasteable(examples or {}))(command)
    return app


def unwrapped(text: str) -> str:
    """Paragraphs without the line breaks of the source, which are not the terminal's; indented ones stay."""
    paragraphs = cleandoc(text).split("\n\n")
    return "\n\n".join(text if "\n " in text else " ".join(text.splitlines()) for text in paragraphs)


def pasteable(examples: Mapping[str, str]) -> str:
    """By command, what it shows: each on a line of its own, so that whole lines can be pasted into any shell."""
    from rich.markup import escape

    lines = [f"[dim]# {escape(note)}[/dim]\n{escape(command)}" for command, note in examples.items()]
    return "\n\n".join(["[bold]Examples[/bold]", *lines]) if lines else ""
