"""Every Python block of README.md and docs/ runs, as the word after ``python`` on its fence says."""

import re
import runpy
from pathlib import Path

import pytest

import turns
from helpers import quiet_deepspeed

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Their blocks tell dist_agc of new modules and frameworks, which the blocks of other pages shall not see.
ALONE = ("adding-a-framework.md", "adding-a-rule.md", "units.md")


def blocks() -> dict[str, tuple[str, str]]:
    """By page and line: the word on the fence, and the code."""
    found = {}
    for page in PAGES:
        text = page.read_text()
        for block in re.finditer(r"^```python *(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            if block[1] != "composer":  # tests/mosaicml runs that page's
                line = text[: block.start()].count("\n") + 1
                found[f"{page.name}:{line}"] = block[1], block[2]
    return found


BLOCKS = blocks()
RANKS = {"": 1, "torchrun": 2}
TOGETHER = {
    word: [case for case, (how, _) in BLOCKS.items() if how == word and not case.startswith(ALONE)] for word in RANKS
}

trained = turns.fixture(*((RANKS[word], cases) for word, cases in TOGETHER.items()), read=lambda folder, log: log)


@pytest.mark.parametrize("case", [case for cases in TOGETHER.values() for case in cases])
def test_code_runs(case: str, trained: turns.Trained) -> None:
    trained(case)


@pytest.mark.parametrize("case", [case for case in BLOCKS if not any(case in cases for cases in TOGETHER.values())])
def test_code_runs_alone(case: str, tmp_path: Path) -> None:
    how, code = BLOCKS[case]
    if how not in RANKS:
        assert how == "torchtitan", f"docs/CONTRIBUTING.md knows no block marked {how!r}"
        pytest.importorskip(how, reason=f"needs {how}")
    script = tmp_path / "block.py"
    script.write_text(code)
    exit_code, said = turns.start(str(script), tmp_path, ranks=RANKS.get(how, 1))
    assert exit_code == 0, said


def run(case: str, folder: str) -> None:
    script = Path(folder, "block.py")
    script.write_text(BLOCKS[case][1])
    if "deepspeed" in BLOCKS[case][1]:
        quiet_deepspeed()
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    turns.take(run)
