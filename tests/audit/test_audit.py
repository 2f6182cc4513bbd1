"""The audit: the units of many models are those that their matrix products leave. docs/units-audit.md has its table.

All of them take two cores more than four minutes. A plain run looks at every family with experts and at some others;
DIST_AGC_AUDIT=1 at all.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="needs pip install 'dist-agc[transformers]'")

import architectures as known
import pictures
import tiny
import transformers
from look import Found, look

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "units-audit.md"


def some(names: Sequence[str], every: int) -> list[str]:
    whole = "DIST_AGC_AUDIT" in os.environ
    return [name for i, name in enumerate(names) if whole or name in known.WITH_EXPERTS or i % every == 0]


def approve(found: Found, less_seen: dict[str, tuple[float, str]]) -> None:
    assert not found.disagreements
    assert not found.guesses, "give them a line in dist_agc/model/table.py"
    least, _ = less_seen.get(found.name, (known.LEAST_SEEN, ""))
    assert found.seen >= least
    if found.name in less_seen:
        assert found.seen < known.LEAST_SEEN, "it is no exception any more"


@pytest.mark.filterwarnings("ignore")  # those of the models
@pytest.mark.parametrize("name", some(known.TRANSFORMERS, every=3))
def test_transformers(name: str) -> None:
    torch.manual_seed(0)
    model = tiny.build(name)
    given = tiny.inputs(model)
    found = look(name, model, lambda: model(**given))
    approve(found, known.LESS_SEEN)
    inner, _ = known.UNROUTED.get(name, (None, ""))
    for parameter, _, dims, seen in found.experts:
        assert dims in ((0, 1), (0, 2)), parameter
        assert seen or (inner and inner in parameter), f"no product took {parameter}"
    if name in known.WITH_EXPERTS and name not in known.EXPERTS_ARE_MODULES:
        assert found.experts


def test_every_family_with_experts_is_there() -> None:
    """Every directory of transformers with a class of experts, by its source, has an architecture in the list."""
    models = Path(transformers.__file__).parent / "models"
    families = {
        path.parent.name
        for path in models.glob("*/modeling_*.py")
        if re.search(r"^class \w*Experts", path.read_text(), re.MULTILINE)
    }
    looked_at = {transformers.CONFIG_MAPPING[name].__module__.split(".")[-2] for name in known.WITH_EXPERTS}
    assert families == looked_at
    assert len(families) > 60


def test_few_could_not_be_built() -> None:
    assert len(known.TRANSFORMERS) >= 100 and len(known.TIMM) >= 50 and len(known.TORCHVISION) >= 10
    assert len(known.NOT_BUILT) <= 0.15 * (len(known.TRANSFORMERS) + len(known.NOT_BUILT))
    assert not set(known.NOT_BUILT) & set(known.TRANSFORMERS)


PARTS = 2


@pytest.mark.skipif(not pictures.installed(), reason="needs timm and torchvision, see launch/setup.sh dev")
@pytest.mark.parametrize(
    ("library", "names"),
    [
        *(pytest.param("timm", some(known.TIMM, every=4)[i::PARTS], id=f"timm-{i}") for i in range(PARTS)),
        pytest.param("torchvision", some(known.TORCHVISION, every=4), id="torchvision"),
    ],
)
def test_pictures(library: str, names: list[str]) -> None:
    rows = pictures.looked_at(library, names)
    assert [row.name for row in rows] == names
    for found in rows:
        approve(found, known.LESS_SEEN_OF_TIMM)


def test_the_page_has_them_all() -> None:
    rows = set(re.findall(r"^(\S+) +[\d,]+ +[\d,]+ +\d+% +\d+ +\d+$", PAGE.read_text(), re.MULTILINE))
    assert rows == {*known.TRANSFORMERS, *known.TIMM, *known.TORCHVISION}
    assert all(f"| {name} | {why} |" in PAGE.read_text() for name, why in known.NOT_BUILT.items())


class Contrary(nn.Linear):
    """Says that it is a Linear, and is not used as one."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight


def test_the_audit_sees_what_is_wrong() -> None:
    model = Contrary(6, 4, bias=False)
    found = look("contrary", model, lambda: model(torch.ones(2, 4)))
    assert found.disagreements == ["weight (4, 6): Contrary: rows says (0,), seen (1,)"]
    with pytest.raises(AssertionError):
        approve(found, {})
    unused = look("unused", nn.Linear(6, 4), lambda: None)
    with pytest.raises(AssertionError):
        approve(unused, {})
