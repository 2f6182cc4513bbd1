"""Nothing hangs: whatever one rank does, every rank ends within the group's timeout, its gradients as they were."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import fault_ranks

WORKER = Path(fault_ranks.__file__)
# What a rank waits for another at most, and what a busy machine may add.
LIMIT = fault_ranks.TIMEOUT + 20

# Settings and structure that rank 1 has otherwise, and what every rank is told.
AGREEMENT = {
    "threshold": "clipping_threshold: rank 0 has [0.01], rank 1 has [0.02]",
    "exclude": "exclude: rank 0 has (), rank 1 has ('bias',)",
    "units": "units: rank 0 has None, rank 1 has {'weight': ()}",
    "statistics": "statistics: rank 0 has True, rank 1 has False",
    "model": "parameters: rank 0 has [('weight', 40, ",
    "frozen": "parameters: rank 0 has [('weight', 40, ((5, 8), (0,))), ('bias', 5, ((5,), ()))], rank 1 has",
    "copies": "clipping_threshold: rank 0 has [0.01], rank 1 has [0.02]",
    "fsdp1 threshold": "clipping_threshold: rank 0 has [0.01], rank 1 has [0.02]",
    "zero threshold": "clipping_threshold: rank 0 has [0.01], rank 1 has [0.02]",
}


def run(scenarios: list[str], folder: Path, size: int = 3) -> dict[str, list[dict[str, Any]]]:
    """How each scenario ended on each rank; {} where one died. A rank that does not come back at all is a hang."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), ",".join(scenarios), str(rank), str(size), str(folder / "store")],
            env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=150) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    lines = [[json.loads(line) for line in out.splitlines() if line.startswith("{")] for out, _ in said]
    assert all(len(line) == len(scenarios) or rank.returncode == 9 for line, rank in zip(lines, ranks, strict=True)), (
        said
    )
    ends = {name: [line[i] if line else {} for line in lines] for i, name in enumerate(scenarios)}
    for name, every in ends.items():
        print(f"{name}: seconds by rank", [round(end["seconds"], 2) if end else "died" for end in every])
    return ends


def test_ranks_set_up_differently_are_told_what_differs(tmp_path: Path) -> None:
    scenarios = [name for name in AGREEMENT if not name.startswith("zero") or find_spec("deepspeed")]
    for name, ends in run(scenarios, tmp_path).items():
        for end in ends:
            assert end["error"] == "RuntimeError" and AGREEMENT[name] in end["message"], (name, end)
            assert end["unchanged"] and end["seconds"] < LIMIT


def test_ranks_that_share_no_axis_with_the_odd_one_are_told_too(tmp_path: Path) -> None:
    """Rank 2 of a 2 x 2 mesh meets rank 0 and rank 3; the odd one is rank 1."""
    for end in run(["mesh of two axes"], tmp_path, size=4)["mesh of two axes"]:
        assert end["error"] == "RuntimeError" and "eps: rank " in end["message"], end
        assert "0.001" in end["message"] and "0.1" in end["message"]
        assert end["unchanged"] and end["seconds"] < LIMIT


@pytest.mark.parametrize("scenario", ["later gradient", "dies", "fsdp1 dies", "zero dies", "stays away", "constructor"])
def test_a_rank_that_does_not_come_ends_the_others(scenario: str, tmp_path: Path) -> None:
    """Raised in validation at a later step, died in the middle of clip(), never called it, or has no Clipper at all."""
    if scenario.startswith("zero"):
        pytest.importorskip("deepspeed")
    # Each ends the group; a rank that raises in its first validation tells the others, and may go before.
    before = ["first gradient"] if scenario == "later gradient" else []
    ran = run([*before, scenario], tmp_path)
    ends = ran[scenario]
    for end in (ends[0], ends[2]):
        assert end["error"] == "RuntimeError", end
        assert "not all of the ranks [0, 1, 2] came to this call of clip(), or one of them ended" in end["message"]
        assert end["unchanged"] and end["seconds"] < LIMIT
    if scenario == "constructor":
        assert ends[1]["error"] == "ValueError" and "'head.*' matches no parameter" in ends[1]["message"]
    if scenario == "later gradient":
        assert ends[1]["error"] == "ValueError" and ends[1]["unchanged"]
        first = ran["first gradient"]
        assert first[1]["error"] == "ValueError" and "'bias' has placements" in first[1]["message"]
        for end in (first[0], first[2]):
            assert end["error"] == "RuntimeError" and "gradients: rank 0 has 'as expected', rank 1" in end["message"]
        assert all(end["unchanged"] for end in first)
