"""What people look at: ratios(), last_linear(), `dist-agc report` in a real browser, `dist-agc advise`."""

import html
import json
import logging
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import dist_agc
import dist_agc.cli
import oracle
from helpers import median_threshold, noisy_grads, storages

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 7), nn.ReLU(), nn.LayerNorm(7), nn.Linear(7, 3)
    )


def run(path: Path, threshold: float, *, steps: int = 12, dry_run: bool = False) -> Path:
    """A small training run that writes what docs/logging.md says."""
    torch.manual_seed(0)
    model, exclude = network(), ("6.*",)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    hook = dist_agc.attach(model, optimizer, clipping_threshold=threshold, exclude=exclude, dry_run=dry_run)
    with path.open("w") as file:
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(torch.randn(8, 1, 4, 4)), torch.randint(3, (8,)))
            loss.backward()
            line: dict[str, Any] = {"step": step, "run": f"at {threshold}", "loss": loss.item()}
            if step == 1:
                line["settings"] = {"clipping_threshold": threshold, "exclude": exclude}
            if step % 4 == 0:
                line |= dist_agc.ratios(hook.clipper).as_dict()
            optimizer.step()
            assert hook.stats is not None
            file.write(json.dumps(line | hook.stats.as_dict(per_parameter=step % 3 == 0)) + "\n")
    return path


def cli(*arguments: Any, fails: bool = False) -> str:
    """The command in this process: all that it says, in one line, without the frames around messages."""
    result = CliRunner().invoke(dist_agc.cli.build(), [*map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb"})
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert (result.exit_code != 0) == fails, result.output
    return " ".join(result.output.replace("│", " ").split())


# ------------------------------------------------------------------------------------------------------------- ratios


def test_ratios_are_the_oracles_and_change_nothing() -> None:
    model = network()
    noisy_grads(model)
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    at = storages(model)
    middle = median_threshold(model, oracle.unit_rules(model))
    found = dist_agc.ratios(model, [middle / 4, middle, middle * 4], exclude="6.*")
    assert storages(model) == at
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.equal(p.grad, before[name])
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for k, threshold in enumerate(found.thresholds):
        expected = oracle.clip(weights, before, oracle.unit_rules(model), threshold, exclude=("6.weight", "6.bias"))
        assert {name: above[k] for name, above in found.above.items()} == {
            name: of.clipped_units for name, of in expected.per_parameter.items()
        }
        assert 0 < expected.clipped_units < expected.units
    assert found.units == {name: of.units for name, of in expected.per_parameter.items()}


def test_looking_leaves_the_weight_norms_that_clipping_reuses() -> None:
    model = torch.nn.Linear(3, 2, bias=False)
    clipper = dist_agc.Clipper(model, clipping_threshold=0.01, weight_norm_interval=2)
    limits = []
    for factor, look in ((1.0, False), (10.0, True)):
        torch.nn.init.constant_(model.weight, factor)
        model.weight.grad = torch.ones_like(model.weight)
        if look:
            dist_agc.ratios(clipper)
        clipper.clip()
        limits.append(float(model.weight.grad.norm(dim=1)[0] / (0.01 * 3**0.5)))
    assert limits == pytest.approx([1.0, 1.0]), "the second call reuses the norms of the first"


def test_ratios_of_an_attached_model_take_its_settings() -> None:
    model = network()
    noisy_grads(model)
    hook = dist_agc.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), exclude="6.*", on_nonfinite="raise")
    assert "6.weight" not in dist_agc.ratios(hook.clipper).above
    with pytest.raises(TypeError, match="settings already"):
        dist_agc.ratios(hook.clipper, eps=0)


@pytest.mark.parametrize("thresholds", [[], [0.1, 0.1], [0.2, 0.1]])
def test_thresholds_must_ascend(thresholds: list[float]) -> None:
    with pytest.raises(ValueError, match="ascend"):
        dist_agc.ratios(network(), thresholds)


# -------------------------------------------------------------------------------------------------------- last_linear


