"""What the command line prints: tables at 80 columns and in a pipe, help whose examples run, versions."""

import io
import json
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import typer
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

import dist_agc
from dist_agc import cli
from dist_agc.cli import bench, plan
from dist_agc.cli.examples import EXAMPLES, MAIN
from dist_agc.lab import contenders
from dist_agc.lab.console import display, tables, unwrapped

COLUMNS = 80


def invoke(*arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(cli.build(), arguments, env={"COLUMNS": str(COLUMNS), "TERM": "dumb"})
    assert result.exit_code == exit_code, result.output
    return result.output


# ------------------------------------------------------------------------------------------------------------- tables


def console(terminal: bool, width: int = COLUMNS) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=width, force_terminal=terminal, color_system=None, highlight=False), out


def shown(made: Table, *, terminal: bool, width: int = COLUMNS) -> str:
    to, out = console(terminal, width)
    tables.show(to, made)
    return out.getvalue()


def planned(of: float) -> dict[str, Any]:
    """A record as wide as one gets: the largest of models on the largest of clusters."""
    numbers = dict.fromkeys((key for key, _ in plan.COLUMNS.values()), of)
    return numbers | {"layout": "tp+fsdp2", "world": 99_999, "all_reduces": 99, "share": 0.0000123, "seconds": 999.99}


METHOD = dict.fromkeys(("to_norm_clip", "to_floor"), 99.99) | {"collectives": 9999, "ms": 99_999.99}
WIDEST = {
    "plan": tables.of_records("llama3-405b", plan.COLUMNS, [planned(of) for of in (999_499, 1.234e15, 0)]),
    "bench": tables.of_records(
        "100% of units clipped",
        bench.COLUMNS,
        [
            METHOD | {"method": name, "operations": 12_345.6, "bytes": 9.99e9, "peak_extra_bytes": 1.234e12}
            for name in (contenders.KERNEL_REUSED, f"FSDP1 {contenders.NORM}", contenders.DEEPSPEED)
        ],
    ),
}


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
@pytest.mark.parametrize("name", WIDEST)
def test_a_table_fits_80_columns_and_nothing_is_cut(name: str, terminal: bool) -> None:
    text = shown(WIDEST[name], terminal=terminal)
    title, *_, first, second, third, _ = text.splitlines()
    assert max(map(len, text.splitlines())) <= COLUMNS and "…" not in text
    assert all(len(row.split()) >= len(WIDEST[name].columns) for row in (first, second, third)), "a row is a line"


@pytest.mark.parametrize("width", [40, 60])
@pytest.mark.parametrize("name", WIDEST)
def test_a_narrow_terminal_cuts_nothing(name: str, width: int) -> None:
    """Where the columns do not fit, every cell stands behind its heading."""
    narrow = shown(WIDEST[name], terminal=True, width=width)
    assert max(map(len, narrow.splitlines())) <= width and "…" not in narrow
    words = " ".join(narrow.split())
    said = [f"{column.header} {cell}".strip() for column in WIDEST[name].columns[1:] for cell in column.cells]
    assert len(said) >= 3 * 7 and [cell for cell in [*WIDEST[name].columns[0].cells, *said] if cell not in words] == []


def test_a_share_is_a_plain_number() -> None:
    _, write = plan.COLUMNS["share"]
    assert [write(share) for share in (0, 1e-6, 0.0054, 0.137, 0.996, 1.176, 56.5)] == [
        *("0%", "<0.001%", "0.54%", "14%", "99.6%", "118%", "5.65k%")
    ]


def test_a_pipe_has_no_right_edge() -> None:
    made = tables.table("wide", ["name", "value"], [["x" * 200, "1"]])
    assert "x" * 200 in shown(made, terminal=False)
    assert max(map(len, shown(made, terminal=True).splitlines())) == COLUMNS


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0"), (7.0, "7"), (44.94, "44.9"), (999, "999"), (1000, "1k"), (156_200, "156k"), (999_999, "1000k")]
    + [(20_126_461, "20.1M"), (405_853_388_800, "406G"), (3_246_629e6, "3.25T")],
)
def test_numbers_are_short(number: float, said: str) -> None:
    assert tables.short(number) == said and len(said) <= 5


