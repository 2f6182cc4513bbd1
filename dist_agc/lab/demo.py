"""`dist-agc demo`: the same training with and without AGC, on several processes, seen side by side."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from .backends import BACKENDS
from .console import launch, require
from .tasks import TASKS, load

if TYPE_CHECKING:
    from .tasks import Task
    from .training import Run, Step

DETAILS = 20  # lines of a run with statistics of every parameter
# Every process imports torch anew: more than a few on a core only make the start slow.
MOST_PROCESSES = max(8, 4 * (os.cpu_count() or 1))


def _one_of(names: Iterable[str]) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in names:
            raise typer.BadParameter(f"{value!r} is not known; choose from: {', '.join(names)}.")
        return value

    return check


def _positive(value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise typer.BadParameter(f"{value} is not a positive finite number.")
    return value


def _processes(value: int | None) -> int | None:
    if value is not None and value < 1:
        raise typer.BadParameter(f"{value} processes cannot train anything; give 1 or more.")
    if value is not None and value > MOST_PROCESSES:
        cores = os.cpu_count()
        raise typer.BadParameter(f"{value} processes are too many for {cores} cores; give {MOST_PROCESSES} or fewer.")
    return value


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"cannot make the folder {path}: {error.strerror}.", param_hint="--out") from None
    if not os.access(path, os.W_OK):
        raise typer.BadParameter(f"cannot write into {path}; give another folder.", param_hint="--out")


def command(
    task: Annotated[
        str,
        typer.Option(
            callback=_one_of(TASKS),
            metavar="|".join(TASKS),
            help="What to train: a norm-free ResNet on handwritten digits, or a small GPT on Python's documentation.",
        ),
    ] = "digits",
    nproc: Annotated[
        int | None,
        typer.Option(callback=_processes, show_default="2", help="How many processes share the model and every batch."),
    ] = None,
    backend: Annotated[
        str, typer.Option(callback=_one_of(BACKENDS), metavar="|".join(BACKENDS), help="How the model is spread.")
    ] = "fsdp2",
    clipping_threshold: Annotated[
        float | None,
        typer.Option(
            callback=_positive,
            show_default="the task's",
            help="Largest allowed norm(gradient) / norm(weights) of a unit: smaller clips more.",
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(callback=_positive, show_default="the task's", help="Learning rate of both runs."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, show_default="the task's", help="Steps of each run.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and the order of the data, in both runs.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the plot and the statistics.")] = Path("runs/demo"),
) -> None:
    """Train a model without and with Adaptive Gradient Clipping, side by side.

    Both runs start from the same weights and see the same data, at a learning
    rate that is too high without AGC. The model is sharded over processes of
    this machine (CPU); its last linear layer is left out of AGC.

    Ends with a table, a plot (TASK.png) and one line of JSON per step
    (TASK.jsonl), both in runs/demo or the folder given by --out.
    """
    require("demo", "sklearn", "matplotlib")
    if backend.startswith("zero"):
        require("deepspeed", "deepspeed")
    _make_folder(out)
    here = launch.place()
    if here is None:
        raise typer.Exit(launch.torchrun(sys.argv[1:], nproc or 2))
    if nproc is not None and nproc != here.size:
        raise typer.BadParameter(f"{nproc}, but the launcher has started {here.size}.", param_hint="--nproc")
    chosen = load(task)
    if here.size > chosen.batch_size:
        raise typer.BadParameter(
            f"{here.size} processes cannot share batches of {chosen.batch_size}.", param_hint="--nproc"
        )
    chosen = replace(
        chosen,
        lr=lr or chosen.lr,
        steps=steps or chosen.steps,
        clipping_threshold=clipping_threshold or chosen.clipping_threshold,
    )
    try:
        with launch.process_group(here):
            _compare(here, chosen, backend, seed, out)
    except KeyboardInterrupt:
        sys.exit(launch.INTERRUPTED)


def _compare(here: launch.Place, task: Task, backend: str, seed: int, out: Path) -> None:
    from .shown import DemoDisplay
    from .training import Run, train

    runs = [Run("no-agc", "without AGC", None), Run("agc", "with AGC", task.clipping_threshold)]
    display = DemoDisplay(here)
    settings = f"{here.size} processes, {backend}, batches of {task.batch_size}, learning rate {task.lr:g}, seed {seed}"
    display.headline(task.title, f"{settings}, clipping threshold {task.clipping_threshold:g}")
    with _statistics(here, out / f"{task.name}.jsonl") as log:
        for run in runs:
            with display.progress(run.label, task.steps) as show:
                for step in train(run, task, BACKENDS[backend], seed, max(1, task.steps // DETAILS)):
                    log.write(_json(run, step, task) + "\n")
                    show(step)
    if here.rank == 0:
        from . import plots

        display.table(runs)
        display.say(_verdict(*runs))
        plot = out / f"{task.name}.png"
        plots.comparison(runs, plot, title=task.title, subtitle=settings)
        display.written("Plot", plot)
        display.written("Statistics", out / f"{task.name}.jsonl")
        display.say(f"More of it, by layer: dist-agc report {out / f'{task.name}.jsonl'}")


def _statistics(here: launch.Place, path: Path) -> IO[str]:
    """Where one line per step goes; line by line, so that an interrupted run leaves what it has done."""
    if here.rank != 0:
        return open(os.devnull, "w")
    return open(path, "w", buffering=1, encoding="utf-8")


def _json(run: Run, step: Step, task: Task) -> str:
    """One line of the statistics. JSON knows no inf or nan: they are null."""
    values: dict[str, Any] = {"step": step.number, "run": run.name, "loss": step.loss, "accuracy": step.accuracy}
    if step.number == 1:
        threshold = run.clipping_threshold
        agc = {} if threshold is None else {"clipping_threshold": threshold, "exclude": list(task.exclude)}
        values["settings"] = agc | {"lr": task.lr}
    values |= step.stats
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()})


def _verdict(plain: Run, clipped: Run) -> str:
    if plain.failed and not clipped.failed:
        return (
            "Same weights, data and learning rate. Without AGC training blew up; AGC scaled down the gradients that "
            "were large beside their weights, left the others alone, and training went on. "
            "A tame --lr trains without AGC too."
        )
    if plain.failed:
        return "Both runs blew up: try a smaller --clipping-threshold or a smaller --lr."
    if clipped.failed:
        return "Only the run with AGC blew up: try a smaller --clipping-threshold or a smaller --lr."
    return "Both runs went through. AGC matters where training is at the edge: try a higher --lr."
