"""`dist-agc check` as a user starts it, on real processes."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from typer.testing import CliRunner, Result

import turns
from dist_agc.cli import build
from dist_agc.clipper import Clipper
from dist_agc.conformance import cases

BIN = Path(sys.executable).parent

Done = subprocess.CompletedProcess[str]
Checked = Callable[[str], Done]

MODELS = '''
import torch
from torch import nn

from dist_agc.engine import execution

CPU = torch.device("cpu")
REAL = execution.all_reduce


def plain():
    """No loss: gradients are noise."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))


def loss(model):
    return model(torch.ones(4, 5)).square().mean()


def tiny():
    """Gradients so small beside the weights that no update of a weight shows them."""
    model = plain()
    for p in model.parameters():
        p.data.mul_(100)
    return model, lambda made: 1e-12 * loss(made)


def half():
    return plain().bfloat16()


class Layers(nn.Module):
    """A list of layers, which has no forward of its own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def layers():
    torch.manual_seed(0)
    return Layers(), torch.ones(4, 5)


class NoForward(nn.Module):
    """What fails says so in many lines."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x):
        raise RuntimeError(f"not with {self}")


def never():
    return NoForward(), torch.ones(4, 5)


def not_finite():
    return plain(), lambda made: loss(made) * float("inf")


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 6, 5))
        self.router = nn.Linear(5, 3)


def mixture():
    torch.manual_seed(0)
    return Mixture()


def fsdp1():
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(plain(), use_orig_params=False, device_id=CPU), loss


def fsdp1_orig():
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(plain(), use_orig_params=True, device_id=CPU), loss


def fsdp2():
    from torch.distributed.fsdp import fully_shard

    return fully_shard(plain()), loss


def shares():
    """Tensor parallelism that leaves the sum of a norm's gradients over ranks to whoever comes next."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 8), nn.Linear(8, 6))
    how = {
        "0": SequenceParallel(),
        "1": ColwiseParallel(input_layouts=Shard(1)),
        "2": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }
    parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), how)
    x = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(1))
    return model, lambda made: made(x).full_tensor().square().mean()


def engine():
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = plain()
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0], loss


def forgets():
    """Nothing is sent, as where the norm of a shard is taken for the norm of the whole."""
    execution.all_reduce = lambda buffer, axis: buffer
    return plain()


def chatters():
    """The answer is right, and comes with a collective that nobody planned."""

    def twice(buffer, axis):
        torch.distributed.all_reduce(torch.ones(1), group=axis.group)
        return REAL(buffer, axis)

    execution.all_reduce = twice
    return plain()


def not_on_rank_1(error):
    if torch.distributed.get_rank() == 1:
        raise error


def no_model():
    not_on_rank_1(OSError("no checkpoint"))
    return plain(), loss


def no_forward():
    def fails(model):
        not_on_rank_1(KeyError("no batch"))
        return loss(model)

    return plain(), fails


def no_forward_of_shares():
    model, shared = shares()

    def fails(made):
        not_on_rank_1(KeyError("no batch"))
        return shared(made)

    return model, fails


def no_loss():
    def fails(model):
        found = loss(model)
        not_on_rank_1(KeyError("no targets"))
        return found

    return plain(), fails


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        not_on_rank_1(ArithmeticError("no gradient"))
        return grad


class Middle(nn.Module):
    def forward(self, x):
        return Fails.apply(x)


def no_backward():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), Middle(), nn.Linear(7, 3)), loss


def needs_ddp():
    return plain(), lambda made: loss(made) * made.reducer.__class__.__name__.count("Reducer")


def exits():
    not_on_rank_1(SystemExit("no licence"))
    return plain(), loss
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MODELS)
    return tmp_path


def check(folder: Path, *arguments: str, nproc: int = 2, launcher: tuple[str, ...] = ()) -> Done:
    start = [*launcher, "dist_agc.cli", "check"] if launcher else [sys.executable, "-m", "dist_agc.cli", "check"]
    command = [*start, *([] if launcher else ["--nproc", str(nproc)]), *arguments]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)


# By name, what the command is given in a start of two processes that these cases share.
TOGETHER = {
    "plain": ["--model=mine:plain", "--layout=fsdp?*", "--layout=zero*", "--json"],
    "half": ["--model=mine:half", "--layout=fsdp2", "--layout=zero2", "--json"],
    "tiny": ["--model=mine:tiny", "--layout=zero*", "--json"],
    "experts": ["--model=mine:mixture", "--layout=fsdp1 full", "--layout=fsdp2", "--json"],
    "outputs": [
        *("--model=mine:mixture", "--layout=fsdp1 full", "--layout=fsdp2", "--json"),
        *("--units=exp*=0,1", "--units=*.bias="),
    ],
    "fsdp1": ["--model=mine:fsdp1", "--layout=as-is", "--json"],
    "fsdp1_orig": ["--model=mine:fsdp1_orig", "--layout=as-is", "--json"],
    "fsdp2": ["--model=mine:fsdp2", "--layout=as-is", "--json"],
    "shares": ["--model=mine:shares", "--layout=as-is", "--json"],
    "engine": ["--model=mine:engine", "--layout=as-is", "--json"],
    "forgets": ["--model=mine:forgets", "--layout=fsdp2", "--layout=ddp", "--json"],
    "chatters": ["--model=mine:chatters", "--layout=fsdp2", "--layout=ddp", "--json"],
    "needs_ddp": ["--model=mine:needs_ddp", "--layout=plain", "--layout=ddp", "--json"],
    "layers": ["--model=mine:layers", *(f"--layout={name}" for name in ("fsdp1 full", "fsdp2", "tp", "hsdp"))],
    "vacuous": ["--layout=ddp", "--exclude=*", "--json"],
}


def read(folder: Path, log: str) -> Done:
    return Done(["dist-agc", "check", *TOGETHER[folder.name]], int((folder / "code").read_text()), log, log)


trained = turns.fixture((2, list(TOGETHER)), read=read)


@pytest.fixture
def checked(trained: Checked) -> Checked:
    pytest.importorskip("deepspeed")
    return trained


def run(case: str, folder: str) -> None:
    """One rank's part of the command, as torchrun starts it."""
    from dist_agc.engine import execution

    real, arguments = execution.all_reduce, ["check", *TOGETHER[case]]
    Path(folder, "mine.py").write_text(MODELS)
    sys.path.insert(0, folder)
    sys.argv[1:] = arguments
    with pytest.raises(SystemExit) as ended:
        build()(arguments)
    execution.all_reduce = real
    Path(folder, "code").write_text(str(ended.value.code))


