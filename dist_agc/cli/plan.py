"""`dist-agc plan`: what AGC would send and keep on a cluster of any size, worked out on this machine."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

from typer import BadParameter, Option

from ..lab.console.tables import Columns, of_records, short, show

if TYPE_CHECKING:
    from torch import nn

    from ..config import AGCConfig
    from ..frameworks.virtual import World


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
    from ..engine.plan import STATISTICS, Plan
    from ..frameworks.virtual import parameters, tensor_parallel_dim
    from ..model.units import unit_rules

    began = time.process_time()
    found = parameters(model, layout, world)
    plan = Plan(found, unit_rules(found, config))
    seconds = time.process_time() - began
    elements = sum(p.numel for p in found)
    size = elements * gradient_size
    held, reduced = elements // world.size, _ring(size, world.size) / 2
    if layout in ("ddp", "zero0"):
        held, reduced = elements, _ring(size, world.size)
    elif layout == "hsdp":
        held = elements // world.shard
        reduced = _ring(size, world.shard) / 2 + _ring(size / world.shard, world.size // world.shard)
    elif layout == "tp+fsdp2":
        cut, ranks = sum(p.numel for p in found if tensor_parallel_dim(p.name) is not None), world.size // world.tensor
        held = (cut // world.tensor + elements - cut) * world.tensor // world.size
        reduced = _ring(held * gradient_size * ranks, ranks) / 2
    buffers = [(4 * axis.numel(columns=STATISTICS if config.statistics else 0), axis.axis.size) for axis in plan.axes]
    slots = [s for axis in plan.axes for s in (axis.pieces, axis.local, *(carried for _, carried in axis.carried))]
    tensors = [axis.complete for axis in plan.axes if axis.complete is not None]
    tensors += [tensor for s in slots for tensor in (s.source, s.slot)]
    kept = {id(tensor): tensor.nbytes for tensor in tensors}  # some are listed twice
    return Planned(
        layout=layout,
        world=world.size,
        elements_per_rank=held,
        units=plan.units,
        local_units=plan.local_units,
        split_units=plan.slots,
        all_reduces=sum(size > 0 for size, _ in buffers),
        payload_bytes=sum(size for size, _ in buffers),
        sent_bytes=sum(_ring(size, ranks) for size, ranks in buffers),
        gradient_bytes=reduced,
        buffer_bytes=max((size for size, _ in buffers), default=0),
        plan_bytes=sum(kept.values()) + 4 * (3 * plan.local_units + 2 * plan.slots),
        seconds=seconds,
    )


def _ring(size: float, ranks: int) -> float:
    """Bytes that each rank sends in an all-reduce."""
    return 2 * size * (ranks - 1) / ranks


def _percent(of: float) -> str:
    if 0 < of < 1e-3:
        return "<0.001%"
    return f"{of:.2g}%" if of < 99.5 else f"{short(of)}%"


# By heading: see `Columns`.
COLUMNS: Columns = {
    "layout": ("layout", str),
    "ranks": ("world", lambda ranks: f"{ranks:,}" if ranks < 100_000 else short(ranks)),
    "held": ("elements_per_rank", short),
    "units": ("units", short),
    "split": ("split_units", short),
    "sends": ("all_reduces", str),
    "AGC": ("sent_bytes", short),
    "grads": ("gradient_bytes", short),
    "share": ("share", lambda share: _percent(100 * share)),
    "buffer": ("buffer_bytes", short),
    "kept": ("plan_bytes", short),
    "CPU s": ("seconds", lambda seconds: f"{seconds:.2f}" if seconds < 10 else short(seconds)),
}
LEGEND = (
    "Held: parameters on one rank. Split: units that are cut between ranks. Sends: all-reduces of a step. AGC, grads: "
    "bytes that a rank sends in a step, to clip and to reduce gradients. Share: the first of the second. Buffer: bytes "
    "during the all-reduces. Kept: bytes of the plan and of the norms of local units. CPU s: to plan. k, M, G, T: "
    "thousand, million, billion, trillion. --json prints exact numbers."
)


def command(
    model: Annotated[
        list[str] | None, Option(help="A preset, or package.module:factory of a model; repeat for several.")
    ] = None,
    layout: Annotated[list[str] | None, Option(help="How it is sharded; repeat for several.  [default: all]")] = None,
    world: Annotated[list[int] | None, Option(min=1, help="Ranks; repeat for several.  [default: 16384]")] = None,
    rank: Annotated[int | None, Option(min=0, help="Whose plan.  [default: the middle one]")] = None,
    tensor: Annotated[int, Option(min=1, help="Tensor-parallel ranks, with tp+fsdp2.")] = 8,
    shard: Annotated[int, Option(min=1, help="Ranks that share one copy of the parameters, with hsdp.")] = 64,
    gradient_bytes: Annotated[int, Option(min=1, help="Bytes of an element in the gradients' reduction.")] = 4,
    as_json: Annotated[bool, Option("--json", help="Print one line of JSON per row instead of tables.")] = False,
) -> None:
    """Show what clipping would send, keep and take to plan, on up to thousands of ranks, without a cluster.

    Parameters are on the meta device and there is no process group; the plan is made by the code that makes it on the
    cluster. Layouts: ddp, fsdp1, fsdp2, hsdp, tp+fsdp2, zero0, zero1, zero2, zero3. Presets: resnet50, nf-resnet50,
    gpt2-small, llama3-8b, llama3-70b, llama3-405b, mixtral-8x7b (also called moe-8x7b), qwen3-30b-a3b, deepseek-v3,
    gpt-oss-120b.

    FSDP1 is taken to wrap every numbered module ("layers.0"), DeepSpeed to have one parameter group, and tensor
    parallel to cut modules that are named as in Llama or in the preset gpt2-small.
    """
    from ..config import AGCConfig
    from ..frameworks.virtual import LAYOUTS, World
    from ..lab import shapes
    from ..lab.console import display

    console = display.console(None)
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
            raise BadParameter(str(error)) from None
        records = [{"model": name, **asdict(row), "share": row.share} for row in rows]
        if as_json:
            print(*map(json.dumps, records), sep="\n")
        else:
            show(console, of_records(name, COLUMNS, records))
    if not as_json:
        console.print(LEGEND, style="dim")
