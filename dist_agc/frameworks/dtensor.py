"""DTensor: FSDP2, HSDP, tensor parallel and any mix of them, told apart by placements alone.

Private to torch and read here only: ``placement_types._StridedShard``, which FSDP2 on top of tensor parallel makes.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard

from ..model.blocks import Axis, Pieces, sharded
from ..model.names import Entry
from ..model.parameter import Parameter, Unknown
from ..model.units import UnitRule
from ..model.values import inside
from . import wrappers
from .base import Framework, group_axis


class DTensors(Framework):
    def prepare(self, model: nn.Module) -> None:
        """Have FSDP2 modules show their sharded parameters, where a forward pass without backward left whole ones."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def not_in_backward(self, module: nn.Module) -> str | None:
        held = module.parameters() if isinstance(module, FSDPModule) else ()
        pairs = ((p.device.type, p.device_mesh.device_type) for p in held if isinstance(p, DTensor))
        if torch.__version__ < "2.13" and any(copied_to_host(*pair) for pair in pairs):
            return (
                "before torch 2.13 FSDP2 runs hooks while it still copies an offloaded gradient to the host "
                "(pytorch #180666); use a newer torch, or no CPUOffloadPolicy"
            )
        return None

    def claim(self, model: nn.Module | None, entries: Sequence[Entry]) -> tuple[list[Parameter], list[Entry]]:
        modules = () if model is None else model.modules()
        reduced = {id(p) for module in modules if isinstance(module, FSDPModule) for p in module.parameters()}
        mine = [entry for entry in entries if isinstance(entry.tensor, DTensor)]
        return [_sharded(entry, reduced) for entry in mine], [e for e in entries if not isinstance(e.tensor, DTensor)]


def copied_to_host(device: str, mesh_device: str) -> bool:
    """Whether gradients are reduced on an accelerator and kept on the CPU, as CPUOffloadPolicy has it."""
    return device == "cpu" and mesh_device != "cpu"


