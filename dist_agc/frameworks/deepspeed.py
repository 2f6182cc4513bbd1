"""DeepSpeed: ZeRO 0 to 3, BF16_Optimizer and the FP16 optimizers, by the fp32 tensors that the base optimizer steps on.

ZeRO 1 and 2, BF16_Optimizer and FP16_Optimizer flatten a parameter group and cut the whole; ZeRO 3 cuts every parameter
by itself and lays the pieces of a sub-group side by side. Either way one rank holds one interval of each parameter.

All of one framework is in this one file, which is why it is longer than others.

Private to DeepSpeed and read here only, each checked when it is read: the lists of flat tensors and of parameters
below, ``_config.gradient_clipping``, ``clip_grad``, and the flags that say that a step goes another way.
"""

from __future__ import annotations

import itertools
import logging
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import AGCConfig, block_of, merged
from ..model.blocks import Axis
from ..model.names import Entry, entries, first_of
from ..model.parameter import LeftAlone, Parameter, Unknown
from . import autotp
from ._flat import ALONE, FlatInterval, Span
from ._names import Names
from .base import Attachment, Framework, group_axis, is_a, read

SUPPORTED = "DeepSpeed 0.16 to 0.19 (tested with 0.19.8)"
BLOCK = "adaptive_gradient_clipping"

_EXPERT = re.compile(r"(.*?deepspeed_experts\.)(\d+)(?=\.)")  # the name of a list of experts, and the place in it


_NOT_BY_MODULE = (
    "is sharded by DeepSpeed: pass the engine, dist_agc.attach(engine), so that clipping runs on the fp32 partitions "
    "inside engine.step()"
)


class DeepSpeed(Framework):
    wrapped = {"DeepSpeedEngine": "module", "PipelineEngine": "module"}

    def steps(self, model: object, optimizer: object = None) -> bool:
        return is_a(model, "DeepSpeedEngine")

    def pipeline(self, engine: Any) -> Any:
        return _read(engine, "grid").get_pipe_parallel_group() if is_a(engine, "PipelineEngine") else None

    def claim(self, model: nn.Module | None, entries: Sequence[Entry]) -> tuple[list[Parameter], list[Entry]]:
        mine = [entry for entry in entries if _spread_by_zero(entry.tensor)]
        # Looked at by `units`; clipped through the engine alone.
        found: list[Parameter] = [Unknown.of(e, _shape(e.tensor), problem=_NOT_BY_MODULE) for e in mine]
        return found, [entry for entry in entries if not _spread_by_zero(entry.tensor)]

    def attachment(
        self, engine: Any, optimizer: Any, config: AGCConfig | None, options: Mapping[str, Any]
    ) -> Attachment:
        """Settings are the block of the engine's JSON config, and ``config`` or ``options`` beside it.

        The option ``norm_clipping``: None switches off a ``gradient_clipping`` that the JSON does not mention and keeps
        one that it does, either with a warning. True keeps it, False switches it off, both silently.
        """
        if not any(optimizer is known for known in (None, engine.optimizer, engine.basic_optimizer)):
            raise TypeError("attach(engine) takes no optimizer: it clips in the step of the engine's own.")
        block = read_block(engine.config)
        if block is not None and not block.pop("enabled"):
            raise ValueError(
                f'the config says "{BLOCK}": {{"enabled": false}}: say true, or do not call attach. '
                "dist_agc.integrations.deepspeed.initialize obeys either."
            )
        options = dict(options)
        norm_clipping = options.pop("norm_clipping", None)
        settings = merged(block or {}, config, options, f'the DeepSpeed config\'s "{BLOCK}"')
        return _Engine(parameters(engine), optimizers(engine), settings, engine, norm_clipping)


