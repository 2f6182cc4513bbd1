"""One parameter as this rank sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .blocks import Axis, Pieces, sharded
from .kinds import default_rule
from .names import Entry
from .units import UnitRule
from .values import inside

P = TypeVar("P", bound="Parameter")


@dataclass(frozen=True, eq=False, kw_only=True)
class Parameter:
    """One parameter: its names, its units, and how this rank gets at what it holds of it.

    This class is a parameter that the rank holds whole. Each framework that spreads parameters over ranks has a
    subclass in `dist_agc.frameworks`.

    Args:
        names: see `Entry`.
        tensor: what the optimizer holds: the parameter, or a flat tensor with many parameters in it.
        shape: of the whole parameter, over all ranks.
        default: the unit rule that its module gives it, so that nothing depends on the module later.
        copies: along which axes every rank holds the same. Nothing is sent along them but the one check that ranks
            agree, because copies that are clipped differently drift apart.
        uneven: says whether ranks of ``copies`` may have run out of batches, and stay away from a step.
        unreduced: says whether gradients are left now as each rank of ``copies`` has them, to be reduced later.
        counted_elsewhere: another stage of the pipeline has it too, and has it in the statistics.
    """

    names: tuple[str, ...]
    tensor: Tensor
    shape: tuple[int, ...]
    default: UnitRule
    copies: tuple[Axis, ...] = ()
    uneven: Callable[[], bool] | None = None
    unreduced: Callable[[], bool] | None = None
    counted_elsewhere: bool = False

    framework: ClassVar[str] = "whole on every rank (plain or DDP)"
    left_alone: ClassVar[bool] = False  # whether AGC governs it in no case, whatever the settings say

    @classmethod
    def of(cls: type[P], entry: Entry, shape: Sequence[int] | None = None, **fields: Any) -> P:
        """The parameter of an entry; ``shape`` where the tensor does not have that of the whole parameter."""
        shape = tuple(entry.tensor.shape if shape is None else shape)
        given = {"names": entry.names, "tensor": entry.tensor, "default": default_rule(shape, entry.owners)}
        return cls(shape=shape, **given | fields)

    def now_in(self, tensor: Tensor) -> Parameter:
        """This parameter in the tensor that has taken the place of its own, or in its own, which may have grown.

        The same dims number its units. One that is spread over ranks knows by itself how its tensor may lie.
        """
        if tensor is self.tensor and (type(self) is not Parameter or tensor.shape == self.shape):
            return self
        assert type(self) is Parameter, f"{self.name!r} is spread over ranks"
        shape, rule = tuple(tensor.shape), self.default
        if shape != self.shape:
            alike = len(shape) == len(rule.shape) and rule.split is None
            rule = replace(rule, shape=shape) if alike else default_rule(shape)
        return replace(self, tensor=tensor, shape=shape, default=rule)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return torch.Size(self.shape).numel()

    @property
    def trains(self) -> bool:
        """Whether an optimizer would step it: torch steps whatever holds a gradient, frozen or not."""
        return self.tensor.requires_grad or self.tensor.grad is not None

    @property
    def copied(self) -> bool:
        """Whether every rank that has it holds all of it."""
        return True

    def lies(self) -> tuple[object, ...]:
        """What a plan depends on beside the structure: where this changes, it has to be made anew."""
        return self.tensor.shape, self.tensor.dtype, self.tensor.device

    def local(self, tensor: Tensor) -> Tensor:
        """The plain local tensor of ``tensor`` or of its gradient. Raises ValueError where it cannot be had now."""
        return inside(tensor)

    def weight(self) -> Tensor:
        """This rank's weights, plain."""
        return self.local(self.tensor)

    def gradient(self) -> Tensor | None:
        """The gradient of these, plain; None where there is none."""
        grad = self.tensor.grad
        return None if grad is None else self.local(grad)

    def pieces(self, rule: UnitRule | None) -> Pieces:
        """The blocks and cuts; without a rule (excluded) what adds up to the gradient norm.

        Raises ValueError where it cannot be cut into these units.
        """
        return sharded(rule, self.shape)

    # Some frameworks leave gradients of copies as each rank's share of a sum, for whoever steps to add up, and whole
    # gradients of parts, of which whoever steps takes its own.

    @property
    def may_be_share(self) -> bool:
        """Whether the gradient may come as this rank's share of a sum over some of ``copies``. From structure alone."""
        return False

    def pending(self) -> tuple[Axis, ...]:
        """The axes along which the gradient that is there now still is a share of a sum."""
        return ()

    def unsettled(self) -> bool:
        """Whether the gradient lies otherwise than its parameter, so that what was clipped is not yet in it."""
        return False

    def settle(self, final: Tensor) -> None:
        """Have this be the gradient, where its parameter lies: in the memory of the share of which it is the sum."""
        raise AssertionError(f"{self.name!r} is settled")


@dataclass(frozen=True, eq=False, kw_only=True)
class Unknown(Parameter):
    """A parameter that cannot be clipped; an error only where it is trained and AGC governs it.

    Quantised base weights do not train, and ``exclude`` is a way out for all others.
    """

    problem: str  # to go on after the parameter's name

    framework: ClassVar[str] = "of a kind that dist_agc cannot clip"
    copied: ClassVar[bool] = False

    @classmethod
    def instead_of(cls, p: Parameter, problem: str) -> Unknown:
        return cls(names=p.names, tensor=p.tensor, shape=p.shape, default=p.default, problem=problem)

    @property
    def error(self) -> ValueError:
        return ValueError(f"parameter {self.name!r} {self.problem}.")

    def lies(self) -> tuple[object, ...]:
        return (type(self.tensor),)  # a lazy one has no shape, and is of another class once it has

    def local(self, tensor: Tensor) -> Tensor:
        raise self.error

    def pieces(self, rule: UnitRule | None) -> Pieces:
        if rule is None:
            return Pieces(())
        raise self.error


class LeftAlone(Unknown):
    """One that no clipping of gradients is meant for, as its framework has said. Nothing reads its gradient."""

    framework: ClassVar[str] = "that AGC leaves alone"
    left_alone: ClassVar[bool] = True


def all_zero(parameters: Sequence[Parameter]) -> list[Parameter]:
    """Those that train and have no weight but zeros now. Waits for the device, and for no other rank.

    Only what every rank holds whole, so that all say the same; and no vectors and scalars, since biases begin at zero
    in nearly every model, and need no second look.
    """
    of_device: dict[torch.device, list[tuple[Parameter, Tensor]]] = {}
    for p in parameters:
        if p.copied and p.trains and len(p.shape) > 1 and p.numel and p.tensor.layout == torch.strided:
            weight = p.weight().detach()
            # A fake tensor has no values to look at, and a rank outside of the mesh of a DTensor nothing of it.
            if type(weight) is Tensor and not weight.is_meta and weight.numel() == p.numel:
                of_device.setdefault(weight.device, []).append((p, weight))
    return [
        p
        for held in of_device.values()
        for (p, _), some in zip(held, torch.stack([weight.any() for _, weight in held]).tolist(), strict=True)
        if not some
    ]
