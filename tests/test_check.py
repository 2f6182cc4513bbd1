"""`dist-agc check` as a user starts it, on real processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = """
import torch

def factory():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
"""


def check(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "dist_agc.cli", "check", "--nproc", "2", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)


def test_layouts_are_held_against_the_reference(tmp_path: Path) -> None:
    """The user's own model, named by glob, as JSON; something was clipped and something not."""
    (tmp_path / "mine.py").write_text(MODEL)
    done = check(tmp_path, "--model", "mine:factory", "--layout", "fsdp2", "--layout", "fsdp1 full*", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout[done.stdout.index("{") :])["layouts"]
    assert [row["layout"] for row in rows] == ["fsdp1 full orig", "fsdp1 full", "fsdp2"]
    for row in rows:
        assert row["verdict"] == "ok" and row["error"] < 1e-6 and row["collectives"] == 1
        assert 0 < row["clipped_units"] < row["units"] and row["split_units"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layout", "ddp", "--exclude", "*.bias", "--exclude", "*.weight"], "nothing to compare"),
        (["--layout", "fsdp3"], "near names"),
        (["--model", "nothing"], "package.module:factory"),
    ],
)
def test_failure_is_an_exit_code(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = check(tmp_path, *arguments)
    assert done.returncode != 0 and said in done.stdout + done.stderr, (done.stdout, done.stderr)
