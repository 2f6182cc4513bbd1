"""Adaptive gradient clipping."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AGC:
    """Keeps each unit's gradient norm below a fraction of its weight norm: ``min(1, clipping_threshold / ratio)``.

    Brock et al. 2021, arXiv 2102.06171, equation 3, with ``ratio = grad_norm / max(weight_norm, eps)``.

    | `judge` takes | shape | is |
    |---|---|---|
    | weight_norm, grad_norm | (units,) | L2 norms, complete and finite |
    | limit | () or (units,) | the clipping threshold of each; a parameter group may have its own, inf never clips |

    | and gives | shape | is |
    |---|---|---|
    | coefficient | (units,) | what to multiply the gradient by; from 1 on the engine leaves it alone |
    | ratio | (units,) | for the statistics |

    Example:
        >>> import torch
        >>> w, g = torch.tensor([5.0, 5.0, 0.0]), torch.tensor([25.0, 1.0, 1.0])
        >>> coefficient, ratio = AGC(eps=1e-3).judge(w, g, 0.5)
        >>> [round(c, 5) for c in coefficient.clamp(max=1).tolist()]
        [0.1, 1.0, 0.0005]
    """

    clipping_threshold: float = 0.01
    eps: float = 1e-3

    def judge(self, weight_norm: Tensor, grad_norm: Tensor, limit: float | Tensor) -> tuple[Tensor, Tensor]:
        ratio = grad_norm / weight_norm.clamp(min=self.eps)
        if self.eps == 0:
            ratio = ratio.masked_fill(grad_norm == 0, 0.0)  # 0/0: nothing to clip, and no nan among the ratios
        return limit / ratio, ratio