def test_names_break_at_dots() -> None:
    assert tables.folded("model.layers.*.weight", 30) == "model.layers.*.weight"
    assert tables.folded("model.layers.*.weight", 16) == "model.layers.*.\n    weight"
    assert tables.folded("weight_and_bias", 9) == "weight_an\n    d_bia\n    s", "and anywhere where there is none"


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_commands_print_80_columns(terminal: bool, runs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    to, out = console(terminal)
    monkeypatch.setattr(display, "console", lambda *_, **__: to)
    invoke("plan", "--model", "dist_agc.lab.tasks.text:example", "--world", "16384")
    invoke("advise", "runs/demo/digits.jsonl", "--batch-size", "5000")
    invoke("units", "--model", "dist_agc.lab.tasks.text:example", "--observe")
    lines = out.getvalue().splitlines()
    assert len(lines) > 60 and max(map(len, lines)) <= COLUMNS
    assert not [line for line in lines if "…" in line]


# --------------------------------------------------------------------------------------------------------------- help


COMMANDS = {"": MAIN, **EXAMPLES}
TYPED = {typed: None for examples in COMMANDS.values() for typed in examples}  # each once, in their order
LAUNCHERS = "torchrun --nproc-per-node 2 -m dist_agc.cli", "mpirun -n 2 dist-agc"
CHEAP = "report", "advise", "units", "plan"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `dist-agc demo` leaves, with little in it."""
    ratios = {"thresholds": [0.01, 0.02], "parameters": {"stem.weight": [16, 8, 2]}}
    monkeypatch.chdir(tmp_path)
    Path("runs/demo").mkdir(parents=True)
    for task in ("digits", "text"):
        line = {"step": 1, "run": "agc", "loss": 2.0, "agc/units": 16.0, "agc/clip_fraction": 0.5, "agc/ratios": ratios}
        Path(f"runs/demo/{task}.jsonl").write_text(json.dumps(line) + "\n")


def test_every_command_has_examples() -> None:
    assert list(EXAMPLES) == list(cli.COMMANDS) and all(EXAMPLES.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_80_columns_and_its_examples_can_be_pasted(name: str) -> None:
    lines = invoke(*([name] if name else []), "--help").splitlines()
    assert max(map(len, lines)) <= COLUMNS
    assert not [line for line in lines if "…" in line]
    whole = [line.strip() for line in lines]
    assert [typed for typed in COMMANDS[name] if typed not in whole] == []


@pytest.mark.parametrize("typed", TYPED)
def test_examples_are_understood(typed: str) -> None:
    for launcher in LAUNCHERS:
        typed = typed.replace(launcher, "dist-agc")
    program, name, *options = shlex.split(typed)
    assert program == "dist-agc"
    group: Any = typer.main.get_command(cli.build())
    group.get_command(click.Context(group), name).make_context(name, options)


def test_cheap_examples_run(runs: None) -> None:
    typed = [shlex.split(typed)[1:] for typed in TYPED]
    cheap = [words for words in typed if words[0] in CHEAP and "llama3-70b" not in words]
    assert len(cheap) >= 9
    for words in cheap:
        assert invoke(*words)
    assert {path.name for path in Path().rglob("*.html")} == {"digits.html", "both.html"}


def test_help_is_wrapped_by_the_terminal_alone() -> None:
    assert unwrapped("One\n    line.\n\n    two\n    words") == "One line.\n\ntwo words"
    assert unwrapped("Kept.\n\n    a  1\n       2\n") == "Kept.\n\na  1\n   2", "what is laid out"


def test_versions() -> None:
    said = invoke("--version")
    assert said.startswith(f"dist-agc {dist_agc.__version__}, torch {torch.__version__}, Python 3.")
    assert invoke("--version", "no-such-command") == said
