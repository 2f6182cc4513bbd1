"""Watching a forward pass: which dims of each parameter its matrix products and convolutions contract.

A product is seen where torch dispatches it. Its operand is traced to a parameter by its memory, and strides tell which
dims of the parameter each dim of the operand runs through. What is computed from a parameter (a cast, a standardised
weight) has memory of its own and is not seen, and neither is a lookup, which contracts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .units import UnitRule

# Sizes, strides, and which of the dims are contracted: an operand as a product sees it.
_Operand = tuple[Sequence[int], Sequence[int], Sequence[int]]


class Products(TorchDispatchMode):
    """Fills ``left`` while it is on: by place among ``parameters``, the dims that each product left, as sets of dims of
    the rule's shape. Products of a backward pass are left out."""

    def __init__(self, parameters: Sequence[tuple[Tensor, UnitRule]]) -> None:
        super().__init__()
        self.left: dict[int, list[tuple[int, ...]]] = {}
        self._places: dict[int, list[int]] = {}
        self._parameters = parameters
        for place, (tensor, _) in enumerate(parameters):
            self._places.setdefault(_memory(tensor), []).append(place)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _PRODUCTS and torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        ):
            # In inference mode torch hands over composite operations as a whole; a product may be inside.
            with self:
                return func.decompose(*args, **(kwargs or {}))
        if func in _PRODUCTS and torch._C._current_graph_task_id() == -1:
            operands = list(_PRODUCTS[func](*args))
            # Of two parameters a product makes a weight, such as B @ A of an adapter, or it takes a token for its
            # input. That says of neither what is one output.
            if not (_PRODUCTS[func] in (_matrices, _added, _linear) and all(self._owned(t) for t, _ in operands)):
                for tensor, operand in operands:
                    self._seen(tensor, operand)
        return func(*args, **(kwargs or {}))

    def _owned(self, tensor: Tensor) -> list[int]:
        """The places of the parameters that the tensor is a view of."""
        found = []
        for place in self._places.get(_memory(tensor), ()):
            parameter = self._parameters[place][0]
            begin = parameter.storage_offset()
            if begin <= tensor.storage_offset() < begin + max(parameter.numel(), 1):
                found.append(place)
        return found

    def _seen(self, tensor: Tensor, operand: _Operand) -> None:
        for place in self._owned(tensor):
            parameter, rule = self._parameters[place]
            self.left.setdefault(place, []).append(_left(operand, rule.shape, _strides(parameter, rule)))


def agrees(rule: UnitRule, left: Sequence[int]) -> bool:
    """Whether the units are numbered by what a product leaves. Dims of size 1 make no difference."""
    return {d for d in rule.kept if rule.shape[d] > 1} == {d for d in left if rule.shape[d] > 1}


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # unlike data_ptr, it is there for tensors on the meta device too


def _strides(parameter: Tensor, rule: UnitRule) -> list[int]:
    strides, at = list(parameter.stride()), rule.split
    if at is not None:
        strides.insert(at, strides[at] * rule.shape[at + 1])
    return strides


def _left(operand: _Operand, shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """The dims of the parameter that no contracted dim of the operand runs through."""
    sizes, steps, contracted = operand
    gone = {
        dim
        for d in contracted
        for dim, (size, stride) in enumerate(zip(shape, strides, strict=True))
        if size > 1 and steps[d] < size * stride and stride <= steps[d] * (sizes[d] - 1)
    }
    return tuple(d for d in range(len(shape)) if d not in gone)


def _contracted(tensor: Tensor, *dims: int) -> tuple[Tensor, _Operand]:
    return tensor, (tensor.shape, tensor.stride(), [d % tensor.ndim for d in dims])


def _matrices(a: Tensor, b: Tensor, *_: Any) -> Iterator[tuple[Tensor, _Operand]]:
    """a @ b: of each, what is contracted. Either may be a stack, and ``b`` a vector."""
    yield _contracted(a, -1)
    yield _contracted(b, -2 if b.ndim > 1 else -1)


def _added(_: Tensor, a: Tensor, b: Tensor, *rest: Any) -> Iterator[tuple[Tensor, _Operand]]:
    return _matrices(a, b)


def _linear(x: Tensor, weight: Tensor, *_: Any) -> Iterator[tuple[Tensor, _Operand]]:
    """x @ weight.T, where it is dispatched as a whole: in inference mode, and on some devices."""
    yield _contracted(x, -1)
    yield _contracted(weight, -1)


def _rows_of(*places: int) -> Callable[..., Iterator[tuple[Tensor, _Operand]]]:
    """A whole layer in one operation, whose arguments at these places are matrices of (out, in), or lists of them."""

    def operands(*args: Any) -> Iterator[tuple[Tensor, _Operand]]:
        for place in places:
            given = args[place] if isinstance(args[place], (list, tuple)) else [args[place]]
            yield from (_contracted(weight, -1) for weight in given if weight.ndim > 1)

    return operands


def _convolution(
    x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, *rest: Any
) -> Iterator[tuple[Tensor, _Operand]]:
    """A weight of (out, in / groups, ...), or transposed of (in, out / groups, ...)."""
    groups: int = rest[1]
    if not transposed:
        yield _contracted(weight, *range(1, weight.ndim))
        return
    (inputs, *sizes), (step, *steps) = weight.shape, weight.stride()
    each = inputs // groups
    contracted = [1, *range(3, weight.ndim + 1)]
    yield weight, ((groups, each, *sizes), (step * each, step, *steps), contracted)


def _bilinear(a: Tensor, weight: Tensor, b: Tensor, e1: Any, e2: Any, e3: Any, summed: Sequence[int], *_: Any) -> Any:
    """`_trilinear`: ``e2`` are the dims that are put into the weight, ``summed`` those of all that are contracted."""
    inside = [d for d in range(weight.ndim + len(e2)) if d not in e2]
    yield _contracted(weight, *(inside.index(d) for d in summed if d in inside))


_aten = torch.ops.aten
_PRODUCTS: dict[Any, Callable[..., Iterator[tuple[Tensor, _Operand]]]] = {
    _aten.mm.default: _matrices,
    _aten.bmm.default: _matrices,
    _aten.mv.default: _matrices,
    _aten.dot.default: _matrices,
    _aten.vdot.default: _matrices,
    _aten.linear.default: _linear,
    _aten.addmm.default: _added,
    _aten._addmm_activation.default: _added,
    _aten.addmv.default: _added,
    _aten.addbmm.default: _added,
    _aten.baddbmm.default: _added,
    _aten.convolution.default: _convolution,
    _aten._trilinear.default: _bilinear,
    # The fast paths of attention and encoder layers in eval mode without gradients
    _aten._native_multi_head_attention.default: _rows_of(5, 7),
    _aten._transformer_encoder_layer_fwd.default: _rows_of(3, 5, 14, 16),
    # One layer of an LSTM on CPU; all layers of a recurrent network on CUDA
    _aten.mkldnn_rnn_layer.default: _rows_of(1, 2),
    _aten._cudnn_rnn.default: _rows_of(1),
}
if hasattr(_aten, "_grouped_mm"):  # torch 2.8
    _PRODUCTS[_aten._grouped_mm.default] = _matrices