def _spread_by_zero(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping")


def read_block(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The block of a DeepSpeed config, checked, with ``"enabled"``; None where there is none. Raises as `block_of`."""
    return block_of(config, BLOCK, "the DeepSpeed config")


@dataclass
class _Engine(Attachment):
    engine: Any
    norm_clipping: bool | None

    by_engine: ClassVar[bool] = True

    @property
    def options(self) -> Mapping[str, Any]:
        return {"norm_clipping": self.norm_clipping}

    def __post_init__(self) -> None:
        self._known = {id(p.tensor) for p in self.parameters}
        self._stepped_on = {id(p) for o in self.optimizers for group in o.param_groups for p in group["params"]}
        self._norm_clip, self._load = norm_clip(self.engine), self.engine.load_checkpoint

    def attached(self, hook: Any) -> None:
        """DeepSpeed's own default of 1.0 must not silently stack on AGC; what the user asked for stays."""
        keep = "gradient_clipping" in self.engine.config if self.norm_clipping is None else self.norm_clipping
        muon = [p.name for p in self.parameters if p.left_alone]
        if keep:
            steps = ", and shortens the steps of Muon" if muon else ""
            text = (
                f"gradient_clipping = {self._norm_clip} is kept, and clips the norm of all gradients before AGC sees "
                f'them{steps}; "gradient_clipping": 0.0 leaves the clipping to AGC.'
            )
        else:
            set_norm_clip(self.engine, 0.0)
            text = f"gradient_clipping is 0.0 instead of DeepSpeed's default {self._norm_clip}: AGC clips."
        if self.norm_clipping is None and self._norm_clip > 0:
            _say(text)
        if muon:
            others = any(p.trains and not p.left_alone for p in self.parameters)
            stage = is_a(self.engine, "PipelineEngine")  # where each stage has its own
            first = stage and not _read(self.engine, "grid").get_data_parallel_rank()
            where = " on this stage" if stage else ""
            clips = "AGC clips all others, and grad_norm is of these alone." if others else "AGC clips nothing here."
            _say(
                f"the {len(muon)} parameters of Muon{where} are left alone ({first_of(muon, 3)}): it orthogonalises "
                f"their gradients, whose lengths count for nothing then. {clips}",
                rank=dist.get_rank() if first else 0,
            )
        self.engine.load_checkpoint = self._load_checkpoint
        self.engine.agc = hook

    def _load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """``engine.load_checkpoint``, after which the norm to clip to is what it was, not what the checkpoint says."""
        settled = norm_clip(self.engine)
        try:
            return self._load(*args, **kwargs)
        finally:
            set_norm_clip(self.engine, settled)

    def step_is_over(self, clipped: Collection[tuple[Optimizer, Collection[object]]]) -> bool:
        """ZeRO 1 steps its groups one after the other."""
        return self._stepped_on <= {thing for _, what in clipped for thing in what}

    def before_clip(self, optimizer: Optimizer) -> None:
        """Raises RuntimeError where the optimizer holds a gradient that the engine did not have at ``attach``."""
        first, *second = self.optimizers
        for copies in second:  # ZeRO 3 makes their first group anew from the settings that Adam knows: no thresholds
            for group, copy in zip(first.param_groups, copies.param_groups, strict=True):
                if "clipping_threshold" in group:
                    copy["clipping_threshold"] = group["clipping_threshold"]
        for tensor in (p for group in optimizer.param_groups for p in group["params"]):
            if tensor.grad is not None and id(tensor) not in self._known:
                raise RuntimeError(
                    f"the optimizer steps on a tensor of shape {tuple(tensor.shape)} that AGC does not know, so it "
                    "would not be clipped: parameters were added or made anew after AGC was attached. Call "
                    "engine.agc.remove() and dist_agc.attach(engine) after such a change."
                )

    def removed(self) -> None:
        set_norm_clip(self.engine, self._norm_clip)
        self.engine.load_checkpoint = self._load
        self.engine.agc = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Partition(FlatInterval):
    """This rank's interval of one parameter in the fp32 tensor that the base optimizer steps on."""

    framework: ClassVar[str] = "DeepSpeed (fp32 partitions)"

    def local(self, tensor: Tensor) -> Tensor:
        flat = tensor.view(-1)
        if len(flat) < self.span.offset + self.span.numel:
            raise ValueError(
                f"the fp32 partition with parameter {self.name!r} is not in memory: it has {len(flat)} elements. Clip "
                "inside engine.step(), where DeepSpeed has brought it back, as dist_agc.attach(engine) does."
            )
        return flat


class _Whole(Parameter):
    framework: ClassVar[str] = "DeepSpeed (whole on every rank)"


def parameters(engine: Any) -> list[Parameter]:
    """The parameters of an engine, on the tensors that its base optimizer steps on.

    Raises ValueError for a way of training in which AGC would not reach every gradient, or would see something else.
    """
    if reason := _refused(engine):
        raise ValueError(f"AGC cannot be attached to this DeepSpeed engine: {reason}.")
    every = entries(engine.module)
    names, way = Names(every, _EXPERT, every), _WAYS.get(type(engine.optimizer).__name__, _plain)
    stepped, found = list(way(engine.optimizer)), []
    slices = _slices(engine, [parameter for parameter, *_ in stepped])
    for held in stepped:
        spread: Iterable[Parameter] = _spread(names, held) if slices is None else _sliced(names, held, *slices)
        if _of_muon(engine, held):
            spread = (LeftAlone.instead_of(p, "is stepped by Muon") for p in spread)
        found += spread
    # Frozen parameters are in no optimizer; they are listed so that patterns may name them.
    return found + [Partition.of(entry, _shape(entry.tensor), span=Span()) for entry in names.left.values()]


def optimizers(engine: Any) -> list[Optimizer]:
    """Those whose ``step`` the engine calls; not always ``engine.basic_optimizer``, since ZeRO remakes Adagrad."""
    if isinstance(engine.optimizer, Optimizer):
        return [engine.optimizer]
    inner = [_read(engine.optimizer, "optimizer")]
    if hasattr(engine.optimizer, "backup_optimizer"):  # ZeRO 3 with an offload ratio below 1: on the accelerator
        inner.append(engine.optimizer.backup_optimizer)
    return inner


def norm_clip(engine: Any) -> float:
    """The norm that DeepSpeed itself clips to; 0 is off."""
    return float(getattr(engine.optimizer, "clip_grad", engine.gradient_clipping()) or 0.0)


def set_norm_clip(engine: Any, value: float) -> None:
    _read(engine, "_config").gradient_clipping = value
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = value


def _say(text: str, rank: int = 0) -> None:
    """On one rank; a warning, since DeepSpeed's logger shows nothing below one unless it is told to."""
    import deepspeed

    deepspeed.utils.log_dist(f"dist_agc: {text}", ranks=[rank], level=logging.WARNING)  # pyright: ignore[reportCallIssue]


def _read(owner: Any, attribute: str) -> Any:
    import deepspeed

    return read(owner, attribute, "DeepSpeed", deepspeed.__version__, SUPPORTED)


def _refused(engine: Any) -> str | None:
    """Why the step goes another way, so that nothing is ever silently left unclipped; None where it does not."""
    optimizer = engine.optimizer
    kind = type(optimizer).__name__
    base = getattr(optimizer, "optimizer", optimizer)
    if optimizer is None or kind in ("DummyOptim", "DeepSpeedZeRoOffload") or type(base).__name__ == "DummyOptim":
        return "it has no optimizer: pass one to initialize, or name one in the config"
    if getattr(optimizer, "zenflow", False):
        return (
            "ZenFlow updates selected channels outside of the base optimizer's step: remove zero_optimization.zenflow"
        )
    if kind == "SuperOffloadOptimizer_Stage3":
        return "SuperOffload steps in another process: remove offload_optimizer.super_offload"
    if kind not in _WAYS and not isinstance(optimizer, Optimizer):
        return f"{kind} is not a way of stepping that dist_agc knows; supported is {SUPPORTED}"
    if not hasattr(base, "register_step_pre_hook"):
        return f"the base optimizer {type(base).__name__} takes no step hooks: derive it from torch.optim.Optimizer"
    if type(base).__module__.startswith("deepspeed.runtime.fp16.onebit"):
        return f"{type(base).__name__} exchanges compressed momenta instead of reducing gradients"
    if getattr(optimizer, "fused_adam_legacy", False) or getattr(optimizer, "fused_lamb_legacy", False):
        return (
            "the legacy fused fp16 step hands gradients past the parameters: set the optimizer's legacy_fusion to false"
        )
    if getattr(optimizer, "torch_autocast_gradscaler", None) is not None and not _norm_decides(optimizer):
        return (
            "each rank lets the GradScaler of torch_autocast in float16 decide by itself whether to step, so that one "
            "would wait for another: leave zero_optimization.compute_grad_norm on (DeepSpeed 0.19.8, whose ranks skip "
            "together then), or use bfloat16, or DeepSpeed's own fp16"
        )
    spread = (
        _tensor_ranks(engine) > 1
        or is_a(engine, "PipelineEngine")
        or any(not getattr(p, "allreduce", True) for p in engine.module.parameters())
    )
    if spread and getattr(engine, "torch_autocast_z0_gradscaler", None) is not None:
        return (
            "the GradScaler of torch_autocast in float16 is each rank's own without ZeRO, and ranks that hold "
            "different parameters (AutoTP, experts, stages of a pipeline) would not skip a step together: use ZeRO, or "
            "bfloat16"
        )
    mpu = engine.mpu
    if mpu is not None and not hasattr(mpu, "initialize_sequence_parallel") and _tensor_ranks(engine) < 2:
        # In the grid of a pipeline the stages are model-parallel too.
        if getattr(mpu, "get_slice_parallel_world_size", mpu.get_model_parallel_world_size)() > 1:
            return "the tensor parallelism of an mpu of your own does not say how it cuts a row: use DeepSpeed's AutoTP"
    return None


def _tensor_ranks(engine: Any) -> int:
    """Ranks over which AutoTP cuts; 0 in versions without it."""
    return getattr(engine, "autotp_size", int)()


def _norm_decides(optimizer: Any) -> bool:
    """Whether ZeRO skips a step by the norm of all gradients, the same on every rank, before a GradScaler looks at its
    own. Where that norm is finite, so are all gradients."""
    if not hasattr(sys.modules[type(optimizer).__module__], "is_invalid_grad_norm"):
        return False  # an older version
    if type(optimizer).__name__ == "DeepSpeedZeroOptimizer_Stage3":
        return True
    checked = _read(optimizer, "dtype") != torch.bfloat16 or _read(optimizer, "check_grad_overflow")
    return _read(optimizer, "compute_grad_norm") and checked


def _of_muon(engine: Any, held: _Held) -> bool:
    """Whether Muon steps this parameter, so that the base optimizer gets an orthogonalised update for a gradient.

    Without ZeRO it makes that in its step, out of the gradient, whose length it drops.
    """
    parameter, tensor, *_ = held
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    groups = [group for group in base.param_groups if group.get("use_muon", False)]
    # ZeRO 3 puts what a group steps on into it in the step alone.
    return bool(groups) and (
        getattr(parameter, "use_muon", False) or any(tensor is p for group in groups for p in group["params"])
    )


def _taken(names: Names, parameter: Tensor) -> Entry:
    missing = f"the optimizer holds a parameter of shape {_shape(parameter)} that is not in the engine's module."
    return names.take(parameter, missing)


def _shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


# A parameter; the tensor that holds this rank's part of it; which part that is, None where the tensor is the whole of
# it; the ranks that hold the other parts, None where every data-parallel rank holds all of it.
_Held = tuple[Tensor, Tensor, Span | None, Axis | None]


def _spread(names: Names, held: _Held) -> Iterator[Parameter]:
    """What this rank steps on of one parameter.

    An expert of another expert-parallel rank is a parameter of its own. Every rank lists all of them, those of other
    ranks with nothing in them: they are cut alike, so one collective over the data-parallel ranks serves every expert
    and the statistics cover all of them.
    """
    parameter, tensor, span, axis = held
    entry, shape = _taken(names, parameter), _shape(parameter)
    # Layers that are tied across stages of a pipeline: the first stage that has them counts them.
    tied = getattr(parameter, "ds_pipe_replicated", False)
    if getattr(parameter, "allreduce", True):  # no expert
        if span is None:
            yield _Whole.of(entry, shape, tensor=tensor, counted_elsewhere=tied)
        else:
            yield Partition.of(entry, shape, tensor=tensor, span=span, axis=axis or ALONE, counted_elsewhere=tied)
        return
    from deepspeed.utils import groups

    span = span or Span(0, tensor.numel())
    experts = group_axis(_read(groups, "_get_expert_parallel_group")(_read(parameter, "group_name")))
    for rank in range(experts.size):
        here = span if rank == experts.rank else Span(bounds=span.bounds)
        known = names.expert(entry, rank) if experts.size > 1 else entry
        yield Partition.of(known, shape, tensor=tensor, span=here, axis=axis or experts)


# The tensor-parallel ranks; by ``id`` what this one holds of a parameter, or why that cannot be told; whether these are
# aligned, as `interval` has it.
_Slices = tuple[Axis, Mapping[int, autotp.Slice | str], bool]


def _slices(engine: Any, parameters: Sequence[Tensor]) -> _Slices | None:
    """None where AutoTP cuts nothing."""
    if _tensor_ranks(engine) < 2:
        return None
    from deepspeed.utils import groups

    axis = group_axis(_read(groups, "get_tensor_model_parallel_group")())
    slices = {id(p): autotp.slice_of(p, _shape(p), axis.rank) for p in parameters}
    # Where a rank has less of one parameter, all that lies behind it in the flat tensor is cut elsewhere.
    return axis, slices, all(not isinstance(one, str) and one.even for one in slices.values())


def _sliced(
    names: Names, held: _Held, over: Axis, slices: Mapping[int, autotp.Slice | str], aligned: bool
) -> Iterator[Parameter]:
    """`_spread` under AutoTP."""
    parameter, tensor, span, axis = held
    entry, part = _taken(names, parameter), slices[id(parameter)]
    if not getattr(parameter, "allreduce", True):
        part = "is an expert under AutoTP, which dist_agc does not know. Exclude it"
    if isinstance(part, str):
        yield Unknown.of(entry, _shape(parameter), tensor=tensor, problem=part)
    elif part.dim is not None:
        yield autotp.Sliced.of(
            entry,
            part.shape,
            tensor=tensor,
            span=span or Span(0, tensor.numel()),
            axis=axis or ALONE,
            across=((over, part.dim),),
            sliced=part.sliced,
            slice=part,
            aligned=aligned,
        )
    elif span is None:
        yield _Whole.of(entry, part.shape, tensor=tensor, copies=(over,))
    else:
        where: dict[str, Any] = {"span": span, "axis": axis or ALONE, "copies": (over,), "aligned": aligned}
        yield Partition.of(entry, part.shape, tensor=tensor, **where)


def _partitions(groups: str, flats: str, optimizer: Any) -> Iterator[_Held]:
    """Groups of parameters laid end to end, padded, and cut into one partition a rank."""
    axis = group_axis(_read(optimizer, "dp_process_group"))
    cut_over = _read(optimizer, "real_dp_process_group")  # experts have fewer data-parallel ranks
    for i, (group, flat) in enumerate(zip(_read(optimizer, groups), _read(optimizer, flats), strict=True)):
        index, starts = group_axis(cut_over[i]).rank, [0, *itertools.accumulate(p.numel() for p in group)][:-1]
        if hasattr(optimizer, "round_robin_bit16_offsets"):  # parameters may be aligned, with padding between them
            starts = optimizer.round_robin_bit16_offsets[i]
        for parameter, at in zip(group, starts, strict=True):
            yield parameter, flat, Span.cut(parameter.numel(), at, flat.numel(), index), axis


def _stage_3(optimizer: Any) -> Iterator[_Held]:
    every, flats = group_axis(_read(optimizer, "dp_process_group")), _read(optimizer, "fp32_partitioned_groups_flat")
    for group, flat in zip(_read(optimizer, "fp16_groups"), flats, strict=True):
        base = 0
        for parameter in group:
            axis = group_axis(_read(parameter, "ds_process_group"))
            size = _read(parameter, "partition_numel")()
            span = Span.cut(_read(parameter, "ds_numel"), 0, size, axis.rank, base)
            # An expert is cut over the ranks that hold it, and known to all (see `_spread`).
            yield parameter, flat, span, axis if getattr(parameter, "allreduce", True) else every
            base += size


def _fp16_fused(optimizer: Any) -> Iterator[_Held]:
    for group, flat in zip(_read(optimizer, "fp16_groups"), _read(optimizer, "fp32_groups_flat"), strict=True):
        at = 0
        for parameter in group:
            yield parameter, flat, Span(0, parameter.numel(), at), None
            at += parameter.numel()


def _fp16_unfused(optimizer: Any) -> Iterator[_Held]:
    for group, masters in zip(_read(optimizer, "fp16_groups"), _read(optimizer, "fp32_groups"), strict=True):
        yield from ((parameter, master, None, None) for parameter, master in zip(group, masters, strict=True))


def _plain(optimizer: Any) -> Iterator[_Held]:
    return ((parameter, parameter, None, None) for group in optimizer.param_groups for parameter in group["params"])


_WAYS: dict[str, Callable[[Any], Iterator[_Held]]] = {
    # Not param._hp_mapping: with round-robin gradients it keeps the order of the group, which is not that of the flat.
    "DeepSpeedZeroOptimizer": partial(_partitions, "round_robin_bit16_groups", "single_partition_of_fp32_groups"),
    "DeepSpeedZeroOptimizer_Stage3": _stage_3,
    "BF16_Optimizer": partial(_partitions, "bf16_groups", "fp32_groups_flat_partition"),
    "FP16_Optimizer": _fp16_fused,
    "FP16_UnfusedOptimizer": _fp16_unfused,
}
