"""A model under one layout, and how to look at all of it: full weights and gradients, gathered on the spot."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..clipper import Clipper
from ..config import AGCConfig
from ..engine.plan import Plan
from ..frameworks import deepspeed
from ..frameworks.base import is_a
from ..model.names import entries, module_paths
from ..stats import ClipStats
from .counting import Operations

Tensors = dict[str, Tensor]
Loss = Callable[[nn.Module], Tensor]


def full(tensor: Tensor) -> Tensor:
    """All of a plain tensor or DTensor, as a float64 copy on the CPU; a collective for DTensors."""
    from torch.distributed.tensor import DTensor

    tensor = tensor.detach()
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.to_dense().to("cpu", torch.float64, copy=True)


class Subject:
    """A sharded model whose gradients lie on its parameters: everything but DeepSpeed.

    ``loss`` runs the forward pass; without one, gradients are noise, spread as the layout spreads the parameters.
    """

    def __init__(self, model: nn.Module, loss: Loss | None = None) -> None:
        self.model, self.loss = model, loss
        self.clipper: Clipper | None = None

    def backward(self) -> None:
        self.model.zero_grad()
        if self.loss is not None:
            self.loss(self.model).backward()
            return
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = _noise_like(parameter)

    def tensors(self) -> tuple[Tensors, Tensors]:
        """Full weights and gradients of the trainable parameters by name; a gradient may be missing."""
        weights, grads = _flat_tensors(self.model)
        with _summoned(self.model):
            for entry in entries(self.model):
                tensor = entry.tensor
                if not tensor.requires_grad or entry.name in weights or getattr(tensor, "_is_flat_param", False):
                    continue
                weights[entry.name] = full(tensor)
                if tensor.grad is not None:
                    grads[entry.name] = full(tensor.grad)
        return weights, grads

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
        return self.tensors()[1]

    def dtypes(self) -> set[torch.dtype]:
        """Those of the gradients that are clipped."""
        return {p.dtype for p in self.model.parameters() if p.requires_grad}

    def plans(self) -> list[Plan]:
        assert self.clipper is not None
        return [self.clipper.execution().plan]

    def has_shares(self) -> bool:
        """Whether gradients come as shares of a sum, which clipping completes: that is sent beside what is planned."""
        placements = [getattr(p.grad, "placements", ()) for p in self.model.parameters()]
        return any(placement.is_partial() for found in placements for placement in found)

    def sent(self, config: AGCConfig) -> Operations:
        """What one more clipping sends; the first of a plan sends its agreement check too."""
        with Operations() as seen:
            self.clip(config)
        return seen


class ZeroSubject(Subject):
    """A DeepSpeed engine. Clipping runs inside its step: what the base optimizer holds is looked at there.

    Full tensors come from DeepSpeed's own interface, which knows nothing of how dist_agc reads its partitions.
    """

    def __init__(self, engine: Any, loss: Loss | None = None) -> None:
        super().__init__(engine, loss)
        self.engine, self.optimizers = engine, deepspeed.optimizers(engine)
        self.hook: Any = None
        self.seen = Operations()
        self._counting = ExitStack()
        self._kept: list[tuple[Tensor, Tensor]] = []  # what the base optimizer holds, and its gradient
        self._plans: list[Plan] = []  # of the last step, in which an optimizer may step several times

    def backward(self) -> None:
        if self.loss is not None:
            self.engine.backward(self.loss(self.engine))
            return
        parameters = [p for _, p in self._named()]
        backward_without_forward(self.engine, parameters, (_noise_like(p) for p in parameters))

    def _named(self) -> list[tuple[str, Any]]:
        return [(entry.name, entry.tensor) for entry in entries(self.engine.module) if entry.tensor.requires_grad]

    def _weights(self) -> Tensors:
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: full(p if (w := safe_get_full_fp32_param(p)) is None else w) for name, p in self._named()}

    def tensors(self) -> tuple[Tensors, Tensors]:
        from deepspeed.utils import safe_get_full_grad

        grads = {name: safe_get_full_grad(p) for name, p in self._named()}
        return self._weights(), {name: full(g) for name, g in grads.items() if g is not None}

    def clip(self, config: AGCConfig) -> ClipStats:
        from ..attach import attach

        def count(*_: Any) -> None:
            self._counting.enter_context(self.seen)

        for optimizer in self.optimizers:
            optimizer.register_step_pre_hook(count)
        self.hook = attach(self.engine, config=config)
        self._step()
        if not self.hook.stats:
            raise ValueError(
                "the engine's step did not come to its optimizer: expected finite gradients and a "
                "gradient_accumulation_steps of 1."
            )
        return self.hook.stats

    def hand_over(self, clip: Callable[[list[Tensor]], None]) -> None:
        for optimizer in self.optimizers:
            optimizer.register_step_pre_hook(lambda one, *_: clip(_held(one)))  # returns None, as a hook must
        self._step()

    def _step(self) -> None:
        def keep(optimizer: Optimizer, *_: Any) -> None:
            self._counting.close()
            held = _held(optimizer)
            self._kept += [(p, p.grad.clone()) for p in held if p.grad is not None]
            if self.hook is not None:
                self._plans.append(self.hook.clipper.execution(held).plan)

        self._plans = []
        last = [optimizer.register_step_pre_hook(keep) for optimizer in self.optimizers]
        self.engine.step()
        for handle in last:
            handle.remove()

    def clipped(self) -> Tensors:
        """What was kept, put together as DeepSpeed puts weights together: it takes their place for a moment."""
        weights = [holder.detach().clone() for holder, _ in self._kept]
        for holder, grad in self._kept:
            holder.detach().copy_(grad)
        found = self._weights()
        for (holder, _), weight in zip(self._kept, weights, strict=True):
            holder.detach().copy_(weight)
        return found

    def dtypes(self) -> set[torch.dtype]:
        return {grad.dtype for _, grad in self._kept}

    def plans(self) -> list[Plan]:
        return self._plans

    def sent(self, config: AGCConfig) -> Operations:
        self.seen = Operations()
        self.backward()
        self._step()
        return self.seen


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


def _held(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _flat_modules(model: nn.Module) -> list[nn.Module]:
    return [
        m for m in model.modules() if is_a(m, "FullyShardedDataParallel") and getattr(m, "_handle", None) is not None
    ]


def _summoned(model: nn.Module) -> Any:
    """FSDP1 with original parameters shows them whole, gradients too, inside of this context."""
    flat: list[Any] = _flat_modules(model)
    if not flat or not flat[0]._use_orig_params:
        return nullcontext()
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel.summon_full_params(model, writeback=False, with_grads=True)


def _flat_tensors(model: nn.Module) -> tuple[Tensors, Tensors]:
    """FSDP1 without original parameters: the flat tensors gathered, and cut where its metadata says."""
    weights: Tensors = {}
    grads: Tensors = {}
    paths = {id(module): path for path, module in module_paths(model)}
    modules: list[Any] = _flat_modules(model)
    for module in modules:
        flat, handle = module._handle.flat_param, module._handle
        if flat._params is not None:
            continue
        for source, found in ((flat, weights), (flat.grad, grads)):
            if source is None:
                continue
            whole = source.detach()
            if handle.uses_sharded_strategy:
                pieces = [torch.empty_like(whole) for _ in range(dist.get_world_size(handle.process_group))]
                dist.all_gather(pieces, whole, group=handle.process_group)
                whole = torch.cat(pieces)
            cuts = [*flat._numels_with_padding, whole.numel() - sum(flat._numels_with_padding)]
            parts = [p for p, pad in zip(whole.split(cuts), [*flat._is_padding_mask, True], strict=True) if not pad]
            for info, shape, part in zip(flat._param_infos, flat._shapes, parts, strict=True):
                path = paths[id(info.module)]
                found[f"{path}.{info.param_name}" if path else info.param_name] = full(part.view(shape))
    return weights, grads


def _noise_like(parameter: Tensor) -> Tensor:
    """Noise with units large and small. Equal on ranks that hold the same, which only the layout itself can tell."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    generator = torch.Generator().manual_seed(parameter.numel())

    def noise(shape: Iterable[int]) -> Tensor:
        shape = tuple(shape)
        spread = torch.randn(shape[:1] + (1,) * (len(shape) - 1), generator=generator).mul(2).exp()
        return torch.randn(shape, generator=generator) * spread

    if isinstance(parameter, DTensor):
        mesh, device = parameter.device_mesh, parameter.device
        return distribute_tensor(noise(parameter.shape).to(device, parameter.dtype), mesh, parameter.placements)
    return noise(parameter.shape).to(parameter.device, parameter.dtype)
