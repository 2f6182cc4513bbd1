"""What a call really sends and dispatches, counted on its way to torch."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts what reaches the dispatcher: operations (views apart, a list operation as one), and collectives with the
    elements and bytes that they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.collectives = self.elements = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor first: what it does inside comes by here again
        if func.namespace in ("c10d", "_c10d_functional"):
            if "wait" not in func.__name__ and "barrier" not in func.__name__:
                self.collectives += 1
                sent = args[0] if isinstance(args[0], list | tuple) else [args[0]]
                tensors = [t for t in sent if isinstance(t, Tensor)]
                self.elements += sum(t.numel() for t in tensors)
                self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        elif func.namespace == "aten" and not func.is_view:
            self.operations += 1
        return func(*args, **(kwargs or {}))
