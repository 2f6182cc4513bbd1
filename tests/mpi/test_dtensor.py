"""DTensor in all its forms: FSDP2, HSDP, tensor parallel, both, three axes, placements by hand."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import dist_agc
import oracle
from helpers import agc, assert_clipped, assert_equal_everywhere, collectives, full, worst_relative_error
from models import awkward
from parallel import parallel, sequence_loss, sequences, tensor_parallel
from parity import check_one_clip, check_training, distribute

pytestmark = [
    pytest.mark.mpi(min_size=2),
    # einsum gives a view; nothing here changes it in place.
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor"),
]


def two_axes(world: Any) -> list[tuple[int, int]]:
    return [(1, world.size), (world.size, 1)] + ([(2, 2)] if world.size == 4 else [])


# ------------------------------------------------------------------------------------------------- FSDP2 and HSDP


def shard_every_layer(model: nn.Module, **options: Any) -> nn.Module:
    """As is usual: a group for each layer, the root takes the rest (here the tied weights)."""
    for name, layer in model.named_children():
        if name not in ("embedding", "head"):
            fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def test_fsdp2(world: Any) -> None:
    model = shard_every_layer(awkward(), mesh=world.mesh())
    check_training(world, model, awkward(dtype=torch.float64), all_reduces=1)


def test_fsdp2_with_excluded_parameters_and_units_by_hand(world: Any) -> None:
    model = shard_every_layer(awkward(), mesh=world.mesh())
    check_training(
        world,
        model,
        awkward(dtype=torch.float64),
        all_reduces=1,
        exclude=("norm.weight", "head.bias"),
        units={"experts.weight": (0, 1), "conv.weight": ()},
    )


def last_dim(parameter: nn.Parameter) -> Shard | None:
    """Cut inside of units wherever FSDP2 can: it wants other dims than 0 to be even."""
    sizes = [d for d in range(1, parameter.ndim) if parameter.shape[d] % torch.distributed.get_world_size() == 0]
    return Shard(sizes[-1]) if sizes else None


def test_fsdp2_sharded_along_other_dims(world: Any) -> None:
    model = shard_every_layer(awkward(), mesh=world.mesh(), shard_placement_fn=last_dim)
    cut = [name for name, p in model.named_parameters() if isinstance(p, DTensor) and p.placements != (Shard(0),)]
    assert cut or world.size == 3
    check_training(world, model, awkward(dtype=torch.float64), all_reduces=1)


@pytest.mark.parametrize("which", range(3))
def test_hsdp(world: Any, which: int) -> None:
    shapes = two_axes(world)
    if which >= len(shapes):
        pytest.skip("needs 4 ranks")
    mesh = world.mesh(shapes[which], ("replicate", "shard"))
    model = shard_every_layer(awkward(), mesh=mesh)
    # Copies are never added up: nothing is sent along the axis of replicas.
    check_training(world, model, awkward(dtype=torch.float64), all_reduces=int(mesh.shape[1] > 1))


# ------------------------------------------------------------------------------------------------- tensor parallel


def check_parallel(world: Any, model: nn.Module, share: tuple[int, int], all_reduces: int) -> None:
    check_training(
        world,
        model,
        parallel(torch.float64),
        share=share,
        all_reduces=all_reduces,
        clipping_threshold=0.03,
        batches=sequences,
        loss=sequence_loss,
    )


def test_tensor_parallel(world: Any) -> None:
    model = tensor_parallel(parallel(), world.mesh(names=("tp",)))
    # SequenceParallel leaves the sums of the norm's two gradients to the optimizer: a collective of their own, before.
    check_parallel(world, model, (0, 1), all_reduces=2)


@pytest.mark.parametrize("which", range(3))
def test_tensor_parallel_and_fsdp2(world: Any, which: int) -> None:
    shapes = two_axes(world)
    if which >= len(shapes):
        pytest.skip("needs 4 ranks")
    mesh = world.mesh(shapes[which], ("dp", "tp"))
    model = tensor_parallel(parallel(), mesh["tp"])
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    if mesh.shape == (2, 2):
        weight, bias = model.up.weight, model.up.bias
        assert isinstance(weight, DTensor) and isinstance(bias, DTensor)
        assert "_StridedShard" in type(weight.placements[0]).__name__ and bias.to_local().numel() == 3
    share = mesh["dp"].get_local_rank(), mesh["dp"].size()
    check_parallel(world, model, share, all_reduces=sum(size > 1 for size in mesh.shape))


@pytest.mark.parametrize("shape", [(1, 2, 2), (2, 1, 2), (2, 2, 1)], ids=str)
def test_tensor_parallel_and_hsdp(world: Any, shape: tuple[int, int, int]) -> None:
    if world.size != 4:
        pytest.skip("needs 4 ranks")
    mesh = world.mesh(shape, ("replicate", "shard", "tp"))
    model = tensor_parallel(parallel(), mesh["tp"])
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh["replicate", "shard"])
    fully_shard(model, mesh=mesh["replicate", "shard"])
    place = mesh.get_local_rank("replicate") * shape[1] + mesh.get_local_rank("shard")
    check_parallel(world, model, (place, shape[0] * shape[1]), all_reduces=sum(size > 1 for size in shape[1:]))


# ------------------------------------------------------------------------------------------------- placements by hand


class Zoo(nn.Module):
    """A parameter of each rule, in sizes that no number of ranks divides, some smaller than the number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 7)
        self.conv = nn.Conv2d(3, 5, (2, 3))
        self.transposed = nn.ConvTranspose1d(5, 7, 3)
        self.grouped = nn.ConvTranspose2d(6, 6, (3, 2), groups=2)
        self.experts = nn.Parameter(torch.randn(3, 5, 2))
        self.table = nn.Embedding(1, 9)
        self.scalar = nn.Parameter(torch.ones(()))


