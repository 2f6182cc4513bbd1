"""A model under one layout, and how to look at all of it: full weights and gradients, gathered on the spot."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..attach import attach
from ..clipper import Clipper
from ..config import AGCConfig
from ..engine.plan import AxisPlan
from ..frameworks import deepspeed
from ..frameworks.base import is_a
from ..held import held
from ..model.names import entries
from ..stats import ClipStats
from . import sharding
from .counting import Operations
from .losses import Loss
from .ranks import NotSetUp

Tensors = dict[str, Tensor]


class Subject:
    """A sharded model whose gradients lie on its parameters: everything but DeepSpeed.

    ``loss`` runs the forward pass; without one, gradients are noise, spread as the layout spreads the parameters.
    ``averages``: nothing else averages the gradients of the ranks.
    """

    def __init__(self, model: Any, loss: Loss | None = None, averages: bool = False) -> None:
        self.model, self.loss, self.averages = model, loss, averages
        self.clipper: Clipper | None = None

    def rehearse(self) -> None:
        """Do without AGC what `clip` does around it, so that what fails there is not taken for AGC's fault."""

    def backward(self) -> None:
        self.model.zero_grad()
        if self.loss is not None:
            self.loss(self.model).backward()
            if self.averages:
                sharding.average_gradients(self.model)
            return
        for parameter, _ in self.held():
            parameter.grad = _noise_like(parameter)

    def tensors(self) -> tuple[Tensors, Tensors]:
        """Full weights and gradients of the trainable parameters, by name."""
        return self.weights(), self.clipped()

    def weights(self) -> Tensors:
        from torch.distributed.fsdp import FullyShardedDataParallel

        # FSDP1 shows original parameters whole in there, and no other model minds.
        with FullyShardedDataParallel.summon_full_params(self.model, writeback=False):
            return {name: _full(parameter) for name, parameter in _trainable(self.model)}

    def held(self) -> list[tuple[Tensor, Tensor | None]]:
        """What an optimizer holds on this rank: trainable tensors and their gradients."""
        return [(p, p.grad) for p in self.model.parameters() if p.requires_grad]

    def clip(self, config: AGCConfig) -> ClipStats:
        if self.clipper is None or self.clipper.config != config:
            self.clipper = Clipper(self.model, config)
        stats = self.clipper.clip()
        assert stats is not None
        return stats

    def hand_over(self, clip: Callable[[list[Tensor]], None]) -> None:
        """Call ``clip`` with what an optimizer holds, where an optimizer would step."""
        clip(list(self.model.parameters()))

    def clipped(self) -> Tensors:
        """Full gradients, gathered as weights are: they take the weights' place for a moment."""
        pairs = self.held()
        kept = [tensor.detach().clone() for tensor, _ in pairs]
        for tensor, grad in pairs:
            tensor.detach().copy_(torch.zeros_like(tensor) if grad is None else grad.to_dense())
        found = self.weights()
        for (tensor, _), weight in zip(pairs, kept, strict=True):
            tensor.detach().copy_(weight)
        return found

    def sends_more(self) -> bool:
        """Whether something is sent beside what is planned: gradients that come as shares of a sum are completed."""
        placements = [getattr(p.grad, "placements", ()) for p in self.model.parameters()]
        return any(placement.is_partial() for found in placements for placement in found)

    def sent(self, config: AGCConfig) -> tuple[Operations, list[AxisPlan]]:
        """What one more clipping sends, and what was planned; the first of a plan sends its agreement check too."""
        with Operations() as seen:
            self.clip(config)
        assert self.clipper is not None
        return seen, self.clipper.execution().plan.axes