def rows_of(done: Done) -> dict[str, dict[str, Any]]:
    assert "{" in done.stdout, done.stderr
    found = json.loads(done.stdout[done.stdout.index('{\n  "torch"') : done.stdout.rindex("}") + 1])
    return {row["layout"]: row for row in found["layouts"]}


def all_ok(done: Done) -> dict[str, dict[str, Any]]:
    """The rows that ran. All of them are right, and in all of them something was clipped and something not."""
    rows = {name: row for name, row in rows_of(done).items() if row["verdict"] != "skipped"}
    assert rows and {row["verdict"] for row in rows.values()} == {"ok"}, rows
    assert done.returncode == 0, done.stderr
    assert all(0 < row["clipped_units"] < row["units"] for row in rows.values()), rows
    return rows


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program, path=str(BIN)) is None:
            pytest.skip(f"needs {program}")


# ------------------------------------------------------------------------------------------------ every layout, at once


@pytest.mark.parametrize("nproc", [2, 4])
def test_every_layout_is_right_and_what_knows_no_shards_is_not(folder: Path, nproc: int) -> None:
    rows = all_ok(check(folder, "--shard-unaware", "--json", nproc=nproc))
    assert all(row["error"] < 1e-6 and row["units"] == 114 for row in rows.values())
    whole = {"plain", "ddp", "zero0", "fsdp1 no-shard orig"}
    flat = {f"fsdp1 {kind}" for kind in ("full", "full orig", "grad-op", "grad-op orig")} | {"zero1", "zero2", "zero3"}
    placed = {"fsdp2", "tp"}
    if nproc == 4:
        flat |= {"fsdp1 hybrid", "fsdp1 hybrid orig"}
        placed |= {"hsdp", "tp+fsdp2"}
    stages = {"pipeline", "deepspeed pipeline"}
    assert set(rows) == whole | flat | placed | stages | {"fsdp1 no-shard", "autotp"}
    for name, row in rows.items():
        one, said = 4 * (row["collectives"] > 0), row["shard_unaware"]
        assert row["bytes"] % 4 == 0 and row["bytes"] >= one * 2 * row["split_units"], row
        if name in whole:
            assert (row["collectives"], row["split_units"], said) == (0, 0, "right")
        elif name in stages:  # of which nothing is cut, and statistics are added up
            assert (row["collectives"], row["split_units"], said) == (1, 0, "right")
        elif name in placed:
            assert row["collectives"] > 0 and said.startswith("raises RuntimeError after"), row
        else:  # a flat tensor, cut or not, is one unit to what does not know better
            sends = {"fsdp1 no-shard": 0, "autotp": nproc - 1}  # AutoTP: along one axis, or along two and back
            assert row["collectives"] == sends.get(name, 1) and said.startswith("error"), row
            assert float(said.split()[1]) > 0.1


