"""The collectives: where a buffer must lie, its sum over ranks, and what to say where a rank did not come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..model.blocks import Axis


def communication_device(device: torch.device, group: Any) -> torch.device:
    """Where a buffer must lie for ``group``: with gradients on CPU and an NCCL group it moves, and they do not."""
    backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(",") if ":" in pair)
    if not backends or device.type in backends:
        return device
    kind = next(iter(backends))
    return torch.device(kind, torch.get_device_module(kind).current_device())


def all_reduce(buffer: Tensor, axis: Axis) -> Tensor:
    """The sum of ``buffer`` over the ranks of ``axis``, on its device.

    Raises RuntimeError where a rank does not come within the timeout of the process group.
    """
    moved = buffer.to(communication_device(buffer.device, axis.group))
    with torch.profiler.record_function("dist_agc::all_reduce"):
        try:
            dist.all_reduce(moved, group=axis.group)
        except RuntimeError as error:
            raise missing(axis) from error
    return moved.to(buffer.device)


def anywhere(flags: Sequence[bool], axis: Axis, device: torch.device) -> list[bool]:
    """Which of the flags are set on any rank of ``axis``. Waits for the device."""
    counts = torch.tensor(flags, dtype=torch.int32, device=device)
    return (all_reduce(counts, axis) > 0).tolist()


def exchange(said: Any, axis: Axis) -> list[Any]:
    """What every rank of ``axis`` says, in their order: anything that can be pickled. Waits for the device."""
    every: list[Any] = [None] * axis.size
    try:
        dist.all_gather_object(every, said, group=axis.group)
    except RuntimeError as error:
        raise missing(axis) from error
    return every


def missing(axis: Axis) -> RuntimeError:
    return RuntimeError(
        f"dist_agc: not all of the ranks {list(axis.ranks)} came to this call of clip(), or one of them ended. "
        "No gradient was changed here. Each of them must clip in every step, with the same model and the same "
        "settings, whatever gradients it has; a rank that raised or died before shows the cause in its own output."
    )
