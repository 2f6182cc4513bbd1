"""The shape of lomo_optim's Lomo, by the names that it is known by: no package is needed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Lomo(Optimizer):
    """The gradient of any parameter brings the steps of those that have one already."""

    loss_scaler: Any = None

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.lr, self.model = lr, model
        self.grad_func = self.fuse_update()
        for p in model.parameters():
            p.register_hook(self.grad_func)
        super().__init__(model.parameters(), {"lr": lr})

    def update(self, p: nn.Parameter) -> None:
        assert p.grad is not None
        p.add_(p.grad, alpha=-self.lr)

    def fuse_update(self) -> Callable[[Any], Any]:
        def func(x: Any) -> Any:
            with torch.no_grad():
                for p in self.model.parameters():
                    if p.grad is not None:
                        self.update(p)
                        p.grad = None
            return x

        return func

    def fused_backward(self, loss: Tensor, lr: float) -> None:
        loss.backward()
        self.grad_func(0)
