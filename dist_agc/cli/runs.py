"""What a training run wrote down: one object of JSON a line, as docs/logging.md describes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeGuard

import typer

PER_PARAMETER = "agc/clip_fraction/"  # before the name of a parameter


@dataclass(frozen=True)
class Counted:
    """Ratios, added up over the lines that count them against the same thresholds as the first.

    ``parameters``: by name, [units, those above the first threshold, above the second, ...]. ``left_out``: lines with
    other thresholds, as a run has that was resumed with other ones.
    """

    thresholds: list[float]
    parameters: dict[str, list[int]]
    lines: int
    left_out: int = 0

    def totals(self) -> list[int]:
        """The same over all parameters."""
        return [sum(column) for column in zip(*self.parameters.values(), strict=True)]


@dataclass
class Run:
    """The lines of one run, by their ``step``."""

    name: str
    lines: list[dict[str, Any]]

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the last line that has some."""
        return next((line["settings"] for line in reversed(self.lines) if line.get("settings")), {})

    @property
    def threshold(self) -> float | None:
        value = self.settings.get("clipping_threshold")
        return float(value) if is_number(value) and value > 0 else None

    @property
    def dry(self) -> bool:
        """Whether it measured and clipped nothing, as its last statistics say, or else its settings."""
        last = next((line for line in reversed(self.lines) if "agc/units" in line), {})
        return bool(last.get("agc/dry_run", self.settings.get("dry_run", False)))

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) wherever the value is a finite number."""
        return [(line["step"], float(line[key])) for line in self.lines if is_number(line.get(key))]

    def values(self, key: str) -> list[float]:
        return [value for _, value in self.series(key)]

    def parameters(self) -> list[str]:
        """Those with statistics of their own, in the order of the model."""
        found = (k for line in self.lines for k, v in line.items() if k.startswith(PER_PARAMETER) and is_number(v))
        return [key.removeprefix(PER_PARAMETER) for key in dict.fromkeys(found)]

    def most_clipped(self, count: int) -> list[str]:
        """At most so many of the parameters, by their mean share of clipped units."""
        shares = {name: self.values(PER_PARAMETER + name) for name in self.parameters()}
        return sorted(shares, key=lambda name: (-fmean(shares[name]), -max(shares[name]), name))[:count]

    def ratios(self) -> Counted:
        """Parameters without units are left out, so that what is there can be divided by."""
        found = [line["agc/ratios"] for line in self.lines if "agc/ratios" in line]
        same = [counts for counts in found if counts["thresholds"] == found[0]["thresholds"]]
        total: dict[str, list[int]] = {}
        for counts in same:
            for name, row in counts["parameters"].items():
                total[name] = [a + b for a, b in zip(total.get(name, [0] * len(row)), row, strict=True)]
        total = {name: row for name, row in total.items() if row[0] > 0}
        return Counted(found[0]["thresholds"] if found else [], total, len(same), len(found) - len(same))


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read(paths: Sequence[Path]) -> list[Run]:
    """The runs in these files, in order; a file may hold several, told apart by ``run``.

    Raises:
        typer.BadParameter: no such file, a line that is not as docs/logging.md describes, nothing of AGC in any file.
    """
    runs: dict[tuple[Path, str], Run] = {}
    for path in dict.fromkeys(paths):
        for line in _lines(path):
            name = str(line.get("run") or path.stem)
            runs.setdefault((path, name), Run(name, [])).lines.append(line)
    if not any(key.startswith("agc/") for run in runs.values() for line in run.lines for key in line):
        raise typer.BadParameter(
            f"nothing in {', '.join(map(str, paths))} begins with agc/: write ClipStats.as_dict()."
        )
    names, files = [name for _, name in runs], _short({path for path, _ in runs})
    for (path, name), run in runs.items():
        run.lines.sort(key=lambda line: line["step"])
        if names.count(name) > 1:
            run.name = files[path] if name == path.stem else f"{files[path]}: {name}"
    return list(runs.values())


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot read {path}: {error}.") from None
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return  # without its end: the run was interrupted while it wrote this line
            raise typer.BadParameter(f"{path}, line {number}: no JSON ({error}).") from None
        if not isinstance(found, dict):
            raise typer.BadParameter(f"{path}, line {number}: expected an object, got {line[:40]}.")
        if problem := _problem(found):
            raise typer.BadParameter(f"{path}, line {number}: {problem}.")
        yield found


def _problem(line: Mapping[str, Any]) -> str | None:
    """What is not as docs/logging.md says, of that which everything else relies on."""
    if not is_number(line.get("step")):
        return f'expected a "step" that is a number, got {_quoted(line.get("step", "none"))}'
    if not isinstance(line.get("settings", {}), dict):
        return f'expected "settings" to be an object, got {_quoted(line["settings"])}'
    if "agc/ratios" not in line:
        return None
    counts = line["agc/ratios"]
    expected = 'expected "agc/ratios" as dist_agc.ratios(...).as_dict() gives them'
    if not isinstance(counts, dict) or not isinstance(counts.get("parameters"), dict):
        return f'{expected}, an object with "thresholds" and "parameters"; got {_quoted(counts)}'
    thresholds = counts.get("thresholds")
    if not isinstance(thresholds, list) or not thresholds or not all(is_number(t) and t > 0 for t in thresholds):
        return f"{expected}, with a list of positive thresholds; got {_quoted(thresholds)}"
    if thresholds != sorted(set(thresholds)):
        return f"{expected}, with thresholds that ascend; got {_quoted(thresholds)}"
    for name, row in counts["parameters"].items():
        whole = isinstance(row, list) and all(isinstance(n, int) and n >= 0 for n in row)
        if not whole or len(row) != len(thresholds) + 1 or row != sorted(row, reverse=True):
            return (
                f"{expected}, for {name!r} the units and those above each of {len(thresholds)} thresholds, which "
                f"become fewer; got {_quoted(row)}"
            )
    return None


def _quoted(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _short(paths: set[Path]) -> dict[Path, str]:
    """The shortest ends of these paths, without the suffix, that tell them apart."""
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        ends = {path: str(Path(*path.with_suffix("").parts[-length:])) for path in paths}
        if len(set(ends.values())) == len(paths):
            return ends
    return {path: str(path) for path in paths}
