"""Cases that share processes: one that fails does so alone, and none sees what another left."""

import os
import warnings

import pytest
import torch

import turns

ran = turns.fixture((1, ["leaves", "raises", "looks"]), read=lambda folder, log: (folder, log))


def run(case: str, folder: str) -> None:
    print("this is", case)
    os.system(f"echo a process of {case}")
    warnings.warn("said once a place", stacklevel=1)
    if case == "raises":
        raise ValueError("on purpose")
    assert "LEFT" not in os.environ and torch.nn.functional.linear is turns._linear
    os.environ["LEFT"] = "yes"
    torch.nn.functional.linear = None  # type: ignore[assignment]
    warnings.simplefilter("ignore")


def test_a_case_fails_alone_and_leaves_nothing(ran: turns.Trained) -> None:
    with pytest.raises(AssertionError, match=r"raises did not end[\s\S]*Traceback[\s\S]*ValueError: on purpose"):
        ran("raises")
    for case in ("looks", "leaves", "looks"):
        folder, log = ran(case)
        assert folder.name == case
        assert "raises" not in log and "on purpose" not in log
        assert log.count(f"this is {case}\n") == log.count(f"a process of {case}\n") == 1
        assert log.count("UserWarning: said once a place") == 1


if __name__ == "__main__":
    turns.take(run)
