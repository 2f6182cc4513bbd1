"""What people look at: ratios(), last_linear(), `dist-agc report` in a real browser, `dist-agc advise`."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import browser
import dist_agc
import dist_agc.cli
import oracle
from helpers import median_threshold, noisy_grads, storages


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
                line["settings"] = {"clipping_threshold": threshold, "exclude": exclude, "dry_run": dry_run}
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
    clipper = dist_agc.Clipper(model, clipping_threshold=0.01, weight_norm_interval=4)
    limits = []
    for factor, look in ((1.0, False), (1.0, False), (10.0, True)):
        torch.nn.init.constant_(model.weight, factor)
        model.weight.grad = torch.ones_like(model.weight)
        if look:
            dist_agc.ratios(clipper)
        clipper.clip()
        limits.append(float(model.weight.grad.norm(dim=1)[0] / (0.01 * 3**0.5)))
    assert limits == pytest.approx([1.0, 1.0, 1.0]), "the third call reuses the norms of the second"


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


def test_last_linear_that_is_tied_says_so() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "norm": nn.LayerNorm(3), "head": nn.Linear(3, 5)})
    assert dist_agc.last_linear(model) == "head.*"
    model["head"].weight = model["embedding"].weight
    with pytest.warns(UserWarning, match="'head.weight' and 'embedding.weight' are one parameter") as said:
        assert dist_agc.last_linear(model) == "head.*"
    assert len(said) == 1


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


PROBE = """({
    wide: document.documentElement.scrollWidth, window: window.innerWidth,
    charts: [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width > 200 &&
                                                           s.getBoundingClientRect().height > 60),
    outside: [...document.querySelectorAll('svg text')].filter(t => {
        const box = t.getBoundingClientRect(), svg = t.ownerSVGElement.getBoundingClientRect();
        return box.left < svg.left - 1 || box.right > svg.right + 1;
    }).map(t => t.textContent),
    cut: [...document.querySelectorAll('h1, h2, p, div, td, th')].filter(e => e.scrollWidth > e.clientWidth + 1)
                                                                .map(e => e.textContent),
    smallest: Math.min(...[...document.querySelectorAll('svg text, td')].map(t => t.getBoundingClientRect().height)
                                                                        .filter(height => height > 0)),
    lines: [...document.querySelectorAll('code')].map(name => {
        const lines = [], range = document.createRange();
        for (const node of name.childNodes) for (let i = 0; i < node.length; i++) {
            range.setStart(node, i), range.setEnd(node, i + 1);
            const top = range.getBoundingClientRect().top;
            if (!lines.length || lines.at(-1).top != top) lines.push({top, text: ''});
            lines.at(-1).text += node.data[i];
        }
        return lines.map(line => line.text);
    }),
    text: document.body.innerText})"""
FONTS = (
    "Liberation Sans Narrow, sans-serif",
    "monospace; letter-spacing: 3px",
)  # narrower, wider than those of readers


def styled(page: str, font: str) -> str:
    """With another font in its figures, as a reader may have it."""
    return page.replace("</style>", f"svg, svg * {{ font-family: {font} }}</style>", 1).replace(
        "font-family: 'D", "x: 'D"
    )


@pytest.mark.parametrize("width", [1280, 375], ids=["desktop", "phone"])
def test_report_in_a_browser(width: int, tmp_path: Path) -> None:
    first, second = run(tmp_path / "first.jsonl", 0.02), run(tmp_path / "second.jsonl", 0.5)
    page = tmp_path / "report.html"
    cli("report", first, second, "--out", page)
    text = page.read_text()
    assert "http:" not in text.replace("http://www.w3.org/", "") and "https:" not in text  # loads nothing
    for seen in browser.look([text, *(styled(text, font) for font in FONTS)], PROBE, tmp_path, width=width):
        assert seen["window"] == width
        assert seen["wide"] <= width, "the page scrolls sideways"
        # four lines over time, the histogram, a heat map of each run
        assert seen["charts"] == [True] * 7
        assert (seen["outside"], seen["cut"]) == ([], []) and seen["smallest"] >= 8  # pixels
        for words in ("at 0.02", "at 0.5", "0.weight", "Clipped most", "clipping_threshold", "['6.*']"):
            assert words in seen["text"], words
    assert "threshold 0.5" in text  # in the histogram
    assert "would" not in text, "neither run was dry"


# As transformers and people name things.
LONG = [
    "model.language_model.layers.10.self_attn.k_proj.weight",
    "model.language_model.layers.10.mlp.experts.down_proj_blocks_scales.weight",
    "model.language_model.layers.10.post_attention_layernorm.weight",
]


def test_long_names_are_whole_and_break_between_words(tmp_path: Path) -> None:
    path = tmp_path / "a_run_with_a_name_that_is_longer_than_a_line_of_a_phone.jsonl"
    line = {"step": 1, "agc/units": 1.2e9, "agc/clip_fraction": 0.5, "agc/grad_norm": 1234567.0, "loss": 12345.0}
    line |= {f"agc/{what}/{name}": 0.123456 for what in ("clip_fraction", "grad_norm") for name in LONG}
    line |= {"settings": {"clipping_threshold": 1.25, "units": {LONG[1]: [0, 1]}}}
    other = line | {"run": "another_run_with_a_long_name_beside_it"}
    ratios = {"agc/ratios": {"thresholds": [0.5, 1.0], "parameters": {name: [9, 5, 1] for name in LONG}}}
    path.write_text("\n".join(json.dumps(line | ratios | {"step": step}) for step in (1, 2_000_000)) + "\n")
    (tmp_path / "other.jsonl").write_text(json.dumps(other) + "\n")
    cli("report", path, tmp_path / "other.jsonl", "--out", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "…" not in text
    for width in (1280, 375):
        (seen,) = browser.look([text], PROBE, tmp_path, width=width)
        assert (seen["outside"], seen["cut"]) == ([], []) and seen["wide"] <= width
        assert sorted("".join(lines) for lines in seen["lines"]) == sorted(2 * LONG)
        for lines in seen["lines"]:
            assert all(part.endswith(".") for part in lines[:-1]), lines
    names = re.sub(r"</text>\s*<text[^>]*>", "", text[text.index("<svg") :])
    for name in LONG:  # in the heat maps
        assert f">{name}<" in names


def test_a_dry_run_says_what_it_would_clip(tmp_path: Path) -> None:
    wet, dry = run(tmp_path / "wet.jsonl", 0.5), run(tmp_path / "dry.jsonl", 0.02, dry_run=True)
    cli("report", dry, wet)
    text = dry.with_suffix(".html").read_text().replace("<wbr>", "")
    for words in (
        "Dry: at 0.02 measured what AGC would clip, and clipped nothing.",
        "<h2>Share of units clipped (in dry runs: would be clipped)</h2>",
        "<h2>Share of units that would be clipped, by parameter: at 0.02</h2>",
        "<h2>Would be clipped most: at 0.02</h2>",
        "<h2>Clipped most: at 0.5</h2>",
    ):
        assert words in text, words
    assert text.count("<td>would clip ") == 1
    assert "at 0.02, a dry run: 3 steps measured" in cli("advise", dry)


@pytest.mark.parametrize(
    ("lines", "dry"),
    [
        ([{"settings": {"dry_run": True}}, {"agc/units": 1}], True),
        ([{"agc/units": 1}], False),
        ([{"agc/units": 1, "agc/dry_run": 1.0}, {"evaluation": 1}], True),
        ([{"agc/units": 1, "agc/dry_run": 1.0}, {"agc/units": 1, "agc/dry_run": 0.0}], False),
        ([{"settings": {"dry_run": True}}, {"agc/units": 1}, {"settings": {"dry_run": False}, "agc/units": 1}], False),
    ],
)
def test_what_a_log_says_of_a_dry_run(lines: list[dict[str, Any]], dry: bool) -> None:
    from dist_agc.cli.runs import Run

    assert Run("run", [{"step": i} | line for i, line in enumerate(lines)]).dry == dry


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


@pytest.mark.parametrize(
    ("of_units", "batch_size", "threshold", "why"),
    [
        (
            [0.5, 0.2, 0.05],
            2048,
            0.01,
            "it would clip 50.0% of the units of this run. For such batches 0.01 was published.",
        ),
        ([0.9, 0.7, 0.05], 2048, 0.16, "0.01 was published, but 0.01 would clip 90.0%: nearly all."),
        ([0.4, 0.02, 0.001], 128, 0.08, "0.16 or more was published, but 0.16 would clip 0.1%: hardly any."),
        ([0.9, 0.8, 0.7], 512, 0.16, "That is nearly all: count larger thresholds"),
        ([0.002, 0.001, 0.0], 512, 0.01, "That is hardly any: AGC may do nothing for this run."),
        ([0.4, 0.12, 0.02], None, 0.08, "a threshold should clip some, not most. --batch-size sets it beside"),
        ([0.9, 0.0, 0.0], None, 0.08, "hardly any"),
    ],
)
def test_advise_names_a_threshold_to_start_with(
    of_units: list[float], batch_size: int | None, threshold: float, why: str
) -> None:
    from dist_agc.cli.advise import start

    measured = [(value, share, 1.0) for value, share in zip((0.01, 0.08, 0.16), of_units, strict=True)]
    chosen, said = start(measured, batch_size)
    assert chosen == threshold and why in said


def test_advise_ends_with_the_start_and_the_reason(tmp_path: Path) -> None:
    first, second = (run(tmp_path / f"{name}.jsonl", value, dry_run=True) for name, value in (("a", 0.02), ("b", 0.03)))
    said = cli("advise", first, "--batch-size", 128)
    assert re.search(r"Start with [\d.]+: it would clip [\d.]+% of the units of this run\.", said)
    both = cli("advise", first, second)
    assert "at 0.02: start with " in both and "at 0.03: start with " in both
