"""Megatron-core: what the torch optimizers inside of its own step on, whole parameters or the distributed optimizer's.

Megatron slices a parameter over tensor-parallel ranks and says so by tags (``tensor_model_parallel``,
``partition_dim``). The distributed optimizer lays what is left into buckets, each of which is cut into one piece a
data-parallel rank: one rank holds one interval of each slice. Experts (``allreduce=False``) have groups of their own.

All of one framework is in this one file, which is why it is longer than others.

Private to Megatron and read here only, each checked when it is read: the lists of parameters below, the places in the
buffers (``param_index_map``, ``buckets``), ``clip_grad``, and what says that a step goes another way.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import AGCConfig
from ..engine.collectives import exchange
from ..model.blocks import Axis
from ..model.names import Entry, entries, first_of
from ..model.parameter import Parameter, Unknown
from ._flat import ALONE, FlatInterval, Span
from ._names import Names
from .base import Attachment, Framework, group_axis, is_a, read

SUPPORTED = "megatron-core 0.16 (tested with 0.16.1)"

_EXPERT = re.compile(r"(.*?local_experts\.)(\d+)(?=\.)")  # the name of a list of experts, and the place in it
_LAYER = re.compile(r"(.*\.|)(\d+)$")  # the path of a layer in a list
_CUTTING = ("ColumnParallelLinear", "RowParallelLinear", "VocabParallelEmbedding")

_NOT_BY_MODULE = (
    "is tensor-parallel by Megatron's tags, and nothing here says over which ranks: pass Megatron's optimizer, "
    "dist_agc.attach(model_chunks, megatron_optimizer), after parallel_state.initialize_model_parallel. Or exclude it"
)
_UNTAGGED = (
    "is in a tensor-parallel layer that was made without tags (perform_initialization=False), so Megatron itself takes "
    "it for whole: call tensor_parallel.set_tensor_model_parallel_attributes on it, or exclude it"
)
_UNEVEN_EXPERTS = (
    "is an expert whose tensor-parallel size is neither 1 nor that of other layers: no process group has all ranks "
    "that share these experts. Choose another expert_tensor_parallel_size, or exclude the experts"
)


class Megatron(Framework):
    wrapped = {"Float16Module": "module"}  # its DistributedDataParallel is called like torch's, and keeps the same name

    def steps(self, model: object, optimizer: object = None) -> bool:
        given = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
        return any(is_a(one, "MegatronOptimizer") for one in given)

    def claim(self, model: nn.Module | None, entries: Sequence[Entry]) -> tuple[list[Parameter], list[Entry]]:
        # Looked at by `units`; clipped with Megatron's optimizer alone, unless the groups say that nothing is cut.
        found: list[Parameter] = []
        left = []
        for entry in entries:
            group = _tensor_group(entry) if _tagged(entry.tensor) else None
            if not _tagged(entry.tensor) or (group is not None and dist.get_world_size(group) == 1):
                left.append(entry)
            else:
                shape = _shape(entry.tensor, 1 if group is None else dist.get_world_size(group))
                found.append(Unknown.of(entry, shape, problem=_NOT_BY_MODULE))
        return found, left

    def pipeline(self, engine: Any) -> Any:
        return _Groups(_chunks(engine)).find("pp_group", "get_pipeline_model_parallel_group")

    def attachment(
        self, engine: Any, optimizer: Any, config: AGCConfig | None, options: Mapping[str, Any]
    ) -> Attachment:
        """The option ``norm_clipping``: None keeps a ``clip_grad`` above 0 with a warning, True keeps it silently,
        False switches it off."""
        chunks = _chunks(engine)
        if not chunks or not all(isinstance(chunk, nn.Module) for chunk in chunks):
            raise TypeError(
                "with Megatron's optimizer, attach takes the list of model chunks that get_model returned, or one "
                f"module; got {engine if not chunks else [type(chunk).__name__ for chunk in chunks]}."
            )
        inner = list(_inner(optimizer))
        if reason := _refused(chunks, inner):
            raise ValueError(f"AGC cannot be attached to this Megatron optimizer: {reason}.")
        options = dict(options)
        norm_clipping = options.pop("norm_clipping", None)
        settings = AGCConfig.of(config, options)
        stepping, model = [one for one in inner if one.optimizer is not None], _Model(chunks)
        stages = self.pipeline(chunks)
        if not stepping and stages is not None and stages.size() > 1:
            raise ValueError(
                "nothing trains on this stage of Megatron's pipeline, so it has no step in which the others could meet "
                "it: attach with more than one stage wants something to train on each."
            )
        beside: dict[Optimizer, list[list[Tensor]]] = {}
        found = [p for one in stepping for p in _parameters(model, one, beside)]
        if missed := [e.name for e in model.names.left.values() if e.tensor.requires_grad]:
            warnings.warn(
                f"none of the optimizers given steps {first_of(map(repr, missed), 3)}, which train: if another does, "
                "their gradients are not clipped. Pass the whole optimizer that get_megatron_optimizer returned.",
                UserWarning,
                stacklevel=4,
            )
        # Frozen parameters are in no optimizer; they are listed so that patterns may name them.
        found += [Piece.of(e, model.shape(e), span=Span(), stepped=False) for e in model.names.left.values()]
        return _Attachment(found, [one.optimizer for one in stepping], settings, inner, beside, norm_clipping)


@dataclass
class _Attachment(Attachment):
    """``beside``: by optimizer and the number of the group, tensors without elements, for the parameters of which other
    data-parallel ranks hold everything."""

    inner: Sequence[Any]
    beside: Mapping[Optimizer, Sequence[Sequence[Tensor]]]
    norm_clipping: bool | None

    by_engine: ClassVar[bool] = True

    @property
    def options(self) -> Mapping[str, Any]:
        return {"norm_clipping": self.norm_clipping}

    def __post_init__(self) -> None:
        self._known = {id(p.tensor) for p in self.parameters}
        self._configs = list({id(one.config): one.config for one in self.inner}.values())
        self._norms = [float(_read(config, "clip_grad") or 0.0) for config in self._configs]

    def attached(self, hook: Any) -> None:
        """Megatron's own default of 1.0 must not silently stack on AGC; it stays unless the user says otherwise."""
        if self.norm_clipping is False:
            for config in self._configs:
                config.clip_grad = 0.0
        elif self.norm_clipping is None and max(self._norms, default=0.0) > 0 and dist.get_rank() == 0:
            logging.getLogger("dist_agc").warning(
                "Megatron's clip_grad = %s is kept, and clips the norm of all gradients before AGC sees them; "
                "clip_grad = 0.0 leaves the clipping to AGC.",
                max(self._norms),
            )

    def groups(self, optimizer: Optimizer) -> Sequence[Mapping[str, Any]]:
        beside = self.beside.get(optimizer, [[]] * len(optimizer.param_groups))
        pairs = zip(optimizer.param_groups, beside, strict=True)
        return [{**group, "params": [*group["params"], *more]} for group, more in pairs]

    def before_clip(self, optimizer: Optimizer) -> None:
        """Raises RuntimeError where the optimizer holds a gradient that it did not have at ``attach``."""
        for tensor in (p for group in optimizer.param_groups for p in group["params"]):
            if id(tensor) not in self._known and tensor.grad is not None:
                raise RuntimeError(
                    f"Megatron's optimizer steps on a tensor of shape {tuple(tensor.shape)} that AGC does not know, so "
                    "it would not be clipped: call .remove() on the handle, and attach again after such a change."
                )

    def removed(self) -> None:
        for config, norm in zip(self._configs, self._norms, strict=True):
            if self.norm_clipping is False and config.clip_grad == 0.0:  # nobody has changed it since
                config.clip_grad = norm


