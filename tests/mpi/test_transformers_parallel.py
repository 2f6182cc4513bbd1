"""transformers' own parallelism, `DistributedConfig`: every parameter that is not whole on a rank is known not to be.

Expert parallelism with FSDP2 is in test_expert_units.py, where its models come from.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_expert_units import EXPERTS, KINDS, SIZES, THRESHOLD, UNITS, language_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from parity import check_training

pytest.importorskip("transformers.distributed.configuration_utils", reason="needs a newer transformers")

pytestmark = [
    pytest.mark.mpi(min_size=2),
    pytest.mark.filterwarnings("ignore:.*torch_dtype"),
    # The embedding gives a view; nothing here changes it in place.
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),
    pytest.mark.filterwarnings("ignore:Deallocating Tensor that still has live PyObject"),
]

TWO_HEADS: dict[str, Any] = {"num_key_value_heads": 2}  # of keys too, since TP deals them out
# A sink for each rank: transformers does not load a vector of which some rank has nothing.
FOUR_HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4}
DENSE = {name: value for name, value in SIZES.items() if "expert" not in name} | TWO_HEADS
TIED: dict[str, Any] = {"tie_word_embeddings": True}
# GPT-OSS has a plan for its head alone; this is for the rest, as its users write it.
ATTENTION = "model.layers.*.self_attn"
GPT_OSS = {
    "model.embed_tokens": "embedding_rowwise",
    **{f"{ATTENTION}.{name}_proj": "colwise" for name in "qkv"},
    f"{ATTENTION}.o_proj": "rowwise",
    f"{ATTENTION}.sinks": "colwise",
    ATTENTION: "local_params",
}


def made(world: Any, kind: str, **sizes: Any) -> tuple[Any, nn.Module, Path]:
    """The class, a twin in float64, and a checkpoint of the same weights."""
    if kind in KINDS:
        whole: Any = language_model(kind) if not sizes else language_model(kind, **sizes)
    else:
        configure, build = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[kind]
        torch.manual_seed(0)
        whole = build(configure(**DENSE | sizes))
    folder = Path(world.gather(world.folder.name)[0]) / f"{kind}{sorted(sizes)}"
    if world.rank == 0:
        whole.save_pretrained(folder)
    world.gather(None)
    return type(whole), whole.double(), folder


def loss(model: nn.Module, tokens: Tensor, classes: Tensor) -> Tensor:
    return F.cross_entropy(model(input_ids=tokens).logits.mean(1), classes)


def check(
    world: Any, kind: str, all_reduces: int, config: dict[str, Any], share: tuple[int, int] = (0, 1), **sizes: Any
) -> nn.Module:
    from transformers.distributed.configuration_utils import DistributedConfig

    build, twin, folder = made(world, kind, **sizes)
    options = {"experts_implementation": "eager"} if kind in KINDS else {}
    model = build.from_pretrained(folder, distributed_config=DistributedConfig(**config), **options)
    model.train()
    assert any(isinstance(p, DTensor) for p in model.parameters())
    check_training(
        world,
        model,
        twin,
        share=share,
        all_reduces=all_reduces,
        known=UNITS.get(kind),
        clipping_threshold=THRESHOLD,
        loss=loss,
    )
    return model


def tp(world: Any, **plan: Any) -> dict[str, Any]:
    if world.size != 2:
        pytest.skip("needs 2 ranks: the models have 2 heads")
    return {"tp_size": 2, "tp_plan": "auto", **plan}


def test_llama(world: Any) -> None:
    model = check(world, "llama", 1, tp(world))
    table: Any = model.get_parameter("model.embed_tokens.weight")
    assert table.placements == (Shard(0),)


def test_tied_llama(world: Any) -> None:
    check(world, "llama", 1, tp(world), **TIED)


def test_columns_of_embeddings(world: Any) -> None:
    check(world, "llama", 1, tp(world, tp_plan={"model.embed_tokens": "embedding_colwise"}))


def test_norms_between_ranks(world: Any) -> None:
    """Qwen3's norms of queries and keys are plain, and their gradients added up by a hook in backward."""
    model = check(world, "qwen3", 1, tp(world))
    assert not isinstance(model.get_parameter("model.layers.0.self_attn.q_norm.weight"), DTensor)


def test_mixtral(world: Any) -> None:
    """Both halves of a fused weight are cut, here unevenly."""
    model = check(world, "mixtral", 1, tp(world), **TWO_HEADS, intermediate_size=25)
    packed: Any = model.get_parameter(f"{EXPERTS}.gate_up_proj")
    assert type(packed.placements[0]).__name__ == "_StridedShard"


def test_mixtral_with_an_expert_axis(world: Any) -> None:
    check(world, "mixtral", 1, tp(world, ep_size=2), **TWO_HEADS)


def test_gpt_oss(world: Any) -> None:
    check(world, "gpt_oss", 1, tp(world, ep_size=2), **TWO_HEADS)


def test_gpt_oss_with_a_plan(world: Any) -> None:
    model = check(world, "gpt_oss", 1, tp(world, ep_size=2, tp_plan=GPT_OSS), **TWO_HEADS)
    assert isinstance(model.get_parameter("model.layers.0.self_attn.sinks"), DTensor)


# ------------------------------------------------------------------------------------------------------- with FSDP2


@pytest.mark.parametrize("kind", ["llama", *KINDS])
def test_fsdp2(world: Any, kind: str) -> None:
    if kind == "mixtral" and world.size == 3:
        pytest.skip("transformers does not load 4 experts of which some rank gets none")
    check(world, kind, 1, {"fsdp_size": world.size}, (world.rank, world.size))


@pytest.mark.parametrize("kind", KINDS)
def test_experts_on_an_axis_of_their_own_and_fsdp2(world: Any, kind: str) -> None:
    """Without tensor parallelism: tokens go to the ranks that have their experts; what is left of these FSDP2 cuts."""
    if world.size == 3:
        pytest.skip("needs an even number of ranks")
    all_reduces = 1 if world.size == 2 else 3  # an axis for the rest, two for the experts
    check(world, kind, all_reduces, {"fsdp_size": world.size, "ep_size": 2}, (world.rank, world.size))


def test_hsdp(world: Any) -> None:
    if world.size != 4:
        pytest.skip("needs 4 ranks")
    check(world, "llama", 1, {"fsdp_size": 2, "dp_replicate_size": 2}, (world.rank, 4))


@pytest.mark.parametrize("kind", ["llama", *KINDS])
def test_tensor_parallel_and_fsdp2(world: Any, kind: str) -> None:
    if world.size != 4:
        pytest.skip("needs 4 ranks")
    config: dict[str, Any] = {"tp_size": 2, "tp_plan": GPT_OSS if kind == "gpt_oss" else "auto", "fsdp_size": 2}
    check(world, kind, 2, config, (world.rank // 2, 2), **FOUR_HEADS)


def test_three_at_once(world: Any) -> None:
    """Tensor parallel and FSDP2, and the experts on an axis of their own."""
    if world.size != 4:
        pytest.skip("needs 4 ranks")
    config: dict[str, Any] = {"tp_size": 2, "tp_plan": "auto", "fsdp_size": 2, "ep_size": 2}
    check(world, "mixtral", 2, config, (world.rank // 2, 2), **TWO_HEADS)
