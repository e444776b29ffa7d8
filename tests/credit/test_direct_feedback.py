"""Direct feedback alignment against projections written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import Recorder, blobs, equal, images, mlp, relative
from references import CE
from references import case as _case
from torch import Tensor, nn

from beyondprop import Descent, DirectFeedbackAlignment, LocalRule


def _heads(net: str) -> list[Callable[[Tensor], Tensor]]:
    """What each stage above the first does before its weights, by hand."""
    relu, tanh = torch.relu, torch.tanh
    return {
        "mlp": [tanh, tanh, tanh],
        "norm": [relu, relu],
        "lenet": [
            lambda z: F.max_pool2d(relu(z), 2),
            lambda z: F.max_pool2d(relu(z), 2).flatten(1),
            relu,
            relu,
        ],
        "residual": [relu, lambda z: z, lambda z: F.adaptive_avg_pool2d(z, 2).flatten(1)],
        "skip": [tanh, lambda z: z, lambda z: z],
    }[net]


@pytest.mark.parametrize("net", ["mlp", "norm", "lenet", "residual", "skip"])
def test_direct_feedback_is_one_projection_and_one_slope(net: str) -> None:
    model, x, y = _case(net)
    credit = DirectFeedbackAlignment(seed=2)
    recorder = Recorder(credit)
    recorder.needs_codes = True
    recorder.bind = credit.bind  # type: ignore[method-assign]
    rule = LocalRule(model, CE, recorder, Descent())
    rule.backward(x, y)
    top, *hidden = recorder.kept
    error = -top.delta
    output = rule.chain.record(x).output
    torch.testing.assert_close(error, torch.softmax(output, 1) - F.one_hot(y, 3))
    for assignment, head in zip(reversed(hidden), _heads(net), strict=True):
        code = assignment.pullback.output.requires_grad_()
        with torch.enable_grad():
            features = head(code)
        matrix = credit.feedback[rule.chain[assignment.index].name]
        assert matrix.shape == (3, features[0].numel())
        (expected,) = torch.autograd.grad(features, code, -(error @ matrix).view_as(features))
        assert relative(assignment.delta, expected) < 1e-12


@pytest.mark.parametrize("net", ["mlp", "lenet", "residual", "skip", "attention"])
def test_with_skips_there_is_exactly_one_path(net: str) -> None:
    """Another matrix for one stage changes that stage's update and no other; another weight above changes none."""
    model, x, y = _case(net)
    credit = DirectFeedbackAlignment()
    rule = LocalRule(model, CE, credit, Descent())
    rule.step(x, y)

    def updates() -> dict[str, list[Tensor]]:
        rule.backward(x, y)
        found = {
            name: [p.grad.clone() for p in ps if p.grad is not None] for name, ps in rule.stage_parameters().items()
        }
        rule.discard()
        return found

    before = updates()
    names = [stage.name for stage in rule.chain]
    assert list(credit.feedback) == names[-2::-1]
    for name in names[:-1]:
        kept = credit.feedback[name].clone()
        credit.feedback[name].mul_(-1.5)
        moved = [n for n, gradients in updates().items() if not equal(gradients, before[n])]
        assert moved == [name]
        credit.feedback[name].copy_(kept)
    for name in names[:-1]:
        kept = credit.feedback[name].clone()
        credit.feedback[name].zero_()
        assert not any(bool(g.any()) for g in updates()[name])  # nothing else arrives
        credit.feedback[name].copy_(kept)


def test_direct_feedback_sees_the_same_dropout_masks() -> None:
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Dropout(0.5), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))
    x, y = blobs(1)
    credit = DirectFeedbackAlignment()
    rule = LocalRule(model, CE, credit, Descent())
    torch.manual_seed(4)
    rule.backward(x, y)
    torch.manual_seed(4)
    mask = F.dropout(torch.ones(1, 40), 0.5) > 0
    bias = model[0].bias.grad  # type: ignore[union-attr]
    assert bias is not None
    assert torch.equal(bias != 0, mask[0])  # type: ignore[arg-type]
    generator = torch.get_rng_state()
    torch.manual_seed(4)
    model(x)
    assert torch.equal(generator, torch.get_rng_state())  # one draw a step


def test_direct_feedback_keeps_an_error_at_its_length() -> None:
    model, x, y = _case("lenet", 40)
    credit = DirectFeedbackAlignment(scale=3.0)
    LocalRule(model, CE, credit, Descent()).backward(x, y)
    for matrix in credit.feedback.values():
        error = torch.randn(50, 3, dtype=torch.float64)
        ratio = (error @ matrix).norm(dim=1) / error.norm(dim=1)
        assert 2.0 < float(ratio.mean()) < 4.0


def test_direct_feedback_of_a_network_of_other_widths_is_refused() -> None:
    """Whose stages have the same names: what the matrices are for is in the state."""
    rule, other = (LocalRule(mlp(6, width, 3), CE, DirectFeedbackAlignment(), Descent()) for width in (8, 9))
    rule.step(*blobs(4))
    saved = rule.credit.state_dict()
    with pytest.raises(ValueError, match=r"feedback for weights of .*'0': \[\[8, 6\], \[8\]\].*, this network has"):
        other.credit.load_state_dict(saved)
    other.step(*blobs(4))
    del saved["weights"]  # as it was saved before
    rule.credit.load_state_dict(saved)


def test_direct_feedback_takes_inputs_of_one_size() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    rule = LocalRule(model, CE, DirectFeedbackAlignment(), Descent())
    rule.step(*images(4))
    with pytest.raises(
        ValueError, match=r"feedback of stage '0' takes 3 outputs to 72 units, this batch has 3 and 128"
    ):
        rule.step(torch.randn(4, 1, 10, 10), torch.arange(4) % 3)


def test_without_a_rule_it_has_what_there_is() -> None:
    credit = DirectFeedbackAlignment()
    assert credit.state_dict() == {"feedback": {}}
    credit.load_state_dict(credit.state_dict())
    with pytest.raises(ValueError, match="has no network yet: build a rule with it"):
        credit.load_state_dict({"feedback": {"0": torch.ones(2, 3)}})
    saved = credit.state_dict()
    rule = LocalRule(mlp(6, 5, 3), nn.CrossEntropyLoss(), credit, Descent())
    credit.load_state_dict(saved)
    rule.step(torch.randn(12, 6), torch.arange(12) % 3)
    assert set(credit.state_dict()) == {"feedback", "weights"}