@dataclass(frozen=True, eq=False, kw_only=True)
class Piece(FlatInterval):
    """This rank's interval of one parameter, or of its tensor-parallel slice, in the tensor that is stepped.

    ``stepped``: whether an optimizer has it. Its tensor need not require gradients then: it may be a copy, or have no
    elements.
    """

    stepped: bool = True

    framework: ClassVar[str] = "Megatron-core"

    @property
    def trains(self) -> bool:
        return self.stepped or super().trains


def _chunks(engine: Any) -> list[Any]:
    return list(engine) if isinstance(engine, list | tuple) else [engine]


def _inner(optimizer: Any) -> Iterator[Any]:
    """The optimizers around one torch optimizer each."""
    if isinstance(optimizer, list | tuple):
        for one in optimizer:
            yield from _inner(one)
    elif type(optimizer).__name__ == "ChainedOptimizer":
        yield from _inner(_read(optimizer, "chained_optimizers"))
    else:
        yield optimizer


def _refused(chunks: Sequence[nn.Module], inner: Sequence[Any]) -> str | None:
    """Why the step goes another way, so that nothing is ever silently left unclipped; None where it does not."""
    for chunk in chunks:
        if getattr(getattr(chunk, "ddp_config", None), "use_megatron_fsdp", False) or is_a(
            chunk, "FullyShardedDataParallel", "TorchFullyShardedDataParallel"
        ):
            return (
                f"a {type(chunk).__name__} shards parameters in a way that dist_agc does not know under Megatron: use "
                "its DistributedDataParallel, with use_distributed_optimizer"
            )
    for one in inner:
        kind = type(one).__name__
        if kind == "LayerWiseDistributedOptimizer":
            return (
                "the LayerWiseDistributedOptimizer gives whole parameters to single ranks, which dist_agc does not "
                "know: use the distributed optimizer, or none"
            )
        if kind not in _WAYS:
            return f"{kind} is not an optimizer of Megatron that dist_agc knows; supported is {SUPPORTED}"
        if one.optimizer is None:
            continue
        if is_a(one.optimizer, "HybridDeviceOptimizer"):
            return "the HybridDeviceOptimizer steps on copies on the CPU: switch optimizer_cpu_offload off, to have AGC"
        if _read(one.config, "use_precision_aware_optimizer_no_fp8_or_ds_fp8"):
            return (
                "the precision-aware optimizer steps on gradients (decoupled_grad) beside its parameters: switch "
                "use_precision_aware_optimizer off"
            )
        if not hasattr(one.optimizer, "_optimizer_step_pre_hooks"):
            return f"its {type(one.optimizer).__name__} takes no step hooks: derive it from torch.optim.Optimizer"
    return None


