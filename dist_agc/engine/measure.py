"""The norms of all local units in one vector: every tensor is read once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.blocks import Block
from .kernels import Kernel, is_small, one_kernel, unit_norms_, vector_norm

# How a tensor lies in memory, which decides on the kernel: strides, dtype, device, whether its numbers are negated.
Kind = tuple[tuple[int, ...], torch.dtype, torch.device, bool]
# (which of the tensors the block is a part of, the block, where its norms begin)
_Placed = tuple[int, Block, int]


class Norms:
    """Where the norms of blocks go.

    What lies on another device than ``out`` is measured there, into one vector, which is copied over once.

    Args:
        blocks: one number for each of their units, block after block.
        owners: which of the tensors each block is a part of.
        samples: tensors of the shapes, devices and kinds that will be measured.
        out: the vector, shape (units of all blocks,).
        own: whether fp32 rows on CPU are measured by `row_norms`.
    """

    def __init__(
        self, blocks: Sequence[Block], owners: Sequence[int], samples: Sequence[Tensor], out: Tensor, *, own: bool
    ) -> None:
        self.out = out
        spans: dict[torch.device, list[_Placed]] = {}
        start = 0
        for block, owner in zip(blocks, owners, strict=True):
            spans.setdefault(samples[owner].device, []).append((owner, block, start))
            start += block.units
        self._here = [_OnDevice(placed, samples, out, own) for device, placed in spans.items() if device == out.device]
        self._elsewhere: list[tuple[_OnDevice, Tensor]] = []
        for device, placed in spans.items():
            if device != out.device:
                ends = itertools.accumulate(block.units for _, block, _ in placed)
                alone = [(owner, block, end - block.units) for (owner, block, _), end in zip(placed, ends, strict=True)]
                place = torch.cat([torch.arange(at, at + block.units, device="cpu") for _, block, at in placed])
                vector = torch.zeros(len(place), dtype=out.dtype, device=device)
                self._elsewhere.append((_OnDevice(alone, samples, vector, own), place.to(out.device)))

    def fill(self, tensors: Sequence[Tensor | None]) -> None:
        """Measure local tensors; None counts as zeros."""
        if any(tensor is None for tensor in tensors):
            self.out.zero_()
        for some in self._here:
            some.fill(tensors)
        for some, place in self._elsewhere:
            some.out.zero_()
            some.fill(tensors)
            self.out.index_copy_(0, place, some.out.to(self.out.device))


class _OnDevice:
    """The blocks of one device, whose norms go into ``out`` on that device."""

    def __init__(self, placed: Sequence[_Placed], samples: Sequence[Tensor], out: Tensor, own: bool) -> None:
        self.out, self._own = out, own
        alone, self._several = [], []
        for owner, block, start in placed:
            part = block.part(samples[owner])
            if block.units == 1 and not part.is_complex() and is_small(part):
                alone.append((tuple(part.shape), start, owner, block))
            else:
                self._several.append((owner, block, out[start : start + block.units].view(block.kept)))
        # Blocks of one unit, biases and gains above all, are measured together, on CPU those of one shape at a time.
        alone.sort(key=lambda entry: entry[:2])
        self._alone = [(owner, block) for _, _, owner, block in alone]
        self._alone_at = torch.tensor([start for _, start, _, _ in alone], dtype=torch.int64, device=out.device)
        shapes = [list(found) for _, found in itertools.groupby(shape for shape, *_ in alone)]
        self._groups = [] if out.device.type != "cpu" else [(found[0], len(found)) for found in shapes]
        self._nothing = out.new_zeros(())
        # What was found to measure each tensor well, for as long as it lies as it did.
        self._chosen: list[tuple[Kind, Kernel] | None] = [None] * len(self._several)

    def fill(self, tensors: Sequence[Tensor | None]) -> None:
        if self._alone:
            self.out.index_copy_(0, self._alone_at, self._small(tensors))
        for at, (owner, block, out) in enumerate(self._several):
            tensor = tensors[owner]
            if tensor is None:
                continue
            if tensor.is_sparse:
                _sparse_norms(tensor.coalesce(), block, out)
                continue
            view = block.view(tensor)
            kind, chosen = (view.stride(), view.dtype, view.device, view.is_neg()), self._chosen[at]
            if chosen is None or chosen[0] != kind:
                kernel = one_kernel(view, block.reduced, out, own=self._own) or unit_norms_
                chosen = self._chosen[at] = (kind, kernel)
            chosen[1](view, block.reduced, out)

    def _small(self, tensors: Sequence[Tensor | None]) -> Tensor:
        parts = [
            self._nothing if (tensor := tensors[owner]) is None else block.part(_dense(tensor))
            for owner, block in self._alone
        ]
        if not self._groups:
            norms = torch._foreach_norm(parts, 2, self.out.dtype)  # pyright: ignore[reportPrivateImportUsage]
            return torch.stack(norms)
        norms, at = torch.empty(len(parts), dtype=self.out.dtype, device=self.out.device), 0
        for shape, count in self._groups:
            some = [part if part is not self._nothing else part.expand(shape) for part in parts[at : at + count]]
            rows, into = torch.stack(some).view(count, -1), norms[at : at + count]
            # By the kernel that measures such units where a rank has more of them, so that norms agree to the last bit.
            (one_kernel(rows, (1,), into, own=self._own) or vector_norm)(rows, (1,), into)
            at += count
        return norms


def _dense(tensor: Tensor) -> Tensor:
    if not tensor.is_sparse:
        return tensor
    # On CPU the tensor is small and has to have the shape of the others that it is measured with.
    return tensor.to_dense() if tensor.is_cpu else tensor.coalesce().values()


def _sparse_norms(grad: Tensor, block: Block, out: Tensor) -> None:
    values = grad.values()
    if not block.kept:
        unit_norms_(values.flatten(), (0,), out)
        return
    norms = out.new_zeros(len(values))
    unit_norms_(values, block.reduced, norms)
    out.zero_().index_copy_(0, grad.indices()[0], norms)
