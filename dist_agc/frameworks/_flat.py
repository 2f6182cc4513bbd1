"""Parameters that are flattened and cut anywhere within a row, as FSDP1, ZeRO and the ranks of `virtual` hold them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..model.blocks import Axis, Block, Pieces, interval
from ..model.parameter import Parameter
from ..model.units import UnitRule


@dataclass(frozen=True)
class Span:
    """The elements [start, stop) of a flattened tensor; maybe none. See `interval` for the rest."""

    start: int = 0
    stop: int = 0
    offset: int = 0
    bounds: range = range(0)

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @classmethod
    def cut(cls, numel: int, at: int, size: int, index: int, base: int = 0) -> Span:
        """What partition ``index`` has of ``numel`` elements that begin at element ``at`` of something cut into
        partitions of ``size``; the partition begins at element ``base`` of the tensor that holds it.

        Example:
            >>> Span.cut(10, at=3, size=5, index=1)   # elements 5 to 9 of the whole are 2 to 6 of these ten
            Span(start=2, stop=7, offset=0, bounds=range(2, 10, 5))
        """
        first = size * index - at
        start = min(max(first, 0), numel)
        stop = max(min(first + size, numel), start)
        return cls(start, stop, base + start - first if stop > start else 0, range(size - at, numel, max(size, 1)))


ALONE = Axis((0,), 0)


@dataclass(frozen=True, eq=False, kw_only=True)
class FlatInterval(Parameter):
    """This rank's interval of one parameter, inside the tensor that an optimizer steps on.

    ``axis``, ``across`` and ``aligned``: see `interval`. ``sliced``: the shape of this rank's slice; None: it is the
    parameter.
    """

    span: Span
    axis: Axis = ALONE
    across: tuple[tuple[Axis, int], ...] = ()
    sliced: tuple[int, ...] | None = None
    aligned: bool = True

    framework: ClassVar[str] = "flat shard"
    copied: ClassVar[bool] = False

    def lies(self) -> tuple[object, ...]:
        # Without the shape: a flat tensor is gathered, or put on a disk, between steps. `local` looks at it in a step.
        return self.tensor.dtype, self.tensor.device

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.view(-1)

    def pieces(self, rule: UnitRule | None) -> Pieces:
        span = self.span
        if rule is None:
            axes = (*(axis for axis, _ in self.across), self.axis)
            block = Block((span.numel,), (0,), (), 0, span.offset, span.numel)
            return Pieces((block,), (), tuple(axis for axis in axes if axis.size > 1))
        rule = self.flattened(rule)
        return interval(
            rule, span.start, span.stop, span.offset, span.bounds, self.axis, self.across, aligned=self.aligned
        )

    def flattened(self, rule: UnitRule) -> UnitRule:
        """The rule of the tensor that was flattened, with its dims in the order of its memory."""
        if self.sliced is None:
            return rule
        if rule.split is not None:
            raise ValueError(
                f"parameter {self.name!r}, seen as {rule.shape}, is sliced before it is flattened: dist_agc cannot "
                "tell where its units lie then."
            )
        return UnitRule(self.sliced, rule.kept)
