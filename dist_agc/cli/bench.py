"""`dist-agc bench`: how long clipping takes, beside the other ways to clip."""

from __future__ import annotations

import json
import os
import platform
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import BadParameter, Exit, Option

from ..lab.console import launch, require
from ..lab.console.tables import Columns, of_records, short, show, table

if TYPE_CHECKING:
    from rich.console import Console

    from ..lab.timing import Method

# By heading: see `Columns`.
COLUMNS: Columns = {
    "": ("method", str),
    "ms": ("ms", "{:.2f}".format),
    "/ norm": ("to_norm_clip", "{:.2f}".format),
    "/ floor": ("to_floor", "{:.2f}".format),
    "ops": ("operations", short),
    "sends": ("collectives", "{:.0f}".format),
    "sent": ("bytes", short),
    "memory": ("peak_extra_bytes", short),
}
LAYOUTS = ("plain", "ddp", "fsdp1", "fsdp2", "hsdp", "tp+fsdp2", "zero1", "zero2", "zero3")


def command(
    model: Annotated[str, Option(help="gpt2-small, resnet50, or package.module:factory of a model.")] = "gpt2-small",
    layout: Annotated[str, Option(help=f"{', '.join(LAYOUTS[:-1])} or {LAYOUTS[-1]}.")] = "plain",
    nproc: Annotated[int, Option(min=1, help="Processes to start, where no launcher has.")] = 1,
    clipped: Annotated[
        list[float] | None, Option(min=0, max=1, help="Share of units that are clipped.  [default: 0, 0.05, 1]")
    ] = None,
    rounds: Annotated[int, Option(min=1, help="Timed rounds; every method runs once in each.")] = 20,
    threads: Annotated[int | None, Option(min=1, help="Threads of each process.  [default: torch's]")] = None,
    cpu_kernel: Annotated[
        bool, Option("--cpu-kernel", help="Time cpu_kernel=True as well; needs a C++ compiler.")
    ] = False,
    growth: Annotated[bool, Option("--growth", help="Time against elements, tensors and ranks instead.")] = False,
    scale: Annotated[float, Option(min=0, help="With --growth: times the usual sizes.")] = 1.0,
    as_json: Annotated[bool, Option("--json", help="Print JSON instead of tables.")] = False,
    out: Annotated[Path, Option(help="Folder for the chart.", file_okay=False)] = Path("runs/bench"),
) -> None:
    """Time clip() against clip_grad_norm_, other implementations of AGC, and reading weights and gradients once.

    Weights and gradients are made up, so that exactly the given share of units is clipped; nothing is trained. All
    methods run in turn in every round, from the same gradients, and ratios are medians over rounds. With zero1, zero2
    and zero3 it is engine.step() of DeepSpeed that is timed, against the same with its own gradient_clipping.
    """
    require("cli", "matplotlib")
    if layout not in LAYOUTS:
        raise BadParameter(f"{layout!r} is not known; choose from: {', '.join(LAYOUTS)}.", param_hint="--layout")
    if layout.startswith("zero"):
        require("deepspeed", "deepspeed")
    here = launch.place()
    if here is None and (nproc > 1 or layout != "plain") and not growth:
        raise Exit(launch.torchrun(sys.argv[1:], nproc))
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else every start of torch's profiler says so on stderr
    import torch

    from ..engine import row_norms
    from ..lab import charts
    from ..lab.console import display
    from ..lab.contenders import FLOOR

    if cpu_kernel:
        try:
            row_norms.load()
        except RuntimeError as error:
            raise BadParameter(str(error), param_hint="--cpu-kernel") from None
    if threads is not None:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    if growth:
        return _growth(out / "growth.png", scale, as_json, display.console(here))
    with launch.process_group(here) if here is not None else nullcontext():
        rank, size = (here.rank, here.size) if here is not None else (0, 1)
        shown = display.console(here, stderr=True)
        shares = clipped or (0.0, 0.05, 1.0)
        results = {share: _run(model, layout, share, rounds, cpu_kernel, shown) for share in shares}
    if rank != 0:
        return
    title = f"{model}, {layout}, {size} process{'es' * (size > 1)} of {torch.get_num_threads()} threads"
    machine = (
        f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
        f"{rounds} rounds"
    )
    path = out / f"{model.replace(':', '.')}-{layout}-{size}.png"
    charts.bars(results, path, title=title, subtitle=machine)
    records = {share: [method.record(found, FLOOR) for method in found] for share, found in results.items()}
    if as_json:
        print(json.dumps({"title": title, "machine": machine, "clipped": records}))
        return
    console = display.console(here)
    console.print(f"[bold]{title}[/bold]\n[dim]{machine}[/dim]")
    for share, rows in records.items():
        show(console, of_records(f"{share:.0%} of units clipped", COLUMNS, rows))
    for row in next(iter(records.values())):
        if "unavailable" in row:
            console.print(f"[dim]{row['method']}: {row['unavailable']}[/dim]")
    console.print(
        "ms: median. / norm and / floor: times that of clipping by the norm of all gradients and of reading W and G "
        "once, in the same round. Every 10: means over 10 calls, of which one measures weights. Kernel: with "
        "cpu_kernel=True. Ops: dispatched, without views and the kernel's own. Sends: collectives; sent: the bytes "
        "given to them. Memory: the most bytes beyond what there was, as torch's profiler sees it. k, M, G: thousand, "
        "million, billion.",
        style="dim",
    )
    console.print(f"Chart: {path}", soft_wrap=True)  # a path that is cut cannot be copied


def _run(model: str, layout: str, share: float, rounds: int, cpu_kernel: bool, console: Console) -> list[Method]:
    from ..config import AGCConfig
    from ..lab import contenders, shapes, synthetic, timing
    from ..lab.console import display

    config = AGCConfig(clipping_threshold=0.01, units=shapes.UNITS.get(model))
    try:
        weights, gradients = shapes.load(model, "cpu"), shapes.load(model, "cpu")
        synthetic.fill(weights)
        synthetic.turn_into_gradients(weights, gradients, share, config)
        if layout.startswith("zero"):
            engine = synthetic.Engine(weights, gradients, int(layout[-1]))
            found = contenders.in_steps(engine, config, cpu_kernel=cpu_kernel)
        else:
            weights, gradients = synthetic.sharded(weights, layout), synthetic.sharded(gradients, layout)
            for parameter, gradient in zip(weights.parameters(), gradients.parameters(), strict=True):
                parameter.grad = gradient.detach()
            found = contenders.on_gradients(weights, layout, config, cpu_kernel=cpu_kernel)
    except ValueError as error:
        raise BadParameter(str(error)) from None
    with display.work(console, f"{share:.0%} of units clipped", rounds + 2) as advance:
        timing.time_together(found, rounds, advance)
    return found


def _growth(path: Path, scale: float, as_json: bool, console: Console) -> None:
    from ..lab import charts, growing

    found = growing.curves(scale)
    charts.growth(found, path)
    if as_json:
        print(json.dumps([{"against": c.against, "what": c.what, "points": c.points, "power": c.power} for c in found]))
        return
    rows = []
    for curve in found:
        ends = [f"{short(size)}: {1e3 * seconds:.2g} ms" for size, seconds in (curve.points[0], curve.points[-1])]
        rows.append([f"{curve.what} against {curve.against}", f"{curve.power:.2f}", *ends])
    show(console, table("CPU time grows with a power of the size; 1 is linear", ["", "power", "from", "to"], rows))
    console.print(f"Chart: {path}", soft_wrap=True)
