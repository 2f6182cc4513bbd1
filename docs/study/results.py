"""OUT/results.jsonl: the settings, then one line for everything that is done. What is there need not be done again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

from .trials import Case, Study, Trial


class Results:
    """What is done, in memory and in the file.

    Raises:
        typer.BadParameter: a file that cannot be read or written, that holds something else, or other settings.
    """

    def __init__(self, path: Path, study: Study, note: Callable[[str], None] = print) -> None:
        self.path = path
        self.trials: dict[Trial, Mapping[str, Any]] = {}
        self.cases: dict[Case, Mapping[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._drop_torn_line(note)
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        except (OSError, UnicodeDecodeError) as error:
            raise typer.BadParameter(f"cannot use {path}: {error}.", param_hint="--out") from None
        for number, line in enumerate(lines, start=1):
            try:
                self._take(json.loads(line), study)
            except (ValueError, LookupError, TypeError):
                raise typer.BadParameter(
                    f"{path}, line {number}: not a line of a study: {line[:60]}", param_hint="--out"
                ) from None
        self._heading = None if lines else {"settings": study.settings()}

    def add(self, record: Mapping[str, Any]) -> None:
        """Keep it, in the file at once."""
        new = [record] if self._heading is None else [self._heading, record]
        self._heading = None
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n" for line in new)
        self._keep(record)

    def _take(self, record: Mapping[str, Any], study: Study) -> None:
        if "settings" not in record:
            return self._keep(record)
        if record["settings"] != study.settings():
            raise typer.BadParameter(
                f"{self.path} holds results of other settings, {record['settings']} and not {study.settings()}: "
                "give another folder, or remove the file.",
                param_hint="--out",
            )

    def _keep(self, record: Mapping[str, Any]) -> None:
        if "dtype" in record:
            self.cases[Case.of(record)] = record
        else:
            self.trials[Trial.of(record)] = record

    def _drop_torn_line(self, note: Callable[[str], None]) -> None:
        """The last line has no end where the study was killed while it wrote."""
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            note(f"{self.path}: the last line was cut off; what it stood for is done again.")
            os.truncate(self.path, whole)