class ZeroSubject(Subject):
    """A DeepSpeed engine. Clipping runs inside its step: what the base optimizer holds is looked at there.

    Full tensors come from DeepSpeed's own interface, which knows nothing of how dist_agc reads its partitions.
    """

    def __init__(self, engine: Any, loss: Loss | None = None) -> None:
        super().__init__(engine, loss)
        self._optimizers = deepspeed.optimizers(engine)
        # Of the last step, in which an optimizer may have stepped several times.
        self._seen = Operations()
        self._kept: list[tuple[Tensor, Tensor | None]] = []
        self._axes: list[AxisPlan] = []

    def rehearse(self) -> None:
        reached: list[Any] = []
        hooks = [one.register_step_pre_hook(lambda one, *_: reached.append(one)) for one in self._optimizers]
        self.backward()
        self._step()
        for hook in hooks:
            hook.remove()
        if not reached:
            raise NotSetUp(
                "a step does not come to its optimizer: is gradient_accumulation_steps 1? do gradients overflow?"
            )

    def backward(self) -> None:
        if self.loss is not None:
            self.model.backward(self.loss(self.model))
            return
        parameters = [p for _, p in _trainable(self.model.module)]
        backward_without_forward(self.model, parameters, map(_noise_like, parameters))

    def tensors(self) -> tuple[Tensors, Tensors]:
        from deepspeed.utils import safe_get_full_grad

        pairs = [(name, p, safe_get_full_grad(p)) for name, p in _trainable(self.model.module)]
        return self.weights(), {name: _unsliced(p, grad) for name, p, grad in pairs if grad is not None}

    def weights(self) -> Tensors:
        from deepspeed.utils import safe_get_full_fp32_param

        found = {name: (p, safe_get_full_fp32_param(p)) for name, p in _trainable(self.model.module)}
        return {name: _unsliced(p, p if weight is None else weight) for name, (p, weight) in found.items()}

    def held(self) -> list[tuple[Tensor, Tensor | None]]:
        return self._kept

    def clip(self, config: AGCConfig) -> ClipStats:
        hook: Any = attach(self.model, config=config)
        self.clipper = hook.clipper
        hook.clipper.clip = partial(self._watched, hook.clipper.clip)  # the hook calls it in an optimizer's step
        self._step()
        assert hook.stats, "the rehearsal came to the optimizer"
        return hook.stats

    def hand_over(self, clip: Callable[[list[Tensor]], None]) -> None:
        for optimizer in self._optimizers:
            optimizer.register_step_pre_hook(lambda one, *_: self._watched(clip, held(one)))  # None, as a hook must
        self._step()

    def _watched(self, clip: Callable[..., Any], tensors: list[Tensor], **options: Any) -> Any:
        """What ``clip`` returns; what it sends and leaves behind is kept."""
        with self._seen:
            result = clip(tensors, **options)
        self._kept += [(p, p.grad.clone()) for p in tensors if p.grad is not None]
        if self.clipper is not None:
            self._axes += self.clipper.execution(tensors).plan.axes
        return result

    def _step(self) -> None:
        self._seen, self._kept, self._axes = Operations(), [], []
        self.model.step()

    def sent(self, config: AGCConfig) -> tuple[Operations, list[AxisPlan]]:
        self.backward()
        self._step()
        return self._seen, self._axes


def backward_without_forward(engine: Any, parameters: list[Any], gradients: Iterable[Tensor]) -> None:
    """A backward pass of a DeepSpeed engine that gives its parameters these gradients, in their order and whole.

    ``gradients`` may be a generator: it is used up where ZeRO 3 has the parameters whole.
    """
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(parameters, enabled=hasattr(parameters[0], "ds_id")):
        products = zip(parameters, gradients, strict=True)
        engine.backward(torch.stack([(p * g).sum() for p, g in products]).sum())


def is_engine(model: object) -> bool:
    return is_a(model, "DeepSpeedEngine")


def _full(tensor: Tensor) -> Tensor:
    """All of a plain tensor or DTensor, as a float64 copy on the CPU; a collective for DTensors."""
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.to("cpu", torch.float64, copy=True)


def _unsliced(parameter: Any, tensor: Tensor) -> Tensor:
    """`_full`, put together by DeepSpeed from the slices of all ranks where its AutoTP has cut ``parameter``."""
    mine = _full(tensor)
    described = getattr(parameter, "ds_autotp_universal_checkpoint_meta", {}).get("conversion", {}).get("affine_map")
    if described is None:
        return mine
    from deepspeed.checkpoint.affine import ParamAffineMap
    from deepspeed.utils import groups

    cut = ParamAffineMap.from_dict(described)
    every: list[Any] = [None] * len(cut.shard_shapes)
    dist.all_gather_object(every, mine, group=groups.get_tensor_model_parallel_group())
    if any(len(piece.locations) > 1 for pieces in cut.pieces_by_rank.values() for piece in pieces):
        return mine  # copies
    return cut.rebuild(dict(enumerate(every)))


def _trainable(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(entry.name, entry.tensor) for entry in entries(model) if entry.tensor.requires_grad]


def _noise_like(parameter: Tensor) -> Tensor:
    """Noise with units large and small. Equal on ranks that hold the same, which only the layout itself can tell."""
    shape, generator = tuple(parameter.shape), torch.Generator().manual_seed(parameter.numel())
    spread = torch.randn(shape[:1] + (1,) * (len(shape) - 1), generator=generator).mul(2).exp()
    noise = (torch.randn(shape, generator=generator) * spread).to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(noise, parameter.device_mesh, parameter.placements)
    return noise
