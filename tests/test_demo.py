"""`dist-agc demo` as a user starts it: real processes, the files it leaves, what it says when something is wrong."""

import json
import logging
import math
import os
import pty
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch.nn import functional as F
from typer.testing import CliRunner

import turns
from dist_agc import cli
from dist_agc.lab.console import launch
from dist_agc.lab.demo import MOST_PROCESSES
from dist_agc.lab.tasks.digits import NFResNet, ScaledStdConv2d
from dist_agc.lab.training import batches

ROOT = Path(__file__).parents[1]
DEMO = (sys.executable, "-m", "dist_agc.cli", "demo")
# Of the terminal and of a launcher that runs the tests, nothing may reach the command.
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "PRTE_", "TORCHELASTIC_"))}
ENV = CLEAN | {"OMP_NUM_THREADS": "1", "TERM": "dumb", "COLUMNS": "100"}
for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    ENV.pop(variable, None)


def run(*command: str, cwd: Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=ENV, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
    )


def interrupted(*command: str, cwd: Path, at: str) -> tuple[str, str]:
    """What a command wrote, to stdout and to stderr, that got a Ctrl-C when it had said ``at``; it must end as such."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=cwd, env=ENV, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True,
        # Tests that a script runs in the background (&) ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        said = ""
        try:
            while line := process.stdout.readline():
                said += line
                if at in line:
                    break
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == launch.INTERRUPTED, said + out + err
    return said + out, err


def invoke(*arguments: str, app: typer.Typer | None = None) -> tuple[int, str]:
    """The command in this process: its exit code and, without the frames around messages, all it said."""
    result = CliRunner().invoke(app or cli.build(), arguments, env={"COLUMNS": "200", "TERM": "dumb"})
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def assert_outputs(result: subprocess.CompletedProcess[str], folder: Path, task: str) -> list[dict[str, Any]]:
    """The table names both runs, the plot is a picture with something on it, AGC clipped some but not all units."""
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    _, _, summary = result.stdout.partition("Summary")
    assert summary.split()[:4] == ["without", "AGC", "with", "AGC"]

    from matplotlib.image import imread

    picture = imread(folder / f"{task}.png")
    assert picture.shape[0] > 500 and picture.shape[1] > 500
    colours = {tuple(round(255 * float(part)) for part in pixel) for pixel in picture[::3, ::3, :3].reshape(-1, 3)}
    assert {(0xC8, 0x55, 0x3D), (0x1F, 0x6F, 0x8B)} <= colours, "a line of each run"

    lines = [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]
    plain, clipped = ([line for line in lines if line["run"] == name] for name in ("no-agc", "agc"))
    assert lines == plain + clipped and plain and clipped
    for steps in (plain, clipped):
        assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert plain[0]["loss"] == pytest.approx(clipped[0]["loss"]), "both start from the same weights and data"
    assert all(set(line) - {"settings"} == {"step", "run", "loss", "accuracy"} for line in plain)
    assert clipped[0]["settings"]["clipping_threshold"] > 0 and "settings" in plain[0]
    fractions = [line["agc/clip_fraction"] for line in clipped]
    assert any(0 < fraction < 1 for fraction in fractions), fractions
    return lines


def test_digits_started_plainly_records_a_run_that_diverges(tmp_path: Path) -> None:
    result = run(*DEMO, "--nproc", "2", "--lr", "2", "--steps", "16", cwd=tmp_path)
    lines = assert_outputs(result, tmp_path / "runs" / "demo", "digits")
    plain = [line for line in lines if line["run"] == "no-agc"]
    assert len(plain) < 16 and plain[-1]["loss"] is None and all(math.isfinite(line["loss"]) for line in plain[:-1])
    assert f"diverged at step {len(plain)}" in result.stdout
    assert sum(line["run"] == "agc" for line in lines) == 16
    assert "\x1b" not in result.stdout + result.stderr, "plain lines where the output is no terminal"


BACKENDS = ("fsdp2", "zero1", "zero2", "zero3")


def read(folder: Path, log: str) -> list[dict[str, Any]]:
    return assert_outputs(subprocess.CompletedProcess(DEMO, 0, log, log), folder, "digits")


trained = turns.fixture((2, BACKENDS), read=read)


def train(backend: str, folder: str) -> None:
    """One rank's part of the command, as torchrun starts it."""
    options = ["--steps", "8", "--lr", "1", "--clipping-threshold", "0.05", "--backend", backend, "--out", folder]
    with pytest.raises(SystemExit) as ended:
        cli.build()(["demo", *options])
    assert not ended.value.code


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_deepspeed_trains_as_fsdp2_does(backend: str, trained: turns.Trained) -> None:
    expected, found = trained(BACKENDS[0]), trained(backend)
    # Where the run without AGC breaks off is a matter of rounding.
    agc = [[line for line in lines if line["run"] == "agc"] for lines in (expected, found)]
    both = list(zip(*agc, strict=True))
    assert [b["agc/units"] for _, b in both] == [a["agc/units"] for a, _ in both]
    for a, b in both[:4]:  # later, rounding has grown
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
        assert abs(b["agc/clipped_units"] - a["agc/clipped_units"]) <= 1
    # Counted before clipping, which leaves no ratio above the threshold.
    counts = found[-1]["agc/ratios"]
    first = next(i for i, threshold in enumerate(counts["thresholds"], start=1) if threshold > 0.05)
    above = sum(row[first] for row in counts["parameters"].values())
    assert 0 < above <= found[-1]["agc/clipped_units"]


