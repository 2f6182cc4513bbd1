"""`dist-agc units`: what the units of a model are, and why; and whether its matrix products say the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from typer import BadParameter, Exit, Option

from .options import UnitsOption, units_option

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from ..observe import UnitRow

DEVICES = ("meta", "cpu")


def command(
    model: Annotated[
        str,
        Option(
            metavar="PACKAGE.MODULE:FACTORY",
            help="A function that returns a module, (module, loss) or (module, batch), as for check.",
        ),
    ],
    observe: Annotated[
        bool,
        Option("--observe", help="Run the model once, on the CPU, and look at what its matrix products contract."),
    ] = False,
    units: UnitsOption = None,
    device: Annotated[
        str | None,
        Option(
            metavar="|".join(DEVICES),
            help="Where the factory is called. On meta a model has shapes and no values, so it may be of any size.",
            show_default="meta; cpu with --observe",
        ),
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object with every parameter.")] = False,
) -> None:
    """Show which dims number the units of every parameter, how many units that makes, and why.

    A unit is what one output is made from: the dims that the forward pass does not contract number the units.

    A guess follows from the shape alone; for a tensor of three dims or more it is often wrong.

    The exit code is 1 where --observe sees a product that disagrees.
    """
    if device is None:
        device = "cpu" if observe else "meta"
    if device not in DEVICES:
        raise BadParameter(f"{device!r} is not one of {', '.join(DEVICES)}.", param_hint="--device")
    asked = units_option(units or ())
    made, loss = _build(model, device)
    if observe and loss is None:
        raise BadParameter(
            f"--observe runs the model: {model} must return (module, loss), where loss(module) gives a scalar, or "
            "(module, batch).",
            param_hint="--model",
        )
    rows = _look(made, asked, device, loss if observe else None)
    if as_json:
        print(json.dumps(_record(model, rows, observe), indent=2))
    else:
        _print(made, rows, observe)
    raise Exit(int(any(row.disagrees for row in rows)))


def _build(spec: str, device: str) -> tuple[nn.Module, Callable[[nn.Module], Any] | None]:
    import torch

    from ..conformance import module_and_loss
    from ..lab.shapes import named

    try:
        factory = named(spec)
    except ValueError as error:
        raise BadParameter(str(error), param_hint="--model") from None
    try:
        with torch.device(device):
            made = factory()
    except ImportError as error:
        raise BadParameter(f"{spec}: {error}", param_hint="--model") from error
    except Exception as error:
        if device != "meta":
            raise
        raise BadParameter(
            f"{spec} fails on the meta device, where tensors have no values. Try --device cpu, which builds the model "
            f"for real. It raised {type(error).__name__}: {error}",
            param_hint="--model",
        ) from error
    try:
        return module_and_loss(made)
    except (TypeError, ValueError) as error:
        raise BadParameter(f"{spec}: {error}", param_hint="--model") from None


def _look(
    model: nn.Module, asked: dict[str, tuple[int, ...]] | None, device: str, loss: Callable[[nn.Module], Any] | None
) -> list[UnitRow]:
    import torch

    from .. import observe

    try:
        rows = observe.units(model, units=asked)
    except (TypeError, ValueError) as error:
        raise BadParameter(str(error)) from None
    if loss is None:
        return rows
    with torch.device(device):
        return observe.units(model, lambda: loss(model), units=asked)


def _record(spec: str, rows: Sequence[UnitRow], observe: bool) -> dict[str, Any]:
    counts = asdict(Counts.of(rows))
    if not observe:
        counts = {name: count for name, count in counts.items() if name not in ("seen", "disagree")}
    return {"model": spec, **counts, "rows": [asdict(row) | {"disagrees": row.disagrees} for row in rows]}


@dataclass(frozen=True)
class Counts:
    """What the last line sums up."""

    parameters: int
    elements: int
    units: int
    guesses: int
    guesses_of_three_dims: int  # or more
    seen: int
    disagree: int

    @classmethod
    def of(cls, rows: Sequence[UnitRow]) -> Counts:
        import torch

        return cls(
            parameters=len(rows),
            elements=sum(torch.Size(row.shape).numel() for row in rows),
            units=sum(row.count for row in rows),
            guesses=sum(row.guessed for row in rows),
            guesses_of_three_dims=sum(map(often_wrong, rows)),
            seen=sum(row.observed is not None for row in rows),
            disagree=sum(row.disagrees for row in rows),
        )


def often_wrong(row: UnitRow) -> bool:
    """Whether clipping warns of this guess."""
    from ..model.units import UnitRule

    return UnitRule(row.view, row.dims, guessed=row.guessed).doubtful


@dataclass(frozen=True)
class Alike:
    """Parameters whose names are alike but for numbers, and whose units are the same."""

    name: str
    rows: list[UnitRow]

    @property
    def one(self) -> UnitRow:
        return self.rows[0]

    @property
    def units(self) -> int:
        return sum(row.count for row in self.rows)

    def cells(self, observe: bool, wide: bool) -> Iterator[str]:
        row = self.one
        shape = _times(row.shape) + (f" as {_times(row.view)}" if row.view != row.shape else "")
        times = f"x{len(self.rows)}" if len(self.rows) > 1 else ""
        yield from (times, shape, _dims(row.dims) or "whole", f"{row.count:,}")
        if observe:
            yield self.said(wide)

    def said(self, wide: bool) -> str:
        """What the products of a forward pass leave."""
        left = self.one.observed
        if left is None:  # that of a vector tells nothing
            return "not seen" if len(self.one.shape) > 1 else ""
        return f"DISAGREES:{' ' if wide else chr(10)}leaves {left}" if self.one.disagrees else "agrees"


def alike(rows: Sequence[UnitRow]) -> list[Alike]:
    from ..model.names import numberless

    found: dict[Any, Alike] = {}
    for row in rows:
        name = numberless(row.name)
        key = name, row.shape, row.view, row.dims, row.why, row.observed
        found.setdefault(key, Alike(name, [])).rows.append(row)
    return list(found.values())


def _times(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "1"


def _dims(dims: Sequence[int]) -> str:
    return ", ".join(map(str, dims))


def _print(model: nn.Module, rows: Sequence[UnitRow], observe: bool) -> None:
    from rich.markup import escape

    from ..lab.console import display
    from ..lab.console.tables import folded, show, table

    console = display.console(None)
    wide = not console.is_terminal
    groups = _grouped(alike(rows))
    headings = ["parameter", "", "shape", "dims", "units", *(["products"] if observe else [])]
    of_rows = [[list(row.cells(observe, wide)) for row in group] for group in groups.values()]
    totals = [f"{sum(row.units for row in group):,}" for group in groups.values()]
    # What the other columns leave to names in this terminal, which break at dots.
    columns = zip(*(cells for group in of_rows for cells in group), strict=True)
    widths = [max(len(line) for cell in column for line in cell.split("\n")) for column in columns]
    widths = [max(width, len(heading)) for width, heading in zip(widths, headings[1:], strict=True)]
    widths[3] = max([widths[3], *map(len, totals)])
    left = 1000 if wide else max(console.width - sum(widths) - 2 * len(headings) - 1, 20)
    cells = []
    for (why, group), of_group, total in zip(groups.items(), of_rows, totals, strict=True):
        colour = "bold yellow" if group[0].one.guessed else "bold"
        cells.append([f"[{colour}]{escape(folded(why, left, ' '))}[/]", "", "", "", f"[bold]{total}[/]"])
        for row, found in zip(group, of_group, strict=True):
            colour = "red" if row.one.disagrees else "yellow" if often_wrong(row.one) else "not bold"
            cells.append([f"[{colour}]{escape(text)}[/]" for text in ("  " + folded(row.name, left - 2), *found)])
    shown = table(f"{type(model).__name__}: which dims number units, and why", headings, cells, left=headings[5:])
    for column in shown.columns:
        column.no_wrap = True
    show(console, shown)
    _conclude(console, model, rows, observe)


def _grouped(rows: Sequence[Alike]) -> dict[str, list[Alike]]:
    """By reason. What needs no second look, one unit each, comes after the rest, and guesses come last."""
    ordered = sorted(rows, key=lambda row: (row.one.guessed, not row.one.dims))
    groups: dict[str, list[Alike]] = {}
    for row in ordered:
        groups.setdefault(row.one.why, []).append(row)
    return groups


def _conclude(console: Console, model: nn.Module, rows: Sequence[UnitRow], observe: bool) -> None:
    counts = Counts.of(rows)
    for row in alike([row for row in rows if row.disagrees]):
        _settle(console, model, row)
    if unsettled := alike([row for row in rows if often_wrong(row) and not row.disagrees]):
        console.print(
            "[bold yellow]Guesses on three dims or more are often wrong.[/] Say which dims number their units; "
            "0 keeps the guess, (0, 1) is for a stack of matrices (n, out, in), (0, 2) for (n, in, out):"
        )
        _code(console, "units={", *(f"    {row.name!r}: 0," for row in unsettled), "}")
    guesses = f"{counts.guesses:,} guessed, {counts.guesses_of_three_dims:,} of them with three dims or more"
    console.print(
        f"[bold]{counts.parameters:,} parameters with {counts.elements:,} elements: {counts.units:,} units.[/bold] "
        f"{guesses if counts.guesses else 'None is guessed'}."
        + (f" {counts.seen:,} seen in products, of which {counts.disagree:,} disagree." if observe else "")
    )


def _settle(console: Console, model: nn.Module, row: Alike) -> None:
    """A disagreement, and the lines that end it."""
    from ..model.names import entries

    one = row.one
    assert one.observed is not None
    console.print(
        f"[bold red]{row.name} disagrees:[/] the products of the forward pass leave {one.observed} of "
        f"{_times(one.view)}, and {one.dims} number its units ({one.why})."
    )
    if one.view != one.shape:
        return  # no dims of the parameter itself say it
    console.print("To take what they leave:")
    _code(console, f"units={{{row.name!r}: {one.observed}}}")
    owners = next(entry.owners for entry in entries(model) if one.name in entry.names)
    # A layer of torch may be used otherwise elsewhere: of those around it, the first that is of somebody's own.
    of = ((type(m), name) for m, name in owners if not f"{type(m).__module__}.".startswith("torch."))
    for kind, name in list(of)[:1]:
        console.print(f"or, for every {kind.__qualname__} of {kind.__module__}:", markup=False)
        _code(console, f"dist_agc.register_units({kind.__name__}, {{{name!r}: {one.observed}}})")


def _code(console: Console, *lines: str) -> None:
    """To be copied: nothing is broken or taken for markup."""
    for line in lines:
        console.print(f"    {line}", markup=False, soft_wrap=True)
