"""`python docs/study`: its grid, its trials, its results, and a whole quick run as a user starts it."""

import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer

from dist_agc.lab.console import application, launch
from study import pool, runner, sharded
from study.command import command
from study.networks import NETWORKS
from study.results import Results
from study.trials import BATCHES, FULL, NONE, PARTS, QUICK, THRESHOLDS, Case, Clipping, Trial
from test_demo import ENV, interrupted, invoke, run

ROOT = Path(__file__).parents[3]
STUDY = (sys.executable, str(ROOT / "docs" / "study"))
APP = application("study", command)
AGC = Clipping("agc", 0.01)


# ------------------------------------------------------------------------------------------------------------- the grid


def test_the_grid_covers_what_the_claims_are_about() -> None:
    trials = FULL.trials("images", seeds=3) + FULL.trials("text", seeds=3)
    assert len(set(trials)) == len(trials)
    assert {t.seed for t in trials} == {0, 1, 2}
    norm_free = {(t.batch, t.clipping) for t in trials if t.network == "nf"}
    assert norm_free >= {(batch, Clipping("agc", at)) for batch in BATCHES for at in THRESHOLDS}
    assert {t.clipping.kind for t in trials if t.network == "nf" and t.batch == 1024} == {"none", "agc", "agc+last"}
    for network in ("plain", "bn"):
        assert {t.batch for t in trials if t.network == network and t.clipping == AGC} == set(BATCHES)
    assert {t.clipping.kind for t in trials if t.network == "gpt"} == {"none", "agc", "norm"}
    assert {t.network for t in trials} == set(NETWORKS)


def test_learning_rates_double_and_reach_further_under_small_thresholds() -> None:
    rates = {
        clipping: [t.lr for t in FULL.trials("images", 1) if (t.network, t.batch, t.clipping) == ("nf", 128, clipping)]
        for clipping in (NONE, AGC, Clipping("agc", 0.32))
    }
    for found in rates.values():
        assert [b / a for a, b in zip(found, found[1:], strict=False)] == pytest.approx([2] * (len(found) - 1))
    assert rates[NONE][0] == rates[AGC][0] and rates[NONE][-1] < rates[AGC][-1]
    assert rates[Clipping("agc", 0.32)] == rates[NONE]


def test_more_seeds_add_trials_and_change_none() -> None:
    assert set(FULL.trials("text", 2)) < set(FULL.trials("text", 3))


@pytest.mark.parametrize("what", [*QUICK.trials("images", 1), *QUICK.trials("text", 1), *QUICK.cases()], ids=str)
def test_lines_name_what_they_are_of(what: Trial | Case) -> None:
    assert type(what).of(json.loads(json.dumps(what.as_dict()))) == what


# ----------------------------------------------------------------------------------------------------------- the trials


