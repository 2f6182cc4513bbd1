"""What is trained: the norm-free network, two of the same shape to hold it against, and a small GPT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from dist_agc.lab.tasks.digits import NFResNet, head

WIDTHS = (8, 16, 32)


class Block(nn.Module):
    """y = shortcut + branch(relu(norm(x))), He et al. 2016 (arXiv 1603.05027)."""

    def __init__(self, width_in: int, width: int, stride: int, batch_norm: bool) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(width_in, batch_norm), _conv(width_in, width, 3, stride)
        self.norm2, self.conv2 = _norm(width, batch_norm), _conv(width, width, 3)
        changes_shape = stride > 1 or width_in != width
        self.shortcut = _conv(width_in, width, 1, stride) if changes_shape else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return shortcut + self.conv2(F.relu(self.norm2(self.conv1(out))))


class ResNet(nn.Module):
    """Logits (batch, 10) of images (batch, 1, 8, 8). Without `batch_norm` nothing in it is normalised."""

    def __init__(self, widths: tuple[int, ...], depth: int, *, batch_norm: bool) -> None:
        super().__init__()
        self.stem = _conv(1, widths[0], 3)
        blocks, width_in = [], widths[0]
        for stage, width in enumerate(widths):
            for index in range(depth):
                blocks.append(Block(width_in, width, 2 if index == 0 and stage > 0 else 1, batch_norm))
                width_in = width
        self.blocks = nn.ModuleList(blocks)
        self.norm = _norm(width_in, batch_norm)
        self.head = head(width_in)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


def _norm(width: int, batch_norm: bool) -> nn.Module:
    return nn.BatchNorm2d(width) if batch_norm else nn.Identity()


def _conv(width_in: int, width: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(width_in, width, kernel_size, stride, padding=kernel_size // 2)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


@dataclass(frozen=True)
class Network:
    """A name for readers, the task whose data it learns, and how it is made (None: as the task makes it)."""

    label: str
    task: str
    make: Callable[[], nn.Module] | None


_SHALLOW, _DEEP = 1, 3  # blocks in each of three stages
_PLAIN, _NORMED = partial(ResNet, batch_norm=False), partial(ResNet, batch_norm=True)

NETWORKS = {
    "nf": Network("norm-free ResNet", "digits", partial(NFResNet, WIDTHS, _SHALLOW)),
    "plain": Network("plain ResNet without BatchNorm", "digits", partial(_PLAIN, WIDTHS, _SHALLOW)),
    "bn": Network("ResNet with BatchNorm", "digits", partial(_NORMED, WIDTHS, _SHALLOW)),
    "nf-deep": Network("norm-free ResNet, 9 blocks", "digits", partial(NFResNet, WIDTHS, _DEEP)),
    "plain-deep": Network("plain ResNet, 9 blocks", "digits", partial(_PLAIN, WIDTHS, _DEEP)),
    "bn-deep": Network("ResNet with BatchNorm, 9 blocks", "digits", partial(_NORMED, WIDTHS, _DEEP)),
    "gpt": Network("small GPT", "text", None),
}
