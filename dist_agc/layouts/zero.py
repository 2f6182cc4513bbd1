"""DeepSpeed: ZeRO 0 to 3, BF16_Optimizer and the FP16 optimizers, by the fp32 tensors that the base optimizer steps on.

ZeRO 1 and 2, BF16_Optimizer and FP16_Optimizer flatten a parameter group and cut the whole; ZeRO 3 cuts every parameter
by itself and lays the pieces of a sub-group side by side. Either way one rank holds one interval of each parameter.

Private to DeepSpeed and read here only, each checked when it is read: the lists of flat tensors and of parameters
below, ``_config.gradient_clipping``, ``clip_grad``, and the flags that say that a step goes another way.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..fragments import Axis, Pieces, excluded, interval
from ..names import Named, named_parameters
from ..units import UnitRule
from . import Placed, group_axis
from .replicated import Replicated

SUPPORTED = "DeepSpeed 0.19 (tested with 0.19.8)"

_EXPERT = re.compile(r"(?<=deepspeed_experts\.)\d+(?=\.)")


@dataclass(frozen=True)
class _Interval:
    """The elements [start, stop) of a parameter, from ``offset`` on in their holder, ``bounds`` between ranks."""

    start: int = 0
    stop: int = 0
    offset: int = 0
    bounds: range = range(0)


@dataclass(frozen=True, eq=False)
class FlatPartition:
    """This rank's interval of one parameter, inside the tensor that the base optimizer steps on.

    Args:
        name: the parameter's name, for errors.
        shape: of the whole parameter; DeepSpeed flattens it row by row.
        holder: what the base optimizer holds.
        part: the interval; maybe empty.
        axis: the ranks that hold the other intervals; None where there are none.
    """

    name: str
    shape: tuple[int, ...]
    holder: Tensor
    part: _Interval
    axis: Axis | None = None

    def local(self, tensor: Tensor) -> Tensor:
        flat = tensor.view(-1)
        if len(flat) < self.part.offset + self.part.stop - self.part.start:
            raise ValueError(
                f"the fp32 partition with parameter {self.name!r} is not in memory: it has {len(flat)} elements. Clip "
                "inside engine.step(), where DeepSpeed has brought it back, as dist_agc.attach(engine) does."
            )
        return flat

    def pieces(self, rule: UnitRule | None) -> Pieces:
        part, axis = self.part, self.axis or Axis((0,), 0)
        if rule is None:
            return excluded(1, (axis,), (part.offset, part.stop - part.start))
        return interval(rule, part.start, part.stop, part.offset, part.bounds, axis)


def place(engine: Any) -> list[Placed]:
    """The parameters of a DeepSpeed engine, on the tensors that its base optimizer steps on.

    Raises:
        ValueError: a way of training in which AGC would not reach every gradient, or would see something else.
        RuntimeError: a DeepSpeed whose insides are not the known ones.
    """
    _refuse(engine)
    optimizer = engine.optimizer
    names = _Names(engine)
    placed = list(_PLACES.get(type(optimizer).__name__, _plain)(names, optimizer))
    # Frozen parameters are in no optimizer; they are listed so that patterns may name them.
    held = {id(entry.named.parameter) for entry in placed}
    rest = [n for n in names.all if id(n.parameter) not in held]
    return placed + [Placed(n, FlatPartition(n.name, _shape(n.parameter), n.parameter, _Interval())) for n in rest]


def optimizers(engine: Any) -> list[Optimizer]:
    """Those whose ``step`` the engine calls; not always ``engine.basic_optimizer``, since ZeRO remakes Adagrad."""
    if isinstance(engine.optimizer, Optimizer):
        return [engine.optimizer]
    inner = [_read(engine.optimizer, "optimizer")]
    if hasattr(engine.optimizer, "backup_optimizer"):  # ZeRO 3 with an offload ratio below 1: on the accelerator
        inner.append(engine.optimizer.backup_optimizer)
    return inner


def pass_thresholds_on(engine: Any) -> None:
    """Thresholds that parameter groups have now, for the groups of ZeRO 3's second optimizer: its first group is made
    anew, from the settings that Adam knows."""
    second = getattr(engine.optimizer, "backup_optimizer", None)
    if second is None:
        return
    for group, copy in zip(engine.optimizer.optimizer.param_groups, second.param_groups, strict=True):
        if "clipping_threshold" in group:
            copy["clipping_threshold"] = group["clipping_threshold"]


def norm_clip(engine: Any) -> float:
    """The norm that DeepSpeed itself clips to; 0 is off."""
    return float(getattr(engine.optimizer, "clip_grad", engine.gradient_clipping()) or 0.0)


def set_norm_clip(engine: Any, value: float) -> None:
    _read(engine, "_config").gradient_clipping = value
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = value


def _read(owner: Any, attribute: str) -> Any:
    """A private attribute of DeepSpeed."""
    try:
        return getattr(owner, attribute)
    except AttributeError:
        import deepspeed

        raise RuntimeError(
            f"dist_agc reads {type(owner).__name__}.{attribute}, which DeepSpeed {deepspeed.__version__} does not "
            f"have; supported is {SUPPORTED}."
        ) from None


def _refuse(engine: Any) -> None:
    """Raise ValueError where the step goes another way, so that nothing is ever silently left unclipped."""
    optimizer = engine.optimizer
    kind = type(optimizer).__name__
    base = getattr(optimizer, "optimizer", optimizer)
    if "PipelineEngine" in [k.__name__ for k in type(engine).__mro__]:
        reason = "pipeline parallelism is not supported: a stage knows nothing of the other stages' units"
    elif optimizer is None or kind in ("DummyOptim", "DeepSpeedZeRoOffload") or type(base).__name__ == "DummyOptim":
        reason = "it has no optimizer: pass one to initialize, or name one in the config"
    elif getattr(optimizer, "zenflow", False):
        reason = (
            "ZenFlow updates selected channels outside of the base optimizer's step: remove zero_optimization.zenflow"
        )
    elif kind == "SuperOffloadOptimizer_Stage3":
        reason = "SuperOffload steps in another process: remove offload_optimizer.super_offload"
    elif kind not in _PLACES and not isinstance(optimizer, Optimizer):
        reason = f"{kind} is not a way of stepping that dist_agc knows; supported is {SUPPORTED}"
    elif not hasattr(base, "register_step_pre_hook"):
        reason = f"the base optimizer {type(base).__name__} takes no step hooks: derive it from torch.optim.Optimizer"
    elif type(base).__module__.startswith("deepspeed.runtime.fp16.onebit"):
        reason = f"{type(base).__name__} exchanges compressed momenta instead of reducing gradients"
    elif any(group.get("use_muon", False) for group in base.param_groups):
        reason = "Muon hands the base optimizer orthogonalised updates, which are no gradients"
    elif getattr(optimizer, "fused_adam_legacy", False) or getattr(optimizer, "fused_lamb_legacy", False):
        reason = (
            "the legacy fused fp16 step hands gradients past the parameters: set the optimizer's legacy_fusion to false"
        )
    elif getattr(optimizer, "torch_autocast_gradscaler", None) is not None:
        reason = (
            "the GradScaler of torch_autocast in float16 lets each rank decide by itself whether to step, so that one "
            "would wait for another: use bfloat16, or DeepSpeed's own fp16"
        )
    elif _tensor_parallel(engine):
        reason = "tensor parallelism under DeepSpeed is not supported: its shards do not say how they cut a row"
    elif any(getattr(p, "ds_zero_placement_family", None) == "autoep_expert" for p in engine.module.parameters()):
        reason = "AutoEP experts under ZeRO 3 are not supported: use ZeRO 1 or 2"
    else:
        return
    raise ValueError(f"AGC cannot be attached to this DeepSpeed engine: {reason}.")


def _tensor_parallel(engine: Any) -> bool:
    mpu = engine.mpu
    if mpu is None or hasattr(mpu, "initialize_sequence_parallel"):
        return getattr(engine, "autotp_size", int)() > 1
    return mpu.get_model_parallel_world_size() > 1


class _Names:
    """The parameters of an engine's module by identity, and experts under names of their own."""

    def __init__(self, engine: Any) -> None:
        self.all = named_parameters(engine.module)
        self._by_id = {id(n.parameter): n for n in self.all}
        self._local: dict[str, int] = {}  # experts that this rank holds, by the name of their list
        for found in filter(None, (_EXPERT.search(n.name) for n in self.all)):
            prefix = found.string[: found.start()]
            self._local[prefix] = max(self._local.get(prefix, 0), int(found.group()) + 1)

    def __getitem__(self, parameter: Tensor) -> Named:
        if id(parameter) not in self._by_id:
            raise ValueError(
                f"the optimizer holds a parameter of shape {_shape(parameter)} that is not in the engine's module."
            )
        return self._by_id[id(parameter)]

    def expert(self, named: Named, expert_rank: int) -> Named:
        """The parameter that an expert-parallel rank has where this rank has ``named``."""

        def rename(name: str) -> str:
            found = _EXPERT.search(name)
            if found is None:
                return f"{name}@{expert_rank}"
            number = self._local[name[: found.start()]] * expert_rank + int(found.group())
            return f"{name[: found.start()]}{number}{name[found.end() :]}"

        return Named(tuple(map(rename, named.names)), named.parameter, named.owner)


