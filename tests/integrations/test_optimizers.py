"""Several optimizers on one model, optimizers and models that wrap others, and plain loggers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import workload
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dist_agc
import oracle
import turns
from helpers import full_grads, full_weights, worst_relative_error

HEAD = ("head.weight", "head.bias")

trained = turns.fixture((2, ["muon", "zero_redundancy"]), read=workload.left_in)


def backward(net: workload.Net, rank: int = 0, ranks: int = 1) -> oracle.Reference:
    """Gradients of the whole data set, and what the oracle makes of them."""
    net.zero_grad()
    net(*workload.my_share(rank, ranks))["loss"].backward()
    return oracle.clip(full_weights(net), full_grads(net), oracle.unit_rules(net), workload.THRESHOLD, exclude=HEAD)


def train_with_muon(net: workload.Net, rank: int = 0, ranks: int = 1) -> list[dict[str, Any]]:
    """Three steps, each held against the oracle; what they tell."""
    matrices = [net.first.weight, net.second.weight]
    rest = [p for p in net.parameters() if all(p is not m for m in matrices)]
    muon, adamw = torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.01)
    hook = dist_agc.attach(net, [muon, adamw], clipping_threshold=workload.THRESHOLD, exclude=workload.EXCLUDE)
    steps = []
    for _ in range(3):
        expected = backward(net, rank, ranks)
        muon.step()
        adamw.step()
        assert 0 < expected.clipped_units < expected.units
        assert worst_relative_error(full_grads(net), expected.grads) < 1e-6
        assert hook.stats is not None
        steps.append(workload.record(hook.stats))
        assert steps[-1]["clipped"] == {n: p.clipped_units for n, p in expected.per_parameter.items()}
        assert steps[-1]["grad_norm"] == pytest.approx(expected.grad_norm, rel=1e-6)
    return steps


def test_muon_and_adamw_on_one_model(trained: turns.Trained) -> None:
    """And sharded by FSDP2, whose ranks clip the same units and reach the same weights."""
    net = workload.model()
    steps = train_with_muon(net)
    found = trained("muon")
    assert [step["clipped"] for step in found["steps"]] == [step["clipped"] for step in steps]
    for name, weight in net.named_parameters():  # Muon orthogonalises in bfloat16
        assert float((found["weights"][name] - weight.detach()).norm() / weight.detach().norm()) < 1e-2


def muon(folder: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = workload.model()
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    steps = train_with_muon(net, dist.get_rank(), 2)
    weights = workload.full_weights(net)
    if dist.get_rank() == 0:
        workload.save(folder, steps, weights)


@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_averaged_models_take_no_part(kind: str) -> None:
    """Attach to the model that trains; its average has parameters of its own."""
    net = workload.model()
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9) if kind == "ema" else None)
    optimizer = torch.optim.SGD(net.parameters(), lr=workload.LR, momentum=workload.MOMENTUM)
    hook = dist_agc.attach(net, optimizer, clipping_threshold=workload.THRESHOLD, exclude=workload.EXCLUDE)
    steps = []
    for _ in range(workload.STEPS):
        backward(net)
        optimizer.step()
        averaged.update_parameters(net)
        steps.append(workload.record(hook.stats))
    workload.assert_as_oracle({"steps": steps, "weights": dict(net.named_parameters())})
    with pytest.raises(ValueError, match="holds none of the model's parameters"):
        dist_agc.attach(averaged, torch.optim.SGD(net.parameters(), lr=0.1))


class Container(torch.optim.Optimizer):
    """The shape of torchtitan's OptimizersContainer: an Optimizer over the optimizers of several model parts."""

    def __init__(self, parts: list[torch.nn.Module], **options: Any) -> None:
        self.optimizers = [torch.optim.SGD(part.parameters(), **options) for part in parts]
        super().__init__([p for part in parts for p in part.parameters()], options)

    def step(self, closure: Any = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


@pytest.mark.parametrize("how", ["container", "optimizers"])
def test_a_container_of_optimizers(how: str) -> None:
    net = workload.model()
    parts = [torch.nn.ModuleList([net.first, net.second]), torch.nn.ModuleList([net.norm, net.head])]
    container = Container(list(parts), lr=workload.LR, momentum=workload.MOMENTUM)
    chosen = container if how == "container" else container.optimizers
    hook = dist_agc.attach(net, chosen, clipping_threshold=workload.THRESHOLD, exclude=workload.EXCLUDE)
    steps = []
    for _ in range(workload.STEPS):
        backward(net)
        container.step()
        steps.append(workload.record(hook.stats))
    workload.assert_as_oracle({"steps": steps, "weights": dict(net.named_parameters())})


@pytest.mark.filterwarnings("default")
def test_torchtitans_container() -> None:
    titan = pytest.importorskip("torchtitan.components.optimizer", reason="needs torchtitan")
    net = workload.model()
    groups = [
        titan.ParamGroupConfig(pattern=pattern, optimizer_name=name, optimizer_kwargs={"lr": 1e-3})
        for pattern, name in ((r"\.weight$", "AdamW"), (".*", "Adam"))
    ]
    config = titan.OptimizersContainer.Config(implementation="for-loop", param_groups=groups)
    container = titan.OptimizersContainer(config, model_parts=[net])
    hook = dist_agc.attach(net, container, clipping_threshold=workload.THRESHOLD, exclude=workload.EXCLUDE)
    for _ in range(3):
        expected = backward(net)
        container.step()
        assert 0 < expected.clipped_units < expected.units
        assert worst_relative_error(full_grads(net), expected.grads) < 1e-6
        assert hook.stats is not None and int(hook.stats.clipped_units) == expected.clipped_units


def zero_redundancy(folder: str) -> None:
    import torch.distributed as dist
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    net = workload.model()
    model = DistributedDataParallel(net)
    optimizer = ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, lr=workload.LR, momentum=workload.MOMENTUM)
    hook = dist_agc.attach(model, optimizer, clipping_threshold=workload.THRESHOLD, exclude=workload.EXCLUDE)
    x, labels = workload.my_share(dist.get_rank(), 2)
    steps = []
    for _ in range(workload.STEPS):
        optimizer.zero_grad()
        model(x, labels)["loss"].backward()
        optimizer.step()
        steps.append(workload.record(hook.stats))
    if dist.get_rank() == 0:
        workload.save(folder, steps, dict(net.named_parameters()))


def test_zero_redundancy_optimizer(trained: turns.Trained) -> None:
    workload.assert_as_oracle(trained("zero_redundancy"))


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard.writer import SummaryWriter

    net = workload.model()
    backward(net)
    stats = dist_agc.apply_agc(net, clipping_threshold=workload.THRESHOLD)
    assert stats is not None
    writer = SummaryWriter(str(tmp_path))
    for name, value in stats.as_dict(per_parameter=True).items():
        writer.add_scalar(name, value, 7)
    writer.close()
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    for name, value in stats.as_dict(per_parameter=True).items():
        (point,) = accumulator.Scalars(name)
        assert (point.step, point.value) == (7, pytest.approx(value, rel=1e-6))


if __name__ == "__main__":
    turns.take(lambda case, folder: {"muon": muon, "zero_redundancy": zero_redundancy}[case](folder))
