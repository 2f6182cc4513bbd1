"""`dist-agc bench`: how long clipping takes, beside the other ways to clip."""

from __future__ import annotations

import json
import os
import platform
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import launch, require

if TYPE_CHECKING:
    from rich.console import Console

    from ..lab.timing import Method

LAYOUTS = ("plain", "ddp", "fsdp1", "fsdp2", "hsdp", "tp+fsdp2", "zero1", "zero2", "zero3")


def command(
    model: Annotated[
        str, typer.Option(help="gpt2-small, resnet50, or package.module:factory of a model.")
    ] = "gpt2-small",
    layout: Annotated[str, typer.Option(help=f"{', '.join(LAYOUTS[:-1])} or {LAYOUTS[-1]}.")] = "plain",
    nproc: Annotated[int, typer.Option(min=1, help="Processes to start, where no launcher has.")] = 1,
    clipped: Annotated[
        list[float] | None, typer.Option(min=0, max=1, help="Share of units that are clipped.  [default: 0, 0.05, 1]")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; every method runs once in each.")] = 20,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each process.  [default: torch's]")] = None,
    cpu_kernel: Annotated[
        bool, typer.Option("--cpu-kernel", help="Time cpu_kernel=True as well; needs a C++ compiler.")
    ] = False,
    growth: Annotated[bool, typer.Option(help="Time against elements, tensors and ranks instead.")] = False,
    scale: Annotated[float, typer.Option(min=0, help="With --growth: times the usual sizes.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the chart.", file_okay=False)] = Path("runs/bench"),
) -> None:
    """Time clip() against clip_grad_norm_, other implementations of AGC, and reading weights and gradients once.

    Weights and gradients are made up, so that exactly the given share of units is clipped; nothing is trained. All
    methods run in turn in every round, from the same gradients, and ratios are medians over rounds. With zero1, zero2
    and zero3 it is engine.step() of DeepSpeed that is timed, against the same with its own gradient_clipping.

    [bold]Examples[/bold]

    \b
    dist-agc bench                                          # GPT-2 small, in one process
    dist-agc bench --model resnet50 --layout fsdp2 --nproc 2
    dist-agc bench --cpu-kernel                             # what a kernel in C++ gains on this machine
    dist-agc bench --layout zero2 --nproc 2
    dist-agc bench --model mypackage.models:make_model --clipped 0.1
    dist-agc bench --growth
    """
    require("cli", "matplotlib")
    if layout not in LAYOUTS:
        raise typer.BadParameter(f"{layout!r} is not known; choose from: {', '.join(LAYOUTS)}.", param_hint="--layout")
    if layout.startswith("zero"):
        require("deepspeed", "deepspeed")
    here = launch.place()
    if here is None and (nproc > 1 or layout != "plain") and not growth:
        raise typer.Exit(launch.torchrun(sys.argv[1:], nproc))
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else every start of torch's profiler says so on stderr
    import torch

    from ..console import display
    from ..engine import row_norms
    from ..lab import charts

    if cpu_kernel:
        try:
            row_norms.load()
        except RuntimeError as error:
            raise typer.BadParameter(str(error), param_hint="--cpu-kernel") from None
    if threads is not None:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    if growth:
        _growth(out / "growth.png", scale, as_json, display.console(here))
        return
    with launch.process_group(here) if here is not None else nullcontext():
        rank, size = (here.rank, here.size) if here is not None else (0, 1)
        shown = display.console(here, stderr=True)
        results = {
            share: _run(model, layout, share, rounds, cpu_kernel, shown) for share in clipped or (0.0, 0.05, 1.0)
        }
    if rank != 0:
        return
    title = f"{model}, {layout}, {size} process{'es' * (size > 1)} of {torch.get_num_threads()} threads"
    machine = (
        f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
        f"{rounds} rounds"
    )
    path = out / f"{model.replace(':', '.')}-{layout}-{size}.png"
    charts.bars(results, path, title=title, subtitle=machine)
    if as_json:
        shares = {str(share): [_record(m, found) for m in found] for share, found in results.items()}
        print(json.dumps({"title": title, "machine": machine, "clipped": shares}))
    else:
        _print(results, title, machine, path, display.console(here))