@pytest.mark.parametrize(
    ("ranks", "runs"),
    [(1, 0), (2, 1), (3, 1), (4, 5), (6, 5), (7, 1), (8, 5), (10, 4), (12, 5), (14, 4)],
)
def test_meshes_fit_the_ranks(ranks: int, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    meshed = cases(["fsdp1 hybrid*", "*hsdp*", "tp*"])
    assert sum(case.needs() is None for case in meshed) == runs


# -------------------------------------------------------------------------------------------------- a model of the user


def test_a_model_without_a_loss(checked: Checked) -> None:
    """Named by globs, with noise for gradients; and in bf16, whose masters DeepSpeed keeps in fp32."""
    rows = all_ok(checked("plain"))
    assert set(rows) > {"fsdp1 full", "fsdp1 full orig", "fsdp2", "zero0", "zero1", "zero2", "zero3"}
    assert all(row["error"] < 1e-6 for row in rows.values())
    assert all(rows[name]["collectives"] == 1 for name in ("fsdp1 full", "fsdp2", "zero1", "zero3"))
    rows = all_ok(checked("half"))
    assert 1e-4 < rows["fsdp2"]["error"] < 8e-3 and rows["zero2"]["error"] < 1e-6


def test_small_gradients_of_large_weights(checked: Checked) -> None:
    rows = all_ok(checked("tiny"))
    assert len(rows) == 4 and all(row["error"] < 1e-6 for row in rows.values())


@pytest.mark.parametrize(("case", "count"), [("experts", 3 + 3 + 1), ("outputs", 3 * 6 + 3 + 1)])
def test_units_of_a_mixture_of_experts(checked: Checked, case: str, count: int) -> None:
    """By default an expert is one unit, as to any AGC; with the dims said, each of its outputs is."""
    rows = all_ok(checked(case))
    assert len(rows) == 2 and {row["units"] for row in rows.values()} == {count}


@pytest.mark.parametrize("factory", ["fsdp1", "fsdp1_orig", "fsdp2", "shares", "engine"])
def test_a_model_that_is_sharded_already(checked: Checked, factory: str) -> None:
    (row,) = all_ok(checked(factory)).values()
    assert row["units"] == (18 if factory == "shares" else 12)
    # Shares of a sum are added up first, by themselves.
    assert row["collectives"] == 1 + (factory == "shares") and row["error"] < 1e-6


# ----------------------------------------------------------------------------------------------------------- what fails


@pytest.mark.parametrize(
    ("factory", "said"),
    [("forgets", "a gradient element is off by"), ("chatters", "collectives: 2, expected 1; numbers sent: ")],
)
def test_a_clip_that_is_wrong_is_called_wrong(checked: Checked, factory: str, said: str) -> None:
    done = checked(factory)
    assert done.returncode == 1
    rows = rows_of(done)
    assert rows["fsdp2"]["verdict"] == "wrong" and said in rows["fsdp2"]["note"], rows
    assert rows["ddp"]["verdict"] == "ok"


@pytest.mark.parametrize(
    ("factory", "said", "layouts"),
    [
        ("no_model", "OSError: no checkpoint", ["ddp", "zero2"]),
        ("exits", "SystemExit: no licence", ["fsdp2", "zero3"]),
        ("no_forward", "KeyError: 'no batch'", ["ddp", "fsdp2"]),
        ("no_forward", "KeyError: 'no batch'", ["fsdp1 full", "zero0"]),
        ("no_forward", "KeyError: 'no batch'", ["zero3"]),
        ("no_forward_of_shares", "KeyError: 'no batch'", ["as-is"]),
        ("no_loss", "KeyError: 'no targets'", ["fsdp2", "zero0"]),
        ("no_loss", "KeyError: 'no targets'", ["zero2"]),
        ("no_backward", "ArithmeticError: no gradient", ["ddp", "fsdp2"]),
        ("no_backward", "ArithmeticError: no gradient", ["fsdp2", "zero3"]),
    ],
)
def test_what_fails_on_one_rank_names_it(folder: Path, factory: str, said: str, layouts: list[str]) -> None:
    """The others may be inside of collectives, which nothing can end; what then cannot run is said to be skipped."""
    if any("zero" in name for name in layouts):
        pytest.importorskip("deepspeed")
    chosen = [f"--layout={name}" for name in layouts]
    began = time.monotonic()
    done = check(folder, "--model", f"mine:{factory}", *chosen, "--json")
    assert done.returncode == 1 and "SIG" not in done.stderr and time.monotonic() - began < 90, done.stderr
    rows = rows_of(done)
    assert list(rows) == layouts
    first, *others = rows.values()
    assert first["verdict"] == "not set up" and first["note"] == f"rank 1: {said}", rows
    for row in others:
        if factory in ("no_model", "exits"):  # every rank knows before it shards anything
            assert row["verdict"] == "not set up" and row["note"] == first["note"]
        else:
            assert row["verdict"] == "skipped" and f"{layouts[0]} failed on rank 1" in row["note"], rows


def test_what_fails_on_every_rank_hides_no_other_layout(checked: Checked) -> None:
    done = checked("needs_ddp")
    rows = rows_of(done)
    assert rows["plain"]["verdict"] == "not set up" and rows["plain"]["note"].startswith("AttributeError: ")
    assert rows["ddp"]["verdict"] == "ok" and done.returncode == 0, "it is no failure of AGC"


def test_a_list_of_layers_and_what_cannot_be_set_up(checked: Checked) -> None:
    done = checked("layers")
    assert done.returncode == 0, (done.stdout, done.stderr)
    for line in (
        "hsdp: needs at least 4 ranks, and a multiple of 2",
        "tp: needs a plan for the model's layers: shard it in the factory and use --layout as-is",
        "Gradients: the mean of squares of the model's first output.",
        "2 of 2 layouts give the unsharded answer.",
        "1 could not be set up, for reasons that have nothing to do with AGC.",
    ):
        assert line in done.stdout.splitlines(), done.stdout


@pytest.fixture
def alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`dist-agc check` on a model of `MODELS`, in this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for name, value in (place | {"LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return lambda model, *arguments: CliRunner().invoke(build(), ["check", "--model", f"mine:{model}", *arguments])


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("never", "RuntimeError: not with NoForward("),
        ("not_finite", "the gradient of 0.weight is not finite"),
        ("loss", "TypeError: loss() missing 1 required positional argument: 'model'"),
    ],
)
def test_where_nothing_runs_it_is_no_success(alone: Callable[..., Result], model: str, reason: str) -> None:
    """The reason is one line, and said once for all the layouts that have it."""
    result = alone(model, "--layout", "plain", "--layout", "ddp")
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stdout.splitlines() if ": " in line]
    assert lines[0] == f"plain, ddp: {reason}" and "NoForward" not in "".join(lines[1:]), result.output
    assert "No layout ran: nothing was checked." in result.stdout
    assert "2 could not be set up" in result.stdout and "give the unsharded answer" not in result.stdout


