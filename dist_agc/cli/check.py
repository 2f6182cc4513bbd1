"""`dist-agc check`: does AGC give the unsharded answer here, on these versions, under every layout that runs here?"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from typer import BadParameter, Exit, Option

from ..lab.console import launch
from .options import UnitsOption, units_option

if TYPE_CHECKING:
    from ..conformance import Row

DID_NOT_RUN = ("skipped", "not set up")


def command(
    model: Annotated[
        str | None,
        Option(
            metavar="PACKAGE.MODULE:FACTORY",
            help="Check a model of your own: a function that returns a module, (module, loss) or (module, batch). "
            "loss(module) gives a scalar; of a batch, it is the loss in the output, or the mean of its squares.",
        ),
    ] = None,
    layout: Annotated[
        list[str] | None,
        Option(help="Only layouts of this name or glob; repeatable. as-is: FACTORY returns it sharded already."),
    ] = None,
    exclude: Annotated[
        list[str] | None, Option(help="A glob of parameters to leave alone, as in AGCConfig; repeatable.")
    ] = None,
    units: UnitsOption = None,
    shard_unaware: Annotated[
        bool,
        Option("--shard-unaware", help="Show, too, what AGC does on each layout that is written for one process."),
    ] = False,
    nproc: Annotated[int, Option(min=1, max=64, help="Processes to start when none of the launchers did.")] = 2,
    as_json: Annotated[bool, Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Hold every layout that runs here against a float64 reference of the gathered tensors.

    Run it where you train: under torchrun, mpirun or the DeepSpeed launcher, [dim]torchrun --nproc-per-node 8 -m
    dist_agc.cli check[/dim], [dim]deepspeed --no_local_rank --module dist_agc.cli check[/dim], or by itself,
    [dim]dist-agc check --nproc 4[/dim].

    The exit code is 1 if AGC is wrong or fails in any layout, or no layout ran. One that could not be set up, with AGC
    or without, is named with the reason and counts for nothing.
    """
    from .. import AGCConfig, conformance
    from ..lab import shapes

    try:
        config = AGCConfig(exclude=tuple(exclude or ()), units=units_option(units or ()))
        conformance.cases(layout or (), own_model=model is not None)
    except (TypeError, ValueError) as error:
        raise BadParameter(str(error)) from None
    here = launch.place()
    if here is None:
        raise Exit(launch.torchrun(sys.argv[1:], nproc))
    try:
        factory = None if model is None else shapes.named(model)
    except ValueError as error:
        raise BadParameter(str(error), param_hint="--model") from None

    with _group(here):
        rows = conformance.run(
            layout or (),
            factory=factory,
            config=config,
            shard_unaware=shard_unaware,
            progress=lambda name: print(f"checking {name} ...", file=sys.stderr, flush=True),
            report=lambda rows: _print(rows, here, as_json),
        )
    raise Exit(int(not {"ok"} <= {row.verdict for row in rows} <= {"ok", *DID_NOT_RUN}))


@contextmanager
def _group(here: launch.Place) -> Iterator[None]:
    """The process group; NCCL beside gloo where every process of this host has an accelerator of its own."""
    import torch
    import torch.distributed as dist

    local = int(os.environ.get("LOCAL_RANK", os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", "0")))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", here.size)))
    # DeepSpeed reads these even where the group exists already, and mpirun does not set them.
    os.environ.update(RANK=str(here.rank), WORLD_SIZE=str(here.size), LOCAL_RANK=str(local))
    if not torch.cuda.is_available() or torch.cuda.device_count() < local_size:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        with launch.process_group(here):
            yield
        return
    torch.cuda.set_device(local)
    address = launch.meeting_point(os.environ)
    dist.init_process_group("cpu:gloo,cuda:nccl", address, launch.GROUP_TIMEOUT, world_size=here.size, rank=here.rank)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _print(rows: Sequence[Row], here: launch.Place, as_json: bool) -> None:
    import torch
    from rich.markup import escape

    from ..conformance.losses import GIVEN
    from ..lab.console import display
    from ..lab.console.tables import show, table

    if as_json:
        print(json.dumps({"torch": torch.__version__, "layouts": [asdict(row) for row in rows]}, indent=2))
        return
    console = display.console(here)
    beside = ["shard-unaware"] if any(row.shard_unaware for row in rows) else []
    cells: list[list[str]] = []
    notes: dict[str, list[str]] = {}  # and the layouts that each is of
    for row in rows:
        colour = {"ok": "green", "skipped": "dim", "not set up": "yellow"}.get(row.verdict, "red")
        short, _, long = row.shard_unaware.partition(": ")
        numbers = (row.units, row.clipped_units, row.split_units, row.collectives, row.bytes)
        ran = row.verdict in ("ok", "wrong", "vacuous")
        measured = [f"{row.error:.1e}", *map(str, numbers)] if ran else [""] * 6
        cells.append([row.layout, *measured, f"[{colour}]{row.verdict}[/{colour}]", *[short for _ in beside]])
        if row.note:
            notes.setdefault(row.note, []).append(f"[{colour}]{row.layout}[/{colour}]")
        if long:
            notes.setdefault(long.partition(". ")[0], []).append(f"{row.layout} shard-unaware")
    heading = f"{here.size} rank{'s' if here.size > 1 else ''}, torch {torch.__version__}"
    columns = ["layout", "error", "units", "clipped", "split", "sends", "bytes", "verdict", *beside]
    show(console, table(heading, columns, cells, left=["verdict", *beside]))
    for note, layouts in notes.items():
        console.print(f"{', '.join(layouts)}: {escape(note)}", soft_wrap=True)
    for source in {row.gradients: None for row in rows if row.gradients not in ("", GIVEN)}:
        console.print(f"Gradients: {source}.", soft_wrap=True)
    if beside:
        console.print(
            "Shard-unaware: AGC as it is written for one process, beside the same rule on whole tensors. Both errors "
            "are the largest of any element, relative to it.",
            style="dim",
        )
    ran = [row for row in rows if row.verdict not in DID_NOT_RUN]
    good = sum(row.verdict == "ok" for row in ran)
    said = f"{good} of {len(ran)} layouts give the unsharded answer." if ran else "No layout ran: nothing was checked."
    console.print(f"[bold]{said}[/bold]")
    if missing := sum(row.verdict == "not set up" for row in rows):
        console.print(f"{missing} could not be set up, for reasons that have nothing to do with AGC.")
