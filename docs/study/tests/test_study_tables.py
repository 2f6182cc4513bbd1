"""What the study makes of its results: verdicts, tables, plots, the page that is committed."""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from study import charts, claims
from study.cells import CHANCE, Setting, against, best, cells, largest_rate
from study.results import Results
from study.tables import fill, tables
from study.trials import FULL, NONE, Clipping, Trial

ROOT = Path(__file__).parents[3]
AGC = Clipping("agc", 0.01)


def record(trial: Trial, score: float | None, clipped: float | None = None) -> dict[str, Any]:
    """A line as a trial leaves it; `score` is the accuracy, of text the loss, None where it diverged."""
    values = {"accuracy": score, "loss": score, "train": score, "diverged": 7 if score is None else None}
    return {**trial.as_dict(), **values, "clipped": clipped, "seconds": 1.0}


def tried(
    network: str, batch: int, clipping: Clipping, scores: dict[float, Iterable[float | None]]
) -> dict[Trial, dict[str, Any]]:
    """Results by learning rate, one a seed."""
    trials = {
        Trial(network, batch, clipping, lr, seed): score for lr, row in scores.items() for seed, score in enumerate(row)
    }
    return {trial: record(trial, score, None if clipping == NONE else 0.25) for trial, score in trials.items()}


# ---------------------------------------------------------------------------------------------------------- the scores


def test_scores_over_seeds() -> None:
    results = tried("nf", 128, NONE, {0.1: (0.9, 0.8, 0.7), 0.2: (0.95, 0.85, None), 0.4: (0.4, 0.6, 0.6)})
    results |= tried("gpt", 32, NONE, {0.1: (2.0, None, 3.0)})
    found = cells(results)
    low, middle, high = found[Setting("nf", 128, NONE)]
    assert (low.median, low.range, low.diverged) == (0.8, (0.7, 0.9), 0)
    assert (middle.median, middle.range, middle.diverged) == (0.85, (CHANCE, 0.95), 1)
    assert best([low, middle, high]) is middle
    assert largest_rate([low, middle, high]) == 0.1, "at the larger ones not every seed trains"
    (text,) = found[Setting("gpt", 32, NONE)]
    assert text.median == -3.0 and text.range == (-math.inf, -2.0)


def test_settings_differ_only_where_no_seed_lies_between() -> None:
    found = cells(
        tried("nf", 128, NONE, {1: (0.5, 0.6, 0.7), 2: (0.7, 0.8, 0.9), 4: (0.71, 0.72, 0.73)}),
    )[Setting("nf", 128, NONE)]
    assert against(found[0], found[1]) == 0, "they touch"
    assert against(found[2], found[0]) == 1 and against(found[0], found[2]) == -1
    assert against(replace(found[2], scores=(0.72, 0.72)), found[0]) == 0, "two seeds decide nothing"


def claim_verdicts(results: dict[Trial, dict[str, Any]]) -> dict[str, list[str]]:
    verdicts: dict[str, list[str]] = {}
    for finding in claims.findings(cells(results)):
        verdicts.setdefault(finding.claim, []).append(finding.verdict)
    return verdicts


@pytest.mark.parametrize(
    ("agc", "none", "verdict"),
    [(0.9, 0.6, "yes"), (0.6, 0.9, "no"), (0.9, 0.9, "undecided")],
)
def test_verdicts_follow_the_data(agc: float, none: float, verdict: str) -> None:
    def around(score: float) -> tuple[float, float, float]:
        return score - 0.01, score, score + 0.01

    plain_verdict = {"yes": "no", "no": "yes"}.get(verdict, verdict)  # the claim is that AGC does not help
    results = tried("nf", 1024, NONE, {0.1: around(none)}) | tried("nf", 1024, AGC, {0.1: around(agc)})
    results |= tried("nf", 1024, Clipping("agc+last", 0.01), {0.1: around(none)})
    results |= tried("plain", 1024, AGC, {0.1: around(agc)}) | tried("plain", 1024, NONE, {0.1: around(none)})
    results |= tried("bn", 1024, NONE, {0.1: around(0.7)})
    results |= tried("gpt", 32, AGC, {0.1: around(none)}) | tried("gpt", 32, NONE, {0.1: around(agc)})
    found = claim_verdicts(results)
    assert found.pop("AGC trains a small GPT better (no claim of its authors)") == [verdict]
    assert found.pop("AGC allows larger batches on norm-free networks") == [verdict]
    assert found.pop("The last layer is better left out") == [verdict]
    behind = "no" if agc > 0.7 else "yes"
    assert found.pop("AGC alone does not rescue a plain ResNet without BatchNorm") == [plain_verdict, behind]
    assert found.pop("AGC allows larger learning rates on norm-free networks") == ["no"], "one rate was tried"
    assert not found, "no small batches were tried"


@pytest.mark.parametrize(
    ("small", "large", "verdict"),
    [
        ({0.01: 0.5, 0.16: 0.9}, {0.01: 0.9, 0.16: 0.5}, "yes"),
        ({0.01: 0.9, 0.16: 0.5}, {0.01: 0.5, 0.16: 0.9}, "no"),
        ({0.01: 0.9, 0.16: 0.9}, {0.01: 0.9, 0.16: 0.5}, "undecided"),
    ],
)
def test_thresholds_are_compared_over_batch_sizes(
    small: dict[float, float], large: dict[float, float], verdict: str
) -> None:
    results: dict[Trial, dict[str, Any]] = {}
    for batch, scores in ((128, small), (1024, large)):
        for at, score in scores.items():
            results |= tried("nf", batch, Clipping("agc", at), {0.1: (score, score, score + 0.01)})
    assert claim_verdicts(results) == {"Small batches want larger thresholds": [verdict]}


