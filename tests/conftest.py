"""Real processes for tests marked ``mpi``: MPI launches and keeps the ranks in step, gloo carries the tensors.

    mpirun -n 3 --oversubscribe python -m pytest --with-mpi tests

Two channels on purpose. A rank that fails leaves the others waiting in a gloo collective until the group's timeout;
they then fail too, all ranks meet in MPI, tell each other what happened, fail alike, and go on with a fresh group.
"""

import math
import os
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

pytest.register_assert_rewrite("helpers", "ranks")

# No tests, and of a name that Python's own installation may have loaded already.
collect_ignore = ["every_process"]

# Processes that tests start find this dist_agc wherever they run, and do what tests/every_process says.
TESTS = Path(__file__).parent
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(TESTS.parent), str(TESTS / "every_process"), *filter(None, [os.environ.get("PYTHONPATH")])]
)

GROUP_TIMEOUT = timedelta(seconds=float(os.environ.get("DIST_AGC_TEST_GROUP_TIMEOUT", 60)))
TEST_TIMEOUT = 180  # pytest-timeout's last resort, for a rank that never comes back

_world = pytest.StashKey["World | None"]()


@dataclass
class World:
    """This process among the others of the run."""

    rank: int
    size: int
    control: Any = field(repr=False)  # the MPI communicator
    store: TCPStore | None = field(default=None, repr=False)
    meshes: dict[tuple[tuple[int, ...], tuple[str, ...]], DeviceMesh] = field(default_factory=dict, repr=False)
    folder: TemporaryDirectory[str] = field(default_factory=TemporaryDirectory, repr=False)

    def mesh(self, shape: tuple[int, ...] | None = None, names: tuple[str, ...] = ("dp",)) -> DeviceMesh:
        """A CPU mesh over all ranks, made once per session: every mesh costs sockets and threads."""
        shape = shape or (self.size,)
        if (shape, names) not in self.meshes:
            self.meshes[shape, names] = init_device_mesh("cpu", shape, mesh_dim_names=names)
        return self.meshes[shape, names]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, over MPI. Raises where another rank has ended the test already."""
        answers = self.exchange("value", value)
        gone = [rank for rank, (kind, _) in enumerate(answers) if kind != "value"]
        if gone:
            raise RuntimeError(f"ranks {gone} ended this test while rank {self.rank} waits for them")
        return [value for _, value in answers]

    def verdicts(self, verdict: Any) -> list[Any]:
        """What every rank says at the end of a test; those that still wait in it are told to give up."""
        while True:
            answers = self.exchange("verdict", verdict)
            if all(kind == "verdict" for kind, _ in answers):
                return [verdict for _, verdict in answers]

    def exchange(self, kind: str, value: Any) -> list[tuple[str, Any]]:
        """One message from each rank to all; a waiting rank sleeps instead of spinning on a shared core."""
        arrived, deadline = self.control.Ibarrier(), time.monotonic() + 1.2 * TEST_TIMEOUT
        while not arrived.Test():
            if time.monotonic() > deadline:  # outside of a test no other timeout is left
                print(f"rank {self.rank} waits for the others since {1.2 * TEST_TIMEOUT:.0f} s", file=sys.__stderr__)
                self.control.Abort(1)
            time.sleep(0.001)
        return self.control.allgather((kind, value))

    def check(self, condition: bool, message: str = "") -> None:
        """An assert in the middle of a test that fails on every rank when it fails on one, so that none waits."""
        __tracebackhide__ = True
        failed = [rank for rank, ok in enumerate(self.gather(bool(condition))) if not ok]
        assert not failed, f"on ranks {failed}: {message}"

    def start(self) -> None:
        """(Re)create the default process group on a port that rank 0 binds itself."""
        if self.rank == 0:
            self.store = TCPStore("127.0.0.1", 0, self.size, is_master=True, wait_for_workers=False)
        port = self.control.bcast(self.store.port if self.store else None, root=0)
        if self.rank != 0:
            self.store = TCPStore("127.0.0.1", port, self.size, is_master=False)
        # DeepSpeed and others read these even when the group exists already.
        os.environ.update(
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            RANK=str(self.rank),
            LOCAL_RANK=str(self.rank),
            WORLD_SIZE=str(self.size),
            LOCAL_WORLD_SIZE=str(self.size),
        )
        # Groups of meshes have a timeout of their own: 30 minutes, in which pytest-timeout would end the whole run.
        dist.distributed_c10d.default_pg_timeout = GROUP_TIMEOUT
        os.environ["DEEPSPEED_TIMEOUT"] = str(math.ceil(GROUP_TIMEOUT.total_seconds() / 60))
        dist.init_process_group("gloo", store=self.store, rank=self.rank, world_size=self.size, timeout=GROUP_TIMEOUT)

    def stop(self) -> None:
        self.meshes.clear()
        if dist.is_initialized():
            dist.destroy_process_group()
        self.gather(None)  # rank 0's store has to outlive the others' use of it
        self.store = None


def _current(config: pytest.Config) -> World | None:
    return config.stash.get(_world, None)


def pytest_configure(config: pytest.Config) -> None:
    if not (config.getoption("--with-mpi", default=False) or config.getoption("--only-mpi", default=False)):
        return
    from mpi4py import MPI

    world = World(MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size, MPI.COMM_WORLD)
    config.stash[_world] = world
    # Ranks that share pytest's folder clear away each other's remains while they look at them.
    config.option.basetemp = config.option.basetemp or world.folder.name
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    world.start()


def pytest_sessionstart(session: pytest.Session) -> None:
    world = _current(session.config)
    if world is not None and world.rank != 0:
        # Every rank reaches the same verdicts, and rank 0 prints all ranks' tracebacks: once is enough.
        session.config.get_terminal_writer()._file = open(os.devnull, "w")


def pytest_unconfigure(config: pytest.Config) -> None:
    world = _current(config)
    if world is not None:
        world.gather(None)  # mpirun ends the job at the first failing exit: not before rank 0 has printed
        world.stop()
        world.folder.cleanup()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Single-process tests run once, not on every rank; mpi tests get a timeout and, without pytest-mpi, a skip."""
    world = _current(config)
    if world is not None and world.size > 1:
        plain = [item for item in items if item.get_closest_marker("mpi") is None]
        config.hook.pytest_deselected(items=plain)
        items[:] = [item for item in items if item.get_closest_marker("mpi") is not None]
    for item in items:
        if item.get_closest_marker("mpi") is None:
            continue
        if not config.pluginmanager.hasplugin("pytest_mpi"):
            item.add_marker(pytest.mark.skip(reason="needs pytest-mpi: pip install 'dist-agc[test]'"))
        if config.pluginmanager.hasplugin("timeout") and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_TIMEOUT, method="thread"))


