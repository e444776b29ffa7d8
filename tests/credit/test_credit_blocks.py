"""One block among others behind a credit; what `Credited` and `CreditBlock` refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CE, mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from beyondprop import Codes, Credit, CreditBlock, Credited, FeedbackAlignment, UnsupportedModelError
from beyondprop.credit.behind_backward import CREDITS


class _Skipping(nn.Module):
    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.block = wrap(nn.Sequential(nn.ReLU(), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)))
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.block(x))


def test_a_block_among_others() -> None:
    """With plain gradients a block changes nothing; with codes it does, and the skip around it is as it was."""
    x, y = torch.randn(12, 8, dtype=torch.float64), torch.arange(12) % 5

    def gradients(wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = _Skipping(wrap).double()
        CE(model(x), y).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients(lambda block: block)
    exact = gradients(lambda block: CreditBlock(block, Codes("gradient")))
    assert list(plain) == list(exact)
    for name, g in plain.items():
        torch.testing.assert_close(exact[name], g, rtol=0, atol=1e-14)
    coded = gradients(lambda block: CreditBlock(block, "am"))
    torch.testing.assert_close(coded["block.3.weight"], plain["block.3.weight"], rtol=0, atol=1e-14)
    assert F.cosine_similarity(coded["block.1.weight"].flatten(), plain["block.1.weight"].flatten(), dim=0) < 1 - 1e-6
    single = gradients(lambda block: CreditBlock(block, Codes("gradient"), cuts=[block]))
    torch.testing.assert_close(single["block.1.weight"], plain["block.1.weight"], rtol=0, atol=1e-14)


def test_the_names_of_credits() -> None:
    for name, kind in CREDITS.items():
        made = Credited(mlp(6, 5, 4, 3), name, CE)
        assert type(made.credit) is kind
        assert f"credit={kind.__name__}" in repr(made)  # type: ignore[attr-defined]


def wrong(value: Any) -> Any:
    """Return what no type checker would let pass."""
    return value


class _OfItsOwn(Credit):
    def assign(self, trace: Any, loss: Any) -> Any:
        yield from ()


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Credited(mlp(4, 5, 3), "backprop"), ValueError, "credit must be one of 'am', 'fa'.*got 'backprop'"),
        (
            lambda: Credited(mlp(4, 5, 3), wrong(3)),
            TypeError,
            "credit must be a Credit or one of am, fa, dfa, tp, dtp, got int",
        ),
        (lambda: Credited(wrong("net"), "am"), TypeError, r"model must be a torch.nn.Module, got str"),
        (
            lambda: Credited(mlp(4, 5, 3), "am"),
            ValueError,
            r"curvature of the loss: pass loss=, such as nn.CrossEntropyLoss",
        ),
        (
            lambda: Credited(mlp(4, 5, 3), "am", nn.L1Loss()),
            ValueError,
            r"loss must be an nn.CrossEntropyLoss.*got L1Loss\(\)",
        ),
        (
            lambda: Credited(mlp(4, 5, 3), "am", nn.CrossEntropyLoss(weight=torch.ones(3))),
            ValueError,
            "without weights.*with weight",
        ),
        (
            lambda: Credited(Credited(mlp(4, 5, 3), "fa"), "fa"),
            UnsupportedModelError,
            "has a Credited or CreditBlock inside",
        ),
        (lambda: Credited(mlp(4, 5, 3), _OfItsOwn()), UnsupportedModelError, "_OfItsOwn has an assign of its own"),
        (lambda: Credited(mlp(4, 3), "fa"), UnsupportedModelError, "1 stage.*2 or more"),
        (
            lambda: CreditBlock(mlp(4, 5, 3), "dfa"),
            UnsupportedModelError,
            "DirectFeedbackAlignment has no delta for what comes",
        ),
        (lambda: Credited(mlp(4, 5, 3), "fa", loss_scale=0.0), ValueError, "loss_scale must be"),
    ],
)
def test_bad_arguments(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_what_cannot_be_is_refused_by_name() -> None:
    layers = [nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 5)]
    model = Credited(nn.Sequential(*layers).double(), "am", CE)
    x, y = torch.randn(12, 8, dtype=torch.float64), torch.arange(12) % 5
    loss = CE(model(x), y)
    with pytest.raises(
        UnsupportedModelError, match=r"create_graph=True reached stage '4': the deltas of Codes have no derivative"
    ):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    with pytest.raises(TypeError, match=r"Credited takes one tensor.*got Tensor, Tensor"):
        model(x, x)
    with pytest.raises(UnsupportedModelError, match=r"gradient at the output .* is not that of a cross-entropy"):
        model(x).square().sum().backward()
    output = model(x)
    with torch.no_grad():
        output.mul_(2)
    with pytest.raises(RuntimeError, match="output of stage '4' was written over in place"):
        CE(output, y).backward()
    model.model[4] = nn.Linear(10, 5).double()  # type: ignore[index]
    with pytest.raises(UnsupportedModelError, match="exchanged, added or taken out; build Credited anew"):
        model(x)
    credit = FeedbackAlignment()
    Credited(mlp(4, 5, 3), credit)
    with pytest.raises(ValueError, match="serves another rule already"):
        Credited(mlp(4, 5, 3), credit)


# torch's compiler looks at tensors between two pieces of a graph, and warns itself of it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_averaged_and_called_with_other_weights() -> None:
    torch.manual_seed(0)
    start = mlp(8, 12, 5)
    x, y = torch.randn(12, 8), torch.arange(12) % 5
    torch.compiler.reset()
    one, two = (Credited(copy.deepcopy(start), "am", CE) for _ in range(2))
    compiled: Any = torch.compile(two, backend="eager")
    CE(one(x), y).backward()
    CE(compiled(x), y).backward()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
    averaged = AveragedModel(one)
    averaged.update_parameters(one)
    with torch.no_grad():
        assert torch.equal(averaged(x), one(x))
    weights = {name: p.detach().clone().requires_grad_() for name, p in one.named_parameters()}
    with pytest.raises(UnsupportedModelError, match=r"Parameter '.*weight' .* was exchanged"):
        torch.func.functional_call(one, weights, (x,))
