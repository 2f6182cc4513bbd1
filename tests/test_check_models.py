"""`dist-agc check` on models as they come: of transformers and timm, with lists of layers, tied weights, no loss.

Run as a program by torchrun it checks the models of `MODELS`, and rank 0 prints one line of JSON for each:

    torchrun --nproc-per-node 2 tests/test_check_models.py [NAME ...]
"""

import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from conftest import World
from dist_agc import conformance
from dist_agc.conformance import agreed_threshold, losses, sharding
from dist_agc.conformance.losses import OutputLoss, module_and_loss, of_example
from dist_agc.conformance.ranks import NotSetUp

AUDIT = Path(__file__).parent / "audit"
TIMM = (AUDIT.parents[1] / ".venv" / "pictures" / "timm").is_dir()  # see tests/audit/pictures.py
LAYOUTS = ("plain", "fsdp1 full", "fsdp2", "zero3")


def language(kind: str, **sizes: Any) -> nn.Module:
    """A language model of transformers with random weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=65, bos_token_id=1, eos_token_id=2, **sizes)
    kinds = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    return kinds.from_config(config).eval()  # without dropout, all layouts have the same gradients


def tokens(seed: int) -> dict[str, Tensor]:
    found = torch.randint(3, 65, (2, 12), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": found, "labels": found}


def of_this_rank(model: nn.Module) -> Tensor:
    return model(**tokens(dist.get_rank())).loss


def shots(seed: int) -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def gpt2() -> nn.Module:
    """Tied weights, and no loss: its tokens are those that transformers shows as an example."""
    return language("gpt2", n_embd=16, n_head=2, n_layer=2, n_positions=16)


LLAMA = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}


def llama() -> tuple[nn.Module, Any]:
    return language("llama", intermediate_size=24, **LLAMA), tokens(0)


def mixtral() -> tuple[nn.Module, Any]:
    return language("mixtral", intermediate_size=12, num_local_experts=4, **LLAMA), of_this_rank


def t5() -> tuple[nn.Module, Any]:
    """One embedding for encoder, decoder and head."""
    return language(
        "t5", d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=2, decoder_start_token_id=0
    ), of_this_rank


def vit() -> tuple[nn.Module, Any]:
    import timm  # pyright: ignore[reportMissingImports]

    sizes = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 7}
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **sizes), shots(dist.get_rank())


def nfnet() -> tuple[nn.Module, Any]:
    """Norm-free: weights are standardised, and its skips begin at a gain of their own."""
    from timm.models.nfnet import NfCfg, NormFreeNet  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    config = NfCfg((1, 1, 1, 1), (16, 16, 24, 24), stem_type="3x3", stem_chs=8, bottle_ratio=0.25, num_features=32)
    classes = torch.tensor([1, 2])
    return NormFreeNet(config, num_classes=7), lambda model: nn.functional.cross_entropy(
        model(shots(dist.get_rank())), classes
    )


def plain() -> tuple[nn.Module, Any]:
    """Comes as it is: a whole model on each rank, and nothing averages the gradients of their data."""
    torch.manual_seed(0)
    return nn.Linear(5, 3), lambda model: model(torch.arange(5.0) + dist.get_rank()).square().mean()


def accumulates() -> tuple[nn.Module, Any]:
    """A DeepSpeed engine, of which every other step does not come to its optimizer."""
    import deepspeed

    model = nn.Linear(5, 3)
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), config=config)
    return engine, torch.ones(4, 5)


# Comes sharded, or as if it were, and why it cannot be checked.
AS_IS = {
    plain: "ranks have different gradients: average them in loss(module)",
    accumulates: "a step does not come to its optimizer: is gradient_accumulation_steps 1?",
}
MEAN, OUTPUT = "the mean of squares of the model's first output", "the loss in the model's output"
# What the gradients come from, and how many layers are sharded by themselves.
MODELS: dict[Callable[[], Any], tuple[str, int]] = {
    gpt2: (MEAN, 2),
    llama: (OUTPUT, 2),
    mixtral: (losses.GIVEN, 2),
    t5: (losses.GIVEN, 4),
    vit: (MEAN, 2),
    nfnet: (losses.GIVEN, 4),
}


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if TIMM:
        sys.path.append(str(AUDIT))
        import pictures  # pyright: ignore[reportMissingImports]

        pictures.find()
    dist.init_process_group("gloo")
    factories = [factory for factory in MODELS if factory.__name__ in names]
    layers = [len(sharding.layers(losses.module_and_loss(factory())[0])) for factory in factories]
    gc.freeze()  # the libraries: check collects garbage after every layout
    for factory, count in zip(factories, layers, strict=True):
        rows = conformance.run(LAYOUTS, factory=factory, report=lambda rows: None)
        if dist.get_rank() == 0:
            said = {"model": factory.__name__, "layers": count, "rows": [asdict(row) for row in rows]}
            print(json.dumps(said), flush=True)
    for factory in AS_IS:
        (row,) = conformance.run(["as-is"], factory=factory, report=lambda rows: None)
        if dist.get_rank() == 0:
            print(json.dumps({"model": factory.__name__} | asdict(row)), flush=True)
    dist.destroy_process_group()


def checked(*factories: Callable[[], Any]) -> dict[str, Any]:
    """What this program says in two processes, by the name of the model."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", __file__, *(f.__name__ for f in factories)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr
    found = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith('{"model"')]
    return {record["model"]: record for record in found}


