"""A transformer encoder whose layers are reversible couplings: attention is F, the perceptron is G."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from beyondprop import _checks
from beyondprop.nn.reversible import AdditiveCoupling, ReversibleSequential


class _Attention(nn.Module):
    """LayerNorm, then self-attention; what comes beside `x` are its masks."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        found, _ = self.attention(x, x, x, key_padding_mask, need_weights=False, attn_mask=attn_mask)
        return self.dropout(found)


class _Perceptron(nn.Module):
    """LayerNorm, then two Linear layers for every position; a coupling gives masks to both of its functions."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        del key_padding_mask, attn_mask
        return self.layers(x)


class ReversibleEncoder(nn.Module):
    """A stack of reversible encoder layers: `y1 = x1 + attention(norm(x2))`, `y2 = x2 + perceptron(norm(y1))`.

    Both streams begin as the input; the output has both, one after the other, normalised. In `mode="inverse"` memory for the
    backward pass does not grow with `depth`.

    Args:
        width: features of a position, a multiple of `heads`.
        depth: layers, >= 1.
        heads: of the attention.
        hidden: units of the perceptron; default: 4 `width`.
        dropout: in [0, 1): on attention weights, hidden units, and what is added to a stream.
        mode: `"inverse"`, `"checkpoint"` or `"store"`, see `ReversibleSequential`.

    Raises:
        ValueError: if a setting is out of its range.

    Source: Kitaev, Kaiser & Levskaya, "Reformer", ICLR 2020, arXiv 2001.04451, section 3; Mangalam et al., "Reversible Vision
    Transformers", CVPR 2022, arXiv 2302.04869, for the output of both streams.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        hidden: int | None = None,
        *,
        dropout: float = 0.0,
        mode: str = "inverse",
    ) -> None:
        super().__init__()
        _checks.at_least("depth", depth, 1)
        if _checks.at_least("width", width, 1) % _checks.at_least("heads", heads, 1):
            raise ValueError(f"width must be a multiple of heads, got {width} and {heads}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout!r}.")
        inner = 4 * width if hidden is None else _checks.at_least("hidden", hidden, 1)
        self.layers = ReversibleSequential(
            *(
                AdditiveCoupling(_Attention(width, heads, dropout), _Perceptron(width, inner, dropout), split_dim=-1)
                for _ in range(depth)
            ),
            split_dim=-1,
            mode=mode,
        )
        self.norm = nn.LayerNorm(2 * width)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        """Map `(N, T, width)` to `(N, T, 2 width)`; the masks are those of `nn.MultiheadAttention`."""
        given = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
        masks = {name: mask for name, mask in given.items() if mask is not None}
        return self.norm(self.layers(torch.cat([x, x], -1), **masks))