def _is_expert(parameter: Tensor) -> bool:
    return not getattr(parameter, "allreduce", True)


def _shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _cut(numel: int, at: int, size: int, index: int, base: int = 0) -> _Interval:
    """What the partition ``index`` has of ``numel`` elements that begin at element ``at`` of something cut into
    partitions of ``size``; the partition begins at element ``base`` of the holder."""
    first = size * index - at
    start = min(max(first, 0), numel)
    stop = max(min(first + size, numel), start)
    return _Interval(start, stop, base + start - first if stop > start else 0, range(size - at, numel, max(size, 1)))


def _spread(names: _Names, parameter: Tensor, holder: Tensor, part: _Interval, axis: Axis | None) -> Iterator[Placed]:
    """One parameter; ``axis`` is None where every data-parallel rank has all of it.

    An expert of another expert-parallel rank is a parameter of its own. Every rank lists all of them, those of other
    ranks with nothing in them: they are cut alike, so one collective over the data-parallel ranks serves every expert
    and the statistics cover all of them.
    """
    named, shape, none = names[parameter], _shape(parameter), _Interval(0, 0, 0, part.bounds)
    if not _is_expert(parameter):
        yield Placed(named, FlatPartition(named.name, shape, holder, part, axis))
        return
    from deepspeed.utils import groups

    expert_parallel = group_axis(_read(groups, "_get_expert_parallel_group")(_read(parameter, "group_name")))
    for rank in range(expert_parallel.size):
        expert = names.expert(named, rank)
        here = part if rank == expert_parallel.rank else none
        yield Placed(expert, FlatPartition(expert.name, shape, holder, here, axis or expert_parallel))


