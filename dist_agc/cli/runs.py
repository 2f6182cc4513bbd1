"""What a training run wrote down: one object of JSON a line, as docs/logging.md describes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer


@dataclass
class Run:
    """The lines of one run, by step.

    ``lines`` have a ``step`` each; ``settings`` are those of the last line that has some.
    """

    name: str
    lines: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) wherever the value is a finite number."""
        found = ((line["step"], line.get(key)) for line in self.lines)
        return [(step, float(v)) for step, v in found if isinstance(v, int | float) and math.isfinite(v)]

    @property
    def threshold(self) -> float | None:
        value = self.settings.get("clipping_threshold")
        return float(value) if isinstance(value, int | float) else None

    def parameters(self) -> list[str]:
        """Those with statistics of their own, in the order of the model."""
        start = "agc/clip_fraction/"
        return list(dict.fromkeys(k[len(start) :] for line in self.lines for k in line if k.startswith(start)))

    def ratios(self) -> tuple[list[float], dict[str, list[int]]]:
        """(thresholds, by parameter [units, above the first threshold, ...]), added up over the lines with them."""
        thresholds: list[float] = []
        total: dict[str, list[int]] = {}
        for found in (line["agc/ratios"] for line in self.lines if "agc/ratios" in line):
            if found["thresholds"] != thresholds and thresholds:
                continue  # a run that was resumed with other ones
            thresholds = found["thresholds"]
            for name, counts in found["parameters"].items():
                total[name] = [a + b for a, b in zip(total.get(name, [0] * len(counts)), counts, strict=True)]
        return thresholds, total


def read(paths: Sequence[Path]) -> list[Run]:
    """The runs in these files, in order; a file may hold several, told apart by ``run``.

    Raises:
        typer.BadParameter: no such file, a line that is no JSON object with a ``step``, nothing of AGC in any of them.
    """
    runs: dict[tuple[Path, str], Run] = {}
    for path in paths:
        for number, line in _objects(path):
            if not isinstance(line.get("step"), int | float):
                raise typer.BadParameter(f'{path}, line {number}: expected a "step", got {", ".join(line) or "{}"}.')
            name = str(line.get("run", path.stem))
            run = runs.setdefault((path, name), Run(name))
            run.lines.append(line)
            run.settings = line.get("settings") or run.settings
    found = list(runs.values())
    if not any(key.startswith("agc/") for run in found for line in run.lines for key in line):
        raise typer.BadParameter(
            f"nothing in {', '.join(map(str, paths))} begins with agc/: write ClipStats.as_dict()."
        )
    names = [run.name for run in found]
    for (path, _), run in runs.items():
        run.lines.sort(key=lambda line: line["step"])
        if names.count(run.name) > 1:
            run.name = f"{path.stem}: {run.name}" if run.name != path.stem else str(path)
    return found


def _objects(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot read {path}: {error}.") from None
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and not text.endswith("\n"):
                return  # the run was interrupted while it wrote its last line
            raise typer.BadParameter(f"{path}, line {number}: no JSON ({error}).") from None
        if not isinstance(found, dict):
            raise typer.BadParameter(f"{path}, line {number}: expected an object, got {line[:40]}.")
        yield number, found
