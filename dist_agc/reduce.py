"""The collectives: a packed all-reduce, and the one check that ranks agree."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .fragments import Axis


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
            raise _missing(axis) from error
    return moved.to(buffer.device)


def add_up(shares: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    """The sums over ``axis`` of tensors that have the same shapes on all of its ranks; fp32 at least, in one buffer."""
    dtype = torch.float32
    for share in shares:
        dtype = torch.promote_types(dtype, share.dtype)
    total = all_reduce(torch.cat([share.flatten().to(dtype) for share in shares]), axis)
    return shaped(total.split([share.numel() for share in shares]), shares)


def shaped(flat: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Parts of a buffer in the shapes and dtypes of the tensors that they were."""
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(flat, like, strict=True)]


def anywhere(flags: Sequence[bool], axis: Axis, device: torch.device) -> list[bool]:
    """Which of the flags are set on any rank of ``axis``."""
    counts = torch.tensor(flags, dtype=torch.int32, device=device)
    return (all_reduce(counts, axis) > 0).tolist()


# Digests in one exchange: a fixed number, because gloo ends the process where ranks send different lengths.
_DIGESTS = 32


def check_agreement(checks: Sequence[tuple[Mapping[str, object], Axis, torch.device]]) -> None:
    """Compare settings and structure, (what, along which axis, on which device), in small collectives of fixed length.

    Two rounds over the axes, given in an order that all ranks share: the second tells ranks that share no axis with
    the one that differs.

    Raises:
        RuntimeError: on every rank, naming what differs, instead of a hang or of nonsense later.
    """
    problems: list[str] = []
    for what, axis, device in checks:
        # The names themselves are compared too, in case ranks run different versions of dist_agc.
        texts = _exchange({"settings": repr(sorted(what)), **{k: repr(v) for k, v in what.items()}}, axis, device)
        if texts:
            problems.append(_differences(texts, axis))
    for _, axis, device in checks:
        texts = _exchange({"problem": problems[0] if problems else ""}, axis, device)
        if texts and not problems:
            problems.append(next(text["problem"] for text in texts if text["problem"]))
    if problems:
        raise RuntimeError(
            f"dist_agc is set up differently on ranks that share parameters; {problems[0]}. No gradient was changed. "
            "Give every rank the same model and the same settings."
        )


def _exchange(said: dict[str, str], axis: Axis, device: torch.device) -> list[dict[str, str]]:
    """What every rank of the axis says; empty where all say the same."""
    assert len(said) <= _DIGESTS
    digests = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") for text in said.values()]
    digests += [0] * (_DIGESTS - len(said))
    mine = torch.tensor(digests, dtype=torch.int64, device=communication_device(device, axis.group))
    every = [torch.empty_like(mine) for _ in axis.ranks]
    try:
        dist.all_gather(every, mine, group=axis.group)
        if bool((torch.stack(every) == mine).all()):
            return []
        # Every rank of the axis knows by now that they differ, so all of them come to this collective.
        texts: list[Any] = [None] * axis.size
        dist.all_gather_object(texts, said, group=axis.group)
    except RuntimeError as error:
        raise _missing(axis) from error
    return texts


def _differences(texts: list[dict[str, str]], axis: Axis) -> str:
    lines = []
    for name in dict.fromkeys(name for text in texts for name in text):
        spoken = [text.get(name, "nothing") for text in texts]
        other = next((i for i, text in enumerate(spoken) if text != spoken[0]), None)
        if other is not None:
            lines.append(f"{name}: {_difference(spoken[0], spoken[other], axis.ranks[0], axis.ranks[other])}")
    return "; ".join(lines)


def _missing(axis: Axis) -> RuntimeError:
    return RuntimeError(
        f"dist_agc: not all of the ranks {list(axis.ranks)} came to this call of clip(), or one of them ended. "
        "No gradient was changed here. Each of them must clip in every step, with the same model and the same "
        "settings, whatever gradients it has; a rank that raised or died before shows the cause in its own output."
    )


def _difference(a: str, b: str, rank_a: int, rank_b: int, width: int = 160) -> str:
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = 0 if len(a) < width and len(b) < width else max(0, start - 20)
    return f"rank {rank_a} has {a[start : start + width]}, rank {rank_b} has {b[start : start + width]}"