def _together(item: pytest.Item, phase: str) -> Generator[None, Any, Any]:
    """Run one phase of an mpi test and give it the same end on every rank."""
    world = _current(item.config)
    if world is None or item.get_closest_marker("mpi") is None:
        return (yield)
    __tracebackhide__ = True
    result, raised, verdict = None, None, "passed"
    try:
        result = yield
    except pytest.skip.Exception as skipped:
        raised, verdict = skipped, f"skipped: {skipped}"
    except (Exception, pytest.fail.Exception) as error:
        failure = pytest.ExceptionInfo.from_exception(error)
        raised = error
        verdict = str(failure.getrepr(style="short", tbfilter=lambda info: info.traceback.cut(path=item.path)))
    verdicts = world.verdicts((item.nodeid, phase, verdict))
    if any(other[:2] != (item.nodeid, phase) for other in verdicts):
        pytest.exit(f"ranks run different tests, nothing after this can be trusted: {verdicts}", returncode=3)
    texts = [other[2] for other in verdicts]
    if set(texts) != {"passed"} and not all(text.startswith("skipped") for text in texts):
        world.stop()
        world.start()  # a collective may have been left half done in the old group
        ranks = {text: [rank for rank, other in enumerate(texts) if other == text] for text in texts}
        report = "\n".join(f"----- rank {', '.join(map(str, ranks[text]))}: {text}" for text in ranks)
        pytest.fail(f"{phase} did not pass on every rank\n{report}", pytrace=False)
    if raised is not None:
        raise raised
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from _together(item, "setup"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from _together(item, "call"))


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """One thread (ranks share cores) and one seed; afterwards all is as it was."""
    threads, linear = torch.get_num_threads(), torch.nn.functional.linear
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.nn.functional.linear = linear  # DeepSpeed puts its own there for ZeRO 3, which torch.compile cannot trace


@pytest.fixture
def world(request: pytest.FixtureRequest) -> World:
    """Rank, size and meshes; only for tests marked ``mpi``."""
    current = _current(request.config)
    assert current is not None, "the world fixture needs @pytest.mark.mpi"
    return current


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, length) of every call of the kernel behind ``cpu_kernel=True``, on this rank."""
    from dist_agc.engine import row_norms

    calls: list[tuple[int, int]] = []
    kernel = row_norms.load()

    def counted(x: int, rows: int, length: int, out: int, threads: int) -> None:
        calls.append((rows, length))
        kernel(x, rows, length, out, threads)

    monkeypatch.setattr(row_norms, "load", lambda: counted)
    return calls
