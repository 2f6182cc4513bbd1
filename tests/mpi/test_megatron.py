"""Megatron-core on CPU: real models, optimizers and schedules against the oracle.

CUDA calls are answered by the CPU, as `megatron_runs.on_cpu` lists them, and nothing else of Megatron is replaced.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from megatron_runs import THRESHOLD, Case, inner, on_cpu, parity  # noqa: E402

pytestmark = pytest.mark.mpi


@pytest.fixture(autouse=True)
def _cuda_answered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    on_cpu(monkeypatch)
    yield


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
        "bf16": (Case(bf16=True), {}),
        "distributed": (
            Case(distributed=True, bucket_size=100),
            {"groups_of": small_groups, "thresholds": small, "exclude": ("output*",), "excluded": "output"},
        ),
        "distributed bf16": (Case(bf16=True, distributed=True, tied=True, bucket_size=100), {}),
        "experts": (Case(experts=2, config=MOE), {}),
        "experts distributed": (Case(experts=2, distributed=True, bucket_size=100, config=MOE), {}),
    },
    4: {
        "tensor x data": (Case(tensor=2, bf16=True, config=SEQUENCE), {}),
        "tensor x distributed": (
            Case(tensor=2, distributed=True, bucket_size=100),
            {"groups_of": small_groups, "thresholds": small},
        ),
        "experts, sliced": (Case(tensor=2, experts=2, config=MOE | SEQUENCE), {}),
        "experts, whole, distributed": (
            Case(tensor=2, experts=2, expert_tensor=1, distributed=True, bucket_size=60, config=MOE | SEQUENCE),
            {},
        ),
        "experts, each on two ranks": (Case(experts=2, distributed=True, bf16=True, config=MOE), {}),
    },
}
HERE = CASES.get(int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")), {})


@pytest.mark.parametrize("name", HERE)
def test_parity(world: Any, name: str) -> None:
    case, options = HERE[name]
    parity(world, case, **options)
