"""Plain tensors: every rank holds all of the parameter, as in DDP and in one process."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..fragments import Axis, Pieces, excluded, whole
from ..units import UnitRule
from . import group_axis


@dataclass(frozen=True, eq=False)
class Replicated:
    holder: Tensor
    copies: tuple[Axis, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.holder.shape)

    def local(self, tensor: Tensor) -> Tensor:
        return tensor

    def pieces(self, rule: UnitRule | None) -> Pieces:
        return excluded(self.holder.ndim, ()) if rule is None else whole(rule)


def copied(model: nn.Module) -> dict[int, tuple[Axis, ...]]:
    """The ranks among which DistributedDataParallel keeps copies of a parameter, by its ``id``."""
    found: dict[int, tuple[Axis, ...]] = {}
    for module in model.modules():
        if not isinstance(module, nn.parallel.DistributedDataParallel):
            continue
        axis = group_axis(module.process_group)
        for name, parameter in module.module.named_parameters():
            if name not in module.parameters_to_ignore:
                found[id(parameter)] = (axis,)
    return found
