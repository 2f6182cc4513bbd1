"""What every framework's test trains, what a run leaves for its test, and what the oracle makes of the same training.

The whole data set is one batch, so the order in which a framework deals it out does not matter.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import oracle
import turns

SAMPLES, FEATURES, CLASSES = 24, 6, 3
STEPS, LR, MOMENTUM = 5, 0.3, 0.9
THRESHOLD, EXCLUDE = 0.15, "head.*"


class Net(nn.Module):
    """Returns the loss when it is given labels, as Hugging Face models do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 13)  # no number of ranks divides 13 or 7
        self.second = nn.Linear(13, 7)
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.norm(torch.tanh(self.second(torch.tanh(self.first(x))))))
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def model() -> Net:
    torch.manual_seed(1)
    return Net()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(SAMPLES, FEATURES, generator=generator)
    # Features of very different size, so that some units' gradients are large and some are small.
    x *= torch.logspace(-1, 0.7, FEATURES)
    return x, torch.randint(CLASSES, (SAMPLES,), generator=generator)


def my_share(rank: int = 0, ranks: int = 1) -> tuple[Tensor, Tensor]:
    """This rank's samples, equally many on each."""
    x, labels = data()
    return x[rank::ranks], labels[rank::ranks]


def dataset() -> list[dict[str, Tensor]]:
    return [{"x": x, "labels": label} for x, label in zip(*data(), strict=True)]


def reference(
    threshold: float = THRESHOLD, *, steps: int = STEPS, eps: float = 1e-3
) -> tuple[list[oracle.Reference], dict[str, Tensor]]:
    """The oracle's statistics of every step and its weights after the last."""
    net = model().double()
    x, labels = data()
    references = oracle.train(
        net,
        [(x.double(), labels)] * steps,
        lambda m, x, y: m(x, y)["loss"],
        oracle.unit_rules(net),
        threshold,
        lr=LR,
        momentum=MOMENTUM,
        eps=eps,
        exclude=("head.weight", "head.bias"),
    )
    return references, {name: p.detach() for name, p in net.named_parameters()}


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Whole parameters by name, on every rank, of a model that fully_shard or ZeRO has sharded; a collective."""
    full: dict[str, Any] = {}
    for name, p in model.named_parameters():
        if isinstance(p, DTensor):
            full[name] = p.full_tensor()
        elif hasattr(p, "ds_id"):
            from deepspeed.utils import safe_get_full_fp32_param

            full[name] = safe_get_full_fp32_param(p)
        else:
            full[name] = p
    return full


def record(stats: Any) -> dict[str, Any]:
    """What a run tells of one step."""
    return {
        "units": stats.units,
        "grad_norm": float(stats.grad_norm),
        "clipped": {name: int(of.clipped_units) for name, of in stats.per_parameter.items()},
    }


def save(folder: str, steps: list[dict[str, Any]], weights: dict[str, Tensor], **more: Any) -> None:
    """Leave what a run did for the test that started it; call it on rank 0."""
    torch.save({name: w.detach().cpu() for name, w in weights.items()}, Path(folder, "weights.pt"))
    Path(folder, "run.json").write_text(json.dumps({"steps": steps, **more}))


def run(script: str, folder: Path, *arguments: str, ranks: int = 1) -> dict[str, Any]:
    """Run a script in processes of its own, which get ``folder`` and the arguments, and read what it left."""
    code, log = turns.start(script, folder, *arguments, ranks=ranks)
    assert code == 0, f"exit code {code}\n{log[-12000:]}"
    return left_in(folder, log)


def left_in(folder: Path, log: str) -> dict[str, Any]:
    """What `save` left there."""
    found = json.loads((folder / "run.json").read_text())
    return {**found, "weights": torch.load(folder / "weights.pt"), "log": log, "folder": folder}


def assert_as_oracle(found: dict[str, Any], *, tolerance: float = 2e-5, **settings: Any) -> None:
    """The same units clipped in the same parameters at every step, and the same weights after the last."""
    references, weights = reference(**settings)
    for reference_ in references:
        assert 0 < reference_.clipped_units < reference_.units
    assert [step["clipped"] for step in found["steps"]] == [
        {name: of.clipped_units for name, of in r.per_parameter.items()} for r in references
    ]
    assert [step["units"] for step in found["steps"]] == [r.units for r in references]
    for step, r in zip(found["steps"], references, strict=True):
        assert abs(step["grad_norm"] / r.grad_norm - 1) < tolerance
    assert set(found["weights"]) == set(weights)
    for name, weight in weights.items():
        error = float((found["weights"][name].detach().double() - weight).norm() / weight.norm())
        assert error < tolerance, f"{name} is off by {error:.3g}"
