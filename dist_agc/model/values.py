"""Tensors around other tensors, and how to get at the numbers that an optimizer steps.

Frameworks name such classes in the two tables, by class name, so that no library is imported to find out.
"""

from __future__ import annotations

from torch import Tensor

# The attribute with the plain tensor of the same shape that is stepped: the weight itself, in its own memory.
AROUND: dict[str, str] = {}
# Weights that are stored in fewer bits, row by row, and read by ``dequantize()``: the attribute with what is stored.
PACKED: dict[str, str] = {}


def inside(tensor: Tensor) -> Tensor:
    """The plain tensor inside of one that only goes around it; any other as it is."""
    attribute = AROUND.get(type(tensor).__name__)
    return tensor if attribute is None else getattr(tensor, attribute)


def packed(tensor: Tensor) -> bool:
    """Whether its numbers are nowhere in memory one by one."""
    return type(tensor).__name__ in PACKED


def values(tensor: Tensor) -> Tensor:
    """The numbers of a packed tensor, in memory of their own; any other as it is."""
    return tensor.dequantize() if packed(tensor) else tensor


def stored(tensor: Tensor) -> Tensor:
    """What is in memory of it, for a look at whether it was written to."""
    attribute = PACKED.get(type(tensor).__name__)
    return tensor if attribute is None else getattr(tensor, attribute)