# ------------------------------------------------------------------------------------------------------- what is cut


def _tagged(tensor: Tensor) -> bool:
    return bool(getattr(tensor, "tensor_model_parallel", False))


def _expert(tensor: Tensor) -> bool:
    """Whether it is one of the experts that expert-parallel ranks share."""
    return not getattr(tensor, "allreduce", True)


def _tensor_group(entry: Entry, given: Any = None) -> Any:
    """The tensor-parallel group of a parameter: its module's own, the one ``given``, Megatron's; None: no such."""
    own = getattr(entry.owners[0][0], "tp_group", None) if entry.owners else None
    if isinstance(own, dist.ProcessGroup):
        return own
    if given is not None and not _expert(entry.tensor):
        return given
    state = sys.modules.get("megatron.core.parallel_state")
    if state is None:
        return None
    kind = "expert_tensor" if _expert(entry.tensor) else "tensor_model"
    return getattr(state, f"get_{kind}_parallel_group")(check_initialized=False)


def _shape(tensor: Tensor, size: int) -> tuple[int, ...]:
    """Of the whole parameter, over so many tensor-parallel ranks."""
    shape = list(tensor.shape)
    if _tagged(tensor):
        shape[tensor.partition_dim] *= size  # pyright: ignore[reportAttributeAccessIssue]
    return tuple(shape)


class _Groups:
    """The process groups of model chunks."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        self.chunks = chunks

    def find(self, attribute: str, getter: str, **options: Any) -> Any:
        """A process group by the name that DistributedDataParallel has for it, or from ``parallel_state``; or None."""
        from megatron.core import parallel_state

        try:
            own = getattr(next(iter(self.chunks), None), attribute, None)
            return getattr(parallel_state, getter)(**options) if own is None else own
        except AssertionError:  # not initialised
            return None

    def axis(self, attribute: str, getter: str, **options: Any) -> Axis:
        found = self.find(attribute, getter, **options)
        if found is None:
            raise ValueError(
                f"Megatron has no {attribute} for these model chunks: call parallel_state.initialize_model_parallel "
                "before attach, or give DistributedDataParallel a pg_collection."
            )
        return group_axis(found)


class _Model(_Groups):
    """Process groups, and ``names``: the entries of a model's parameters under global names."""

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        super().__init__(chunks)
        every = _named(chunks)
        self.names = Names(every, _EXPERT, (entry for entry in every if _expert(entry.tensor)))

    def take(self, parameter: Tensor) -> Entry:
        missing = (
            f"Megatron's optimizer holds a parameter of shape {tuple(parameter.shape)} that is not in the model "
            "chunks: pass all chunks that the optimizer was made for."
        )
        return self.names.take(parameter, missing)

    def tensor_axis(self, entry: Entry) -> Axis:
        group = _tensor_group(entry, getattr(self.chunks[0], "tp_group", None))
        return self.axis("tp_group", "get_tensor_model_parallel_group") if group is None else group_axis(group)

    def shape(self, entry: Entry) -> tuple[int, ...]:
        return _shape(entry.tensor, self.tensor_axis(entry).size)


