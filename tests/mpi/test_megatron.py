"""Megatron-core on CPU: real models, optimizers and schedules against the oracle.

CUDA calls are answered by the CPU, as `megatron_runs.on_cpu` lists them, and nothing else of Megatron is replaced.
"""

import logging
import os
import runpy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron_runs
import pytest
import torch

import dist_agc
from dist_agc import conformance

if os.environ.get("OMPI_COMM_WORLD_SIZE") == "3":
    pytest.skip("2 and 4 ranks have all of it, and the import takes long", allow_module_level=True)
pytest.importorskip("megatron.core")

from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer  # noqa: E402
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer  # noqa: E402
from megatron_runs import (  # noqa: E402
    THRESHOLD,
    VOCABULARY,
    Case,
    build,
    forward_backward,
    groups,
    inner,
    on_cpu,
    parity,
    ungroup,
)

from helpers import passing_groups  # noqa: E402

pytestmark = pytest.mark.mpi


@pytest.fixture(autouse=True)
def _cuda_answered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    on_cpu(monkeypatch)
    yield


@pytest.fixture(autouse=True, scope="module")
def _groups() -> Iterator[None]:
    yield
    megatron_runs.ungroup()


SIZE = int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
MOE = {"num_moe_experts": 4, "moe_ffn_hidden_size": 10, "add_bias_linear": False}
SEQUENCE = {"sequence_parallel": True}


def small_groups(optimizer: Any) -> None:
    """A threshold of its own for the parameters without weight decay: the vectors."""
    for one in inner(optimizer):
        for group in one.optimizer.param_groups:
            if group["wd_mult"] == 0.0:
                group["clipping_threshold"] = 0.3


def small(name: str) -> float | None:
    return 0.3 if name.endswith("bias") or "layernorm" in name else THRESHOLD


# By the number of ranks.
CASES: dict[int, dict[str, tuple[Case, dict[str, Any]]]] = {
    2: {
        "data-parallel": (Case(), {}),
        "tensor-parallel": (Case(tensor=2, tied=True), {"exclude": ("*layernorm*",), "excluded": "layernorm"}),
        "sequence-parallel SGD": (Case(tensor=2, optimizer="sgd", config=SEQUENCE), {}),
        "bf16, after Megatron's norm clip": (Case(bf16=True, clip_grad=1.0), {"norm_clipping": True}),
        "fp16 with a loss scale": (
            Case(fp16=True, optimizer_config={"initial_loss_scale": 256.0, "min_loss_scale": 1.0}),
            {},
        ),
        "distributed": (
            Case(distributed=True, bucket_size=100),
            {"groups_of": small_groups, "thresholds": small, "exclude": ("output*",), "excluded": "output"},
        ),
        "distributed bf16": (Case(bf16=True, distributed=True, tied=True, bucket_size=100), {}),
        "experts": (Case(experts=2, config=MOE), {}),
        "experts distributed": (Case(experts=2, distributed=True, bucket_size=100, config=MOE), {}),
        # The last stage's copy of the embedding is called output_layer.weight: either name means both.
        "stages": (Case(stages=2, tied=True, bf16=True), {"exclude": ("output*",), "excluded": "word_embeddings"}),
        "virtual stages": (
            Case(stages=2, virtual=2, distributed=True),
            {"exclude": ("*layers.3.*",), "excluded": "s.3."},
        ),
    },
    4: {
        "tensor x data": (Case(tensor=2, bf16=True, config=SEQUENCE), {}),
        "tensor x distributed": (
            Case(tensor=2, distributed=True, bucket_size=100),
            {"groups_of": small_groups, "thresholds": small},
        ),
        "stages x distributed": (Case(stages=2, distributed=True, tied=True, bucket_size=100), {}),
        "virtual stages x tensor": (Case(stages=2, virtual=2, tensor=2, config=SEQUENCE), {}),
        "experts, sliced": (Case(tensor=2, experts=2, config=MOE | SEQUENCE), {}),
        "experts, whole, distributed": (
            Case(tensor=2, experts=2, expert_tensor=1, distributed=True, bucket_size=60, config=MOE | SEQUENCE),
            {},
        ),
        "experts, each on two ranks": (Case(experts=2, distributed=True, bf16=True, config=MOE), {}),
    },
}
HERE = CASES.get(SIZE, {})


@pytest.mark.parametrize("name", HERE)
def test_parity(world: Any, name: str) -> None:
    case, options = HERE[name]
    parity(world, case, **options)


two_ranks = pytest.mark.skipif(SIZE != 2, reason="two ranks show it")


