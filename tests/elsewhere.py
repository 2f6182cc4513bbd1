"""A device that is not here: tensors that say they lie on it, and a watch over what travels there and back."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Elsewhere(Tensor):
    """A tensor of a device that is not here: says that it lies there, and keeps its values on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, device: torch.device) -> "Elsewhere":
        made = Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=device)  # type: ignore[attr-defined]
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if name == "allreduce_":  # in place, over the real gloo group
            return func([t.values for t in args[0]], *args[1:], **(kwargs or {}))
        if name == "_to_copy" and (kwargs or {}).get("device") == torch.device("cpu"):
            return args[0].values.clone()
        raise AssertionError(f"{func} on the other device: only the collective belongs there")


class Journeys(TorchDispatchMode):
    """Takes to another device what is sent there, and notes how much that was and where it came from."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[int, int]] = []
        self.back: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = (kwargs or {}).get("device")
        if func.__name__.startswith("_to_copy") and isinstance(args[0], Elsewhere):
            self.back.append(args[0].numel())
        elif func.__name__.startswith("_to_copy") and device is not None and device.type != "cpu":
            self.sent.append((args[0].numel(), args[0].data_ptr()))
            return Elsewhere(args[0].clone(), device)
        return func(*args, **(kwargs or {}))