def _run(model: str, layout: str, share: float, rounds: int, cpu_kernel: bool, console: Console) -> list[Method]:
    from ..config import AGCConfig
    from ..console import display
    from ..lab import contenders, shapes, synthetic, timing

    config = AGCConfig(clipping_threshold=0.01, units=shapes.UNITS.get(model))
    try:
        weights, gradients = shapes.load(model, "cpu"), shapes.load(model, "cpu")
        synthetic.fill(weights)
        synthetic.turn_into_gradients(weights, gradients, share, config)
        if layout.startswith("zero"):
            found = contenders.in_steps(
                synthetic.Engine(weights, gradients, int(layout[-1])), config, cpu_kernel=cpu_kernel
            )
        else:
            weights, gradients = synthetic.sharded(weights, layout), synthetic.sharded(gradients, layout)
            for parameter, gradient in zip(weights.parameters(), gradients.parameters(), strict=True):
                parameter.grad = gradient.detach()
            found = contenders.on_gradients(weights, layout, config, cpu_kernel=cpu_kernel)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with display.work(console, f"{share:.0%} of units clipped", rounds + 2) as advance:
        timing.time_together(found, rounds, advance)
    return found


def _record(method: Method, found: list[Method]) -> dict[str, Any]:
    from ..lab.contenders import FLOOR

    if method.call is None:
        return {"method": method.name, "unavailable": method.reason}
    beside = {"to_norm_clip": [m for m in found if m.baseline], "to_floor": [m for m in found if m.name == FLOOR]}
    ratios = {name: method.ratio(others[0]) for name, others in beside.items() if others}
    return {"method": method.name, "ms": 1e3 * method.typical, **ratios, **method.counts}


def _print(results: dict[float, list[Method]], title: str, machine: str, path: Path, console: Console) -> None:
    from .tables import table

    # By heading: what it is called in a record, its unit, and how it is written.
    columns = {
        "ms": ("ms", 1, ".2f"),
        "/ norm": ("to_norm_clip", 1, ".2f"),
        "/ floor": ("to_floor", 1, ".2f"),
        "ops": ("operations", 1, ",.0f"),
        "sends": ("collectives", 1, ".0f"),
        "kB": ("bytes", 1e3, ",.1f"),
        "MB": ("peak_extra_bytes", 1e6, ".2f"),
    }
    console.print(f"[bold]{title}[/bold]\n[dim]{machine}[/dim]")
    for share, found in results.items():
        rows = []
        for method in found:
            record = _record(method, found)
            cells = [f"{record[n] / unit:{form}}" if n in record else "–" for n, unit, form in columns.values()]
            rows.append([method.name, *cells])
        console.print(table(f"{share:.0%} of units clipped", ["", *columns], rows))
    for method in next(iter(results.values())):
        if method.call is None:
            console.print(f"[dim]{method.name}: {method.reason}[/dim]")
    console.print(
        "ms: median. / norm and / floor: times that of clipping by the norm of all gradients and of reading W and G "
        "once, in the same round. Every 10: means over 10 calls, of which one measures weights. Kernel: with "
        "cpu_kernel=True. Ops: dispatched, without views and the kernel's own. Sends: collectives, and the kB given to "
        "them. MB: the most memory beyond what there was, as torch's profiler sees it.",
        style="dim",
    )
    console.print(f"Chart: {path}")


def _growth(path: Path, scale: float, as_json: bool, console: Console) -> None:
    from ..lab import charts
    from ..lab.growing import curves

    found = curves(scale)
    charts.growth(found, path)
    if as_json:
        print(json.dumps([{"against": c.against, "what": c.what, "points": c.points, "power": c.power} for c in found]))
        return
    for curve in found:
        points = ", ".join(f"{size:,}: {seconds * 1e3:.2g} ms" for size, seconds in curve.points)
        console.print(f"{curve.what:8} against {curve.against:12} grows with the power {curve.power:.2f}  ({points})")
    console.print(f"Chart: {path}")
