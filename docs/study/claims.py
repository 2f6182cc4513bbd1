"""The claims that AGC came with, each held against the results by a rule that was fixed before they were there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

from .cells import SEEDS, Cell, Cells, Setting, against, best, largest_rate
from .networks import NETWORKS
from .trials import NONE, TEXT_BATCH, Clipping

SMALL, LARGE = 128, 1024
# By batch size, what Brock et al. (1024) and Thakur (128 and 256) advise. Not the best one here: picked from many, it
# would have an advantage that is none of AGC's.
ADVISED = {128: Clipping("agc", 0.16), 256: Clipping("agc", 0.16), 1024: Clipping("agc", 0.01)}
VERDICTS = {1: "yes", 0: "undecided", -1: "no"}


@dataclass(frozen=True)
class Finding:
    """What was held against what, the figures of both, and whether the claim holds."""

    claim: str
    compared: str
    figures: str
    verdict: str


def figures(cell: Cell) -> str:
    """Median [lowest, highest] over the seeds: accuracy in percent, of text the loss."""
    text = cell.median < 0
    numbers = (-s if text else 100 * s for s in (cell.median, *sorted(cell.range, reverse=text)))
    middle, low, high = (f"{number:.{3 if text else 1}f}" for number in numbers)
    return f"{middle} [{low}, {high}]"


def findings(cells: Cells) -> list[Finding]:
    """Of every claim, and of AGC on text; comparisons for which results are missing are left out."""
    return [f for claim in (_batches, _rates, _thresholds, _last_layer, _plain, _text) for f in claim(cells)]


def tuned(cells: Cells, network: str, batch: int, kind: str) -> dict[Clipping, Cell]:
    """The best cell of every clipping of a kind."""
    wanted = (network, batch, kind)
    return {s.clipping: best(found) for s, found in cells.items() if (s.network, s.batch, s.clipping.kind) == wanted}


def _norm_free(cells: Cells) -> Iterator[tuple[str, list[Cell], list[Cell]]]:
    """Which comparison, and the cells of norm-free networks with AGC as advised and without."""
    for network, (batch, advised) in product(("nf", "nf-deep"), ADVISED.items()):
        clipped, without = (cells.get(Setting(network, batch, clipping)) for clipping in (advised, NONE))
        if clipped and without:
            yield f"{NETWORKS[network].label}, batch {batch}: {advised} and {NONE}", clipped, without


def _batches(cells: Cells) -> Iterator[Finding]:
    for name, clipped, without in _norm_free(cells):
        with_agc, other = best(clipped), best(without)
        yield Finding(
            "AGC allows larger batches on norm-free networks",
            f"{name}, each at its best rate",
            f"{figures(with_agc)} and {figures(other)}",
            VERDICTS[against(with_agc, other)],
        )


def _rates(cells: Cells) -> Iterator[Finding]:
    for name, clipped, without in _norm_free(cells):
        rates = [largest_rate(tried) for tried in (clipped, without)]
        with_agc, other = (rate or 0.0 for rate in rates)
        seeds = min(len(cell.scores) for cell in (*clipped, *without))
        yield Finding(
            "AGC allows larger learning rates on norm-free networks",
            f"{name}, largest rate at which every seed trains",
            " and ".join("none" if rate is None else f"{rate:g}" for rate in rates),
            VERDICTS[0 if seeds < SEEDS else 1 if with_agc > other else -1],
        )


def _thresholds(cells: Cells) -> Iterator[Finding]:
    """The best threshold of small batches and those not told apart from it must lie above all those of large ones."""
    for how, choose in (
        ("each threshold at its best rate", partial(tuned, kind="agc")),
        ("all at the rate that is best without clipping", at_rate_of_none),
    ):
        small, large = (good_thresholds(choose(cells, "nf", batch)) for batch in (SMALL, LARGE))
        if small and large:
            yield Finding(
                "Small batches want larger thresholds",
                f"{NETWORKS['nf'].label}, batches {SMALL} and {LARGE}, {how}: thresholds not told apart from the best",
                " and ".join(", ".join(f"{at:g}" for at in found) for found in (small, large)),
                VERDICTS[(min(small) > max(large)) - (max(small) < min(large))],
            )


def at_rate_of_none(cells: Cells, network: str, batch: int) -> dict[Clipping, Cell]:
    """AGC at every threshold, at the learning rate that is best without clipping."""
    without = cells.get(Setting(network, batch, NONE))
    if without is None:
        return {}
    rate = best(without).lr
    return {
        setting.clipping: cell
        for setting, found in cells.items()
        if (setting.network, setting.batch) == (network, batch) and setting.clipping.kind == "agc"
        for cell in found
        if cell.lr == rate
    }


def good_thresholds(cells: dict[Clipping, Cell]) -> list[float]:
    """The threshold of the highest median and all whose seeds are not wholly below its seeds."""
    if not cells:
        return []
    top = max(cells.values(), key=lambda cell: cell.median)
    return [clipping.at for clipping, cell in sorted(cells.items()) if against(top, cell) <= 0]


def _last_layer(cells: Cells) -> Iterator[Finding]:
    for batch in sorted({setting.batch for setting in cells if setting.network == "nf"}):
        out, clipped = tuned(cells, "nf", batch, "agc"), tuned(cells, "nf", batch, "agc+last")
        pairs = [(out[Clipping("agc", c.at)], cell) for c, cell in clipped.items() if Clipping("agc", c.at) in out]
        if not pairs:
            continue
        results = [against(left_out, too) for left_out, too in pairs]
        better, worse = results.count(1), results.count(-1)
        yield Finding(
            "The last layer is better left out",
            f"{NETWORKS['nf'].label}, batch {batch}: left out and clipped too, at {len(pairs)} thresholds",
            f"better at {better}, worse at {worse}, undecided at {results.count(0)}",
            VERDICTS[(better > 0) - (worse > 0)],
        )


def _plain(cells: Cells) -> Iterator[Finding]:
    advised = ADVISED[LARGE]
    for depth in ("", "-deep"):
        settings = [Setting(f"{n}{depth}", LARGE, c) for n, c in (("plain", advised), ("plain", NONE), ("bn", NONE))]
        if not all(setting in cells for setting in settings):
            continue
        clipped, without, normed = (best(cells[setting]) for setting in settings)
        name = f"{NETWORKS[f'plain{depth}'].label}, batch {LARGE}, {advised}"
        yield Finding(
            "AGC alone does not rescue a plain ResNet without BatchNorm",
            f"{name}: no better than without AGC",
            f"{figures(clipped)} and {figures(without)}",
            VERDICTS[-against(clipped, without)],
        )
        yield Finding(
            "AGC alone does not rescue a plain ResNet without BatchNorm",
            f"{name}: worse than with BatchNorm and no clipping",
            f"{figures(clipped)} and {figures(normed)}",
            VERDICTS[against(normed, clipped)],
        )


def _text(cells: Cells) -> Iterator[Finding]:
    agc, norm, none = (tuned(cells, "gpt", TEXT_BATCH, kind) for kind in ("agc", "norm", "none"))
    for others in (none, norm):
        if agc and others:
            (mine, ours), (its, other) = (
                max(tried.items(), key=lambda item: item[1].median) for tried in (agc, others)
            )
            yield Finding(
                "AGC trains a small GPT better (no claim of its authors)",
                f"{NETWORKS['gpt'].label}: loss with the best of {mine} and {its}, each at its best rate",
                f"{figures(ours)} and {figures(other)}",
                VERDICTS[against(ours, other)],
            )