# ----------------------------------------------------------------------------------------------------- tables and plots


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of every kind, made up."""
    results = Results(tmp_path_factory.mktemp("study") / "results.jsonl", FULL)
    lines = tried("nf", 128, NONE, {0.1: (0.9, 0.95, 0.97), 0.2: (None, None, 0.3)})
    lines |= tried("nf", 128, AGC, {0.1: (0.8, 0.8, 0.8), 0.2: (0.96, 0.97, 0.98)})
    lines |= tried("nf", 128, Clipping("agc+last", 0.01), {0.1: (0.7, 0.7, 0.7)})
    lines |= tried("nf", 1024, NONE, {0.1: (0.4, 0.4, 0.4)})
    lines |= tried("gpt", 32, NONE, {0.1: (2.5, 2.5, 2.6), 0.2: (None, None, None)})
    lines |= tried("gpt", 32, Clipping("norm", 0.25), {0.1: (2.3, 2.4, 2.5), 0.2: (2.2, 2.3, 2.4)})
    for line in lines.values():
        results.add(line)
    apart = {"loss": 1.5e-15, "clipped": 0, "weights": 2e-14}
    ran = {"processes": 2, "steps": 4, "loss": [2.3, 1.2], "units": 10, "clipped": 7, "apart": apart}
    results.add(FULL.cases()[0].as_dict() | ran)
    return results


def test_tables_say_what_the_results_say(some: Results) -> None:
    made = tables(some)
    assert made["best-nf"].splitlines() == [
        "|  | batch 128 | batch 1024 |",
        "| --- | --- | --- |",
        "| no clipping | 95.0 [90.0, 97.0] at 0.1 | 40.0 [40.0, 40.0] at 0.1 |",
        "| AGC 0.01 | 97.0 [96.0, 98.0] at 0.2, 25% clipped |  |",
    ]
    assert made["rates-nf"].splitlines()[2:] == [
        "| no clipping | 0.1 | none |",
        "| AGC 0.01 | 0.2 (the largest tried) |  |",
    ]
    assert made["one-rate-nf"].splitlines()[2:] == [
        "| 128, rate 0.1 | 95.0 [90.0, 97.0] | 80.0 [80.0, 80.0] |",
        "| 1024, rate 0.1 | 40.0 [40.0, 40.0] |  |",
    ]
    assert made["last-layer"].splitlines()[2:] == [
        "| 128 | 0.01 | 97.0 [96.0, 98.0] at 0.2, 25% clipped | 70.0 [70.0, 70.0] at 0.1, 25% clipped |",
    ]
    assert made["text"].splitlines() == [
        "| learning rate | 0.1 | 0.2 | clipped at the best |",
        "| --- | --- | --- | --- |",
        "| no clipping | **2.500 [2.500, 2.600]** | 3 of 3 diverged | – |",
        "| global norm 0.25 | 2.400 [2.300, 2.500] | **2.300 [2.200, 2.400]** | 25.0% |",
    ]
    assert made["sharded"].splitlines()[2:] == [
        "| norm-free ResNet, AGC 0.02 | float64 | 2 | 4 | 2.3 to 1.2 | 7 of 40 | 0 | 1.5e-15 | 2.0e-14 |",
    ]
    assert "best-plain" not in made, "nothing was tried"
    (line,) = made["claims"].splitlines()[2:]
    assert "The last layer" in line and "better at 1, worse at 0, undecided at 0 | **yes**" in line


def test_a_page_is_filled_between_its_markers(some: Results) -> None:
    page = "# Study\n<!-- study: text -->\nold\n<!-- /study -->\nWords.\n<!-- study: sharded -->\n<!-- /study -->\n"
    made = tables(some)
    filled = fill(page, made)
    assert filled.startswith(f"# Study\n<!-- study: text -->\n{made['text']}\n<!-- /study -->\nWords.\n")
    assert made["sharded"] in filled and "old" not in filled
    assert fill(filled, made) == filled
    with pytest.raises(typer.BadParameter, match="no results for the table 'cats'"):
        fill("<!-- study: cats -->\n<!-- /study -->", made)
    with pytest.raises(typer.BadParameter, match="no <!-- study"):
        fill("# Nothing", made)


def colours(path: Path) -> set[str]:
    from matplotlib.image import imread

    picture = imread(path)
    assert picture.shape[0] > 300 and picture.shape[1] > 500
    pixels = np.unique((255 * picture[:, :, :3]).round().astype(int).reshape(-1, 3), axis=0)
    return {"#{:02x}{:02x}{:02x}".format(*pixel) for pixel in pixels}


def test_plots_show_every_kind_of_clipping(some: Results, tmp_path: Path) -> None:
    written = charts.draw(cells(some.trials), tmp_path)
    assert [path.name for path in written] == ["rates.png", "thresholds.png", "text.png"]
    rates, thresholds, text = map(colours, written)
    assert {charts.WITHOUT, charts.SHADES[0]} <= rates
    assert {charts.WITHOUT, charts.AGC, charts.TOO} <= thresholds
    assert {charts.WITHOUT, charts.NORM[0]} <= text


# ------------------------------------------------------------------------------------------------- what is committed


def test_the_committed_results_are_whole_and_their_page_is_what_they_make() -> None:
    folder = ROOT / "docs" / "study"
    size = (folder / "results.jsonl").stat().st_size
    results = Results(folder / "results.jsonl", FULL)
    assert size < 300_000
    assert set(results.trials) >= {*FULL.trials("images", 3), *FULL.trials("text", 3)}
    assert set(results.cases) == set(FULL.cases())
    page = (ROOT / "docs" / "study.md").read_text()
    assert fill(page, tables(results)) == page, "python docs/study --out docs/study --page docs/study.md"
