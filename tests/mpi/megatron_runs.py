"""Real Megatron models, optimizers and schedules on CPU, and what the torch optimizers inside saw.

CUDA calls are answered by the CPU (see `on_cpu`), and nothing else of Megatron is replaced. Pieces of all ranks are put
together from Megatron's own maps and tags, without dist_agc's bookkeeping.
"""

import functools
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import dist_agc
import oracle
from helpers import (
    assert_equal_everywhere,
    assert_some_clipped,
    assert_stats,
    passing_groups,
    worst_distance,
    worst_relative_error,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of missing Apex and Transformer Engine
    megatron = pytest.importorskip("megatron.core")
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

VOCABULARY, LENGTH, BATCH = 16, 4, 12  # a batch divides among 1, 2, 3 and 4 ranks
THRESHOLD = 0.05


def on_cpu(patch: pytest.MonkeyPatch) -> None:
    """Answer by the CPU what Megatron asks of CUDA, and no more:

    - ``torch.cuda.current_device()`` is the CPU, ``torch.cuda.synchronize()`` returns at once;
    - ``torch.zeros``, ``ones``, ``empty``, ``tensor`` with ``device="cuda"`` make it on the CPU;
    - ``Tensor.type()`` says ``torch.cuda.FloatTensor`` for ``torch.FloatTensor``, ``Tensor.cuda()`` is the tensor.

    And one name that the router of 0.16.1 asks for, and that nothing defines where Transformer Engine is missing.
    """
    patch.setattr(moe_utils, "te_general_gemm", None, raising=False)
    patch.setattr(torch.cuda, "current_device", lambda: "cpu")
    patch.setattr(torch.cuda, "synchronize", lambda *_: None)
    patch.setattr(Tensor, "cuda", lambda self, *_, **__: self)
    kind = Tensor.type

    def typed(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        return kind(self, *args, **kwargs) if args or kwargs else kind(self).replace("torch.", "torch.cuda.")

    patch.setattr(Tensor, "type", typed)

    def made(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(make)
        def on_the_cpu(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            return make(*args, device="cpu" if device == "cuda" else device, **kwargs)

        return on_the_cpu

    for name in ("zeros", "ones", "empty", "tensor"):
        patch.setattr(torch, name, made(getattr(torch, name)))


class Norm(nn.LayerNorm):
    """Marked for sequence parallelism, as Apex's and Transformer Engine's are, and torch's is not."""

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps)
        for p in self.parameters():
            p.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]


@dataclass
class Case:
    """One way of training. ``config``: more of Megatron's TransformerConfig."""

    tensor: int = 1
    stages: int = 1
    virtual: int | None = None
    experts: int = 1  # expert-parallel ranks
    expert_tensor: int | None = None
    distributed: bool = False
    bf16: bool = False
    fp16: bool = False
    tied: bool = False
    optimizer: str = "adam"
    clip_grad: float = 0.0
    lr: float = 0.02
    bucket_size: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    optimizer_config: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32


_made: dict[str, Any] = {}  # for which sizes the groups of this world were made: each costs sockets and threads


_ending = ExitStack()


def groups(case: Case) -> None:
    """Megatron's process groups, and its random numbers."""
    sizes = case.tensor, case.stages, case.virtual, case.experts, case.expert_tensor
    if _made.get("sizes") != sizes or _made.get("world") is not dist.group.WORLD:
        ungroup()
        _ending.enter_context(passing_groups())
        parallel_state.initialize_model_parallel(
            *sizes[:3],
            expert_model_parallel_size=case.experts,
            expert_tensor_parallel_size=case.expert_tensor,
            create_gloo_process_groups=False,
        )
        _made.update(sizes=sizes, world=dist.group.WORLD)
    # Without a CUDA generator: this tracker of Megatron's own leaves random numbers to the CPU's.
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)


def ungroup() -> None:
    parallel_state.destroy_model_parallel()
    _made.clear()
    _ending.close()


def build(case: Case) -> tuple[list[nn.Module], Any]:
    """Model chunks as ``get_model`` makes them, and the optimizer. Megatron warns of much of its own here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _build(case)


def _build(case: Case) -> tuple[list[nn.Module], Any]:
    options = {
        "num_layers": case.stages * (case.virtual or 1) if case.stages > 1 else 2,
        # The distributed optimizer cuts at multiples of 64 elements: inside of rows of 12 and 20.
        "hidden_size": 12,
        "num_attention_heads": 2,
        "ffn_hidden_size": 20,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "tensor_model_parallel_size": case.tensor,
        "pipeline_model_parallel_size": case.stages,
        "virtual_pipeline_model_parallel_size": case.virtual,
        "expert_model_parallel_size": case.experts,
        "expert_tensor_parallel_size": case.expert_tensor,
        "pipeline_dtype": case.dtype,
        "bf16": case.bf16,
        "fp16": case.fp16,
        "params_dtype": case.dtype,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False,
        "moe_token_dispatcher_type": "allgather",  # the other wants CUDA streams
        **case.config,
    }
    config: Any = TransformerConfig(**options)
    spec: Any = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False)
    if config.sequence_parallel:
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = Norm
        local = config.num_layers // case.stages // (case.virtual or 1)
        spec = TransformerBlockSubmodules([spec] * local, Norm)  # pyright: ignore[reportArgumentType]
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=case.distributed,
        overlap_grad_reduce=case.bucket_size is not None,
        bucket_size=case.bucket_size,
    )
    chunks = []
    for stage in range(case.virtual or 1):
        at = stage if case.virtual else None
        rank: int = parallel_state.get_pipeline_model_parallel_rank()
        first, last = rank == 0, rank == case.stages - 1
        model = GPTModel(
            config,
            spec,
            VOCABULARY,
            LENGTH,
            pre_process=first and stage == 0,
            post_process=last and stage == (case.virtual or 1) - 1,
            share_embeddings_and_output_weights=case.tied,
            position_embedding_type="learned_absolute",
            vp_stage=at,
        )
        plant(model)
        whole = Float16Module(config, model) if case.bf16 or case.fp16 else model
        chunks.append(DistributedDataParallel(config, ddp, whole, disable_bucketing=stage > 0))
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer=case.optimizer,
            lr=case.lr,
            weight_decay=0.0,
            clip_grad=case.clip_grad,
            bf16=case.bf16,
            fp16=case.fp16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=case.distributed,
            **case.optimizer_config,
        ),
        chunks,
        use_gloo_process_groups=False,
    )
    config.grad_scale_func = optimizer.scale_loss if case.fp16 else None
    return chunks, optimizer


# ------------------------------------------------------------------------------------------------- names and pieces


def named(chunks: Sequence[nn.Module]) -> dict[int, tuple[str, Any]]:
    """By id, every parameter and its name in the whole model: layers and experts counted over all ranks."""
    found = {}
    for chunk in chunks:
        modules: dict[str, Any] = dict(chunk.named_modules())
        for name, parameter in chunk.named_parameters():
            names = [name]
            if layer := re.match(r"(.*\.layers)\.(\d+)(\..*)", name):
                number = modules[f"{layer[1]}.{layer[2]}"].layer_number - 1
                names.append(f"{layer[1]}.{number}{layer[3]}")
            if expert := re.match(r"(.*local_experts)\.(\d+)\.", name):
                first = parallel_state.get_expert_model_parallel_rank() * len(modules[expert[1]])
                names.append(re.sub(r"local_experts\.\d+", f"local_experts.{first + int(expert[2])}", names[-1]))
            if getattr(parameter, "shared", False):  # the last stage's copy
                names.append("embedding.word_embeddings.weight")
            found[id(parameter)] = re.sub(r"^(module\.)+", "", names[-1]), parameter
    return found


def tensor_rank(name: str, parameter: nn.Parameter) -> tuple[int, int]:
    """This rank's place among those that a parameter is sliced over, and their number."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return 0, 1
    if "local_experts" in name:
        group: Any = parallel_state.get_expert_tensor_parallel_group()
    else:
        group = parallel_state.get_tensor_model_parallel_group()
    return group.rank(), group.size()


def plant(model: nn.Module) -> None:
    """Weights by their names alone, the same however the model is spread."""
    with torch.no_grad():
        for name, p in named([model]).values():
            rank, size = tensor_rank(name, p)
            shape = list(p.shape)
            if size > 1:
                shape[p.partition_dim] *= size
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            whole = torch.randn(shape, generator=generator) * 0.4
            if name.endswith("layernorm.weight"):
                whole += 1
            if size > 1:
                whole = whole.chunk(size, p.partition_dim)[rank]
            p.copy_(whole)


@dataclass
class Piece:
    """Elements [start, stop) of one rank's slice, flat: weights, gradients before AGC and after."""

    name: str
    tensor_rank: int
    dim: int
    size: int  # slices in all
    shape: tuple[int, ...]  # of a slice
    start: int
    weight: Any
    raw: Any
    clipped: Any = None

    @property
    def cuts_a_row(self) -> bool:
        return len(self.shape) > 1 and self.start % self.shape[-1] > 0


def inner(optimizer: Any) -> list[Any]:
    return [one for one in optimizer.chained_optimizers if one.optimizer is not None]


class Watch:
    """What the torch optimizers inside of Megatron's saw, around AGC's own hook. Make it after attaching."""

    def __init__(self, chunks: Sequence[nn.Module], optimizer: Any) -> None:
        self.names, self.pieces = named(chunks), list[Piece]()
        self.parts = {id(one.optimizer): list(self._parts(one)) for one in inner(optimizer)}
        self._handles = [register_optimizer_step_pre_hook(self._before)]
        self._handles += [one.optimizer.register_step_pre_hook(self._after) for one in inner(optimizer)]

    def _parts(self, one: Any) -> Iterator[tuple[Any, Any, int]]:
        """Model parameters, the tensors that are stepped, and where these begin."""
        kind = type(one).__name__
        if kind == "FP32Optimizer":
            yield from ((p, p, 0) for group in one.optimizer.param_groups for p in group["params"])
        elif kind == "Float16OptimizerWithFloat16Params":
            for of in ((one.float16_groups, one.fp32_from_float16_groups), (one.fp32_from_fp32_groups,) * 2):
                for pair in zip(*of, strict=True):
                    yield from ((p, master, 0) for p, master in zip(*pair, strict=True))
        else:
            for of in (
                (one.model_float16_groups, one.shard_fp32_from_float16_groups),
                (one.model_fp32_groups, one.shard_fp32_groups),
            ):
                for pair in zip(*of, strict=True):
                    for p, shard in zip(*pair, strict=True):
                        yield p, shard, one._get_model_param_range_map(p)["param"].start

    def _before(self, optimizer: Any, *_: Any) -> None:
        for p, tensor, start in self.parts.get(id(optimizer), ()):
            name = self.names[id(p)][0]
            rank, size = tensor_rank(name, p)
            dim = p.partition_dim if size > 1 else 0
            flat = (tensor.detach().flatten().clone(), tensor.grad.detach().flatten().clone())
            self.pieces.append(Piece(name, rank, dim, size, tuple(p.shape), start, *flat))

    def _after(self, optimizer: Any, *_: Any) -> None:
        parts = self.parts[id(optimizer)]
        for piece, (_p, tensor, _start) in zip(self.pieces[-len(parts) :] if parts else [], parts, strict=True):
            piece.clipped = tensor.grad.detach().flatten().clone()

    def take(self, world: Any) -> dict[str, dict[str, Tensor]]:
        """Full tensors in float64, by what they are and by name; the same on every rank."""
        pieces, self.pieces = self.pieces, []
        return {what: together(world, pieces, what) for what in ("weight", "raw", "clipped")}

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def together(world: Any, pieces: Sequence[Piece], what: str) -> dict[str, Tensor]:
    said = [(p.name, p.tensor_rank, p.dim, p.size, p.shape, p.start, getattr(p, what).numpy()) for p in pieces]
    slices: dict[str, dict[int, Tensor]] = {}
    dims = {}
    for name, rank, dim, size, shape, start, values in (one for held in world.gather(said) for one in held):
        flat = slices.setdefault(name, {}).setdefault(rank, torch.full(shape, torch.nan, dtype=torch.float64)).view(-1)
        there, new = flat[start : start + len(values)], torch.as_tensor(values).double()
        assert bool((there.isnan() | (there == new)).all()), f"copies of {name} differ in {what}"
        there.copy_(new)
        dims[name] = dim, size
    found = {}
    for name, held in slices.items():
        dim, size = dims[name]
        assert sorted(held) == list(range(size)), name
        found[name] = torch.cat([held[i] for i in range(size)], dim)
        assert not found[name].isnan().any(), name
    return found


# ---------------------------------------------------------------------------------------------------------- training


def batches(step: int) -> Iterator[dict[str, Tensor]]:
    """This data-parallel rank's micro batches, of one sample each."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    mine = tokens[rank::size][: 4 if size < 4 else 2]
    for pair in mine.split(2):
        yield {"tokens": pair[:, :-1], "labels": pair[:, 1:]}


def forward_step(data: Iterator[dict[str, Tensor]], model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
    batch = next(data)
    positions = torch.arange(LENGTH).expand_as(batch["tokens"])
    mask = torch.ones(1, 1, LENGTH, LENGTH).triu(1).bool()
    output = model(batch["tokens"], positions, mask, labels=batch["labels"])
    return output, lambda loss: (loss.mean(), {"loss": loss.detach().mean()})


def forward_backward(chunks: Sequence[nn.Module], optimizer: Any, step: int) -> None:
    rows = list(batches(step))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's own
        for chunk in chunks:
            chunk.zero_grad_buffer()  # pyright: ignore[reportCallIssue]
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(rows) for _ in chunks] if len(chunks) > 1 else iter(rows),
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=len(rows),
            seq_length=LENGTH,
            micro_batch_size=2,
            forward_only=False,
        )


def step_of(optimizer: Any) -> float:
    """One step; the norm that Megatron returns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.distributed.* is deprecated", FutureWarning)
        done, norm, _ = optimizer.step()
    assert done, "an overflow"
    return norm


@dataclass
class Outcome:
    chunks: list[nn.Module]
    optimizer: Any
    expected: oracle.Reference
    names: list[str]
    worst: float
    distance: float
    clipped: list[int]


def parity(
    world: Any,
    case: Case,
    *,
    threshold: float = THRESHOLD,
    exclude: tuple[str, ...] = (),
    excluded: str | None = None,
    groups_of: Callable[[Any], None] | None = None,
    thresholds: Callable[[str], float | None] | None = None,
    steps: int = 3,
    tolerance: float = 2e-6,
    drift: float = 2e-5,
    **options: Any,
) -> Outcome:
    """Train with AGC, and hold every step against the oracle: gradients, counts, norms, Megatron's own norm; in the end
    the weights, against the same optimizer in float64 on whole tensors."""
    groups(case)
    chunks, optimizer = build(case)
    if groups_of:
        groups_of(optimizer)
    hook = dist_agc.attach(chunks, optimizer, clipping_threshold=threshold, exclude=exclude, **options)
    watch, reference, worst, counts, expected = Watch(chunks, optimizer), None, 0.0, [], None
    for step in range(steps):
        forward_backward(chunks, optimizer, step)
        norm = step_of(optimizer)
        if case.distributed and parallel_state.get_data_parallel_world_size() > 1:
            assert any(p.cuts_a_row for held in world.gather(watch.pieces) for p in held)
        seen = watch.take(world)
        rules = {name: oracle.Units((0,) if w.ndim > 1 else ()) for name, w in seen["weight"].items()}
        limit = threshold if thresholds is None else {name: thresholds(name) for name in rules}
        left_out = {name for name in rules if excluded and excluded in name}
        expected = oracle.clip(seen["weight"], seen["raw"], rules, limit, exclude=left_out)
        assert_some_clipped(expected)
        counts.append(expected.clipped_units)
        worst = max(worst, worst_relative_error(seen["clipped"], expected.grads))
        assert_stats(hook.stats, expected, tolerance=tolerance)
        assert_equal_everywhere(world, hook.stats)
        if not case.clip_grad:
            assert norm == pytest.approx(float(hook.stats.grad_norm), rel=1e-6)
            assert norm == pytest.approx(expected.grad_norm, rel=1e-6)
        reference = reference or Reference(seen["weight"], case)
        reference.step(expected.grads)
    assert expected is not None and reference is not None
    forward_backward(chunks, optimizer, steps)
    step_of(optimizer)
    last = watch.take(world)
    watch.remove()
    hook.remove()
    distance = worst_distance(last["weight"], reference.weights())
    print(f"{case}: worst {worst:.2g}, weights {distance:.2g}, clipped {counts} of {expected.units}")
    assert worst <= tolerance, f"worst relative error of a clipped gradient element: {worst:.3g}"
    assert distance <= drift, f"weights are {distance:.3g} away from the float64 run"
    return Outcome(chunks, optimizer, expected, list(expected.per_parameter), worst, distance, counts)


class Reference:
    """Whole parameters in float64 with torch's optimizer, on the oracle's gradients."""

    def __init__(self, weights: Mapping[str, Tensor], case: Case) -> None:
        self._held = {name: nn.Parameter(w.clone()) for name, w in weights.items()}
        if case.optimizer == "adam":
            self._optimizer: Any = torch.optim.AdamW(self._held.values(), lr=case.lr, weight_decay=0.0)
        else:
            self._optimizer = torch.optim.SGD(self._held.values(), lr=case.lr, momentum=0.9)

    def step(self, grads: Mapping[str, Tensor]) -> None:
        for name, p in self._held.items():
            p.grad = grads[name]
        self._optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._held.items()}
