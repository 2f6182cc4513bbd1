"""Where the gradients of a check come from: the user's loss, what the model makes of a batch, or else noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from . import sharding
from .ranks import NotSetUp

Loss = Callable[[nn.Module], Tensor]


class OutputLoss:
    """Of a model that came with a batch and no loss: what the output has as its ``loss``, else the mean of squares of
    its first float tensor.

    Args:
        batch: what forward takes: keywords in a mapping, arguments in a tuple or list, or one argument.
    """

    def __init__(self, batch: Any) -> None:
        self.batch = batch
        self.used = ""  # after a call, which of the two it was

    def __call__(self, model: nn.Module) -> Tensor:
        batch = dict(self.batch) if isinstance(self.batch, Mapping) else self.batch
        batch = tree_map_only(Tensor, lambda tensor: tensor.to(sharding.device()), batch)
        if isinstance(batch, dict):
            output = model(**batch)
        else:
            output = model(*batch) if isinstance(batch, tuple | list) else model(batch)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is not None:
            self.used = "the loss in the model's output"
            return loss
        tensors = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())
        if (first := next(tensors, None)) is None:
            raise NotSetUp("the model's output has no loss and no float tensor: let the factory return (model, loss)")
        self.used = "the mean of squares of the model's first output"
        return first.float().square().mean()


def module_and_loss(made: Any) -> tuple[nn.Module, Loss | None]:
    """What a factory returned: a module, (module, loss) or (module, batch). TypeError: it is something else."""
    model, given = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"the factory must return a module, (module, loss) or (module, batch), got {type(model).__name__}."
        )
    loss: Any = given if given is None or callable(given) else OutputLoss(given)
    return model, loss


def of_example(model: nn.Module) -> Loss | None:
    """A loss of the batch that the model itself shows as an example, where it has one and runs with it."""
    batch = next((b for name in EXAMPLES if (b := getattr(model, name, None)) is not None), None)
    if batch is None:
        return None
    loss = OutputLoss(batch)
    try:
        with torch.no_grad():
            loss(model)
    except Exception:  # of another kind of model: transformers shows tokens to its vision models, too
        return None
    return loss


GIVEN = "loss(module)"
EXAMPLES = ("dummy_inputs", "example_input_array")  # of transformers and diffusers; of Lightning


def described(loss: Loss | None) -> str:
    """What gradients came from, once it has run."""
    if loss is None:
        return "noise, since no loss and no batch came with the model"
    return loss.used if isinstance(loss, OutputLoss) else GIVEN