def test_models_of_transformers_and_timm() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("deepspeed")
    wanted = [f for f in MODELS if f not in (vit, nfnet) or TIMM]
    found = checked(*wanted)
    for factory in wanted:
        record, (gradients, layers) = found[factory.__name__], MODELS[factory]
        rows = {row["layout"]: row for row in record["rows"] if row["verdict"] != "skipped"}
        assert {"plain", "fsdp1 full", "fsdp2"} <= set(rows) and record["layers"] == layers, record
        for row in rows.values():
            assert (row["verdict"], row["gradients"]) == ("ok", gradients), (factory.__name__, row)
            assert row["error"] < 1e-6 and 0 < row["clipped_units"] < row["units"]
        # Each layout has the average of all ranks' gradients, so that the same units are clipped in all of them.
        assert len({row["clipped_units"] for row in rows.values()}) == 1, rows
    for factory, reason in AS_IS.items():
        row = found[factory.__name__]
        assert row["verdict"] == "not set up" and row["note"].startswith(reason), row


# ------------------------------------------------------------------------------------------ what is sharded by itself


class Block(nn.Module):
    def __init__(self, around: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = around or nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Model(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def tied() -> nn.Module:
    """The head has the weight of the embedding, and the last layer the bias of the head."""
    model = Model(embedding=nn.Embedding(4, 4), layers=nn.ModuleList([Block(), nn.Linear(4, 4)]), head=nn.Linear(4, 4))
    model.get_submodule("head").weight = model.get_submodule("embedding").weight
    model.get_submodule("head").bias = model.get_submodule("layers.1").bias
    return model


LISTS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "a list": (lambda: Model(layers=nn.ModuleList([Block(), Block()]), head=nn.Linear(4, 4)), ["layers.0", "layers.1"]),
    "a list first and no other child": (lambda: Model(layers=nn.ModuleList([Block()])), ["layers.0"]),
    "a sequence": (lambda: nn.Sequential(Block(), nn.ReLU(), Block()), ["0", "2"]),
    "lists of lists": (
        lambda: Model(layers=nn.ModuleList(nn.ModuleList([Block(), nn.Linear(4, 4)]) for _ in range(2))),
        ["layers.0.0", "layers.0.1", "layers.1.0", "layers.1.1"],
    ),
    "inside of others": (
        lambda: Model(a=nn.ModuleDict({"h": nn.ModuleList([Block()])}), b=Model(stages=nn.Sequential(Block()))),
        ["a.h.0", "b.stages.0"],
    ),
    "one layer again and again": (lambda: Model(layers=nn.ModuleList([Block()] * 3), head=nn.Linear(4, 4)), []),
    "tied": (tied, ["layers.0"]),
    "no list": (lambda: Model(a=Block(nn.Linear(4, 4)), b=nn.Linear(4, 4), c=nn.Linear(4, 4)), ["a"]),
    "no list, and half of it is none that runs": (lambda: Model(a=nn.ModuleDict(), b=nn.Linear(4, 4)), []),
}


@pytest.mark.parametrize("name", LISTS)
def test_layers_are_sharded_by_themselves_and_ties_kept_together(name: str) -> None:
    build, expected = LISTS[name]
    model = build()
    paths = {module: path for path, module in model.named_modules()}
    assert [paths[layer] for layer in sharding.layers(model)] == expected


# ---------------------------------------------------------------------------------------------------- a loss of none


class Says(nn.Module):
    """Returns what it is told to make of its one weight."""

    def __init__(self, output: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.weight, self.output = nn.Parameter(torch.tensor([1.0, 3.0])), output

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Any:
        return self.output(scale * self.weight * x)


class Output:
    def __init__(self, loss: Tensor | None) -> None:
        self.loss = loss


@pytest.mark.parametrize(
    ("output", "batch", "expected", "used"),
    [
        (lambda y: y, torch.ones(2), 5.0, MEAN),
        (lambda y: (torch.arange(3), None, y.half(), -y), (torch.ones(2),), 5.0, MEAN),
        (lambda y: {"loss": y.sum(), "logits": y}, {"x": torch.ones(2), "scale": 2.0}, 8.0, OUTPUT),
        (lambda y: {"loss": None, "logits": y}, [torch.ones(2)], 5.0, MEAN),
        (lambda y: Output(y.sum()), torch.ones(2), 4.0, OUTPUT),
    ],
)
def test_the_loss_of_a_batch(output: Callable[[Tensor], Any], batch: Any, expected: float, used: str) -> None:
    model, loss = module_and_loss((Says(output), batch))
    assert loss is not None and float(loss(model).detach()) == expected
    assert losses.described(loss) == used


def test_where_no_loss_can_be_guessed() -> None:
    with pytest.raises(NotSetUp, match=r"no loss and no float tensor: let the factory return \(model, loss\)"):
        OutputLoss(torch.ones(2))(Says(lambda y: Output(None)))


@pytest.mark.parametrize("made", [None, (None, torch.ones(2)), (nn.Linear(2, 2), torch.ones(2), None)])
def test_a_factory_that_makes_something_else(made: Any) -> None:
    with pytest.raises(TypeError, match=r"a module, \(module, loss\) or \(module, batch\), got "):
        module_and_loss(made)


def test_the_example_that_a_model_shows() -> None:
    model = Says(lambda y: y)
    assert of_example(model) is None and losses.described(None).startswith("noise, since no loss")
    model.dummy_inputs = {"x": torch.ones(2)}  # type: ignore[assignment]
    assert of_example(model) is not None
    model.dummy_inputs = {"input_ids": torch.ones(2)}  # type: ignore[assignment]
    assert of_example(model) is None, "it does not run with that"


# -------------------------------------------------------------------------------------------- ranks with their own data


def test_ranks_agree_on_a_threshold() -> None:
    assert agreed_threshold([None, None]) is None
    assert agreed_threshold([0.5, 0.5 * (1 + 1e-8)]) == 0.5, "copies of a sum may differ in its last digits"
    for found in ([0.5, 0.6], [0.5, None], [None, 0.5]):
        with pytest.raises(NotSetUp, match="ranks have different gradients"):
            agreed_threshold(found)


@pytest.mark.mpi(min_size=2)
def test_gradients_of_whole_models_are_averaged(world: World) -> None:
    first, last = nn.Linear(2, 1), nn.Linear(2, 1)
    first.weight.grad = torch.full((1, 2), float(world.rank))
    if world.rank == 1:
        last.weight.grad = torch.ones(1, 2)
    sharding.average_gradients(nn.Sequential(first, last))
    assert first.weight.grad is not None and last.weight.grad is not None
    world.check(torch.equal(first.weight.grad, torch.full((1, 2), (world.size - 1) / 2)))
    world.check(torch.allclose(last.weight.grad, torch.full((1, 2), 1 / world.size)), "a missing one counts as zero")
    world.check(first.bias.grad is None, "one that no rank has stays away")


if __name__ == "__main__":
    main(sys.argv[1:])