def _partitions(names: _Names, optimizer: Any, groups: str, flats: str) -> Iterator[Placed]:
    """Groups of parameters laid end to end, padded, and cut into one partition a rank."""
    axis = group_axis(_read(optimizer, "dp_process_group"))
    cut_over = _read(optimizer, "real_dp_process_group")  # experts have fewer data-parallel ranks
    for i, (parameters, flat) in enumerate(zip(_read(optimizer, groups), _read(optimizer, flats), strict=True)):
        index = group_axis(cut_over[i]).rank
        for parameter, at in zip(parameters, _offsets(optimizer, i, parameters), strict=True):
            part = _cut(parameter.numel(), at, flat.numel(), index)
            yield from _spread(names, parameter, flat, part, axis)


def _offsets(optimizer: Any, group: int, parameters: list[Tensor]) -> list[int]:
    if hasattr(optimizer, "round_robin_bit16_offsets"):  # parameters may be aligned, with padding between them
        return optimizer.round_robin_bit16_offsets[group]
    return [0, *itertools.accumulate(p.numel() for p in parameters)][:-1]


def _stage_1_and_2(names: _Names, optimizer: Any) -> Iterator[Placed]:
    # Not param._hp_mapping: with round-robin gradients it keeps the order of the group, which is not that of the flat.
    return _partitions(names, optimizer, "round_robin_bit16_groups", "single_partition_of_fp32_groups")


def _bf16(names: _Names, optimizer: Any) -> Iterator[Placed]:
    return _partitions(names, optimizer, "bf16_groups", "fp32_groups_flat_partition")


def _stage_3(names: _Names, optimizer: Any) -> Iterator[Placed]:
    for parameters, flat in zip(
        _read(optimizer, "fp16_groups"), _read(optimizer, "fp32_partitioned_groups_flat"), strict=True
    ):
        base = 0
        for parameter in parameters:
            axis = group_axis(_read(parameter, "ds_process_group"))
            size = _read(parameter, "partition_numel")()
            part = _cut(_read(parameter, "ds_numel"), 0, size, axis.rank, base)
            base += size
            yield from _spread(names, parameter, flat, part, axis)


def _fp16_fused(names: _Names, optimizer: Any) -> Iterator[Placed]:
    for parameters, flat in zip(_read(optimizer, "fp16_groups"), _read(optimizer, "fp32_groups_flat"), strict=True):
        at = 0
        for parameter in parameters:
            yield from _spread(names, parameter, flat, _cut(parameter.numel(), at, flat.numel(), 0), None)
            at += parameter.numel()


def _fp16_unfused(names: _Names, optimizer: Any) -> Iterator[Placed]:
    for parameters, masters in zip(_read(optimizer, "fp16_groups"), _read(optimizer, "fp32_groups"), strict=True):
        for parameter, master in zip(parameters, masters, strict=True):
            yield from _whole(names, parameter, master)


def _plain(names: _Names, optimizer: Any) -> Iterator[Placed]:
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        yield from _whole(names, parameter, parameter)


def _whole(names: _Names, parameter: Tensor, holder: Tensor) -> Iterator[Placed]:
    if _is_expert(parameter):
        yield from _spread(names, parameter, holder, _cut(holder.numel(), 0, holder.numel(), 0), None)
    else:
        yield Placed(names[parameter], Replicated(holder))


_PLACES = {
    "DeepSpeedZeroOptimizer": _stage_1_and_2,
    "DeepSpeedZeroOptimizer_Stage3": _stage_3,
    "BF16_Optimizer": _bf16,
    "FP16_Optimizer": _fp16_fused,
    "FP16_UnfusedOptimizer": _fp16_unfused,
}
