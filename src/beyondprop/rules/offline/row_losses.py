"""Output losses row by row, for methods that solve for every sample's codes by themselves.

All are sums over the outputs: `squared` is |z - t|^2 / 2, `hinge` that of `proximal.hinge_prox`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beyondprop.rules.offline import proximal


@dataclass(frozen=True, slots=True)
class RowLoss:
    """One output loss.

    Attributes:
        name: as `output_loss` takes it.
        values: `values(z, t)`, `(N,)`.
        gradient: `gradient(z, t)`, `(N, out)`.
        curvature: `curvature(z, t, v)` is v^T H v, `(N,)`.
        bound: number b with H <= b I everywhere: what a majorising step divides by.
        prox: `prox(t, b, weight)` is the minimiser of `loss(z, t) + weight |z - b|^2 / 2`, or None without a closed form.
        takes_labels: whether targets stay class indices `(N,)`.
    """

    name: str
    values: Callable[[Tensor, Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    curvature: Callable[[Tensor, Tensor, Tensor], Tensor]
    bound: float
    prox: Callable[[Tensor, Tensor, float], Tensor] | Any = None
    takes_labels: bool = False

    def targets(self, y: Tensor, outputs: int, like: Tensor) -> Tensor:
        """Return what `values` takes for the user's `y`: class indices, or rows `(N, outputs)` in the dtype of `like`.

        Raises:
            ValueError: if `y` cannot be the target of so many outputs.
        """
        if y.ndim == 1 and y.dtype == torch.int64:
            if len(y) and not 0 <= int(y.min()) <= int(y.max()) < outputs:
                raise ValueError(
                    f"y has labels {int(y.min())} to {int(y.max())}; {outputs} outputs accept 0 to {outputs - 1}."
                )
            return y if self.takes_labels else F.one_hot(y, outputs).to(like.dtype)
        if self.takes_labels or y.shape[1:] != (outputs,) or y.dtype != like.dtype:
            accepted = "int64 labels (N,)" + ("" if self.takes_labels else f", or rows (N, {outputs}) of {like.dtype}")
            raise ValueError(
                f"y of shape {tuple(y.shape)} and dtype {y.dtype} does not fit: {self.name} takes {accepted}."
            )
        if self.name == "hinge" and not bool(((y == 0) | (y == 1)).all()):
            raise ValueError("y has entries other than 0 and 1, which is all that the hinge loss takes.")
        return y


def _hinge_slack(z: Tensor, t: Tensor) -> Tensor:
    return torch.where(t > 0.5, 1 - z, z)


def _cross_entropy_curvature(z: Tensor, t: Tensor, v: Tensor) -> Tensor:
    p = z.softmax(1)
    return (p * v.square()).sum(1) - (p * v).sum(1).square()


ROW_LOSSES: dict[str, RowLoss] = {
    "squared": RowLoss(
        "squared",
        lambda z, t: 0.5 * (z - t).square().sum(1),
        lambda z, t: z - t,
        lambda z, t, v: v.square().sum(1),
        1.0,
        proximal.squared_prox,
    ),
    "hinge": RowLoss(
        "hinge",
        lambda z, t: _hinge_slack(z, t).clamp_min(0).sum(1),
        lambda z, t: torch.where(_hinge_slack(z, t) > 0, torch.where(t > 0.5, -1.0, 1.0), 0.0).to(z.dtype),
        lambda z, t, v: torch.zeros_like(z[:, 0]),
        0.0,
        proximal.hinge_prox,
    ),
    "cross_entropy": RowLoss(
        "cross_entropy",
        lambda z, t: F.cross_entropy(z, t, reduction="none"),
        lambda z, t: z.softmax(1).scatter_add_(1, t.unsqueeze(1), torch.full_like(z[:, :1], -1.0)),
        _cross_entropy_curvature,
        0.5,  # diag(p) - p p^T <= I / 2 (Böhning, 1992)
        takes_labels=True,
    ),
}
_OF_MODULE: dict[type, str] = {nn.MSELoss: "squared", nn.CrossEntropyLoss: "cross_entropy"}


def row_loss(loss: object, name: str | None, accepted: tuple[str, ...], rule: str) -> RowLoss:
    """Return the row loss of that name, or where `name` is None that of the user's `torch.nn` loss.

    Raises:
        ValueError: if the rule cannot serve it; the message says what it can.
    """
    options = ", ".join(map(repr, accepted))
    if name is None:
        name = _OF_MODULE.get(type(loss))
        plain = not isinstance(loss, nn.CrossEntropyLoss) or (
            loss.weight is None and loss.label_smoothing == 0.0 and loss.ignore_index == -100
        )
        if name not in accepted or not plain:
            what = f"{type(loss).__name__}{'' if plain else ' with weight, label_smoothing or ignore_index'}"
            raise ValueError(
                f"{rule} has no closed form for {what}. Pass output_loss, one of {options}: the codes are fitted to that "
                f"loss, and {type(loss).__name__} is reported."
            )
    elif name not in accepted:
        raise ValueError(f"output_loss must be one of {options} for {rule}, got {name!r}.")
    return ROW_LOSSES[name]
