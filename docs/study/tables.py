"""The study's tables in Markdown, and the pages that hold them between markers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import typer

from .cells import Cell, Cells, Setting, best, cells, largest_rate
from .claims import at_rate_of_none, figures, findings
from .networks import NETWORKS
from .results import Results
from .trials import NONE, Case, Clipping

MARKED = re.compile(r"(<!-- study: (\S+) -->\n).*?(<!-- /study -->)", re.DOTALL)


def tables(results: Results) -> dict[str, str]:
    """By name, all for which there are results."""
    found = cells(results.trials)
    made = {
        "claims": _claims(found),
        **{f"best-{n}": _best(found, n) for n in ("nf", "plain", "bn")},
        "best-deep": _deep(found),
        "rates-nf": _rates(found, "nf"),
        "one-rate-nf": _one_rate(found, "nf"),
        "last-layer": _last_layer(found),
        "text": _text(found),
        "sharded": _sharded(results.cases),
    }
    return {name: table for name, table in made.items() if table}


def marked(page: str) -> list[str]:
    """The tables that a page has markers for.

    Raises:
        typer.BadParameter: for none.
    """
    names = [name for _, name, _ in MARKED.findall(page)]
    if not names:
        raise typer.BadParameter("no <!-- study: TABLE --> ... <!-- /study --> in this page.", param_hint="--page")
    return names


def fill(page: str, made: Mapping[str, str]) -> str:
    """The page with what stands between its markers made anew.

    Raises:
        typer.BadParameter: there is no such table, or no marker at all.
    """
    missing = [name for name in marked(page) if name not in made]
    if missing:
        raise typer.BadParameter(
            f"no results for the table {missing[0]!r}; there are {', '.join(made)}.", param_hint="--page"
        )
    return MARKED.sub(lambda match: f"{match[1]}{made[match[2]]}\n{match[3]}", page)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def _claims(found: Cells) -> str:
    rows, before = [], None
    for finding in findings(found):
        claim = "" if finding.claim == before else f"**{finding.claim}**"
        rows.append([claim, finding.compared, finding.figures, f"**{finding.verdict}**"])
        before = finding.claim
    return _table(["claim", "compared", "figures", "holds"], rows)


def _by_batch(found: Cells, network: str, cell: Callable[[list[Cell]], str], kinds: Sequence[str]) -> str:
    """A row for each clipping, a column for each batch size."""
    settings = [s for s in found if s.network == network and s.clipping.kind in kinds]
    batches = sorted({s.batch for s in settings})
    clippings = sorted({s.clipping for s in settings})
    rows = (
        [str(clipping), *(cell(found.get(Setting(network, batch, clipping), [])) for batch in batches)]
        for clipping in clippings
    )
    return _table(["", *(f"batch {batch}" for batch in batches)], rows)


def _at_best(tried: list[Cell]) -> str:
    if not tried:
        return ""
    top = best(tried)
    share = "" if top.clipped is None else f", {top.clipped:.0%} clipped"
    return f"{figures(top)} at {top.lr:g}{share}"


def _best(found: Cells, network: str) -> str:
    return _by_batch(found, network, _at_best, ("none", "agc"))


def _rates(found: Cells, network: str) -> str:
    def cell(tried: list[Cell]) -> str:
        if not tried:
            return ""
        rate = largest_rate(tried)
        if rate is None:
            return "none"
        return f"{rate:g}" + (" (the largest tried)" if rate == tried[-1].lr else "")

    return _by_batch(found, network, cell, ("none", "agc"))


def _deep(found: Cells) -> str:
    deep = [s for s in found if s.network.endswith("-deep")]
    networks = [name for name in NETWORKS if name in {s.network for s in deep}]
    clippings = sorted({s.clipping for s in deep})
    batch = max((s.batch for s in deep), default=0)
    rows = (
        [NETWORKS[n].label, *(_at_best(found.get(Setting(n, batch, clipping), [])) for clipping in clippings)]
        for n in networks
    )
    return _table(["", *map(str, clippings)], rows)


def _one_rate(found: Cells, network: str) -> str:
    clippings = sorted({s.clipping for s in found if s.network == network and s.clipping.kind == "agc"})
    rows = []
    for setting in (s for s in found if s.network == network and s.clipping == NONE):
        without, clipped = best(found[setting]), at_rate_of_none(found, network, setting.batch)
        row = [f"{setting.batch}, rate {without.lr:g}", figures(without)]
        rows.append([*row, *(figures(clipped[c]) if c in clipped else "" for c in clippings)])
    return _table(["batch size", str(NONE), *map(str, clippings)], rows)


def _last_layer(found: Cells) -> str:
    rows = []
    for setting in found:
        left_out = Setting(setting.network, setting.batch, Clipping("agc", setting.clipping.at))
        if setting.clipping.kind == "agc+last" and left_out in found:
            rows.append(
                [
                    str(setting.batch),
                    f"{setting.clipping.at:g}",
                    *(_at_best(found[s]) for s in (left_out, setting)),
                ]
            )
    return _table(["batch size", "threshold", "last layer left out", "clipped too"], rows)


def _text(found: Cells) -> str:
    settings = [s for s in found if s.network == "gpt"]
    rates = sorted({cell.lr for s in settings for cell in found[s]})
    rows = []
    for setting in settings:
        by_rate = {cell.lr: cell for cell in found[setting]}
        top = best(found[setting])
        row = [str(setting.clipping)]
        for rate in rates:
            shown = _loss(by_rate.get(rate))
            row.append(f"**{shown}**" if rate == top.lr else shown)
        rows.append([*row, "–" if top.clipped is None else f"{top.clipped:.1%}"])
    return _table(["learning rate", *(f"{rate:g}" for rate in rates), "clipped at the best"], rows)


def _loss(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return figures(cell) if math.isfinite(cell.range[0]) else f"{cell.diverged} of {len(cell.scores)} diverged"


def _sharded(cases: Mapping[Case, Mapping[str, Any]]) -> str:
    rows = []
    for case in sorted(cases, key=lambda c: (c.dtype != "float64", list(NETWORKS).index(c.network), c.clipping)):
        record = cases[case]
        apart, judged = record["apart"], record["units"] * record["steps"]
        rows.append(
            [
                f"{NETWORKS[case.network].label}, {case.clipping}",
                case.dtype,
                str(record["processes"]),
                str(record["steps"]),
                "{} to {}".format(*record["loss"]),
                f"{record['clipped']} of {judged}",
                f"{apart['clipped']}",
                f"{apart['loss']:.1e}",
                f"{apart['weights']:.1e}",
            ]
        )
    head = ["", "dtype", "processes", "steps", "loss", "units clipped", "judged otherwise", "loss apart"]
    return _table([*head, "weights apart"], rows)
