"""A small GPT that reads the English documentation of Python's own `pydoc_data.topics`, character by character."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import Split, Task

CONTEXT = 64


class Block(nn.Module):
    """A transformer block with the normalisation before each branch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Logits (batch, length, vocabulary) of the next character after each of `length` <= CONTEXT characters."""

    def __init__(self, vocabulary: int, width: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)
            if isinstance(module, nn.Linear):
                # Branches start small beside what they are added to, and the logits near zero.
                small = name.endswith(("out", "down", "head"))
                nn.init.normal_(module.weight, std=(0.1 if small else 1.0) * module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def example() -> tuple[GPT, Callable[[GPT], Tensor]]:
    """A model, the same in every process, and a loss of it, as `dist-agc check` and `dist-agc units` take them."""
    tokens = torch.arange(2 * CONTEXT).view(2, CONTEXT) % 96
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        made = GPT(96)
    return made, lambda model: F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def task() -> Task:
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    vocabulary = sorted(set(text))
    index = {character: i for i, character in enumerate(vocabulary)}
    # Windows that overlap by one character: the targets are the inputs moved by one.
    windows = torch.tensor([index[character] for character in text]).unfold(0, CONTEXT + 1, CONTEXT)
    inputs, targets = windows[:, :-1], windows[:, 1:]
    # Every 20th window is kept for the test.
    held_out = torch.arange(len(windows)) % 20 == 0
    return Task(
        name="text",
        title="Small GPT on Python's own documentation (pydoc_data.topics)",
        train=Split(inputs[~held_out], targets[~held_out]),
        test=Split(inputs[held_out], targets[held_out]),
        model=lambda: GPT(len(vocabulary)),
        exclude=("head.*",),
        batch_size=32,
        steps=240,
        lr=1.0,
        clipping_threshold=0.02,
    )
