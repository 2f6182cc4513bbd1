"""One start of processes for many cases of a test file: they run in turn, each as if in processes of its own.

To import a framework takes longer than any case. In a test file ``trained = turns.fixture(...)`` lists the cases that
start together, its tests ask ``trained(case)`` for what a case left, and its last line is ``turns.take(...)``, which is
what the processes do.
"""

import gc
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock  # torch needs it
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

TESTS = Path(__file__).parent
Trained = Callable[[str], Any]


def start(script: str, folder: Path, *arguments: str, ranks: int = 1) -> tuple[int, str]:
    """A script in processes of its own, which get ``folder`` and the arguments: the exit code, and what they wrote."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"]
    torchrun += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    ours = {"PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ['PYTHONPATH']}", "OMP_NUM_THREADS": "1"}
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "offline"}
    result = subprocess.run(
        [sys.executable, *(torchrun if ranks > 1 else []), script, str(folder), *arguments],
        cwd=folder,
        env=os.environ | ours | offline | {"GLOO_SOCKET_IFNAME": "lo"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return result.returncode, result.stdout + result.stderr


# -------------------------------------------------------------------------------------------------------- in the tests


def fixture(*launches: tuple[int, Sequence[str]], read: Callable[[Path, str], Any]) -> Any:
    """The fixture ``trained`` of a test file. A launch: how many ranks, and the cases that they run.

    ``read`` makes of a case's folder, and of what all its ranks wrote, what the test gets.
    """

    @pytest.fixture
    def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
        script = request.module.__file__
        base = tmp_path_factory.getbasetemp()
        base = base.parent if hasattr(request.config, "workerinput") else base  # one launch for all workers of xdist

        def of(case: str) -> Any:
            ((ranks, cases),) = [launch for launch in launches if case in launch[1]]
            folder = base / f"{Path(script).stem}-{cases[0]}"
            folder.mkdir(exist_ok=True)
            return read(folder / case, _ran(script, folder, case, cases, ranks))

        return of

    return trained


def _ran(script: str, folder: Path, case: str, cases: Sequence[str], ranks: int) -> str:
    """What all ranks wrote in a case, which runs now if it has not yet: it first, then the others of its launch.

    A case that raises ends the processes, since what it left in them is unknown. The first test whose case was not
    reached starts those that are left.
    """
    said = ""
    with FileLock(folder / "lock"):
        if not (folder / case).exists():
            left = [case, *(other for other in cases if other != case and not (folder / other).exists())]
            code, said = start(script, folder, *left, ranks=ranks)
            ended_well = code == 0 or not all(_ended(folder / one, ranks) for one in left)
            assert ended_well, f"exit code {code} after the last case\n{said[-12000:]}"
    log = "".join(path.read_text() for path in sorted((folder / case).glob("*.log")))
    assert _ended(folder / case, ranks), f"{case} did not end on every rank\n{(log or said)[-12000:]}"
    return log


def _ended(folder: Path, ranks: int) -> bool:
    return all((folder / f"{rank}.ended").exists() for rank in range(ranks))


# ---------------------------------------------------------------------------------------------------- in the processes


def take(run: Callable[[str, str], None]) -> None:
    """Run the cases that the command line names; ``run`` gets the name of a case and the folder that is its own."""
    root, *cases = sys.argv[1:]
    environ, together, stores = dict(os.environ), _torchruns_store(), []
    rank, ranks = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
    for case in cases:
        folder = Path(root, case)
        folder.mkdir(exist_ok=True)
        os.chdir(folder)
        with _output_in(folder / f"{rank}.log"), warnings.catch_warnings():
            if together:
                stores.append(_meeting_point(case, together, rank))  # kept: other ranks may still need that of rank 0
            run(case, str(folder))
            _forget()
        os.environ.clear()
        os.environ.update(environ)
        (folder / f"{rank}.ended").touch()
        if together:  # no rank is in another case where one fails
            together.set(f"{case} ended on {rank}", "")
            together.wait([f"{case} ended on {other}" for other in range(ranks)])


@contextmanager
def _output_in(path: Path) -> Iterator[None]:
    """All that this process writes in a file, what C++ writes and a traceback too."""
    kept = os.dup(1), os.dup(2)
    with path.open("ab") as log:
        _point_to(log.fileno(), log.fileno())
        try:
            yield
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            _point_to(*kept)
            os.close(kept[0])
            os.close(kept[1])


def _point_to(output: int, errors: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(output, 1)
    os.dup2(errors, 2)


def _torchruns_store() -> TCPStore | None:
    if "RANK" not in os.environ:
        return None
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def _meeting_point(case: str, together: TCPStore, rank: int) -> TCPStore | None:
    """A store for this case: in torchrun's own, its process group would read the addresses of the one before it."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    if store is not None:
        together.set(case, str(store.port))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=together.get(case).decode())
    return store


_linear = torch.nn.functional.linear


def _forget() -> None:
    """What frameworks leave in a process, gone."""
    gc.collect()  # first what only points at itself: models hold process groups
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    if "transformers.integrations.deepspeed" in sys.modules:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    if "deepspeed" in sys.modules:
        from deepspeed.comm import comm
        from deepspeed.utils import groups

        comm.cdb = None
        groups._release_process_group_references(group=None)
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.nn.functional.linear = _linear  # ZeRO 3 puts its own there