def zoo() -> Zoo:
    torch.manual_seed(4)
    return Zoo()


UNITS = {"experts": (0, 1)}


def cut(ndim: int, choice: int) -> Any:
    return Replicate() if choice % (ndim + 1) == ndim else Shard(choice % (ndim + 1))


def test_any_dim_of_any_parameter_on_one_axis(world: Any) -> None:
    shapes = {name: p.ndim for name, p in zoo().named_parameters()}
    for choice in range(5):
        placements = {name: [cut(ndim, choice)] for name, ndim in shapes.items()}
        check_one_clip(world, zoo, lambda m, p=placements: distribute(m, world.mesh(), p), units=UNITS, all_reduces=1)


def test_any_two_dims_of_any_parameter_on_two_axes(world: Any) -> None:
    """Each parameter is cut in its own way, so that orders of axes conflict and empty ranks pass sums on."""
    shapes = {name: p.ndim for name, p in zoo().named_parameters()}
    mesh = world.mesh((2, world.size // 2) if world.size % 2 == 0 else (world.size, 1), ("outer", "inner"))
    for first, second in itertools.product(range(5), repeat=2):
        placements = {}
        for i, (name, ndim) in enumerate(shapes.items()):
            placements[name] = [cut(ndim, first + i), cut(ndim, second + 2 * i)]
            if name == "grouped.weight" and placements[name] == [Shard(0), Shard(0)]:
                placements[name] = [Replicate(), Shard(0)]
        check_one_clip(world, zoo, lambda m, p=placements: distribute(m, mesh, p), units=UNITS)


def test_opposite_orders_of_axes(world: Any) -> None:
    """A wants its units whole along one axis before it is counted along the other, B the other way round."""
    mesh = world.mesh((world.size // 2, 2) if world.size % 2 == 0 else (world.size, 1), ("outer", "inner"))
    placements = {"0.weight": [Shard(1), Shard(0)], "1.weight": [Shard(0), Shard(1)]}

    def make() -> nn.Module:
        torch.manual_seed(6)
        return nn.Sequential(nn.Linear(5, 7), nn.Linear(9, 3))

    # One collective per axis, and one more for the statistics of whichever comes first.
    axes = sum(size > 1 for size in mesh.shape)
    check_one_clip(world, make, lambda m: distribute(m, mesh, placements), all_reduces=3 if axes == 2 else 1)


def test_several_meshes_and_plain_tensors(world: Any) -> None:
    """Where clip_grad_norm_ raises: experts on a mesh of their own, a table cut over all ranks, plain norms."""
    flat = world.mesh()
    experts = world.mesh((1, world.size), ("dp", "ep")) if world.size != 4 else world.mesh((2, 2), ("dp", "ep"))

    def make() -> nn.Module:
        torch.manual_seed(7)
        model = nn.ModuleDict({"table": nn.Embedding(11, 6), "norm": nn.LayerNorm(6), "head": nn.Linear(6, 3)})
        model.register_module("moe", nn.ParameterDict({"up": torch.randn(6, 5, 3), "down": torch.randn(5, 3, 5)}))
        return model

    def shard(model: nn.Module) -> nn.Module:
        model = distribute(model, flat, {"table.weight": [Shard(0)], "head.weight": [Shard(1)]})
        return distribute(model, experts, {"moe.up": [Shard(1), Shard(0)], "moe.down": [Replicate(), Shard(0)]})

    units = {"moe.up": (0, 1), "moe.down": (0, 1)}
    # Without 4 ranks both meshes have the same ranks, and those share a collective.
    expected = check_one_clip(world, make, shard, units=units, all_reduces=3 if world.size == 4 else 1)
    assert expected.per_parameter["moe.up"].units == 30
    model = shard(make())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises((RuntimeError, ValueError), match="mesh|mixed"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def test_pending_sums_of_replicated_parameters_are_added_up(world: Any) -> None:
    """A Partial gradient of a replicated parameter is each rank's share of a sum, and the sum is judged."""
    layer, shares = pending_sums(world, Replicate())
    weight: Any = layer.weight
    expected = oracle.clip({"weight": full(weight)}, {"weight": shares.sum(0)}, {"weight": oracle.Units((0,))}, 0.5)
    stats = agc(layer, clipping_threshold=0.5)
    assert_clipped(layer, stats, expected)
    assert_equal_everywhere(world, stats)


def pending_sums(world: Any, placement: Any) -> tuple[nn.Module, torch.Tensor]:
    layer = distribute(nn.Linear(4, 6, bias=False), world.mesh(), {"weight": [placement]})
    torch.manual_seed(8)
    shares = torch.randn(world.size, 6, 4) * torch.tensor([0.01, 9.0, 0.01, 9.0, 9.0, 0.01])[:, None]
    give(world, layer.weight, shares)
    return layer, shares


def give(world: Any, weight: Any, shares: torch.Tensor) -> None:
    """Each rank its own share, in memory of its own."""
    weight.grad = DTensor.from_local(shares[world.rank].clone(), world.mesh(), [Partial()], run_check=False)


def share_of(weight: Any) -> torch.Tensor:
    assert weight.grad.placements == (Partial(),), "still a share"
    return weight.grad.to_local()


def test_pending_sums_wait_for_ranks_without_a_gradient(world: Any) -> None:
    """The sequence of collectives does not follow from which gradients exist; a rank without one adds zeros."""
    layer, shares = pending_sums(world, Replicate())
    layer.register_parameter("gain", nn.Parameter(torch.ones(3)))
    weight: Any = layer.weight
    clipper = dist_agc.Clipper(layer, clipping_threshold=0.5)
    for missing in (1, None, 0):  # also in the very first call
        give(world, weight, shares)
        share = share_of(weight)
        if world.rank == missing:
            layer.zero_grad()
        present = [shares[rank] for rank in range(world.size) if rank != missing]
        expected = oracle.clip(
            {"weight": full(weight), "gain": full(layer.gain)},  # type: ignore[arg-type]
            {"weight": torch.stack(present).sum(0)},
            {"weight": oracle.Units((0,)), "gain": oracle.Units(())},
            0.5,
        )
        with collectives() as seen:
            clipper.clip()
        world.check((missing == 1) or seen.counts == {"allreduce_": 1}, str(seen.counts))
        if world.rank == missing:
            world.check(weight.grad is None)
            continue
        world.check(weight.grad.placements == (Replicate(),), "the sum took the place of the share")
        error = worst_relative_error({"weight": share.double()}, {"weight": expected.grads["weight"]})
        assert error <= 1e-6, "in the memory of the share"


def test_pending_sums_of_parameters_that_another_axis_cuts(world: Any) -> None:
    """Their pieces are known only after the sum, so it comes first and not in the collective of its own axis."""
    mesh = world.mesh((1, world.size) if world.size != 4 else (2, 2), ("dp", "tp"))
    model = distribute(nn.Linear(3, 5), mesh, {"weight": [Shard(1), Replicate()], "bias": [Shard(0), Shard(0)]})
    torch.manual_seed(9)
    shares = {name: torch.randn(world.size, *p.shape) * 9 for name, p in model.named_parameters()}
    shares["weight"][:, ::2] *= 0.01
    for name, parameter in model.named_parameters():
        placed: Any = parameter
        whole = shares[name] if name == "weight" else shares[name][:1]
        parts = [distribute_tensor(part, mesh, placed.placements, src_data_rank=None) for part in whole]
        mine = parts[mesh.get_local_rank("tp") if name == "weight" else 0].to_local()
        pending = [*placed.placements[:1], Partial() if name == "weight" else placed.placements[1]]
        placed.grad = DTensor.from_local(
            mine.clone(), mesh, pending, run_check=False, shape=placed.shape, stride=placed.stride()
        )
    totals = {"weight": shares["weight"][: mesh.size(1)].sum(0), "bias": shares["bias"][0]}
    weights = {name: full(p) for name, p in model.named_parameters()}
    expected = oracle.clip(weights, totals, {"weight": oracle.Units((0,)), "bias": oracle.Units(())}, 4.0)
    with collectives() as seen:
        stats = agc(model, clipping_threshold=4.0)
    assert_clipped(model, stats, expected)
    # The first call's question, the sum, one of each axis.
    assert seen.counts["allreduce_"] == 3 + (world.size == 4), seen.counts


def test_pending_sums_stay_where_nothing_is_clipped(world: Any) -> None:
    """Until everything was checked, and in a dry run, every gradient is as it was."""
    layer, shares = pending_sums(world, Replicate())
    measured = agc(layer, clipping_threshold=0.5, dry_run=True)
    assert torch.equal(share_of(layer.weight), shares[world.rank])
    assert int(measured.clipped_units) == int(agc(layer, clipping_threshold=0.5).clipped_units) > 0

    layer, shares = pending_sums(world, Replicate())
    if world.rank == 0:
        share_of(layer.weight)[2, 1] = float("inf")
    with pytest.raises(FloatingPointError, match="in weight; no gradient was changed"):
        agc(layer, clipping_threshold=0.5, on_nonfinite="raise")
    assert torch.equal(share_of(layer.weight)[3:], shares[world.rank, 3:])

    layer, shares = pending_sums(world, Replicate())
    layer.register_parameter("later", nn.Parameter(torch.ones(2, 3)))
    layer.later.grad = torch.ones(1, 3).expand(2, 3)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="'later' has a gradient with several elements in one place"):
        agc(layer, clipping_threshold=0.5)
    assert torch.equal(share_of(layer.weight), shares[world.rank])


@pytest.mark.filterwarnings("ignore:exclude=.* leaves out every parameter")
def test_pending_sums_of_excluded_parameters_stay_for_the_optimizer(world: Any) -> None:
    layer, shares = pending_sums(world, Replicate())
    stats = agc(layer, clipping_threshold=0.5, exclude="weight")
    assert float(stats.grad_norm) == pytest.approx(float(shares.sum(0).norm()), rel=1e-6)
    assert torch.equal(share_of(layer.weight), shares[world.rank])


# ------------------------------------------------------------------------------------------------- what is refused


def test_pending_sums_of_sharded_parameters_name_the_parameter(world: Any) -> None:
    layer, shares = pending_sums(world, Shard(0))
    with pytest.raises(ValueError, match=r"'weight' has placements .*Shard.* and its gradient .*Partial"):
        agc(layer, clipping_threshold=0.5)
    gradient: Any = layer.weight.grad
    assert torch.equal(gradient.to_local(), shares[world.rank])


def test_unknown_placements_name_the_parameter(world: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    local = torch.ones(2, 2)
    partial = DTensor.from_local(local, world.mesh(), [Partial()], run_check=False)
    model[1].weight = nn.Parameter(partial)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match=r"'1\.weight' has the placement Partial.*mesh axis 0.*Redistribute"):
        dist_agc.apply_agc(model, clipping_threshold=0.01)
    assert all(
        bool((full(p.grad) == full(torch.ones_like(p))).all()) for p in model[0].parameters() if p.grad is not None
    )


def test_gradients_that_lie_elsewhere(world: Any) -> None:
    model = distribute(nn.Sequential(nn.Linear(3, 2), nn.Linear(4, 4)), world.mesh(), {"1.weight": [Shard(0)]})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model[1].weight.grad = distribute_tensor(torch.ones(4, 4), world.mesh(), [Shard(1)])  # type: ignore[index,union-attr]
    with pytest.raises(ValueError, match=r"'1\.weight' has placements .*Shard\(dim=0\).*redistribute the gradient"):
        dist_agc.apply_agc(model, clipping_threshold=0.01)
    assert all(bool((p.grad == 1).all()) for p in model[0].parameters() if p.grad is not None)  # type: ignore[index,union-attr]


def test_a_grouped_weight_cut_twice_along_dim_0(world: Any) -> None:
    mesh = world.mesh((1, world.size) if world.size != 4 else (2, 2), ("outer", "inner"))
    layer = distribute(nn.ConvTranspose1d(8, 4, 3, groups=2), mesh, {"weight": [Shard(0), Shard(0)]})
    if world.size == 4:
        with pytest.raises(ValueError, match=r"'weight' .*dim 0, seen as \(.*\), is sharded along more"):
            dist_agc.Clipper(layer, clipping_threshold=0.01)
    else:
        assert dist_agc.Clipper(layer, clipping_threshold=0.01).execution().plan.units == 4 + 1


def test_a_grouped_weight_cut_in_strides(world: Any) -> None:
    """As transformers' ``packed_colwise`` cuts fused weights: each rank has a part of each half of dim 0."""
    layer, placed = nn.ConvTranspose1d(4 * world.size, 4, 3, groups=2), [_StridedShard(0, split_factor=2)]
    with torch.no_grad():
        mine = torch.cat([half.chunk(world.size)[world.rank] for half in layer.weight.chunk(2)])
    layer.weight = nn.Parameter(DTensor.from_local(mine, world.mesh(), placed, run_check=False))
    layer.weight.grad = torch.ones_like(layer.weight)
    with pytest.raises(ValueError, match=r"'weight' with placements .*: dim 0, of which units see a part, is cut in"):
        dist_agc.apply_agc(layer, clipping_threshold=0.01)
    assert bool((layer.weight.grad.to_local() == 1).all())  # type: ignore[union-attr]