@dataclass(frozen=True, eq=False, kw_only=True)
class Sharded(Parameter):
    """A DTensor.

    ``cuts``: see `sharded`. ``reduced``: whether FSDP2 reduces its gradients, which then never are shares of a sum.
    """

    tensor: DTensor
    cuts: tuple[tuple[Axis, int], ...]
    reduced: bool

    framework: ClassVar[str] = "DTensor (FSDP2, tensor parallel)"

    def local(self, tensor: Tensor) -> Tensor:
        wanted = self.tensor.placements
        if not isinstance(tensor, DTensor):
            raise ValueError(
                f"parameter {self.name!r} is a DTensor and its gradient is a {type(tensor).__name__}: expected a "
                f"DTensor with placements {wanted}."
            )
        if tensor.placements != wanted:
            self._shares(tensor)
            # Of what every rank has whole each takes its own part: a copy of it, and nothing is sent.
            pairs = zip(tensor.placements, wanted, strict=True)
            tensor = tensor.redistribute(placements=[to if _cuts(to) else now for now, to in pairs])
        return inside(tensor.to_local())

    @property
    def copied(self) -> bool:
        return not self.cuts

    @property
    def may_be_share(self) -> bool:
        return bool(self.copies) and not self.reduced

    def pending(self) -> tuple[Axis, ...]:
        grad = self.tensor.grad
        return () if grad is None else self._shares(grad)

    def _shares(self, grad: Tensor) -> tuple[Axis, ...]:
        """The axes along which a gradient still is each rank's share of a sum, where the parameter is replicated.

        Tensor parallelism without FSDP2 leaves such gradients (SequenceParallel's norms), for the optimizer to reduce,
        and whole ones of parameters that are cut (RowwiseParallel's embeddings), of which it takes a part.
        Raises ValueError where the gradient lies elsewhere than its parameter in another way.
        """
        assert isinstance(grad, DTensor)
        mesh, wanted = self.tensor.device_mesh, self.tensor.placements
        pairs = list(zip(grad.placements, wanted, strict=False))
        shares = [now == Partial("sum") and isinstance(to, Replicate) for now, to in pairs]
        whole = [isinstance(now, Replicate) and _cuts(to) for now, to in pairs]
        if grad.device_mesh != mesh or not all(
            share or parts or now == to for share, parts, (now, to) in zip(shares, whole, pairs, strict=True)
        ):
            raise ValueError(
                f"parameter {self.name!r} has placements {wanted} and its gradient {grad.placements}: redistribute the "
                "gradient to the parameter's placements before clipping (a Partial gradient of a sharded parameter "
                "still waits for its reduction)."
            )
        return tuple(
            group_axis(mesh.get_group(axis)) for axis, share in enumerate(shares) if share and mesh.size(axis) > 1
        )

    def unsettled(self) -> bool:
        grad = self.tensor.grad
        return isinstance(grad, DTensor) and grad.placements != self.tensor.placements

    def settle(self, final: Tensor) -> None:
        grad, tensor = self.tensor.grad, self.tensor
        assert isinstance(grad, DTensor)
        local = grad.to_local()
        local = local.copy_(final) if local.shape == final.shape else final
        tensor.grad = DTensor.from_local(
            local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )

    def pieces(self, rule: UnitRule | None) -> Pieces:
        try:
            self._refuse_strides(rule)
            return sharded(rule, self.weight().shape, self.cuts)
        except ValueError as error:
            raise ValueError(f"parameter {self.name!r} with placements {self.tensor.placements}: {error}.") from None

    def _refuse_strides(self, rule: UnitRule | None) -> None:
        """Of fused weights (transformers' ``packed_colwise``) each rank holds a part of each, in strides along a dim.
        Units that this dim numbers, or runs through, do not mind; those that see a part of it do."""
        split, mesh, ndim = None if rule is None else rule.joined.split, self.tensor.device_mesh, self.tensor.ndim
        placed: list[Any] = list(self.tensor.placements)
        cut = [p for axis, p in enumerate(placed) if mesh.size(axis) > 1 and _cuts(p) and p.dim % ndim == split]
        if len(cut) == 1 and getattr(cut[0], "split_factor", 1) > 1:
            raise ValueError(f"dim {split}, of which units see a part, is cut in strides")


def _cuts(placement: Placement) -> bool:
    """Whether ranks hold parts. FSDP2's _StridedShard is no Shard in newer versions of torch."""
    return isinstance(placement, Shard) or type(placement).__name__ == "_StridedShard"


def _sharded(entry: Entry, reduced: Container[int]) -> Sharded | Unknown:
    """``reduced``: ids of the parameters of FSDP2 modules."""
    tensor: Any = entry.tensor
    with torch.no_grad():  # else it is a view, which some classes make plain
        problem = wrappers.unknown(tensor.to_local())
    if problem:
        return Unknown.of(entry, problem=problem)
    mesh, cuts, copies = tensor.device_mesh, [], []
    for axis in reversed(range(mesh.ndim)):  # innermost first: tensor parallel before data parallel
        placement = tensor.placements[axis]
        copied = isinstance(placement, Replicate)
        if not copied and not _cuts(placement):
            problem = (
                f"has the placement {placement!r}; expected Shard or Replicate on mesh axis {axis}: dist_agc cannot "
                "tell which rank holds which elements. Redistribute it to Shard or Replicate, or exclude it"
            )
            return Unknown.of(entry, problem=problem)
        if mesh.size(axis) > 1 and mesh.get_coordinate() is not None:
            ranks = group_axis(mesh.get_group(axis))
            if copied:
                copies.append(ranks)
            else:
                cuts.append((ranks, placement.dim % max(tensor.ndim, 1)))
    return Sharded.of(entry, cuts=tuple(cuts), copies=tuple(copies), reduced=id(tensor) in reduced)
