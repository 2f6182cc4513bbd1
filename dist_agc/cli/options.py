"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from typer import BadParameter, Option

UnitsOption = Annotated[
    list[str] | None,
    Option(
        metavar="GLOB=DIMS",
        help="The dims that number the units of some parameters, as in AGCConfig: '*.experts.*=0,1'; repeatable.",
    ),
]


def units_option(given: Sequence[str]) -> dict[str, tuple[int, ...]] | None:
    """``["*.experts.*=0,1"]`` as `AGCConfig` takes it; no dims name the whole tensor."""
    units = {}
    for text in given:
        pattern, _, dims = text.rpartition("=")
        try:
            units[pattern] = tuple(int(dim) for dim in dims.split(",") if dim.strip())
        except ValueError:
            pattern = ""
        if not pattern:
            raise BadParameter(f"{text!r}: expected GLOB=DIMS, such as '*.experts.*=0,1'.", param_hint="--units")
    return units or None