def test_the_rate_rises_then_falls_to_nothing() -> None:
    shares = [runner._share_of_rate(step, 100) for step in range(100)]
    assert shares[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert shares[10] == 1 and shares[10:] == sorted(shares[10:], reverse=True) and 0 < shares[-1] < 0.001
    assert runner._share_of_rate(0, 1) == 1


@pytest.mark.parametrize("name", ["nf", "plain", "bn"])
def test_networks_are_of_one_shape(name: str) -> None:
    make = NETWORKS[name].make
    assert make is not None
    model = make()
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    kernels = {n: p.shape for n, p in model.named_parameters() if p.ndim == 4}
    reference = NETWORKS["nf"].make
    assert reference is not None
    assert kernels == {n: p.shape for n, p in reference().named_parameters() if p.ndim == 4}
    normed = any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    assert normed == (name == "bn")


def test_a_trial_gives_the_same_again_and_counts_what_was_clipped() -> None:
    trial = Trial("nf", 1024, AGC, 0.4, seed=1)
    first, again = (runner.run(QUICK, trial) for _ in range(2))
    for found in (first, again):
        assert found.pop("seconds") >= 0
    assert first == again
    assert first["diverged"] is None and 0 < first["clipped"] < 1 and 0 < first["accuracy"] < 1
    other = runner.run(QUICK, replace(trial, seed=2))
    assert other["loss"] != first["loss"]
    unclipped = runner.run(QUICK, replace(trial, clipping=NONE))
    assert unclipped["clipped"] is None and unclipped["loss"] != first["loss"]


def test_a_trial_that_diverges_says_when() -> None:
    found = runner.run(QUICK, Trial("nf", 128, NONE, 1e4, seed=0))
    assert 1 < found["diverged"] < 34
    assert found["accuracy"] is None and found["loss"] is None
    json.dumps(found, allow_nan=False)


def test_the_last_layer_is_clipped_only_where_asked() -> None:
    units = {}
    for kind in ("agc", "agc+last"):
        case = Case("nf", 256, Clipping(kind, 0.02), 0.1, "float64")
        with launch.process_group(launch.ALONE):
            run = runner.trained(runner.prepared(case, QUICK), case.clipping, 0)
        units[kind] = run.steps[0].stats["agc/units"]
    assert units["agc+last"] - units["agc"] == 11  # ten rows and a bias


def test_batch_norm_is_tested_with_its_running_statistics() -> None:
    make = NETWORKS["bn"].make
    assert make is not None
    model = make()
    task = replace(runner.prepared(Trial("bn", 1024, NONE, 0.1, 0), QUICK), model=lambda: model)
    with launch.process_group(launch.ALONE):
        run = runner.trained(task, NONE, 0)
    with torch.no_grad():
        right = (model.eval()(task.test.inputs).argmax(1) == task.test.targets).float().mean()
        batch = (model.train()(task.test.inputs).argmax(1) == task.test.targets).float().mean()
    assert run.test_accuracy == pytest.approx(float(right))
    assert run.test_accuracy != pytest.approx(float(batch))


def test_the_global_norm_is_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """At max_norm 1e-6 SGD cannot move."""
    trial = Trial("nf", 1024, Clipping("norm", 1e-6), 0.4, 0)
    assert runner.run(QUICK, trial)["train"] == pytest.approx(math.log(10), abs=0.02)
    assert runner.run(QUICK, replace(trial, clipping=NONE))["train"] < 2.2


def test_an_early_end_leaves_no_process_behind() -> None:
    found = pool.results(QUICK, QUICK.trials("images", 1), jobs=2)
    next(found)
    workers = multiprocessing.active_children()
    found.close()
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL] * 2, "they did not finish what was left"


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "from study import pool\nfrom study.trials import QUICK\n"
        "for line in pool.results(QUICK, QUICK.trials('images', 1), jobs=1): print(line, flush=True)"
    )
    command = [sys.executable, "-c", code]
    env = ENV | {"PYTHONPATH": f"{ROOT / 'docs'}{os.pathsep}{ENV.get('PYTHONPATH', ROOT)}"}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "accuracy" in process.stdout.readline()
        process.kill()
        process.communicate(timeout=60)  # its output ends when the last process that could write to it has ended


# ---------------------------------------------------------------------------------------------------------- the results


