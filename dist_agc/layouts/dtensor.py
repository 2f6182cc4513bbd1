"""DTensor: FSDP2, HSDP, tensor parallel and any mix of them, told apart by placements alone.

Private to torch and read here only: ``placement_types._StridedShard``, which FSDP2 on top of tensor parallel makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard

from ..fragments import Axis, Pieces, chunk, excluded, sharded
from ..units import UnitRule
from . import group_axis


def mesh_axis(mesh: DeviceMesh, axis: int) -> Axis:
    """One row of a mesh axis: the ranks that this rank meets along it."""
    return group_axis(mesh.get_group(axis))


def reshard(model: nn.Module) -> None:
    """Have FSDP2 modules show their sharded parameters, where a forward pass without backward left whole ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shard_dim(placement: Placement, ndim: int) -> int | None:
    """The tensor dim that a placement shards; None for Replicate.

    Raises:
        ValueError: any other placement.
    """
    if isinstance(placement, Replicate):
        return None
    if isinstance(placement, Shard) or type(placement).__name__ == "_StridedShard":
        return placement.dim % max(ndim, 1)  # type: ignore[attr-defined]
    raise ValueError(f"the placement {placement!r}; expected Shard or Replicate")


@dataclass(frozen=True, eq=False)
class Sharded:
    name: str
    holder: DTensor
    cuts: tuple[tuple[Axis, int], ...] = field(init=False)
    copies: tuple[Axis, ...] = field(init=False)

    def __post_init__(self) -> None:
        mesh, found, copies = self.holder.device_mesh, [], []
        for axis in reversed(range(mesh.ndim)):  # innermost first: tensor parallel before data parallel
            try:
                dim = shard_dim(self.holder.placements[axis], self.holder.ndim)
            except ValueError as error:
                raise ValueError(
                    f"parameter {self.name!r} has {error} on mesh axis {axis}: dist_agc cannot tell which rank holds "
                    "which elements. Redistribute it to Shard or Replicate."
                ) from None
            if mesh.size(axis) == 1 or mesh.get_coordinate() is None:
                continue
            if dim is None:
                copies.append(mesh_axis(mesh, axis))
            else:
                found.append((mesh_axis(mesh, axis), dim))
        object.__setattr__(self, "cuts", tuple(found))
        object.__setattr__(self, "copies", tuple(copies))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.holder.shape)

    def local(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            raise ValueError(
                f"parameter {self.name!r} is a DTensor and its gradient is a {type(tensor).__name__}: expected a "
                f"DTensor with placements {self.holder.placements}."
            )
        if tensor.placements != self.holder.placements:
            self.pending(tensor)
        return tensor.to_local()

    def pending(self, grad: Tensor) -> tuple[Axis, ...]:
        """The axes along which a gradient still is each rank's share of a sum, where the parameter is replicated.

        Tensor parallelism without FSDP2 leaves such gradients (SequenceParallel's norms), for the optimizer to reduce.

        Raises:
            ValueError: the gradient lies elsewhere than its parameter in another way.
        """
        assert isinstance(grad, DTensor)
        mesh, wanted = self.holder.device_mesh, self.holder.placements
        axes = [axis for axis, pair in enumerate(zip(grad.placements, wanted, strict=False)) if pair[0] != pair[1]]
        if grad.device_mesh != mesh or any(
            grad.placements[axis] != Partial("sum") or not isinstance(wanted[axis], Replicate) for axis in axes
        ):
            raise ValueError(
                f"parameter {self.name!r} has placements {wanted} and its gradient {grad.placements}: redistribute the "
                "gradient to the parameter's placements before clipping (a Partial gradient of a sharded parameter "
                "still waits for its reduction)."
            )
        return tuple(mesh_axis(mesh, axis) for axis in axes if mesh.size(axis) > 1)

    def settle(self, total: Tensor) -> None:
        """Put the sum in the place of this rank's share, in the same memory."""
        share, holder = self.holder.grad, self.holder
        assert isinstance(share, DTensor)
        local = share.to_local()
        local.copy_(total)
        holder.grad = DTensor.from_local(
            local, holder.device_mesh, holder.placements, run_check=False, shape=holder.shape, stride=holder.stride()
        )

    def pieces(self, rule: UnitRule | None) -> Pieces:
        if rule is None:
            return excluded(self.holder.ndim, (axis for axis, _ in self.cuts))
        local = self.holder.to_local()
        try:
            return sharded(rule, local.shape, self.cuts, self._rows(rule, local.shape) if rule.grouped else None)
        except ValueError as error:
            raise ValueError(f"parameter {self.name!r} with placements {self.holder.placements}: {error}.") from None

    def _rows(self, rule: UnitRule, local_shape: Sequence[int]) -> tuple[int, int]:
        """The rows of dim 0 that this rank holds, for a grouped ConvTranspose, whose groups they may cut."""
        axes = [axis for axis, dim in self.cuts if dim == 0]
        size = rule.shape[0] * rule.shape[1]
        rows = chunk(size, axes[0].size, axes[0].rank) if len(axes) == 1 else (0, local_shape[0])
        if rows[1] - rows[0] != local_shape[0]:
            raise ValueError(f"{local_shape[0]} local rows where torch.chunk gives {rows[1] - rows[0]}")
        return rows
