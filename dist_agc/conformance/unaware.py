"""AGC as it is written for one process, to show what becomes of it on shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _norm(x: Tensor) -> Tensor:
    """Of the whole tensor where it has one dim or none, else of every slice along dim 0."""
    if x.ndim <= 1:
        return torch.linalg.vector_norm(x)
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)


def clip(parameters: Sequence[Tensor], clipping_threshold: float, eps: float) -> None:
    """The rule of timm and of Composer: tensor by tensor, in place, in what the framework hands over, sending nothing.

    Whatever torch raises comes as a RuntimeError that says how far it came: the tensors before that are clipped.
    """
    having = [p for p in parameters if p.grad is not None]
    for i, parameter in enumerate(having):
        grad = parameter.grad
        assert grad is not None
        try:
            # In place, as both write it: what torch refuses here on a DTensor, it would gather out of place.
            limit = _norm(parameter.detach()).clamp_(min=eps).mul_(clipping_threshold)
            factor = limit.div_(_norm(grad.detach())).nan_to_num_(nan=1.0).clamp_(max=1.0)
            grad.detach().mul_(factor)
        except Exception as error:
            text = " ".join(str(error).split())
            raise RuntimeError(f"raises {type(error).__name__} after {i} of {len(having)} tensors: {text}") from error