def test_a_clip_that_raises_is_an_error_of_agc(alone: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(clipper: Clipper) -> None:
        raise ArithmeticError("no sum")

    monkeypatch.setattr(Clipper, "clip", fails)
    result = alone("layers", "--layout", "plain")
    assert result.exit_code == 1 and "plain: ArithmeticError: no sum" in result.stdout
    assert "0 of 1 layouts give the unsharded answer." in result.stdout and "set up" not in result.stdout


def test_nothing_to_compare_is_no_success(checked: Checked) -> None:
    done = checked("vacuous")
    assert done.returncode == 1
    assert rows_of(done)["ddp"]["verdict"] == "vacuous", done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layout", "fsdp3"], "near names: fsdp"),
        (["--units", "*.weight:0"], "expected GLOB=DIMS"),
        (["--units", "experts=0,one"], "expected GLOB=DIMS"),
        (["--units", "w=0,0"], "distinct dims"),
        (["--layout", "as-is"], "give a factory"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    result = CliRunner().invoke(build(), ["check", *arguments])
    assert result.exit_code == 2 and said in result.output, result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nothing"], "package.module:factory"),
        (["--layout", "ddp", "--units", "up.weigth=0"], "near names: up.weight"),
    ],
)
def test_mistakes(folder: Path, arguments: list[str], said: str) -> None:
    done = check(folder, *arguments, nproc=1)
    assert done.returncode != 0 and said in done.stdout + done.stderr, (done.stdout, done.stderr)


# ------------------------------------------------------------------------------------------------------------ launchers


def test_the_table_under_mpirun(folder: Path) -> None:
    need("mpirun")
    launcher = (str(BIN / "mpirun"), "-n", "2", "--oversubscribe", "--bind-to", "none", sys.executable, "-m")
    done = check(folder, "--layout", "fsdp2", "--layout", "hsdp", "--layout", "zero2", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert "2 ranks, torch" in done.stdout and "2 of 2 layouts give the unsharded answer" in done.stdout
    assert "hsdp: needs at least 4 ranks" in done.stdout


def test_the_deepspeed_launcher(folder: Path) -> None:
    need("deepspeed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = (
        str(BIN / "deepspeed"),
        "--num_gpus",
        "2",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        port,
        "--no_local_rank",
    )
    done = check(folder, "--layout", "zero*", "--json", launcher=(*launcher, "--module"))
    assert set(all_ok(done)) == {"zero0", "zero1", "zero2", "zero3"}


if __name__ == "__main__":
    turns.take(run)