def _named(chunks: Sequence[nn.Module]) -> list[Entry]:
    """The entries of all chunks. Layers have the number that they have in the whole model: a stage counts its own from
    0, and Megatron gives each layer the other one too."""
    found = []
    for i, chunk in enumerate(chunks):
        for entry in entries(chunk):
            names = tuple(_globally(entry, name) for name in entry.names)
            found.append((i, replace(entry, names=(*names, *_of_copy(entry.tensor, names)))))
    often = Counter(entry.name for _, entry in found)
    return [e if often[e.name] == 1 else replace(e, names=(f"{i}.{e.name}", *e.names)) for i, e in found]


def _of_copy(tensor: Tensor, names: Sequence[str]) -> list[str]:
    """What the copy of a tied embedding is called on another stage: a pattern that names one has to name both."""
    if not getattr(tensor, "shared_embedding", False):
        return []
    ends = ("embedding.word_embeddings.weight", "output_layer.weight")
    called = [n.removesuffix(a) + b for n in names for a, b in (ends, ends[::-1]) if n.endswith(a)]
    return [name for name in called if name not in names]


def _globally(entry: Entry, name: str) -> str:
    for module, within in reversed(entry.owners):
        path, number = name.removesuffix(f".{within}"), getattr(module, "layer_number", None)
        if path != name and isinstance(number, int) and (found := _LAYER.match(path)):
            return f"{found[1]}{number - 1}.{within}"
    return name


# ------------------------------------------------------------------------------------------- what optimizers step on


# A parameter; the tensor that is stepped; which interval that is, None where it is all of this rank's slice; the ranks
# that hold the other intervals.
_Held = tuple[Tensor, Tensor, Span | None, Axis]


def _parameters(model: _Model, optimizer: Any, beside: dict[Optimizer, list[list[Tensor]]]) -> Iterator[Parameter]:
    for held in _WAYS[type(optimizer).__name__](optimizer, beside):
        yield from _spread(model, held)


def _spread(model: _Model, held: _Held) -> Iterator[Parameter]:
    """What this rank steps on of one parameter.

    An expert of another expert-parallel rank is a parameter of its own. Every rank lists all of them, those of other
    ranks with nothing in them: they are cut alike, so one collective serves every expert and the statistics cover all.
    """
    parameter, tensor, span, axis = held
    entry = model.take(parameter)
    tensors = model.tensor_axis(entry)
    shape, tagged = model.shape(entry), _tagged(parameter)
    expert = _expert(parameter)
    if not tagged and tensors.size > 1 and parameter.ndim > 1 and is_a(entry.owners[0][0], *_CUTTING):
        yield Unknown.of(entry, shape, tensor=tensor, problem=_UNTAGGED)
        return
    if expert:
        replicas = model.axis("expt_dp_group", "get_expert_data_parallel_group")
    else:
        replicas = model.axis("dp_cp_group", "get_data_parallel_group", with_context_parallel=True)
    copies = [*([] if tagged else [tensors]), *([replicas] if span is None else [])]
    across = ((tensors, parameter.partition_dim),) if tagged and tensors.size > 1 else ()  # pyright: ignore
    fields: dict[str, Any] = {
        "tensor": tensor,
        "across": across,
        "sliced": tuple(parameter.shape) if across else None,
        "copies": tuple(one for one in copies if one.size > 1),
        "counted_elsewhere": bool(getattr(parameter, "shared", False)),
    }
    if not expert:
        whole = Span(0, parameter.numel())
        yield Piece.of(entry, shape, span=span or whole, axis=axis, **fields)
        return
    experts = model.axis("ep_group", "get_expert_model_parallel_group")
    sharing = experts if span is None else _sharing(model, experts, axis)
    span = span or Span(0, parameter.numel())
    for rank in range(experts.size):
        here, own = span if rank == experts.rank else Span(bounds=span.bounds), model.names.expert(entry, rank)
        if sharing is None:
            yield Unknown.of(own, shape, tensor=tensor, problem=_UNEVEN_EXPERTS)
        else:
            yield Piece.of(own, shape, span=here, axis=sharing, **fields)


