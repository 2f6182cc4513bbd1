"""Pages that repeat what the code says, held against the code: errors, the command line, the public names."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import typer

import dist_agc
from dist_agc import cli

ROOT = Path(__file__).parents[1]
PACKAGE, DOCS = ROOT / "dist_agc", ROOT / "docs"


def sections(page: str) -> dict[str, str]:
    """The text below every heading of the second level."""
    parts = re.split(r"^## (.*)\n", (DOCS / page).read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# -------------------------------------------------------------------------------------------------------------- errors

# The command line reports mistakes in its own way; virtual.py serves it alone.
ELSEWHERE = {
    *(PACKAGE / name for name in ("cli", "conformance", "lab")),
    PACKAGE / "frameworks" / "virtual.py",
}
SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if not ELSEWHERE & {path, *path.parents}]
# What log records fill in, in %-style.
FILLED_IN = re.compile(r"%[sd]")


def text(node: ast.AST) -> str:
    """A string as it stands in the source, with … for what is filled in; empty for what is no string."""
    if isinstance(node, ast.Constant):
        return FILLED_IN.sub("…", node.value) if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return ""


@cache
def strings() -> set[str]:
    return {text(node) for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))}


def raised() -> Iterator[tuple[str, str]]:
    """Where each exception is raised, and its message; not those that only pass on what another string says."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                message = text(node.exc.args[0])
                if len(message.replace("…", "")) >= 20:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", message


@cache
def documented() -> list[str]:
    """The messages in the first columns of the page's tables. At the ends, … stands for anything."""
    rows = re.findall(r"^\| (`.*?) \| ", (DOCS / "errors.md").read_text(), re.MULTILINE)
    return [message.strip("…") for row in rows for message in re.findall(r"`([^`]+)`", row)]


@pytest.mark.parametrize("message", documented())
def test_documented_errors_are_in_the_source(message: str) -> None:
    assert any(message in string for string in strings())


@pytest.mark.parametrize("message", [pytest.param(message, id=where) for where, message in raised()])
def test_errors_in_the_source_are_documented(message: str) -> None:
    assert any(fragment in message for fragment in documented()), "give it a line in docs/errors.md"


def test_these_tests_see_messages() -> None:
    assert len(list(raised())) > 60 and len(documented()) > 90


# -------------------------------------------------------------------------------------------------------- command line


def test_every_command_has_a_section() -> None:
    assert set(sections("cli.md")) == {f"dist-agc {name}" for name in cli.COMMANDS}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_documented_options_are_those_of_the_command(name: str) -> None:
    group: Any = typer.main.get_command(cli.build())
    parameters = group.get_command(click.Context(group), name).params
    real = {option for p in parameters for option in (*p.opts, *p.secondary_opts) if option.startswith("--")}
    rows = re.findall(r"^\| (`--.*?) \|", sections("cli.md")[f"dist-agc {name}"], re.MULTILINE)
    assert {option for row in rows for option in re.findall(r"`(--[\w-]+)`", row)} == real


# ----------------------------------------------------------------------------------------------------------------- API


def shown(what: str) -> set[str]:
    return set(re.findall(rf"^\.\. auto(?:{what}):: ([\w.]+)(?:\(\))?$", (DOCS / "api.md").read_text(), re.MULTILINE))


def test_every_public_name_is_on_the_page() -> None:
    assert set(dist_agc.__all__) <= shown("class|function")


def test_every_integration_is_on_the_page() -> None:
    modules = {path.stem for path in (PACKAGE / "integrations").glob("[a-z]*.py")}
    assert shown("module") == {f"dist_agc.integrations.{name}" for name in modules}
