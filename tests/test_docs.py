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

import browser
import dist_agc
from dist_agc import cli
from dist_agc.cli.examples import EXAMPLES

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


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_documented_examples_are_those_of_the_help(name: str) -> None:
    lines = re.findall(r"^(?:dist-agc|torchrun|mpirun) .*", sections("cli.md")[f"dist-agc {name}"], re.MULTILINE)
    assert dict(re.split(r" +# ", line, maxsplit=1) for line in lines) == EXAMPLES[name]


# ------------------------------------------------------------------------------------------------------------- figures


FIGURES = [path.name for path in sorted(DOCS.glob("*.svg"))]
# Narrow, usual, wide; one that is wider than any.
FONTS = ("Liberation Sans", "DejaVu Sans", "monospace", "monospace; letter-spacing: 3px")
PROBE = """[...document.querySelectorAll('text')].map(text => {
    const of = text.getBoundingClientRect(), middle = (of.left + of.right) / 2;
    const rects = [...document.querySelectorAll('svg, rect')].map(r => r.getBoundingClientRect())
        .filter(r => r.left < middle && middle < r.right && r.top < of.top + 8 && of.top + 8 < r.bottom);
    const free = text.cloneNode(true);
    free.removeAttribute('textLength');
    text.after(free);
    const natural = free.getComputedTextLength();
    free.remove();
    return {words: text.textContent, length: Number(text.getAttribute('textLength')), natural,
            out: rects.some(r => of.left < r.left || of.right > r.right)};
})"""


def test_figures_keep_their_text_inside_with_any_font(tmp_path: Path) -> None:
    """Every text has a textLength, so that no font makes it longer; it is about as long as it is by itself."""
    drawn = [(name, font) for name in FIGURES for font in FONTS]
    pages = [
        f"<!doctype html><style>svg text {{ font-family: {font} }}</style>{(DOCS / name).read_text()}"
        for name, font in drawn
    ]
    for (name, font), texts in zip(drawn, browser.look(pages, PROBE, tmp_path), strict=True):
        assert texts, name
        assert [text["words"] for text in texts if text["out"]] == [], f"{name} in {font}: leaves its box"
        if font in FONTS[:2]:
            off = {t["words"]: round(t["natural"]) for t in texts if not 0.75 < t["length"] / t["natural"] < 1.33}
            assert off == {}, f"{name} in {font}: give these texts about this textLength, and lengthAdjust"


# ----------------------------------------------------------------------------------------------------------------- API


def shown(what: str) -> set[str]:
    return set(re.findall(rf"^\.\. auto(?:{what}):: ([\w.]+)(?:\(\))?$", (DOCS / "api.md").read_text(), re.MULTILINE))


def test_every_public_name_is_on_the_page() -> None:
    assert set(dist_agc.__all__) <= shown("class|function")


def test_every_integration_is_on_the_page() -> None:
    modules = {path.stem for path in (PACKAGE / "integrations").glob("[a-z]*.py")}
    assert shown("module") == {f"dist_agc.integrations.{name}" for name in modules}