def _sharing(model: _Model, experts: Axis, axis: Axis) -> Axis | None:
    """All ranks among which the distributed optimizer has spread the experts of one layer: those of all expert-parallel
    ranks, each with the ranks of ``axis``. None: there is no process group of just these."""
    if axis.size == 1 or experts.size == 1:
        return experts if axis.size == 1 else axis
    context = {"with_context_parallel": True}
    groups = (
        model.find("intra_dp_cp_group", "get_data_parallel_group", **context, partial_data_parallel=True),
        model.find("dp_cp_group", "get_data_parallel_group", **context),
        model.find("tp_dp_cp_group", "get_tensor_and_data_parallel_group", **context),
    )
    for candidate in (group_axis(group) for group in groups if group is not None):
        if candidate.size == experts.size * axis.size and {*experts.ranks, *axis.ranks} <= {*candidate.ranks}:
            return candidate
    return None


def _fp32(optimizer: Any, _: object) -> Iterator[_Held]:
    return ((p, p, None, ALONE) for group in optimizer.optimizer.param_groups for p in group["params"])


def _float16(optimizer: Any, _: object) -> Iterator[_Held]:
    for which, stepped in (("float16_groups", "fp32_from_float16_groups"), ("fp32_from_fp32_groups",) * 2):
        for group, tensors in zip(_read(optimizer, which), _read(optimizer, stepped), strict=True):
            yield from ((p, tensor, None, ALONE) for p, tensor in zip(group, tensors, strict=True))


def _distributed(optimizer: Any, beside: dict[Optimizer, list[list[Tensor]]]) -> Iterator[_Held]:
    axis = group_axis(_read(optimizer, "data_parallel_group"))
    mine: dict[int, tuple[int, Tensor]] = {}  # by id of a parameter, the number of its group and its shard
    for which, stepped in (
        ("model_float16_groups", "shard_fp32_from_float16_groups"),
        ("model_fp32_groups", "shard_fp32_groups"),
    ):
        for i, pair in enumerate(zip(_read(optimizer, which), _read(optimizer, stepped), strict=True)):
            mine |= {id(p): (i, shard) for p, shard in zip(*pair, strict=True)}
    placed = [(buffer, p) for buffer in _read(optimizer, "buffers") for p in _read(buffer, "params")]
    # A rank does not know the group of a parameter of which it holds nothing, and that group may have a threshold.
    numbers = [mine[id(p)][0] if id(p) in mine else None for _, p in placed]
    every = exchange(numbers, axis) if axis.size > 1 else [numbers]
    groups = [next((i for i in said if i is not None), 0) for said in zip(*every, strict=True)]
    empty = beside[optimizer.optimizer] = [[] for _ in optimizer.optimizer.param_groups]
    for (buffer, p), group in zip(placed, groups, strict=True):
        start, _, number = _read(buffer, "param_index_map")[p]
        bucket = _read(buffer, "buckets")[number]
        size = _read(bucket, "grad_data").numel() // axis.size
        span = replace(Span.cut(p.numel(), start - _read(bucket, "offset"), size, axis.rank), offset=0)
        if id(p) in mine:
            tensor = mine[id(p)][1]
            known = _read(optimizer, "_get_model_param_range_map")(p)["param"]
            if (known.start, known.end) != (span.start, span.stop):
                raise RuntimeError(
                    f"dist_agc expected elements {span.start} to {span.stop} of a parameter on this rank, and Megatron "
                    f"has {known.start} to {known.end}: its buckets are not cut as in {SUPPORTED}."
                )
        else:
            tensor = torch.empty(0, dtype=torch.float32, device=p.device)
            empty[group].append(tensor)
        yield p, tensor, span, axis


_WAYS = {
    "FP32Optimizer": _fp32,
    "Float16OptimizerWithFloat16Params": _float16,
    "DistributedOptimizer": _distributed,
}


def _read(owner: Any, attribute: str) -> Any:
    import megatron.core

    return read(owner, attribute, "megatron-core", megatron.core.__version__, SUPPORTED)
