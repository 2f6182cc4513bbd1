"""launch/: every launcher that runs here starts launch/train.py and trains alike; the other files are linted."""

import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional as F

import dist_agc
from dist_agc.lab.tasks import load

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
BIN = Path(sys.executable).parent
SCRIPTS = sorted(path for path in LAUNCH.rglob("*") if path.suffix in (".sh", ".sbatch"))
STEPS = 3
ARGUMENTS = ("--steps", str(STEPS), "--log-every", "1")

# Nothing of a launcher that runs the tests, nor of the user's job settings, may reach the scripts.
FOREIGN = ("OMPI_", "PMIX_", "PRTE_", "TORCHELASTIC_", "SLURM_", "PET_", "ACCELERATE_")
SETTINGS = "RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT NPROC NNODES NODE_RANK RDZV_ENDPOINT RDZV_ID HOSTFILE"
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN) and k not in SETTINGS.split()}
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
ENV = CLEAN | AS_ROOT | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run(*commands: list[str], env: list[dict[str, str]], cwd: Path = ROOT) -> str:
    """What the commands said, run side by side; each must succeed."""
    started = [
        subprocess.Popen(
            command,
            env=ENV | own,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, own in zip(commands, env, strict=True)
    ]
    try:
        said = [process.communicate(timeout=200)[0] for process in started]
    finally:
        for process in started:
            process.terminate()  # not kill: a launcher ends its processes first
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(said)
    return "\n".join(said)


@pytest.fixture(scope="module")
def unsharded() -> list[tuple[float, float]]:
    """Loss and clipped fraction of every step of launch/train.py's training, in one process and without wrappers."""
    torch.manual_seed(0)
    task = load("digits")
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(STEPS):
        batch = torch.randperm(len(task.train.inputs), generator=order)[: task.batch_size]
        loss = F.cross_entropy(model(task.train.inputs[batch]), task.train.targets[batch])
        optimizer.zero_grad()
        loss.backward()
        stats = dist_agc.apply_agc(model, task.clipping_threshold, exclude=task.exclude)
        assert stats is not None
        optimizer.step()
        seen.append((loss.item(), float(stats.clip_fraction)))
    return seen


def assert_trained_alike(said: str, unsharded: list[tuple[float, float]], processes: int = 2) -> None:
    lines = re.findall(r"^step +(\d+)  loss +([\d.]+)  clipped +([\d.]+)%$", said, re.MULTILINE)
    assert [int(step) for step, _, _ in lines] == list(range(1, STEPS + 1)), said
    found = [(float(loss), float(clipped) / 100) for _, loss, clipped in lines]
    assert all(0 < clipped < 1 for _, clipped in found)
    for ours, theirs in zip(found, unsharded, strict=True):
        # Loss is printed with 4 digits; a unit at the border may fall to either side.
        assert ours == pytest.approx(theirs, abs=2e-3), (found, unsharded)
    assert re.search(rf"accuracy on test data [\d.]+% \({processes} processes, (cpu|cuda)\)", said), said


# ------------------------------------------------------------------------------------------------------ real launchers


@pytest.mark.parametrize(
    ("script", "config"),
    [
        ("torchrun.sh", None),
        ("torchrun.sh", "ds_zero2.json"),
        ("accelerate.sh", None),
        ("mpirun.sh", None),
        ("mpirun.sh", "ds_zero1.json"),
        ("deepspeed.sh", "ds_zero0.json"),
        ("deepspeed.sh", "ds_zero3.json"),
    ],
)
def test_launchers_train_alike(script: str, config: str | None, unsharded: list[tuple[float, float]]) -> None:
    if config:
        pytest.importorskip("deepspeed")
    more = ["--config", str(LAUNCH / "zero" / config)] if config else []
    said = run(["bash", str(LAUNCH / script), *ARGUMENTS, *more], env=[{"MASTER_PORT": free_port()}])
    assert_trained_alike(said, unsharded)


def test_torchrun_on_two_machines_that_are_one(unsharded: list[tuple[float, float]]) -> None:
    command = ["bash", str(LAUNCH / "torchrun.sh"), *ARGUMENTS]
    env = {"NNODES": "2", "NPROC": "1", "RDZV_ENDPOINT": f"127.0.0.1:{free_port()}"}
    assert_trained_alike(run(command, command, env=[env, env]), unsharded)


def test_accelerate_on_two_machines_that_are_one(unsharded: list[tuple[float, float]]) -> None:
    command = ["bash", str(LAUNCH / "accelerate.sh"), *ARGUMENTS]
    env = {"NNODES": "2", "NPROC": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    said = run(command, command, env=[env | {"NODE_RANK": rank} for rank in "01"])
    assert_trained_alike(said, unsharded)


def nodes_of_slurm() -> int:
    """How many idle nodes a SLURM has that answers here; 0 where there is none."""
    if shutil.which("sbatch") is None or subprocess.run(["scontrol", "ping"], capture_output=True).returncode:
        return 0
    idle = subprocess.run(["sinfo", "-h", "-t", "idle", "-o", "%D"], capture_output=True, text=True, timeout=30)
    return sum(map(int, idle.stdout.split()))


@pytest.mark.parametrize(("script", "nodes"), [("one_node", 1), ("several_nodes", 2)])
def test_slurm(script: str, nodes: int, unsharded: list[tuple[float, float]], tmp_path: Path) -> None:
    if nodes_of_slurm() < nodes:
        pytest.skip(f"needs a SLURM with {nodes} idle nodes (docs/launching.md shows how to make one)")
    job = ["sbatch", "--wait", f"--output={tmp_path / 'log'}", f"--export=ALL,NPROC={2 // nodes}"]
    run([*job, str(LAUNCH / "slurm" / f"{script}.sbatch"), *ARGUMENTS], env=[{}])
    assert_trained_alike((tmp_path / "log").read_text(), unsharded)


# ---------------------------------------------------------------------------------------------------------- kubernetes


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    env = {"IMAGE": "registry.example/dist-agc:1", "PODS": "3", "GPUS": "2"}
    return yaml.safe_load(run(["bash", str(LAUNCH / "kubernetes" / "submit.sh"), "--print"], env=[env]))


def test_pytorchjob_is_what_the_operator_expects(job: dict[str, Any]) -> None:
    import kubernetes_validate

    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert job["spec"]["nprocPerNode"] == "2", "a string, as torchrun's option"
    assert job["spec"]["runPolicy"]["cleanPodPolicy"] == "None"
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {kind: of["replicas"] for kind, of in replicas.items()} == {"Master": 1, "Worker": 2}
    for of in replicas.values():
        assert of["restartPolicy"] == "Never"
        pod = {"apiVersion": "v1", "kind": "Pod", **of["template"]}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
        (container,) = pod["spec"]["containers"]
        assert (container["name"], container["image"]) == ("pytorch", "registry.example/dist-agc:1")
        assert container["resources"]["limits"] == {"nvidia.com/gpu": 2}
        assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["spec"]["volumes"]}


def test_command_of_the_pytorchjob_runs(job: dict[str, Any], unsharded: list[tuple[float, float]]) -> None:
    """With the variables that the operator sets, for two pods of one process."""
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    env = address | {f"PET_{name}": value for name, value in address.items()}
    env |= {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "WORLD_SIZE": "2"}
    pods = [env | {"PET_NODE_RANK": rank, "RANK": rank} for rank in "01"]
    command = [*container["command"], *ARGUMENTS]
    assert_trained_alike(run(command, command, env=pods), unsharded)


# --------------------------------------------------------------------------------------------------------------- lint


def test_scripts_are_found() -> None:
    names = {str(path.relative_to(LAUNCH)) for path in SCRIPTS}
    assert names >= {"torchrun.sh", "slurm/one_node.sbatch", "slurm/several_nodes.sbatch", "kubernetes/submit.sh"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_clean(script: Path) -> None:
    run(["bash", "-n", str(script)], env=[{}])
    run([str(BIN / "shellcheck"), "--exclude=SC2016", str(script)], env=[{}])


@pytest.mark.parametrize("path", [*(LAUNCH / "slurm").glob("*.sbatch"), LAUNCH / "kubernetes" / "pytorchjob.yaml"])
def test_files_that_never_ran_on_a_cluster_say_so(path: Path) -> None:
    assert "ever run on a cluster" in path.read_text() or "never on a cluster" in path.read_text()


# ------------------------------------------------------------------------------------------------------------- mistakes


def refused(command: list[str], **env: str) -> str:
    done = subprocess.run(
        command, env=ENV | env, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert done.returncode not in (0, 124), done.stdout
    return done.stderr


@pytest.mark.parametrize(
    ("script", "env", "says"),
    [
        ("torchrun.sh", {"NNODES": "2"}, "RDZV_ENDPOINT: HOST:PORT where the machines meet"),
        ("accelerate.sh", {"NNODES": "2"}, "NODE_RANK: the number of this machine"),
        ("accelerate.sh", {"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR: the host that is number 0"),
        ("deepspeed.sh", {"HOSTFILE": "hosts"}, "MASTER_ADDR: the first host of HOSTFILE"),
        ("mpirun.sh", {"HOSTFILE": "hosts"}, "MASTER_ADDR: the first host of HOSTFILE"),
        ("kubernetes/submit.sh", {}, "IMAGE: an image with this repository"),
        ("kubernetes/submit.sh", {"IMAGE": "x", "GPUS": "all"}, "PODS and GPUS must be whole numbers, got 'all'"),
        ("kubernetes/submit.sh", {"IMAGE": "x", "PODS": "1"}, "at least one worker"),
        ("slurm/one_node.sbatch", {}, "SLURM_SUBMIT_DIR: this is a job: submit it with sbatch"),
        ("slurm/one_node.sbatch", {"SLURM_SUBMIT_DIR": "/"}, "submit from the root of the repository"),
        ("slurm/several_nodes.sbatch", {"SLURM_SUBMIT_DIR": str(ROOT)}, "SLURM_GPUS_ON_NODE: no GPUs"),
    ],
)
def test_what_is_missing_is_said(script: str, env: dict[str, str], says: str) -> None:
    assert says in refused(["bash", str(LAUNCH / script)], **env)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set: start this script by a launcher"),
        (["--config", "nowhere.json"], "--config nowhere.json: there is no such file"),
    ],
)
def test_script_without_a_launcher(arguments: list[str], says: str) -> None:
    assert says in refused([sys.executable, str(LAUNCH / "train.py"), *arguments])


def test_batches_that_cannot_be_shared_equally() -> None:
    assert "3 processes cannot share batches of 512 equally" in refused(
        ["bash", str(LAUNCH / "torchrun.sh")], NPROC="3"
    )


@pytest.mark.parametrize(
    ("requires", "marker"),
    [
        (None, ""),
        (">=3.9", ""),
        (">=3.10", ""),
        (">=3.11", ' ; python_version >= "3.11"'),
        (">=3.11.5", ' ; python_full_version >= "3.11.5"'),
        ("<4,>=3.10.2", ' ; python_full_version >= "3.10.2"'),
    ],
)
def test_a_pin_leaves_older_pythons_to_choose(requires: str | None, marker: str) -> None:
    assert runpy.run_path(str(LAUNCH / "lock.py"))["marker"](requires) == marker