@two_ranks
def test_norm_clip_said_and_kept_or_off(world: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Megatron's default of 1.0 must not stack on AGC in silence."""
    case = Case(clip_grad=1.0)
    groups(case)
    chunks, optimizer = build(case)
    config = inner(optimizer)[0].config
    with caplog.at_level(logging.WARNING, "dist_agc"):
        with dist_agc.attach(chunks, optimizer):
            assert config.clip_grad == 1.0
        said = [r.getMessage() for r in caplog.records if "clip_grad = 1.0 is kept" in r.getMessage()]
        assert len(said) == (world.rank == 0)
        caplog.clear()
        with dist_agc.attach(chunks, optimizer, norm_clipping=False):
            assert config.clip_grad == 0.0
        with dist_agc.attach(chunks, [optimizer], norm_clipping=True):
            assert config.clip_grad == 1.0
        assert config.clip_grad == 1.0 and not caplog.records


@two_ranks
def test_norm_clipping_on_one_rank_alone(world: Any) -> None:
    """Copies of the model would drift apart."""
    groups(Case())
    chunks, optimizer = build(Case(clip_grad=1.0))
    with dist_agc.attach(chunks, optimizer, norm_clipping=world.rank == 0):
        forward_backward(chunks, optimizer, 0)
        with pytest.raises(RuntimeError, match="norm_clipping: rank 0 has True, rank 1 has False"):
            optimizer.step()
    groups(Case(stages=2))
    chunks, optimizer = build(Case(stages=2))
    with pytest.raises(RuntimeError, match="different settings: .*norm_clipping"):
        dist_agc.attach(chunks, optimizer, norm_clipping=world.rank == 0)


@two_ranks
def test_one_of_several_optimizers_is_told(world: Any) -> None:
    case = Case(experts=2, config=MOE)
    groups(case)
    chunks, optimizer = build(case)
    with pytest.warns(UserWarning, match=r"none of the optimizers given steps '.*local_experts.*, which train"):
        dist_agc.attach(chunks, optimizer.chained_optimizers[0]).remove()
    dist_agc.attach(chunks, optimizer).remove()


@two_ranks
def test_a_skipped_step_clips_nothing(world: Any) -> None:
    case = Case(fp16=True, distributed=True, optimizer_config={"initial_loss_scale": 2.0**24})
    groups(case)
    chunks, optimizer = build(case)
    with dist_agc.attach(chunks, optimizer, clipping_threshold=THRESHOLD) as hook:
        forward_backward(chunks, optimizer, 0)
        done, *_ = optimizer.step()
        assert not done and hook.steps == 0 and not hook.stats


@two_ranks
def test_tags_without_groups_or_optimizer(world: Any) -> None:
    """Never taken for whole: by name, whatever is called; and shown all the same."""
    groups(Case(tensor=2))
    chunks, _ = build(Case(tensor=2, optimizer="sgd"))
    model: Any = chunks[0]
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    error = "'embedding.word_embeddings.weight' is tensor-parallel by Megatron's tags"
    with pytest.raises(ValueError, match=error):
        dist_agc.attach(model, plain)
    with pytest.raises(ValueError, match=error):
        dist_agc.apply_agc(list(model.module.named_parameters()))
    shown = {unit.name: unit for unit in dist_agc.units(model)}
    assert shown["embedding.word_embeddings.weight"].count == VOCABULARY
    assert shown["decoder.layers.1.mlp.linear_fc2.weight"].shape == (12, 20)
    tagged = [
        "*word_embeddings*",
        "*linear_qkv*",
        "*linear_proj.weight",
        "*linear_fc1*",
        "*linear_fc2.weight",
        "output*",
    ]
    dist_agc.attach(model, plain, exclude=tagged).remove()
    ungroup()
    with pytest.raises(ValueError, match=error):
        dist_agc.apply_agc(list(model.module.named_parameters()))
    groups(Case())
    chunks, optimizer = build(Case())
    whole = inner(optimizer)[0].optimizer
    dist_agc.attach(chunks, whole).remove()  # nothing is cut


@two_ranks
def test_refused_by_name(world: Any) -> None:
    case = Case(tensor=2)
    groups(case)
    chunks, optimizer = build(case)
    one = inner(optimizer)[0]

    def refused(message: str, model: Any = chunks, given: Any = optimizer, **options: Any) -> None:
        with pytest.raises((ValueError, TypeError), match=message):
            dist_agc.attach(model, given, **options)
        assert not one.optimizer._optimizer_step_pre_hooks

    refused("takes the list of model chunks", [*chunks[0].parameters()])
    refused(
        "that is not in the model chunks", [m for m in chunks[0].modules() if type(m).__name__ == "TransformerBlock"]
    )
    refused("during_backward=True is not for Megatron", during_backward=True)
    refused("unknown option 'clip'", clip=1)
    refused("'head' matches no parameter", exclude=("head",))
    one.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    refused("decoupled_grad")
    one.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = False
    layers = LayerWiseDistributedOptimizer.__new__(LayerWiseDistributedOptimizer)
    refused("LayerWiseDistributedOptimizer gives whole parameters to single ranks", given=layers)
    inside, one.optimizer = one.optimizer, HybridDeviceOptimizer.__new__(HybridDeviceOptimizer)
    try:
        with pytest.raises(ValueError, match="steps on copies on the CPU"):
            dist_agc.attach(chunks, optimizer)
    finally:
        one.optimizer = inside
    with dist_agc.attach(chunks, optimizer):
        with pytest.raises(ValueError, match="AGC is attached to this AdamW already"):
            dist_agc.attach(chunks, optimizer)
    for p in chunks[0].parameters():
        p.tensor_model_parallel = False  # pyright: ignore[reportAttributeAccessIssue]
    refused("was made without tags")


@two_ranks
def test_the_launch_example(world: Any) -> None:
    """It wants GPUs: here the CPU answers, and all but ``main`` runs."""
    groups(Case(tensor=2))
    script = runpy.run_path(str(Path(__file__).parents[2] / "launch" / "megatron.py"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's own
        hook = script["train"](2, 3, 1)
    assert hook.steps == 3 and 0 < int(hook.stats.clipped_units) < hook.stats.units
    hook.remove()


@pytest.mark.skipif(SIZE == 1, reason="cuts nothing")
def test_checks_row(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """``dist-agc check`` has it where there is a GPU; here the CPU answers."""
    ungroup()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with passing_groups():
        (row,) = conformance.run(["megatron"], shard_unaware=True, report=lambda _: None)
        ungroup()
    assert (row.verdict, row.note, row.units, row.collectives) == ("ok", "", 114, 1)
    assert row.error < 1e-6 and row.split_units > 0 and 0 < row.clipped_units < row.units
    assert row.shard_unaware.startswith("error")
