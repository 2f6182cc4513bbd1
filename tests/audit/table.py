"""Print the table of docs/units-audit.md:

bash launch/setup.sh dev
.venv/bin/python tests/audit/table.py
"""

import warnings
from collections.abc import Iterator
from pathlib import Path

import architectures as known
import pictures
import tiny
import torch
import transformers
from look import HEADINGS, Found, look, row


def of_transformers() -> Iterator[Found]:
    for name in known.TRANSFORMERS:
        torch.manual_seed(0)
        model = tiny.build(name)
        given = tiny.inputs(model)
        yield look(name, model, lambda model=model, given=given: model(**given))


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    versions = {name: _version(name) for name in ("timm", "torchvision")}
    print(f"torch {torch.__version__}, transformers {transformers.__version__}", end="")
    print("".join(f", {name} {version}" for name, version in versions.items()))
    every: list[Found] = []
    for title, looked_at in (
        ("transformers", of_transformers()),
        ("timm", pictures.looked_at("timm")),
        ("torchvision", pictures.looked_at("torchvision")),
    ):
        print(f"\n{title}\n{row(*HEADINGS)}")
        for found in looked_at:
            print(found.line(), flush=True)
            every.append(found)
    wrong = [found.name for found in every if found.disagreements]
    guessed = [found.name for found in every if found.guesses]
    stacks = sum(len(found.experts) for found in every)
    print(
        f"\n{len(every)} architectures, {sum(bool(f.experts) for f in every)} of them with {stacks} stacks of experts"
    )
    print(f"with a disagreement: {len(wrong)} {' '.join(wrong)}")
    print(f"with a guess of three dims or more: {len(guessed)} {' '.join(guessed)}")


def _version(name: str) -> str:
    return next(pictures.FOLDER.glob(f"{name}-*.dist-info"), Path("-none.")).name.split("-")[1].removesuffix(".dist")


if __name__ == "__main__":
    main()
