"""Processes for commands that train: start them with torchrun, or join those that a launcher has started."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

GROUP_TIMEOUT = timedelta(seconds=120)
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C has ended


@dataclass(frozen=True)
class Place:
    """This process among the others."""

    launcher: str
    rank: int
    size: int


ALONE = Place("", 0, 1)


def place(env: Mapping[str, str] = os.environ) -> Place | None:
    """What torchrun, the DeepSpeed launcher or mpirun says; None where the command was started by itself."""
    mpi = "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"
    for launcher, (rank, size) in {"torchrun": ("RANK", "WORLD_SIZE"), "mpirun": mpi}.items():
        if rank in env and size in env:
            return Place(launcher, int(env[rank]), int(env[size]))
    return None


def torchrun(arguments: Sequence[str], nproc: int, program: Path | None = None) -> int:
    """Run `dist-agc ARGUMENTS`, or another program, in `nproc` processes of this machine; returns the exit code."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    local = "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"
    # "--": or torchrun takes an option of the command, such as --nproc, for one of its own cut short.
    started = ["--module", "--", "dist_agc.cli"] if program is None else ["--", str(program)]
    silenced, threads_given = logging.root.manager.disable, "OMP_NUM_THREADS" in os.environ
    logging.disable()  # torchrun's account of a worker that failed is a page; here it is one line
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    try:
        run.run(run.parse_args([*local, f"--nproc-per-node={nproc}", *started, *arguments]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed (exit code {code}), see above"
        print(f"dist-agc: rank {rank} of {nproc} {how}.", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, SignalException):
        print("\ndist-agc: interrupted, all processes are stopped.", file=sys.stderr)
        return INTERRUPTED
    finally:
        logging.disable(silenced)
        if not threads_given:
            del os.environ["OMP_NUM_THREADS"]
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[?25h")  # a progress bar that was cut off leaves the cursor hidden
    return 0


@contextmanager
def process_group(here: Place) -> Iterator[None]:
    """The default process group, by gloo; of `ALONE`, a group of this process, whatever a launcher says."""
    import torch.distributed as dist

    former = signal.signal(signal.SIGTERM, signal.default_int_handler)  # launchers pass Ctrl-C on as SIGTERM
    if sys.platform == "linux" and os.environ.get("MASTER_ADDR", "localhost") in ("127.0.0.1", "localhost"):
        # Else gloo looks up the host's own name, which not every machine can resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.HashStore() if here is ALONE else None  # pyright: ignore[reportPrivateImportUsage]
    address = None if here is ALONE else meeting_point(os.environ)
    dist.init_process_group(
        "gloo", init_method=address, store=store, rank=here.rank, world_size=here.size, timeout=GROUP_TIMEOUT
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
        # Sharded modules refer to themselves and hold groups of their own. Left to the end of the interpreter, gloo's
        # threads there may give up a tensor too late and abort the process (pytorch #179291). Those of groups that
        # something still holds get the interpreter while this thread sleeps.
        gc.collect()
        time.sleep(0.1)
        signal.signal(signal.SIGTERM, former)


def meeting_point(env: Mapping[str, str]) -> str:
    """The init_method: the launcher's address, or on one host a file in the folder that mpirun makes for its job."""
    if "MASTER_ADDR" in env and "MASTER_PORT" in env:
        return "env://"
    one_host = env.get("OMPI_COMM_WORLD_SIZE") == env.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    if one_host and (folder := env.get("PMIX_SERVER_TMPDIR")):
        return (Path(folder) / "dist-agc-store").as_uri()
    sys.exit(
        "dist-agc: the processes need an address to meet at: set MASTER_ADDR to the host of rank 0 and MASTER_PORT to "
        "a free port there; mpirun passes them on with -x MASTER_ADDR -x MASTER_PORT."
    )
