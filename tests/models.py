"""Small models with everything that goes wrong when parameters are sharded, and reproducible batches for them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dist_agc

VOCABULARY = 11
FULL_BATCH = 12  # divides among 1, 2, 3 and 4 ranks


class Experts(nn.Module):
    """Stacked experts (experts, out, in): one unit per expert by default, one per (expert, out) by override."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, outputs, inputs) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->beo", x, self.weight).sum(1)


# Said, since a guess of the same would warn in every test.
dist_agc.register_units(Experts, {"weight": 0})


class Awkward(nn.Module):
    """Shapes that no number of ranks divides, in every module kind that has a unit rule of its own.

    7 rows (uneven over 2 to 4 ranks), 1 and 2 rows (empty shards), 1-D parameters split over ranks, a ConvTranspose
    with groups, stacked experts, an embedding tied to the head, a dead layer (never a gradient), a frozen layer.
    ``scalar`` adds a 0-d parameter (FSDP2 refuses those), ``conv1d`` a transformers Conv1D with weight (in, out).
    """

    def __init__(self, *, scalar: bool = False, conv1d: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.conv = nn.Conv2d(8, 6, 3, padding=1)
        self.deconv = nn.ConvTranspose2d(6, 10, 2, groups=2)  # weight (6, 5, 2, 2): 10 units
        self.norm = nn.LayerNorm(10)
        self.experts = Experts(3, 10, 5)
        self.uneven = nn.Linear(5, 7)
        self.frozen = nn.Linear(7, 7)
        self.thin = nn.Linear(7, 2)
        self.single = nn.Linear(2, 1)
        self.widen = nn.Linear(1, 8)
        self.head = nn.Linear(8, VOCABULARY)
        self.head.weight = self.embedding.weight
        self.dead = nn.Linear(3, 5)
        self.frozen.requires_grad_(False)
        if scalar:
            self.scalar = nn.Parameter(torch.tensor(1.5))
        if conv1d:
            from transformers.pytorch_utils import Conv1D

            self.conv1d = Conv1D(7, 7)
            nn.init.normal_(self.conv1d.weight, std=0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (batch, 16) to logits (batch, VOCABULARY)."""
        x = self.embedding(tokens).transpose(1, 2).reshape(-1, 8, 4, 4)
        x = self.norm(self.deconv(torch.tanh(self.conv(x))).flatten(2).mean(2))
        x = self.uneven(torch.tanh(self.experts(x)))
        if hasattr(self, "conv1d"):
            x = self.conv1d(x)
        x = self.single(torch.tanh(self.thin(self.frozen(x))))
        if hasattr(self, "scalar"):
            x = x * self.scalar
        return self.head(self.widen(x))


# Some units of Awkward, and not all, have a larger ratio than this in each of the first steps at lr 0.1.
THRESHOLD = 0.2


def awkward(
    *, seed: int = 0, dtype: torch.dtype = torch.float32, scalar: bool = False, conv1d: bool = False
) -> Awkward:
    """The same weights for the same seed, whatever the dtype (drawn in float32, so float64 twins start equal)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Awkward(scalar=scalar, conv1d=conv1d)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype)


def batch(step: int, *, rank: int = 0, size: int = 1) -> tuple[Tensor, Tensor]:
    """This rank's equal share of the full batch of one step: tokens (n, 16) and classes (n,)."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(VOCABULARY, (FULL_BATCH, 16), generator=generator)
    classes = torch.randint(VOCABULARY, (FULL_BATCH,), generator=generator)
    if FULL_BATCH % size:
        raise ValueError(f"a batch of {FULL_BATCH} does not divide among {size} ranks")
    share = FULL_BATCH // size
    rows = slice(rank * share, (rank + 1) * share)
    return tokens[rows], classes[rows]


def loss(model: nn.Module, tokens: Tensor, classes: Tensor) -> Tensor:
    """Mean cross entropy: the mean over ranks of equal shares is the full batch's."""
    return F.cross_entropy(model(tokens), classes)
