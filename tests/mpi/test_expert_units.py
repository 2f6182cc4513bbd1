"""Stacked experts under every layout that spreads them: transformers' in both layouts, torchtitan's, none announced.

Nothing here passes ``units=``: the package has to know these modules. The oracle's units are written down by hand.
"""

import copy
import importlib
import importlib.util
import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from test_fsdp1 import full_grads, full_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel as DDP
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

import models
import oracle
from parity import STEPS, check_one_clip, check_training, distribute

pytestmark = [
    pytest.mark.mpi(min_size=2),
    pytest.mark.filterwarnings("ignore:FSDP"),
    pytest.mark.filterwarnings("ignore:Deallocating Tensor that still has live PyObject"),  # torch 2.7, without AGC too
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

SIZES = {
    "vocab_size": models.VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "use_cache": False,
}
KINDS: dict[str, tuple[Any, Any]] = {
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "gpt_oss": (GptOssConfig, GptOssForCausalLM),
}
EXPERTS = "model.layers.0.mlp.experts"
UNITS = {
    "mixtral": {  # (experts, out, in)
        f"{EXPERTS}.gate_up_proj": oracle.Units((0, 1)),
        f"{EXPERTS}.down_proj": oracle.Units((0, 1)),
    },
    "gpt_oss": {  # (experts, in, out), and a vector for each expert
        f"{EXPERTS}.gate_up_proj": oracle.Units((0, 2)),
        f"{EXPERTS}.down_proj": oracle.Units((0, 2)),
        f"{EXPERTS}.gate_up_proj_bias": oracle.Units((0,)),
        f"{EXPERTS}.down_proj_bias": oracle.Units((0,)),
    },
}
# In each of the first steps every stack of experts has units with a larger ratio than this, and others.
THRESHOLD = 0.055


def language_model(kind: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> nn.Module:
    """The same weights for the same kind."""
    return copy.deepcopy(_language_model(kind, **sizes)).to(dtype)


@cache
def _language_model(kind: str, **sizes: Any) -> nn.Module:
    configure, build = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = configure(**SIZES | sizes)
        config._experts_implementation = "eager"
        model = build(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1 or parameter.shape[0] == 4:  # biases and routers too are no zeros
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


class Both(nn.Module):
    """Experts of both layouts in one model."""

    def __init__(self) -> None:
        super().__init__()
        for kind in KINDS:
            self.add_module(kind, language_model(kind))

    def forward(self, tokens: Tensor) -> Tensor:
        return sum(logits(model, tokens) for model in self.children())  # type: ignore[return-value]


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens).logits.mean(1)


def both(dtype: torch.dtype = torch.float32) -> Both:
    return Both().to(dtype)


KNOWN = {f"{kind}.{name}": units for kind, known in UNITS.items() for name, units in known.items()}


def experts_of(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith("experts")]


def check(world: Any, model: nn.Module, all_reduces: int, **options: Any) -> None:
    options = {"clipping_threshold": THRESHOLD, "known": KNOWN, **options}
    check_training(world, model, both(torch.float64), all_reduces=all_reduces, **options)


# ------------------------------------------------------------------------------------- trained, without an expert axis


def test_what_is_clipped(world: Any) -> None:
    """Of every stack of experts some units are clipped and some not: the tests below show what they say."""
    model = both(torch.float64)
    rules, named = oracle.unit_rules(model) | KNOWN, dict(model.named_parameters())
    for step in range(STEPS):
        model.zero_grad()
        models.loss(model, *models.batch(step)).backward()
        expected = oracle.clip(named, {name: p.grad for name, p in named.items()}, rules, THRESHOLD)
        for name in KNOWN:
            found = expected.per_parameter[name]
            assert 0 < found.clipped_units < found.units, f"step {step}: {name}: {found}"
        assert [expected.per_parameter[name].units for name in KNOWN] == [4 * 48, 4 * 16, 4 * 48, 4 * 16, 4, 4]


@pytest.mark.parametrize("use_orig_params", [True, False], ids=["originals", "flat"])
def test_fsdp1(world: Any, use_orig_params: bool) -> None:
    """Flattened and cut anywhere: within a row, within an expert."""
    model, options = both(), {"device_id": torch.device("cpu"), "use_orig_params": use_orig_params}
    for kind in KINDS:
        layer = model.get_submodule(f"{kind}.model.layers.0.mlp")
        layer.experts = FSDP(layer.experts, **options)  # type: ignore[assignment]
    check(world, FSDP(model, **options), 1, weights=full_weights, grads=full_grads)


def fsdp2(model: nn.Module, mesh: DeviceMesh, dim: int = 0) -> nn.Module:
    """Experts cut along ``dim``, and along dim 0 where its size does not divide."""

    def place(parameter: nn.Parameter) -> Shard | None:
        fits = parameter.ndim == 3 and parameter.shape[dim] % mesh["shard"].size() == 0
        return Shard(dim) if dim and fits else None

    for experts in experts_of(model):
        fully_shard(experts, mesh=mesh, shard_placement_fn=place)
    fully_shard(model, mesh=mesh)
    return model


def test_fsdp2(world: Any) -> None:
    model = fsdp2(both(), world.mesh(names=("shard",)))
    check(world, model, 1)


@pytest.mark.filterwarnings("ignore")  # DeepSpeed and what it imports warn about each other's ways
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero(world: Any, stage: int) -> None:
    pytest.importorskip("deepspeed")
    import deepspeed_runs as runs

    task = runs.Task(both, models.loss, KNOWN)
    settings = runs.config(world, stage)
    done = runs.parity(world, settings, task=task, exclude=(), threshold=THRESHOLD, steps=2)
    done.engine.destroy()


# --------------------------------------------------------------------------------------- clipped once, on any placement


def test_ddp(world: Any) -> None:
    check_one_clip(world, both, DDP, known=KNOWN, all_reduces=0)


@pytest.mark.parametrize("dim", [1, 2])
def test_fsdp2_along_another_dim(world: Any, dim: int) -> None:
    """Dim 1 numbers the units of the one kind and is contracted in the other, dim 2 the other way round."""
    shard = partial(fsdp2, mesh=world.mesh(names=("shard",)), dim=dim)
    stacks: list[Any] = [p for n, p in shard(both()).named_parameters() if n in KNOWN and p.ndim == 3]
    cut = {p.placements[0].dim for p in stacks}
    assert cut == ({0, dim} if world.size == 3 else {dim})  # of 16, 24 and 48 not all divide by 3
    check_one_clip(world, both, shard, known=KNOWN, all_reduces=1)


def test_hsdp(world: Any) -> None:
    if world.size != 4:
        pytest.skip("needs 4 ranks")
    for dim in (0, 1, 2):
        shard = partial(fsdp2, mesh=world.mesh((2, 2), ("replicate", "shard")), dim=dim)
        check_one_clip(world, both, shard, known=KNOWN, all_reduces=1)


# ------------------------------------------------------------------------------------------------------ an expert axis


def expert_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Each rank of the mesh holds other experts, whole. Uneven where their number does not divide."""
    placements = {
        name: [Shard(0)] for name, _ in model.named_parameters() if name.rpartition(".")[0].endswith("experts")
    }
    return distribute(model, mesh, placements)


def test_an_expert_axis(world: Any) -> None:
    check_one_clip(world, both, partial(expert_parallel, mesh=world.mesh()), known=KNOWN, all_reduces=1)


def test_an_expert_axis_and_fsdp2(world: Any) -> None:
    """As torchtitan and transformers have it: experts over "ep", each rank's share of them over "efsdp", the rest over
    all ranks."""
    if world.size != 4:
        pytest.skip("needs 4 ranks")
    mesh = world.mesh((2, 2), ("efsdp", "ep"))

    def shard(model: nn.Module, dim: int = 0) -> nn.Module:
        expert_parallel(model, mesh["ep"])
        for experts in experts_of(model):
            # Shard(1) is torchtitan's choice where ranks outnumber experts.
            place = (lambda p: Shard(dim) if p.ndim == 3 else None) if dim else None
            fully_shard(experts, mesh=mesh["efsdp"], shard_placement_fn=place)
            assert all(isinstance(p, DTensor) and len(p.placements) == 2 for p in experts.parameters())
        fully_shard(model, mesh=world.mesh())
        return model

    for dim in (0, 1, 2):
        check_one_clip(world, both, partial(shard, dim=dim), known=KNOWN)


@pytest.mark.filterwarnings("ignore:.*torch_dtype")
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_distributes(world: Any, kind: str) -> None:
    """Its own expert parallelism with FSDP2, trained."""
    if world.size % 2:
        pytest.skip("needs an even number of ranks")
    from transformers.distributed.configuration_utils import DistributedConfig

    folder = Path(world.gather(world.folder.name)[0]) / kind
    if world.rank == 0:
        whole: Any = language_model(kind)
        whole.save_pretrained(folder)
    world.gather(None)
    distributed = DistributedConfig(fsdp_size=world.size, ep_size=2)
    model: Any = KINDS[kind][1].from_pretrained(folder, distributed_config=distributed, experts_implementation="eager")
    model.train()
    experts: Any = model.get_parameter(f"{EXPERTS}.down_proj")
    assert isinstance(experts, DTensor) and len(experts.placements) == 2
    check_training(
        world,
        model,
        language_model(kind, torch.float64),
        all_reduces=3 if world.size == 4 else 1,
        known=UNITS[kind],
        clipping_threshold=THRESHOLD,
        loss=lambda m, x, y: F.cross_entropy(logits(m, x), y),
    )


# --------------------------------------------------------------------------------------------------------- torchtitan


def torchtitan_moe() -> Any:
    """Without triton something takes the place of its kernels for dispatch, which nothing here runs."""
    pytest.importorskip("torchtitan", reason="needs torchtitan")
    if importlib.util.find_spec("triton") is None:
        sys.modules.setdefault("torchtitan.distributed.minimal_async_ep.kernels", MagicMock())
    return importlib.import_module("torchtitan.models.common.moe")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torchtitan imports
def test_torchtitan(world: Any) -> None:
    moe = torchtitan_moe()

    def make() -> nn.Module:
        torch.manual_seed(3)
        experts = moe.GroupedExperts.Config(dim=16, hidden_dim=24, num_experts=5).build()
        for parameter in experts.parameters():
            nn.init.normal_(parameter)
        return nn.Sequential(OrderedDict(experts=experts, gate=nn.Linear(16, 5)))

    known = {f"experts.{name}": oracle.Units((0, 1)) for name in ("w1_EFD", "w2_EDF", "w3_EFD")}
    layouts: list[Callable[[nn.Module], nn.Module]] = [
        partial(fsdp2, mesh=world.mesh(names=("shard",)), dim=dim) for dim in (0, 1, 2)
    ]
    for shard in [*layouts, partial(expert_parallel, mesh=world.mesh())]:
        expected = check_one_clip(world, make, shard, known=known, all_reduces=1)
        assert expected.per_parameter["experts.w1_EFD"].units == 5 * 24