def test_a_terminal_sees_a_bar_with_loss_accuracy_and_clip_fraction(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        (*DEMO, "--nproc", "1", "--steps", "30", "--lr", "0.1"),
        cwd=tmp_path,
        env=ENV | {"TERM": "xterm"},
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        said = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # Linux says so when the other end is closed
                break
            if not piece:
                break
            said += piece
        assert process.wait(60) == 0
    os.close(ours)
    seen = said.decode()
    assert "━" in seen and "30/30" in seen
    assert all(word in seen for word in ("loss", "accuracy", "clipped"))


def test_what_the_readme_promises(tmp_path: Path) -> None:
    """The command as it is typed: without AGC training blows up, with it the digits are learned."""
    result = run(*DEMO, cwd=tmp_path)
    lines = assert_outputs(result, tmp_path / "runs" / "demo", "digits")
    plain, clipped = ([line for line in lines if line["run"] == name] for name in ("no-agc", "agc"))
    last = [line["accuracy"] for line in clipped[-10:]]
    assert plain[-1]["loss"] is None or plain[-1]["loss"] > plain[0]["loss"]
    assert sum(last) / len(last) > 0.9


def test_text_under_mpirun(tmp_path: Path) -> None:
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert mpirun, "pip install 'dist-agc[test]' brings it"
    as_root = [f"OMPI_ALLOW_RUN_AS_ROOT{end}=1" for end in ("", "_CONFIRM")]
    launcher = ["env", *as_root, mpirun, "-n", "2", "--oversubscribe", "--bind-to", "none"]
    result = run(*launcher, *DEMO, "--task", "text", "--backend", "ddp", "--steps", "4", "--out", "here", cwd=tmp_path)
    lines = assert_outputs(result, tmp_path / "here", "text")
    assert len(lines) == 8
    assert result.stdout.count("Summary") == 1, "one process speaks"


def test_a_failing_process_fails_the_command(tmp_path: Path) -> None:
    (tmp_path / "digits.jsonl").mkdir()
    result = run(*DEMO, "--nproc", "1", "--out", str(tmp_path), "--steps", "1", cwd=tmp_path)
    assert result.returncode == 1
    assert "IsADirectoryError" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("dist-agc: rank 0 of 1 failed")


def test_interrupt_ends_all_processes_quietly(tmp_path: Path) -> None:
    _, err = interrupted(*DEMO, "--steps", "100000", "--lr", "0.1", cwd=tmp_path, at="step    1/")
    assert err.strip() == "dist-agc: interrupted, all processes are stopped."
    assert (tmp_path / "runs" / "demo" / "digits.jsonl").read_text().startswith('{"step": 1,')


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "cats"], "'cats' is not known; choose from: digits, text"),
        (["--backend", "horovod"], "'horovod' is not known; choose from: fsdp2"),
        (["--nproc", "0"], "0 processes cannot train anything; give 1 or more"),
        (["--nproc", str(MOST_PROCESSES + 1)], f"give {MOST_PROCESSES} or fewer"),
        (["--clipping-threshold", "0"], "0.0 is not a positive finite number"),
        (["--clipping-threshold", "-0.01"], "-0.01 is not a positive finite number"),
        (["--clipping-threshold", "nan"], "nan is not a positive finite number"),
        (["--lr", "inf"], "inf is not a positive finite number"),
        (["--steps", "0"], "--steps"),
        (["--seed", "-1"], "--seed"),
        (["--out", f"{__file__}/runs"], "cannot make the folder"),
        (["--threshold", "1"], "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_any_process_starts(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(launch, "torchrun", lambda *_: started.append(_) or 0)
    code, output = invoke("demo", *arguments)
    assert (code, started) == (2, [])
    assert said in output


def test_help_shows_every_option_and_examples() -> None:
    code, output = invoke("demo", "--help")
    assert code == 0
    options = ("task", "nproc", "backend", "clipping-threshold", "lr", "steps", "seed", "out")
    assert [option for option in options if f"--{option}" not in output] == []
    assert "dist-agc demo --task text --nproc 4" in output and "mpirun -n 2 dist-agc demo" in output
    code, output = invoke("--help")
    assert code == 0 and all(f" {command} " in output for command in cli.COMMANDS)


def test_a_launchers_processes_are_joined_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.place({}) is None
    assert launch.place({"RANK": "1", "WORLD_SIZE": "3"}) == launch.Place("torchrun", 1, 3)
    mpi = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    assert launch.place(mpi) == launch.Place("mpirun", 0, 2)
    with pytest.raises(SystemExit, match="MASTER_ADDR"):
        launch.meeting_point(mpi | {"PMIX_SERVER_TMPDIR": "/nowhere"})  # the other process is on another host
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    code, output = invoke("demo", "--nproc", "2", "--out", ".")
    assert code == 2 and "the launcher has started 3" in output


@pytest.mark.parametrize("end", [None, KeyboardInterrupt(), ValueError("no port")], ids=repr)
def test_starting_processes_leaves_this_one_as_it_was(
    end: BaseException | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch.distributed import run as torchrun

    def fake(_: object) -> None:
        logging.error("a page of torchrun's")
        if end is not None:
            raise end

    monkeypatch.setattr(torchrun, "run", fake)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environment = dict(os.environ)
    logging.disable(logging.DEBUG)  # as a user may have done
    try:
        with pytest.raises(ValueError) if isinstance(end, ValueError) else nullcontext():
            assert launch.torchrun(["check"], 2) == (0 if end is None else launch.INTERRUPTED)
        logging.error("a word of ours")
        logging.debug("what the user has silenced")
    finally:
        logging.disable(logging.NOTSET)
    assert [record.message for record in caplog.records] == ["a word of ours"]
    assert dict(os.environ) == environment


def test_scaled_standardised_weights() -> None:
    torch.manual_seed(0)
    layer = ScaledStdConv2d(3, 5, 3)
    with torch.no_grad():
        layer.gain.uniform_(0.5, 2)
        layer.bias.uniform_(-1, 1)  # pyright: ignore[reportOptionalMemberAccess]
    weight = layer.weight.double()
    mean = weight.mean((1, 2, 3), keepdim=True)
    variance = weight.var((1, 2, 3), keepdim=True, correction=0)
    expected = (weight - mean) / (variance * 27 + 27e-5).sqrt() * layer.gain.double().view(-1, 1, 1, 1)
    images = torch.randn(2, 3, 8, 8)
    bias = layer.bias.double()  # pyright: ignore[reportOptionalMemberAccess]
    reference = F.conv2d(images.double(), expected, bias, padding=1)
    torch.testing.assert_close(layer(images).double(), reference, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_signals_keep_their_size_without_normalisation() -> None:
    """What the scaled activations, alpha and beta are for: every block gets and gives a variance near one."""
    torch.manual_seed(0)
    model = NFResNet()
    x = model.stem(torch.randn(64, 1, 8, 8))
    for block in model.blocks:
        x = block(x)
        assert 0.5 < float(x.var()) < 2


def test_batches_are_the_same_everywhere_and_cover_the_data() -> None:
    ours, theirs = (torch.cat(list(batches(10, 4, 5, seed=3))) for _ in range(2))
    assert torch.equal(ours, theirs)
    assert ours[:10].sort().values.tolist() == ours[10:].sort().values.tolist() == list(range(10))
    assert ours[:10].tolist() != ours[10:].tolist()


if __name__ == "__main__":
    turns.take(train)
