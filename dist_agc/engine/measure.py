"""The norms of all local units in one vector: every tensor is read once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.blocks import Block
from ..model.values import packed, values
from .kernels import Kernel, one_kernel, unit_norms_, vector_norm


def norm_of(tensor: Tensor, order: float = 2) -> Tensor:
    """The norm of all that a local tensor holds, sparse ones too, in 32 bits at least."""
    plain = tensor.coalesce().values() if tensor.is_sparse else values(tensor)
    return torch.linalg.vector_norm(plain, order, dtype=torch.promote_types(plain.dtype, torch.float32))


# Numbers of a packed weight that are unpacked at a time: 16 MB of them in fp32.
_UNPACKED = 1 << 22


class Norms:
    """The norms of the units of ``blocks`` in the vector ``out``, block after block.

    What lies on another device is measured there, into a vector of its own, which is copied over once.
    ``owners``: which of the tensors each block is a part of. ``samples``: tensors of the shapes, devices and kinds that
    will be measured. ``own``: whether fp32 rows on CPU are measured by `row_norms`.
    """

    def __init__(
        self, blocks: Sequence[Block], owners: Sequence[int], samples: Sequence[Tensor], out: Tensor, *, own: bool
    ) -> None:
        self.out = out
        placed: dict[torch.device, list[tuple[int, Block, int]]] = {out.device: []}
        start = 0
        for block, owner in zip(blocks, owners, strict=True):
            placed.setdefault(samples[owner].device, []).append((owner, block, start))
            start += block.units
        self._here = _OnDevice(placed.pop(out.device), samples, out, own)
        self._elsewhere = [
            _OnDevice(some, samples, torch.zeros_like(out, device=device), own) for device, some in placed.items()
        ]

    def fill(self, tensors: Sequence[Tensor | None]) -> None:
        """Measure local tensors; None counts as zeros."""
        if self._elsewhere or any(tensor is None for tensor in tensors):
            self.out.zero_()
        self._here.fill(tensors)
        for part in self._elsewhere:
            part.out.zero_()
            part.fill(tensors)
            self.out.add_(part.out.to(self.out.device))  # zeros, where the norm was measured elsewhere


class _OnDevice:
    """Blocks on one device. ``placed``: (of which tensor it is a part, the block, where its norms begin in ``out``)."""

    def __init__(
        self, placed: Sequence[tuple[int, Block, int]], samples: Sequence[Tensor], out: Tensor, own: bool
    ) -> None:
        self.out, self._own, self._nothing = out, own, out.new_zeros(())
        # Blocks of one unit, biases and gains above all, are measured together, on CPU those of one shape at a time.
        alone, self._several = [], []
        for owner, block, start in placed:
            part = block.part(samples[owner])
            every, norm = tuple(range(part.ndim)), out[start : start + 1]
            if block.units == 1 and part.numel() and not packed(part) and one_kernel(part, every, norm):
                alone.append((tuple(part.shape) if out.is_cpu else (), start, owner, block))
            else:
                self._several.append((owner, block, out[start : start + block.units].view(block.kept)))
        alone.sort(key=lambda entry: entry[:2])
        self._alone = [(shape, owner, block) for shape, _, owner, block in alone]
        self._alone_at = torch.tensor([start for _, start, _, _ in alone], dtype=torch.int64, device=out.device)
        self._shapes = Counter(shape for shape, _, _ in self._alone)
        # What was found to measure a tensor well that lies like this: strides, dtype, device, whether it is negated.
        self._chosen: dict[tuple[object, ...], Kernel] = {}

    def fill(self, tensors: Sequence[Tensor | None]) -> None:
        if self._alone:
            self.out.index_copy_(0, self._alone_at, self._small(tensors))
        for at, (owner, block, out) in enumerate(self._several):
            if (tensor := tensors[owner]) is None:
                continue
            if tensor.is_sparse:
                _sparse_norms(tensor.coalesce(), block, out)
                continue
            if packed(tensor):
                _packed_norms(tensor, block, out)
                continue
            view = block.view(tensor)
            lies = (at, view.stride(), view.dtype, view.device, view.is_neg())
            if (kernel := self._chosen.get(lies)) is None:
                kernel = self._chosen[lies] = one_kernel(view, block.reduced, out, own=self._own) or unit_norms_
            kernel(view, block.reduced, out)

    def _small(self, tensors: Sequence[Tensor | None]) -> Tensor:
        parts = [
            self._nothing.expand(shape) if (tensor := tensors[owner]) is None else block.part(_dense(tensor))
            for shape, owner, block in self._alone
        ]
        if not self.out.is_cpu:
            return torch.stack(torch._foreach_norm(parts, 2, self.out.dtype))  # pyright: ignore[reportPrivateImportUsage]
        norms, at = self.out.new_empty(len(parts)), 0
        for count in self._shapes.values():
            rows, into = torch.stack(parts[at : at + count]).view(count, -1), norms[at : at + count]
            # By the kernel that measures such units where a rank has more of them, so that norms agree to the last bit.
            (one_kernel(rows, (1,), into, own=self._own) or vector_norm)(rows, (1,), into)
            at += count
        return norms


def _dense(tensor: Tensor) -> Tensor:
    if not tensor.is_sparse:
        return tensor
    # On CPU the tensor is small and has to have the shape of the others that it is measured with.
    return tensor.to_dense() if tensor.is_cpu else tensor.coalesce().values()


def _packed_norms(weight: Tensor, block: Block, out: Tensor) -> None:
    """A few rows at a time where units are rows, so that the numbers of all are never in memory at once."""
    if block.sizes is not None or 0 in block.reduced:
        unit_norms_(block.view(values(weight)), block.reduced, out)
        return
    step = max(1, _UNPACKED // max(1, math.prod(weight.shape[1:])))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        unit_norms_(values(weight[rows]), block.reduced, out[rows])


def _sparse_norms(grad: Tensor, block: Block, out: Tensor) -> None:
    values = grad.values()
    if block.kept:
        norms = unit_norms_(values, block.reduced, out.new_zeros(len(values)))
        out.zero_().index_copy_(0, grad.indices()[0], norms)
    else:
        unit_norms_(values.flatten(), (0,), out)