def test_last_linear_is_found_and_logged_by_name(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    with caplog.at_level(logging.INFO, "dist_agc"):
        assert dist_agc.last_linear(model) == "6.*"
    assert "'6'" in caplog.text
    noisy_grads(model)
    stats = dist_agc.apply_agc(model, exclude=dist_agc.last_linear(model))
    assert stats is not None and set(stats.per_parameter) == {n for n, _ in model.named_parameters() if n[0] != "6"}


def test_last_linear_of_wrapped_odd_and_impossible_models() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.norm = nn.Linear(2, 2), nn.LayerNorm(2)
            self.heads = nn.ModuleDict({"a[0]": nn.Linear(2, 1)})

    model = Head()
    pattern = dist_agc.last_linear(torch.compile(model, backend="eager"))  # type: ignore[arg-type]
    noisy_grads(model)
    stats = dist_agc.apply_agc(model, exclude=pattern)
    assert stats is not None and not [name for name in stats.per_parameter if name.startswith("heads")]
    assert dist_agc.last_linear(nn.Linear(2, 2)) == "*"
    with pytest.raises(ValueError, match="Conv2d has no linear layer"):
        dist_agc.last_linear(nn.Conv2d(1, 1, 1))
    with pytest.raises(TypeError, match="expected a module, got list"):
        dist_agc.last_linear([])  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- report


PROBE = """<script>addEventListener('load', () => parent.document.title = JSON.stringify({
    wide: document.documentElement.scrollWidth, window: window.innerWidth,
    charts: [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width > 200 &&
                                                           s.getBoundingClientRect().height > 60),
    cut: [...document.querySelectorAll('svg text')].filter(t => {
        const box = t.getBoundingClientRect(), svg = t.ownerSVGElement.getBoundingClientRect();
        return box.left < svg.left - 1 || box.right > svg.right + 1;
    }).map(t => t.textContent),
    smallest: Math.min(...[...document.querySelectorAll('svg text, td')].map(t => t.getBoundingClientRect().height)),
    text: document.body.innerText}))</script>"""


@pytest.mark.parametrize("width", [1280, 375], ids=["desktop", "phone"])
def test_report_in_a_browser(width: int, tmp_path: Path) -> None:
    if BROWSER is None:
        pytest.skip("no browser here: install chromium")
    first, second = run(tmp_path / "first.jsonl", 0.02), run(tmp_path / "second.jsonl", 0.5)
    page = tmp_path / "report.html"
    cli("report", first, second, "--out", page)
    text = page.read_text()
    assert "http:" not in text.replace("http://www.w3.org/", "") and "https:" not in text  # loads nothing
    # In a frame, because no window of headless Chromium is as narrow as a phone.
    framed = html.escape(text.replace("</main>", f"</main>{PROBE}"))
    frame = (
        f'<title>nothing</title><iframe style="border: 0; width: {width}px; height: 800px" srcdoc="{framed}"></iframe>'
    )
    (tmp_path / "framed.html").write_text(f"<!doctype html>{frame}")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    flags += ["--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,900"]
    dom = subprocess.run(
        [BROWSER, *flags, "--dump-dom", (tmp_path / "framed.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    start = dom.index("<title>") + len("<title>")
    seen = json.loads(html.unescape(dom[start : dom.index("</title>")]))
    assert seen["window"] == width
    assert seen["wide"] <= width, "the page scrolls sideways"
    # four lines over time, the histogram, a heat map of each run
    assert seen["charts"] == [True] * 7
    assert seen["cut"] == [] and seen["smallest"] >= 8  # pixels
    for words in ("at 0.02", "at 0.5", "0.weight", "Clipped most", "clipping_threshold", "['6.*']"):
        assert words in seen["text"], words
    assert "threshold 0.5" in text  # in the histogram


def test_report_of_little(tmp_path: Path) -> None:
    """One step, no loss, nothing per parameter, a null for a number that was not finite, names with HTML in them."""
    path = tmp_path / "little.jsonl"
    path.write_text('{"step": 1, "run": "<b>", "agc/clip_fraction": 0.5, "agc/grad_norm": null}\n{"step": 2, "a')
    cli("report", path)
    text = path.with_suffix(".html").read_text()
    assert "&lt;b&gt;" in text and "<b>" not in text
    assert "50.0%" in text and "as_dict(per_parameter=True)" in text


def table(path: Path) -> dict[str, list[str]]:
    """The report's table of runs: by heading, a cell a run."""
    cli("report", path)
    text = path.with_suffix(".html").read_text()
    rows = re.findall(r"<tr>(.*?)</tr>", text[: text.index("</section>")])
    cells = [[re.sub("<.*?>", "", cell) for cell in re.findall("<td>(.*?)</td>", row)] for row in rows]
    return {row[0]: row[1:] for row in cells}


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (['"loss": 2.5', '"loss": 1.25', '"evaluation": 7'], "1.25"),
        (['"loss": 2.5', '"loss": NaN'], "not finite"),
        (['"loss": 2.5', '"loss": null', '"evaluation": 7'], "not finite"),
        (['"evaluation": 7'], "–"),
    ],
)
def test_last_loss_and_step_of_a_report(losses: list[str], said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    lines = [f'{{"step": {1234567 + i}, "agc/clip_fraction": 0.5, {loss}}}' for i, loss in enumerate(losses)]
    path.write_text("\n".join(lines))
    found = table(path)
    assert found["last loss"] == [said]
    assert found["last step"] == [f"{1234567 + len(losses) - 1:,}"]


def test_runs_of_files_with_one_name_are_told_apart(tmp_path: Path) -> None:
    from dist_agc.cli.runs import read

    paths = [tmp_path / folder / "run.jsonl" for folder in ("a/x", "b/x", "c/y")]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.write_text('{"step": 1, "agc/units": 1}\n{"step": 1, "run": "second", "agc/units": 1}\n')
    assert [found.name for found in read(paths[1:])] == ["x/run", "x/run: second", "y/run", "y/run: second"]
    assert [found.name for found in read(paths)][::2] == ["a/x/run", "b/x/run", "c/y/run"]
    assert [found.name for found in read([paths[0], paths[0]])] == ["run", "second"]  # one file given twice
    assert len(read([paths[0], paths[0]])[0].lines) == 1


def test_report_of_many_parameters_says_that_it_shows_some(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps({"step": 1} | {f"agc/clip_fraction/layer{i}": i / 100 for i in range(70)}) + "\n")
    cli("report", path)
    text = path.with_suffix(".html").read_text()
    assert "The 60 parameters that are clipped most, of 70." in text
    assert ">layer69<" in text and ">layer9<" not in text


def test_report_and_advice_on_ratios_with_little_in_them(tmp_path: Path) -> None:
    """No parameter with units; a parameter whose statistics were never finite; other thresholds after a while."""
    path = tmp_path / "run.jsonl"
    path.write_text(
        '{"step": 1, "agc/ratios": {"thresholds": [0.1], "parameters": {"empty": [0, 0]}}}\n'
        '{"step": 2, "agc/clip_fraction/empty": null}\n'
    )
    cli("report", path)
    assert "No ratios were counted" in path.with_suffix(".html").read_text()
    assert "no line has agc/ratios" in cli("advise", path, fails=True)
    ratios = [f'{{"thresholds": [{t}], "parameters": {{"a": [8, 4], "empty": [0, 0]}}}}' for t in (0.1, 0.1, 0.2)]
    path.write_text("\n".join(f'{{"step": {i}, "agc/ratios": {r}}}' for i, r in enumerate(ratios)))
    assert "2 steps measured, 8 units; 1 with other thresholds left out" in cli("advise", path)
    cli("report", path)
    assert "1 lines of run with other thresholds are left out" in path.with_suffix(".html").read_text()


def ratios_line(**changed: Any) -> str:
    return json.dumps({"step": 1, "agc/ratios": {"thresholds": [0.1, 0.2], "parameters": {}} | changed})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("{}\n", 'expected a "step"'),
        ('{"step": NaN}\n', 'line 1: expected a "step" that is a number, got NaN'),
        ('{"step": true}\n', 'expected a "step" that is a number, got true'),
        ('{"step": 1, "settings": "x"}\n', 'line 1: expected "settings" to be an object, got "x"'),
        ('{"step": 0, "agc/units": 1}\n{"step": 1, "agc/ratios": null}\n', 'line 2: expected "agc/ratios" as'),
        (ratios_line(parameters=[]), 'an object with "thresholds" and "parameters"'),
        (ratios_line(thresholds=[]), "a list of positive thresholds; got []"),
        (ratios_line(thresholds=[0.1, "x"]), "a list of positive thresholds"),
        (ratios_line(thresholds=[0.2, 0.1]), "thresholds that ascend; got [0.2, 0.1]"),
        (ratios_line(parameters={"a": [1, 2]}), "'a' the units and those above each of 2 thresholds"),
        (ratios_line(parameters={"a": [1, 2, 0]}), "which become fewer; got [1, 2, 0]"),
        (ratios_line(parameters={"a": None}), "got null"),
        ("[1]\n", "line 1: expected an object"),
        ('{"step": 1}\nnothing\n{"step": 2}\n', "line 2: no JSON"),
        ('{"step": 1, "loss": 2}\n', "begins with agc/"),
    ],
)
def test_what_is_no_run_is_refused_with_the_line(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    if content is not None:
        path.write_text(content)
    assert message in cli("report", path, fails=True)


# ------------------------------------------------------------------------------------------------------------- advise


def test_advise_counts_what_each_threshold_would_clip(tmp_path: Path) -> None:
    from dist_agc.cli.advise import shares
    from dist_agc.cli.runs import Counted

    counted = Counted([0.1, 1.0], {"a": [4, 2, 0], "b": [6, 1, 1]}, 1)
    assert shares(counted) == [(0.1, 0.3, 1.0), (1.0, 0.1, 0.5)]
    said = cli("advise", run(tmp_path / "dry.jsonl", 0.02, dry_run=True), "--batch-size", 2048)
    assert "3 steps measured" in said and "this run's" in said
    assert "→ 0.01 " in said and said.count("→") == 1
    assert "SGD on ResNets without normalisation" in said
    assert "→ up to 0.08" in cli("advise", tmp_path / "dry.jsonl", "--batch-size", 512)
    assert "→ 0.16 or more" in cli("advise", tmp_path / "dry.jsonl", "--batch-size", 128)


def test_advise_says_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"step": 1, "agc/clip_fraction": 0.5}\n')
    assert "dist_agc.ratios(model)" in cli("advise", path, fails=True)
