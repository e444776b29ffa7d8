"""A small character-level transformer, and the text that ships with Python: its own reference documentation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTEXT = 64


def documentation() -> tuple[Tensor, int]:
    """Return Python's language reference, the topics of `help()`, as character codes `(length,)`, and how many codes there are.

    Its length depends on the version of Python: 3.11 has about 700,000 characters.
    """
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = {character: code for code, character in enumerate(sorted(set(text)))}
    return torch.tensor([alphabet[character] for character in text]), len(alphabet)


def windows(codes: Tensor, context: int = CONTEXT) -> tuple[Tensor, Tensor]:
    """Return all windows of a text that start at multiples of half the context: inputs and next characters `(N, context)`."""
    cut = codes.unfold(0, context + 1, context // 2)
    return cut[:, :-1].contiguous(), cut[:, 1:].contiguous()


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, each behind a LayerNorm and beside a skip.

    Args:
        width: of the stream.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, T, width)` to the same shape."""
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(n, t, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A decoder over characters: codes `(N, T)` to logits `(N, T, alphabet)`."""

    def __init__(self, alphabet: int, width: int = 128, depth: int = 3, heads: int = 4, context: int = CONTEXT) -> None:
        super().__init__()
        self.characters = nn.Embedding(alphabet, width)
        self.positions = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, alphabet)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        """Return the logits of every next character."""
        x = self.characters(codes) + self.positions[: codes.shape[1]]
        return self.head(self.norm(self.blocks(x)))
