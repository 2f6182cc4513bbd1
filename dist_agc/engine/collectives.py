"""The collectives: how numbers are packed, all-reduced, and what to say where a rank did not come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..model.blocks import Axis
from .plan import Slots


def communication_device(device: torch.device, group: Any) -> torch.device:
    """Where a buffer must lie for a collective of ``group``.

    CPU-offloaded gradients with an NCCL group: the packed buffer moves, the gradients do not.
    """
    backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(",") if ":" in pair)
    if not backends or device.type in backends:
        return device
    kind = next(iter(backends))
    return torch.device(kind, torch.get_device_module(kind).current_device())


def all_reduce(buffer: Tensor, axis: Axis) -> Tensor:
    """The sum of ``buffer`` over the ranks of ``axis``, on the device of ``buffer``.

    Raises:
        RuntimeError: a rank did not come, within the timeout of the process group.
    """
    device = communication_device(buffer.device, axis.group)
    moved = buffer.to(device)
    with torch.profiler.record_function("dist_agc::all_reduce"):
        try:
            dist.all_reduce(moved, group=axis.group)
        except RuntimeError as error:
            raise missing(axis) from error
    return moved.to(buffer.device)


class Packing:
    """Puts numbers into the slots of a packed buffer.

    A slot that several numbers go to gets their sum, always in the same order and without atomics: copies of a model
    that are summed apart stay equal to the last bit.
    """

    def __init__(self, slots: Slots, device: torch.device) -> None:
        self.source, self.slot = slots.source.to(device), slots.distinct.to(device)
        self.lengths = None if slots.lengths is None else slots.lengths.to(device)

    def add(self, values: Tensor, into: Tensor) -> None:
        values = values.index_select(0, self.source)
        if self.lengths is not None:
            values = torch.segment_reduce(values, "sum", lengths=self.lengths, unsafe=True, initial=0)
        into.index_copy_(0, self.slot, values)


def anywhere(flags: Sequence[bool], axis: Axis, device: torch.device) -> list[bool]:
    """Which of the flags are set on any rank of ``axis``. Waits for the device."""
    counts = torch.tensor(flags, dtype=torch.int32, device=device)
    return (all_reduce(counts, axis) > 0).tolist()


def missing(axis: Axis) -> RuntimeError:
    return RuntimeError(
        f"dist_agc: not all of the ranks {list(axis.ranks)} came to this call of clip(), or one of them ended. "
        "No gradient was changed here. Each of them must clip in every step, with the same model and the same "
        "settings, whatever gradients it has; a rank that raised or died before shows the cause in its own output."
    )
