"""Batches that no rule can train on, as the first and as the third step: refused in words of ours, nothing written."""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import equal, mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import beyondprop
from beyondprop import Backprop, LearningRule
from beyondprop.lab import registry

pytestmark = [
    pytest.mark.filterwarnings("ignore::beyondprop.FrozenStageWarning"),
]

X, Y = torch.randn(12, 6, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3
ONE_HOT = nn.functional.one_hot(Y).float()


def _with(tensor: Tensor, index: Any, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


BAD: dict[str, tuple[Any, Any]] = {
    "inputs of NaN": (_with(X, (0, 0), float("nan")), Y),
    "inputs of infinity": (_with(X, (0, 0), float("inf")), Y),
    "inputs too narrow": (X[:, :5], Y),
    "inputs too wide": (torch.cat([X, X], 1), Y),
    "one row without a batch": (X[0], Y[:1]),
    "inputs without a dimension": (X[0, 0], Y[0]),
    "no rows": (X[:0], Y[:0]),
    "whole numbers as inputs": (X.long(), Y),
    "booleans as inputs": (X > 0, Y),
    "complex inputs": (X.to(torch.complex64), Y),
    "inputs in double precision": (X.double(), Y),
    "inputs in half precision": (X.half(), Y),
    "inputs without storage": (X.to("meta"), Y),
    "a list": (X.tolist(), Y),
    "an array": (X.numpy(), Y),
    "nothing": (None, Y),
    "text": ("x", Y),
    "a pair of inputs": ((X, X), Y),
    "inputs by name": ({"x": X}, Y),
    "too few labels": (X, Y[:11]),
    "too many labels": (X, torch.cat([Y, Y])),
    "a label too large": (X, _with(Y, 0, 3)),
    "a negative label": (X, _with(Y, 0, -1)),
    "ignored labels alone": (X, torch.full_like(Y, -100)),
    "labels as floats": (X, Y.float()),
    "labels in a column": (X, Y[:, None]),
    "probabilities of NaN": (X, torch.full((12, 3), float("nan"))),
    "probabilities of infinity": (X, _with(ONE_HOT, (0, 0), float("inf"))),
    "too many probabilities": (X, torch.rand(12, 4)),
    "labels in an array": (X, Y.numpy()),
    "no labels": (X, None),
    "booleans as labels": (X, Y > 0),
    "complex labels": (X, ONE_HOT.to(torch.complex64)),
    "labels without storage": (X, Y.to("meta")),
}
OURS = Path(beyondprop.__file__).parent


def _rule(name: str) -> LearningRule:
    torch.manual_seed(2)
    spec = registry.rules.get(name)
    return spec.build(mlp(6, 5, 3), nn.CrossEntropyLoss(), spec.lr)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", registry.rules.names())
def test_a_bad_batch_is_refused_in_words_of_ours_and_writes_nothing(name: str, steps: int) -> None:
    wrong = []
    for what, (x, y) in (BAD | {"sparse inputs": (X.to_sparse(), Y)}).items():
        rule = _rule(name)
        for _ in range(steps):
            rule.step(X, Y)
        before = copy.deepcopy(rule.model.state_dict())
        try:
            rule.step(x, y)
        except Exception as error:
            raised = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
            if OURS not in raised.parents:
                wrong.append(f"{what}: raw {type(error).__name__}: {error}")
        else:
            if what != "sparse inputs":  # which a product takes as they are
                wrong.append(f"{what}: accepted")
            continue
        if not equal(before, rule.model.state_dict()):
            wrong.append(f"{what}: weights changed")
    assert not wrong, f"{name}, step {steps + 1}:\n" + "\n".join(wrong)


class _Checkpointed(nn.Module):
    """A layer that is computed again in the backward pass, by a backward pass of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Any:
        return checkpoint(lambda h: torch.tanh(self.layer(h)), x, use_reentrant=True)


def _converted(rule: LearningRule) -> None:
    rule.model.double()
    rule.step(X.double(), Y)


def _without_gradients(rule: LearningRule) -> None:
    with torch.no_grad():
        rule.step(X, Y)


def _of_inference(what: str) -> Callable[[LearningRule], Any]:
    with torch.inference_mode():
        x, y = X.clone(), Y.clone()
    return lambda rule: rule.step(*{"x": (x, Y), "y": (X, y), "both": (x, y)}[what])


SURROUNDINGS: dict[str, Callable[[LearningRule], Any]] = {
    "a model that was converted": _converted,
    "no_grad": _without_gradients,
    "inputs of inference": _of_inference("x"),
    "labels of inference": _of_inference("y"),
    "a batch of inference": _of_inference("both"),
}


def _refused(run: Callable[[], Any]) -> str:
    """What speaks against the way in which something was refused; nothing where it worked."""
    try:
        run()
    except (ValueError, TypeError) as error:
        if OURS not in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parents:
            return f"raw {type(error).__name__}: {error}"
    except Exception as error:
        return f"raw {type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("name", registry.rules.names())
def test_odd_surroundings_are_borne_or_refused_in_words_of_ours(name: str) -> None:
    wrong = []
    for what, run in SURROUNDINGS.items():
        rule = _rule(name)
        for _ in range(2):
            rule.step(X, Y)
        if found := _refused(lambda rule=rule, run=run: run(rule)):
            wrong.append(f"{what}: {found}")
    checkpointed = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), _Checkpointed(), nn.Linear(5, 3))
    spec = registry.rules.get(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transfer functions that cannot be read
        if found := _refused(lambda: spec.build(checkpointed, nn.CrossEntropyLoss(), spec.lr).step(X, Y)):
            wrong.append(f"a reentrant checkpoint: {found}")
    assert not wrong, f"{name}:\n" + "\n".join(wrong)


def test_what_torch_says_is_the_cause() -> None:
    rule = _rule("adam")
    with pytest.raises(ValueError, match=r"^Backprop has no gradient to train by: torch.no_grad\(\) is on") as found:
        _without_gradients(rule)
    assert isinstance(found.value.__cause__, RuntimeError)
    rule.step(X, Y)
    with pytest.raises(ValueError, match=r"^The state of Adam is torch.float32 and a parameter torch.float64"):
        _converted(rule)
    rule.load_state_dict(rule.state_dict())  # the way out
    rule.step(X.double(), Y)
    rule = Backprop(mlp(6, 5, 3), lambda z, y: nn.functional.cross_entropy(z.detach(), y), torch.optim.SGD)
    with pytest.raises(ValueError, match="the model or the loss detaches its output"):
        rule.step(X, Y)
