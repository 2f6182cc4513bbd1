"""Plain tensors: every rank holds all of the parameter, as in DDP and in one process.

Private to torch and read here only: ``DistributedDataParallel._join_config``, which says whether `join` is on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import ref

from torch import Tensor, nn

from ..model.names import Entry
from ..model.parameter import Parameter
from .base import Framework, group_axis, is_a, read_torch

_NOT_FINAL = "DistributedDataParallel reduces gradients after the hooks of their parameters"


class Plain(Framework):
    wrapped = {"DistributedDataParallel": "module"}

    def claim(self, model: nn.Module | None, entries: Sequence[Entry]) -> tuple[list[Parameter], list[Entry]]:
        copies = {} if model is None else _copied(model)
        return [Parameter.of(entry, **copies.get(id(entry.tensor), {})) for entry in entries], []

    def not_in_backward(self, module: nn.Module) -> str | None:
        # The second is what torch.distributed._composable.replicate makes of a module's class.
        return _NOT_FINAL if is_a(module, "DistributedDataParallel", "DDP") else None


def not_in_backward_of(parameters: Sequence[Tensor], things: Sequence[object]) -> str | None:
    """The same, where one of ``things`` is a DistributedDataParallel of some of ``parameters``."""
    ours = set(map(id, parameters))
    wrappers = (thing for thing in things if issubclass(type(thing), nn.parallel.DistributedDataParallel))
    held = (p for wrapper in wrappers for p in wrapper.parameters())  # type: ignore[attr-defined]
    return _NOT_FINAL if any(id(p) in ours for p in held) else None


def _copied(model: nn.Module) -> dict[int, dict[str, Any]]:
    """By ``id``, what a `Parameter` says of one of which DistributedDataParallel keeps copies."""
    wrappers = [m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    return {
        id(parameter): {"copies": (axis,), "uneven": uneven, "unreduced": unreduced}
        for wrapper in wrappers
        for axis in [group_axis(wrapper.process_group)]
        for uneven, unreduced in [(partial(_joins, ref(wrapper)), partial(_in_no_sync, ref(wrapper), axis.size))]
        for name, parameter in wrapper.module.named_parameters()
        if name not in wrapper.parameters_to_ignore
    }


def _joins(wrapper: ref[nn.parallel.DistributedDataParallel]) -> bool:
    """Whether `join` is on for a wrapper: since its ranks entered one, and until they enter one that is switched off.

    It is the same on all of them, whichever batches they have left.
    """
    found = wrapper()
    return found is not None and read_torch(found, "_join_config").enable


def _in_no_sync(wrapper: ref[nn.parallel.DistributedDataParallel], ranks: int) -> bool:
    """Whether a wrapper reduces no gradients now. When `no_sync` has ended nothing in it says for certain which
    backwards were inside: a forward pass without gradients leaves the same traces."""
    found = wrapper()
    return found is not None and ranks > 1 and not found.require_backward_grad_sync
