"""A norm-free ResNet on the 1797 handwritten digits (8 x 8 pixels) that ship with scikit-learn.

NF-ResNet is the architecture that AGC was made for: without normalisation layers nothing keeps a large step from
destroying the weights. The recipe is the one of Brock et al. 2021 (arXiv 2101.08692 and 2102.06171).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import Split, Task

# The gain that gives ReLU of a unit normal variance one again.
RELU_GAIN = math.sqrt(2 / (1 - 1 / math.pi))


def scaled_relu(x: Tensor) -> Tensor:
    return F.relu(x) * RELU_GAIN


class ScaledStdConv2d(nn.Conv2d):
    """A convolution whose weight is standardised over the fan-in of every output, with a learned gain."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2)
        nn.init.kaiming_normal_(self.weight, nonlinearity="linear")
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]
        self.gain = nn.Parameter(torch.ones(out_channels))

    def forward(self, input: Tensor) -> Tensor:
        # One fused call: batch_norm over "channels" = outputs is (W - mean) / sqrt(var + eps) * scale.
        fan_in = self.weight[0].numel()
        flat = self.weight.view(1, self.out_channels, -1)
        scale = self.gain * fan_in**-0.5
        weight = F.batch_norm(flat, None, None, weight=scale, training=True, momentum=0.0, eps=1e-5)
        return F.conv2d(input, weight.view_as(self.weight), self.bias, self.stride, self.padding)


class Block(nn.Module):
    """y = shortcut + alpha * branch(act(x) * beta): beta undoes the variance that x is expected to have."""

    def __init__(self, width_in: int, width: int, stride: int, alpha: float, beta: float) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, beta
        self.conv1 = ScaledStdConv2d(width_in, width, 3, stride)
        self.conv2 = ScaledStdConv2d(width, width, 3)
        changes_shape = stride > 1 or width_in != width
        self.shortcut = ScaledStdConv2d(width_in, width, 1, stride) if changes_shape else None

    def forward(self, x: Tensor) -> Tensor:
        out = scaled_relu(x) * self.beta
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return shortcut + self.alpha * self.conv2(scaled_relu(self.conv1(out)))


def head(width: int) -> nn.Linear:
    """The last layer: ten classes, nearly the same logits for all of them at first."""
    layer = nn.Linear(width, 10)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


class NFResNet(nn.Module):
    """Logits (batch, 10) of images (batch, 1, 8, 8)."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64), depth: int = 2, alpha: float = 0.2) -> None:
        super().__init__()
        self.stem = ScaledStdConv2d(1, widths[0], 3)
        blocks, width_in, variance = [], widths[0], 1.0
        for stage, width in enumerate(widths):
            for index in range(depth):
                transition = index == 0
                stride = 2 if transition and stage > 0 else 1
                blocks.append(Block(width_in, width, stride, alpha, beta=variance**-0.5))
                # A convolution on the shortcut starts the count of the variance again.
                variance = (1.0 if width_in != width else variance) + alpha**2
                width_in = width
        self.blocks = nn.ModuleList(blocks)
        self.head = head(width_in)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(scaled_relu(x).mean((2, 3)))


def task() -> Task:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)
    train, test = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    pixels = (pixels - pixels[train].mean()) / pixels[train].std()
    targets = torch.tensor(labels)
    return Task(
        name="digits",
        title="Norm-free ResNet on handwritten digits (scikit-learn)",
        train=Split(pixels[train], targets[train]),
        test=Split(pixels[test], targets[test]),
        model=NFResNet,
        exclude=("head.*",),
        batch_size=512,
        steps=60,
        lr=1.0,
        clipping_threshold=0.02,
    )
