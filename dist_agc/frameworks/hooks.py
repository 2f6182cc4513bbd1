"""Hooks of libraries that use a gradient inside of backward, known by name: no library is imported to find out.

Private to others and read here only: the names of these hooks, ``_post_accumulate_grad_hooks`` and ``_backward_hooks``
of torch's tensors, ``_in_backward_optimizers`` of torch.distributed.optim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# How the qualified name of a hook ends that steps its parameter and frees the gradient, and whose it is.
_STEPPING = {
    "setup_low_rank_optimizer.<locals>.optimizer_hook": "transformers' layer-wise GaLore or Apollo",
    "get_scheduler.<locals>.scheduler_hook": "transformers' layer-wise scheduler",
    "_create_galore_optimizer.<locals>.optimizer_hook": "LLaMA-Factory's layer-wise GaLore",
    "_create_apollo_optimizer.<locals>.optimizer_hook": "LLaMA-Factory's layer-wise Apollo",
    "OptimizersInBackwardContainer.__init__.<locals>.optim_hook": "torchtitan's OptimizersInBackwardContainer",
    "register_optim_in_bwd_hooks.<locals>.optim_step": "torchtune's optimizer in backward",
    "Lomo.fuse_update.<locals>.func": "LOMO or AdaLomo",
    "Lomo.fuse_update_zero3.<locals>.func": "LOMO or AdaLomo",
}
# The forward of a module whose parameters get a hook in the first forward pass that adds their gradients up.
_SUMMING = "ReplicatedWithGradAllReduce.install_forward.<locals>.tp_forward"


def stepped_in_backward(tensor: Tensor) -> str | None:
    """Whose hook steps this parameter inside of backward; None where no known one does."""
    hooks = [*_after(tensor).values(), *(tensor._backward_hooks or {}).values()]
    if hasattr(tensor, "_in_backward_optimizers"):  # its hook is on the node, where nothing can be seen
        return "torch's _apply_optimizer_in_backward"
    return next(filter(None, map(_steps, hooks)), None)


def comes_too_late(tensor: Tensor) -> bool:
    """Whether a hook that nobody knows is there already, and would meet a gradient before one that comes now."""
    return not all(map(_steps, _after(tensor).values()))


def put_first(tensor: Tensor, handle: RemovableHandle) -> None:
    """Have the post-accumulate-grad hook of ``handle`` run before all others."""
    hooks = _after(tensor)
    for key in [key for key in hooks if key != handle.id]:
        hooks[key] = hooks.pop(key)  # move_to_end would not do: torch goes by the order in which they were put in


def summed_later(module: nn.Module) -> str | None:
    """Why the gradients of ``module`` are not final when hooks that are registered before its first forward run."""
    if getattr(vars(module).get("forward"), "__qualname__", "").endswith(_SUMMING):
        return (
            "transformers' tensor parallelism adds gradients up over ranks in a hook that the first forward pass "
            "registers, and so after AGC's"
        )
    return None


def _after(tensor: Tensor) -> dict[Any, Any]:
    return getattr(tensor, "_post_accumulate_grad_hooks", None) or {}


def _steps(hook: object) -> str | None:
    name = getattr(hook, "__qualname__", "")
    return next((whose for end, whose in _STEPPING.items() if name.endswith(end)), None)