def test_results_are_kept_and_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    first, second = FULL.trials("images", 1)[:2]
    case = FULL.cases()[0]
    results = Results(path, FULL)
    results.add(first.as_dict() | {"accuracy": 0.5})
    results.add(case.as_dict() | {"processes": 2})
    results.add(second.as_dict() | {"accuracy": 0.75})
    assert json.loads(path.read_text().splitlines()[0]) == {"settings": FULL.settings()}
    again = Results(path, FULL)
    assert again.trials == results.trials and again.cases == results.cases and set(again.cases) == {case}

    path.write_bytes(path.read_bytes()[:-20])
    notes: list[str] = []
    torn = Results(path, FULL, notes.append)
    assert set(torn.trials) == {first} and len(notes) == 1 and "cut off" in notes[0]
    torn.add(second.as_dict() | {"accuracy": 0.75})
    assert Results(path, FULL, notes.append).trials == results.trials and len(notes) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"settings":{"epochs":1}}\n', "other settings"),
        ("loss 3\n", "line 1: not a line of a study: loss 3"),
        ('{"step":1}\n', "line 1: not a line of a study"),
        ("[1]\n", "line 1: not a line of a study"),
    ],
)
def test_a_file_of_something_else_is_refused_and_kept(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(content)
    with pytest.raises(typer.BadParameter, match=said):
        Results(path, FULL)
    assert path.read_text() == content


# ------------------------------------------------------------------------------------------------ sharded and unsharded


def test_differences_are_seen() -> None:
    one = sharded.Outcome([2.0, 1.0], [3, 4], 10, {"w": torch.tensor([1.0, -4.0]), "b": torch.ones(1)})
    other = sharded.Outcome([2.0, 1.5], [3, 2], 10, {"w": torch.tensor([1.0, -3.0]), "b": torch.ones(1)})
    assert sharded.differences(one, one)["apart"] == {"loss": 0, "clipped": 0, "weights": 0}
    assert sharded.differences(one, other)["apart"] == {"loss": 0.5, "clipped": 2, "weights": 0.25}


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.mark.timeout(600)
def test_quick_run_is_interrupted_goes_on_and_then_has_nothing_to_do(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- study: claims -->\n<!-- /study -->\n")
    command = (*STUDY, "--quick", "--page", str(page))
    path = tmp_path / "runs" / "study-quick" / "results.jsonl"
    total = {part: len(QUICK.trials(part, 1)) for part in ("images", "text")} | {"sharded": len(QUICK.cases())}

    def finished(timeout: float) -> str:
        done = run(*command, cwd=tmp_path, timeout=timeout)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    out, err = interrupted(*command, cwd=tmp_path, at="trials  1/")
    assert "the same command goes on from there" in " ".join(out.split()) and err == ""
    before = path.read_text()
    assert 2 <= len(before.splitlines()) < total["images"]
    with path.open("a") as file:
        file.write('{"net":"nf","ba')

    out = finished(timeout=400)
    assert "the last line was cut off" in " ".join(out.split())
    done_before = re.findall(r"(?:images|text): \d+ trials, (\d+) of them done before", out)
    assert sum(map(int, done_before)) == len(before.splitlines()) - 1
    done = path.read_text()
    assert done.startswith(before)
    lines = [json.loads(line) for line in done.splitlines()]
    assert len(lines) == 1 + sum(total.values())
    for line in (line for line in lines if "dtype" in line):
        assert line["processes"] == 2 and line["steps"] == QUICK.sharded_steps
        assert 0 < line["clipped"] < line["units"] * line["steps"]
        apart = line["apart"]
        assert apart["clipped"] == 0 and apart["loss"] < 1e-12 and apart["weights"] < 1e-9
    assert {p.name for p in path.parent.glob("*.png")} == {"rates.png", "thresholds.png", "text.png"}
    assert "| claim |" in page.read_text() and "| claim |" in (path.parent / "tables.md").read_text()

    out = finished(timeout=60)
    for part, number in total.items():
        assert f"{part}: {number} tr" in out and f", {number} of them done before." in out
    assert path.read_text() == done, "nothing ran again"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "cats"], "'cats' is not known; choose from: images, text, sharded"),
        (["--seeds", "0"], "--seeds"),
        (["--jobs", "0"], "--jobs"),
        (["--out", f"{__file__}/runs"], "cannot use"),
        (["--page", "/no/such/page.md"], "does not exist"),
        (["--page", str(ROOT / "README.md")], "no <!-- study: TABLE -->"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_any_trial(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pool, "results", lambda *_: pytest.fail("a trial was started"))
    code, output = invoke(*arguments, app=APP)
    assert code == 2 and said in output


def test_a_launchers_processes_run_the_sharded_part_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, output = invoke("--quick", app=APP)
    assert code == 2 and "add --only sharded" in output


def test_the_page_names_every_option() -> None:
    rows = re.findall(r"^\| `(--[\w-]+)` \|", (ROOT / "docs" / "study.md").read_text(), re.MULTILINE)
    real = {option for p in typer.main.get_command(APP).params for option in p.opts}
    assert set(rows) == real - {"--help", "-h"} and len(rows) == len(set(rows))


def test_help_teaches() -> None:
    code, output = invoke("--help", app=APP)
    assert code == 0
    assert [o for o in ("only", "quick", "seeds", "jobs", "out", "page") if f"--{o}" not in output] == []
    assert all(part in output for part in PARTS) and "python docs/study --only text --seeds 5" in output
