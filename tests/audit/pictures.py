"""Models of timm and torchvision, each in the smallest size that is published. Run as a program it looks at them:

    python tests/audit/pictures.py timm|torchvision [NAME ...]      one line of JSON for each model

A process of its own, since torchvision's compiled library is linked to one build of torch and the wheels that package
registries have are for CUDA. The models need none of it, but beside a torch for CPU `import torchvision` fails, and
with it whatever of transformers imports it. So both lie apart, in .venv/pictures (launch/setup.sh), and here the two
operators that the import asks for are named first.
"""

import json
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import architectures
import torch
from look import Found, look
from torch import nn

FOLDER = Path(__file__).parents[2] / ".venv" / "pictures"
# Without them these run their heads for training, which a forward pass in eval mode leaves out.
WITHOUT_AUXILIARY = {name: {"aux_logits": False, "init_weights": False} for name in ("googlenet", "inception_v3")}


def installed() -> bool:
    return (FOLDER / "timm").is_dir() and (FOLDER / "torchvision").is_dir()


def find() -> None:
    """Make timm and torchvision importable in this process."""
    sys.path.append(str(FOLDER))
    try:
        import torchvision  # noqa: F401  # pyright: ignore[reportMissingImports]
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        kept.append(library)


kept: list[Any] = []  # an operator goes with its library


def build(library: str, name: str) -> tuple[nn.Module, int]:
    """The model, and the side of a picture for it."""
    if library == "timm":
        import timm  # pyright: ignore[reportMissingImports]

        model = timm.create_model(name, num_classes=10)
        return model.eval(), model.pretrained_cfg["input_size"][-1]
    from torchvision import models  # pyright: ignore[reportMissingImports]

    return models.get_model(name, weights=None, num_classes=10, **WITHOUT_AUXILIARY.get(name, {})).eval(), 224


def looked_at(library: str, names: Sequence[str] = ()) -> list[Found]:
    """What this program says, in a process of its own."""
    command = [sys.executable, __file__, library, *names]
    ran = subprocess.run(command, stdout=subprocess.PIPE, timeout=280, text=True, check=True)
    return [Found(**json.loads(line)) for line in ran.stdout.splitlines()]


def main(library: str, *names: str) -> None:
    find()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in names or {"timm": architectures.TIMM, "torchvision": architectures.TORCHVISION}[library]:
        model, side = build(library, name)
        picture = torch.randn(1, 3, side, side)
        print(json.dumps(look(name, model, lambda model=model, picture=picture: model(picture)).as_dict()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
