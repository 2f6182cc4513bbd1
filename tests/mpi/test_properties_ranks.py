"""Random models on real ranks: any shapes, rules, meshes, placements, dtypes and gradient patterns give the oracle's.

Drawn from a seed and not by hypothesis, which would shrink a failure on one rank while the others wait.
"""

import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import dist_agc
import oracle
from helpers import collectives, full_grads, full_weights, worst_relative_error

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.filterwarnings("ignore")]

EXAMPLES = 40
TOLERANCE = {torch.float32: 2e-6, torch.float64: 2e-6, torch.bfloat16: 5e-3}
PATTERNS = ("noise", "noise", "noise", "none", "zero", "inf", "nan", "none here", "zero weight")


def draw(seed: int, size: int) -> dict[str, Any]:
    """One case, the same on every rank."""
    rng = random.Random(seed)
    shapes = [(size,), (size, 1), (1, size)] + ([(2, 2)] * 3 if size == 4 else [])
    mesh = rng.choice(shapes)
    parameters = []
    for _ in range(rng.randint(1, 4)):
        shape = tuple(rng.randint(0 if rng.random() < 0.1 else 1, 6) for _ in range(rng.randint(1, 5)))
        kept = tuple(range(rng.randint(0, min(2, len(shape)))))
        placements = [Replicate() if rng.random() < 0.3 else Shard(rng.randrange(len(shape))) for _ in mesh]
        parameters.append((shape, kept, placements, rng.choice(PATTERNS)))
    dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
    return {"mesh": mesh, "parameters": parameters, "dtype": dtype, "on_nonfinite": rng.choice(["keep", "zero"])}


def build(world: Any, case: dict[str, Any], seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """The sharded model; and the gradients that rank 1 lacks, by name."""
    torch.manual_seed(seed)
    model, mesh, missing = nn.Module(), world.mesh(case["mesh"], ("a", "b")[: len(case["mesh"])]), {}
    for i, (shape, _, placements, pattern) in enumerate(case["parameters"]):
        weight, grad = torch.randn(shape), torch.randn(shape) * torch.randn(shape[:1] + (1,) * (len(shape) - 1)).exp()
        if pattern == "zero weight":
            weight.zero_()
        if pattern == "zero":
            grad.zero_()
        elif pattern in ("inf", "nan") and grad.numel():
            grad.view(-1)[seed % grad.numel()] = float(pattern)
        made = nn.Parameter(distribute_tensor(weight.to(case["dtype"]), mesh, placements))
        placed = distribute_tensor(grad.to(case["dtype"]), mesh, placements)
        if pattern == "none here" and all(p.is_shard() for p in placements):
            if world.rank == 1:
                placed.to_local().zero_()
            missing[f"p{i}"] = placed
        made.grad = None if pattern == "none" else placed
        model.register_parameter(f"p{i}", made)
    return model, missing


def test_random_models_give_the_oracles_gradients(world: Any) -> None:
    clipped = units = 0
    for seed in range(EXAMPLES):
        case = draw(seed, world.size)
        model, missing = build(world, case, seed)
        rules = {f"p{i}": oracle.Units(kept) for i, (_, kept, _, _) in enumerate(case["parameters"])}
        expected = oracle.clip(full_weights(model), full_grads(model), rules, 1.0, on_nonfinite=case["on_nonfinite"])
        options = {
            "clipping_threshold": 1.0,
            "units": {name: rule.dims for name, rule in rules.items()},
            "on_nonfinite": case["on_nonfinite"],
        }
        if world.rank == 1:
            for name in missing:
                model.get_parameter(name).grad = None
        clipper = dist_agc.Clipper(model, **options)
        with collectives() as first:
            stats = clipper.clip()
        for name, grad in missing.items():
            model.get_parameter(name).grad = grad
        assert stats is not None
        error = worst_relative_error(full_grads(model), expected.grads)
        assert error <= TOLERANCE[case["dtype"]], f"seed {seed}: {error:.2g} in {case}"
        assert (stats.units, int(stats.nonfinite_units)) == (expected.units, expected.nonfinite_units), f"seed {seed}"
        said = world.gather((first.counts, repr(stats.as_dict(per_parameter=True))))
        assert len(set(map(str, said))) == 1 or len(case["mesh"]) == 2 and len({text for _, text in said}) == 1
        clipped, units = clipped + expected.clipped_units, units + expected.units
    assert 0.1 * units < clipped < 0.9 * units
