"""The harness itself: one failing rank fails every rank, quickly, and the tests after it still run."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from conftest import World

TESTS = Path(__file__).parent

GAVE_UP = "ranks [1] ended this test while rank 0 waits for them"

FAILING = """
    import pytest
    import torch
    import torch.distributed as dist

    @pytest.mark.mpi(min_size=2)
    def test_fails_before_a_collective(world):
        if world.rank == 1:
            raise RuntimeError("only rank one is broken")
        dist.all_reduce(torch.ones(1))

    @pytest.fixture
    def broken_fixture(world):
        assert world.rank != 1, "the fixture of rank one is broken"

    @pytest.mark.mpi(min_size=2)
    def test_fails_in_a_fixture(world, broken_fixture):
        dist.all_reduce(torch.ones(1))

    @pytest.mark.mpi(min_size=2)
    def test_check_fails_everywhere(world):
        world.check(world.rank != 1, "rank one says no")

    @pytest.mark.mpi(min_size=2)
    def test_fails_before_the_others_gather(world):
        assert world.rank != 1, "rank one does not come"
        world.gather(1)
        world.gather(2)

    @pytest.mark.mpi(min_size=2)
    def test_skips_on_one_rank(world):
        if world.rank == 1:
            pytest.skip("rank one does not want to")

    @pytest.mark.mpi(min_size=2)
    def test_runs_afterwards(world):
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == world.size
        assert world.mesh().size() == world.size

    @pytest.mark.mpi(min_size=99)
    def test_needs_more_ranks():
        raise AssertionError

    def test_plain():
        raise AssertionError("a single-process test ran on several ranks")
"""


@pytest.mark.skipif(shutil.which("mpirun", path=str(Path(sys.executable).parent)) is None, reason="needs mpirun")
def test_one_failing_rank_fails_all(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "test_failing.py").write_text(textwrap.dedent(FAILING))
    command = [str(Path(sys.executable).parent / "mpirun"), "-n", "2", "--oversubscribe", "--tag-output"]
    command += [
        sys.executable,
        "-m",
        "pytest",
        "--with-mpi",
        "-p",
        "no:cacheprovider",
        "-q",
        "--color=no",
        "test_failing.py",
    ]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMIX_", "PRTE_"))}
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    root["DIST_AGC_TEST_GROUP_TIMEOUT"] = "8"
    run = subprocess.run(
        command, cwd=tmp_path, env=inherited | root, capture_output=True, text=True, timeout=240, check=False
    )
    output = run.stdout + run.stderr
    assert run.returncode == 1, output
    assert re.search(r"\b4 failed, 1 passed, 1 skipped, 1 deselected, 1 error", output), output
    for message in (
        "only rank one is broken",
        "fixture of rank one is broken",
        "on ranks [1]: rank one says no",
        GAVE_UP,
    ):
        assert message in output, output
    assert re.search(r"rank 1: skipped", output), output


@pytest.mark.mpi(min_size=2)
def test_ranks_share_a_gloo_group(world: World) -> None:
    total = torch.tensor(float(world.rank))
    dist.all_reduce(total)
    assert dist.get_backend() == "gloo"
    assert total.item() == sum(range(world.size))
    assert world.gather(world.rank) == list(range(world.size))
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    assert [os.environ["RANK"], os.environ["WORLD_SIZE"]] == [str(world.rank), str(world.size)]


@pytest.mark.mpi
def test_meshes_are_made_once(world: World) -> None:
    assert world.mesh() is world.mesh()
    assert world.mesh((1, world.size), ("replicate", "shard")).shape == (1, world.size)
