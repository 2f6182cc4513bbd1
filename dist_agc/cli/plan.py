"""`dist-agc plan`: what AGC would send and keep on a cluster of any size, worked out on this machine."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn

    from ..config import AGCConfig
    from ..layouts.virtual import World


@dataclass(frozen=True)
class Planned:
    """One rank's plan. Bytes are those that a rank sends in a step: a ring all-reduce of n bytes over k ranks sends
    2 (k - 1) / k n, a reduce-scatter half of that."""

    layout: str
    world: int
    elements_per_rank: int  # parameters that a rank holds
    units: int  # of the whole model
    local_units: int  # of which this rank holds something
    split_units: int
    all_reduces: int
    payload_bytes: int  # length of the buffers
    sent_bytes: float
    gradient_bytes: float  # sent by the reduction of the gradients
    buffer_bytes: int  # the largest buffer, in memory only during its all-reduce
    plan_bytes: int  # tensors that are kept: the plan's, and the vectors of local units
    seconds: float  # of CPU, to plan

    @property
    def share(self) -> float:
        """AGC's bytes over those of the gradients; 0 where neither sends anything."""
        return self.sent_bytes / self.gradient_bytes if self.gradient_bytes else 0.0


def planned(model: nn.Module, layout: str, world: World, config: AGCConfig, gradient_size: int = 4) -> Planned:
    """Plan for ``world.rank``, with the code that plans on the cluster. ``gradient_size``: bytes of an element."""
    from ..layouts import make_fragments
    from ..layouts.virtual import place
    from ..plan import Plan

    began = time.process_time()
    fragments = make_fragments(place(model, layout, world), config)
    plan = Plan(fragments, statistics=config.statistics)
    seconds = time.process_time() - began
    elements = sum(f.numel for f in fragments)
    stages = plan.stages
    tensors = [t for s in stages for t in (s.local, s.slot, s.passing)]
    tensors += [split.runs for f in fragments for split in f.pieces.splits]
    vectors = 4 * (3 * plan.local_units + 2 * sum(s.slots for s in stages))
    copies = {"ddp": world.size, "zero0": world.size, "hsdp": world.size // world.shard}.get(layout, 1)
    held = _held(fragments, layout, world) if layout == "tp+fsdp2" else elements * copies // world.size
    return Planned(
        layout,
        world.size,
        held,
        plan.units,
        plan.local_units,
        sum(s.slots for s in stages),
        len(stages),
        sum(4 * s.numel() for s in stages),
        sum(_ring(4 * s.numel(), s.axis.size) for s in stages),
        _gradients(elements * gradient_size, held * gradient_size, layout, world),
        max((4 * s.numel() for s in stages), default=0),
        sum(t.numel() * t.element_size() for t in tensors) + vectors,
        seconds,
    )


def _held(fragments: Any, layout: str, world: World) -> int:
    from ..layouts.virtual import tensor_parallel_dim
    from ..names import Named

    cut = sum(f.numel for f in fragments if tensor_parallel_dim(Named((f.name,), f.holder)) is not None)
    return (cut // world.tensor + sum(f.numel for f in fragments) - cut) * world.tensor // world.size


def _ring(size: float, ranks: int) -> float:
    """Bytes that each rank sends in an all-reduce."""
    return 2 * size * (ranks - 1) / ranks


def _gradients(size: int, held: int, layout: str, world: World) -> float:
    if layout in ("ddp", "zero0"):
        return _ring(size, world.size)
    if layout == "hsdp":
        return _ring(size, world.shard) / 2 + _ring(size / world.shard, world.size // world.shard)
    if layout == "tp+fsdp2":
        ranks = world.size // world.tensor
        return _ring(held * ranks, ranks) / 2
    return _ring(size, world.size) / 2


def command(
    model: Annotated[
        list[str] | None, typer.Option(help="A preset, or package.module:factory of a model; repeat for several.")
    ] = None,
    layout: Annotated[
        list[str] | None, typer.Option(help="How it is sharded; repeat for several.  [default: all]")
    ] = None,
    world: Annotated[list[int] | None, typer.Option(min=1, help="Ranks; repeat for several.  [default: 16384]")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Whose plan.  [default: the middle one]")] = None,
    tensor: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks, with tp+fsdp2.")] = 8,
    shard: Annotated[int, typer.Option(min=1, help="Ranks that share one copy of the parameters, with hsdp.")] = 64,
    gradient_bytes: Annotated[int, typer.Option(min=1, help="Bytes of an element in the gradients' reduction.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON per row instead of tables.")] = False,
) -> None:
    """Show what clipping would send, keep and take to plan, on up to thousands of ranks, without a cluster.

    Parameters are on the meta device and there is no process group; the plan is made by the code that makes it on the
    cluster. Layouts: ddp, fsdp1, fsdp2, hsdp, tp+fsdp2, zero0, zero1, zero2, zero3. Presets: resnet50, nf-resnet50,
    gpt2-small, llama3-8b, llama3-70b, llama3-405b, moe-8x7b.

    FSDP1 is taken to wrap every numbered module ("layers.0"), DeepSpeed to have one parameter group, and tensor
    parallel to cut modules that are named as in Llama or in the preset gpt2-small.

    [bold]Examples[/bold]

    \b
    dist-agc plan --model llama3-70b                        # every layout, 16,384 ranks
    dist-agc plan --model llama3-8b --layout fsdp1 --world 64 --world 1024
    dist-agc plan --model mypackage.models:make_model --layout fsdp2 --world 32
    """
    from rich.console import Console

    from ..config import AGCConfig
    from ..layouts.virtual import LAYOUTS, World
    from . import shapes

    console = Console(highlight=False)
    for name in layout or ():
        if name not in LAYOUTS:
            raise typer.BadParameter(
                f"{name!r} is not known; choose from: {', '.join(LAYOUTS)}.", param_hint="--layout"
            )
    for name in model or ["llama3-8b"]:
        rows = []
        try:
            made = shapes.load(name)
            config = AGCConfig(units=shapes.UNITS.get(name))
            for size in world or [16384]:
                for kind in layout or LAYOUTS:
                    sizes = {"tp+fsdp2": {"tensor": tensor}, "hsdp": {"shard": shard}}.get(kind, {})
                    here = World(size, size // 2 if rank is None else rank, **sizes)
                    rows.append(planned(made, kind, here, config, gradient_bytes))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        if as_json:
            for row in rows:
                print(json.dumps({"model": name, **asdict(row), "share": row.share}))
        else:
            console.print(_table(name, rows))
    if not as_json:
        console.print(
            "MB are sent by each rank in a step. Share: AGC's over the gradients'. Buffer: memory during the "
            "all-reduce. Kept: the plan's tensors and the norms of local units.",
            style="dim",
        )


def _table(name: str, rows: list[Planned]) -> Any:
    from rich.table import Table

    table = Table(title=name, title_justify="left", title_style="bold")
    headings = (
        "layout world elements/rank units split all-reduces AGC_MB gradient_MB share buffer_MB kept_MB plan_CPU_s"
    )
    for heading in headings.split():
        table.add_column(heading.replace("_", " "), justify="left" if heading == "layout" else "right")
    for row in rows:
        table.add_row(
            row.layout,
            f"{row.world:,}",
            f"{row.elements_per_rank:,}",
            f"{row.units:,}",
            f"{row.split_units:,}",
            str(row.all_reduces),
            f"{row.sent_bytes / 1e6:.3f}",
            f"{row.gradient_bytes / 1e6:,.0f}",
            f"{row.share:.4%}",
            f"{row.buffer_bytes / 1e6:.2f}",
            f"{row.plan_bytes / 1e6:.2f}",
            f"{row.seconds:.2f}",
        )
    return table
