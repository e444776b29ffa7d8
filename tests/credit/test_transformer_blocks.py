"""Credit in the blocks of a model as transformers makes them: keywords in, a dictionary out, layers of its own kinds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from beyondprop import Codes, Credit, CreditBlock, Credited, FeedbackAlignment, UnsupportedModelError

D = torch.float64


class Conv1D(nn.Module):
    """A linear layer with a transposed weight, that of GPT-2."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.weight, self.bias = nn.Parameter(0.3 * torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.size()[:-1], self.outputs)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class Gelu(nn.Module):
    """An activation module of one's own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class Mlp(nn.Module):
    """The feed-forward block of a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj, self.act = Conv1D(12, 6), Conv1D(6, 12), Gelu()
        self.dropout = nn.Dropout(0.2)

    def forward(self, hidden_states: Tensor | None) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))


class Output(nn.Module):
    """The second half of an encoder's feed-forward block, which has two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(12, 6), nn.LayerNorm(6)

    def forward(self, hidden_states: Tensor, skipped: Tensor) -> Tensor:
        return self.norm(self.dense(hidden_states) + skipped)


class Intermediate(nn.Module):
    """The first half."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.act = nn.Linear(6, 12), Gelu()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.act(self.dense(hidden_states))


class Layer(nn.Module):
    """Attention and feed-forward block, of a decoder or an encoder."""

    def __init__(self, is_decoder: bool) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True)
        if is_decoder:
            self.mlp = Mlp()
        else:
            self.intermediate, self.output = Intermediate(), Output()
        self.is_decoder = is_decoder

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = x + self.attend(x, x, x, key_padding_mask=attention_mask)[0]
        return x + self.mlp(x) if self.is_decoder else self.output(self.intermediate(x), x)


class Model(nn.Module):
    """A classifier of sentences that returns a dictionary."""

    reentrant: bool | None = None

    def __init__(self, is_decoder: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.layers = nn.ModuleList(Layer(is_decoder) for _ in range(2))
        self.score = nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        for layer in self.layers:
            if self.reentrant is None:
                x = layer(x, attention_mask=attention_mask)
            else:
                x = checkpoint(layer, x, attention_mask, use_reentrant=self.reentrant)
        logits = self.score(x.mean(1))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


Place = tuple[nn.Module, str, dict[str, Any]]
PLACES: dict[str, Callable[[Any], list[Place]]] = {
    "decoder": lambda model: [(layer, "mlp", {"cuts": "linear"}) for layer in model.layers],
    "whole": lambda model: [(layer, "mlp", {}) for layer in model.layers],
    "encoder": lambda model: [
        place for layer in model.layers for place in ((layer, "intermediate", {}), (layer.output, "dense", {}))
    ],
}
CREDITS: dict[str, Callable[[], Credit]] = {"am": Codes, "cg": lambda: Codes("cg"), "fa": FeedbackAlignment}
every_place = pytest.mark.parametrize("where", list(PLACES))
every_credit = pytest.mark.parametrize("credit", list(CREDITS))


def _model(where: str, credit: Callable[[], Credit] | None = None) -> Model:
    torch.manual_seed(0)
    model = Model(where != "encoder").double()
    for owner, name, settings in PLACES[where](model) if credit is not None else ():
        assert credit is not None
        setattr(owner, name, CreditBlock(getattr(owner, name), credit(), **settings))
    return model


def _batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(8, 5, dtype=torch.bool)
    mask[::3, 3:] = True
    return {
        "input_ids": torch.randint(9, (8, 5), generator=generator),
        "attention_mask": mask,
        "labels": torch.arange(8) % 3,
    }


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model(**_batch())["loss"].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@every_place
def test_plain_gradients_come_out_as_they_were(where: str) -> None:
    plain, found = _gradients(_model(where)), _gradients(_model(where, lambda: Codes("gradient")))
    assert list(found) == list(plain)
    for name, g in plain.items():
        torch.testing.assert_close(found[name], g, rtol=0, atol=1e-14)


@every_place
@every_credit
def test_what_is_above_keeps_its_gradient_and_what_is_below_gets_a_delta(where: str, credit: str) -> None:
    plain, found = _gradients(_model(where)), _gradients(_model(where, CREDITS[credit]))
    torch.testing.assert_close(found["score.weight"], plain["score.weight"], rtol=0, atol=1e-14)
    # The one block whose output only plain layers follow has the gradient of its last weight.
    last = "layers.1.output.dense.weight" if where == "encoder" else "layers.1.mlp.c_proj.weight"
    torch.testing.assert_close(found[last], plain[last], rtol=0, atol=1e-14)
    for name in ("layers.0.attend.in_proj_weight", "embed.weight"):
        assert F.cosine_similarity(found[name].flatten(), plain[name].flatten(), dim=0) < 1 - 1e-9, name


@every_place
@every_credit
def test_names_are_the_models_and_checkpoints_go_both_ways(where: str, credit: str) -> None:
    plain, model = _model(where), _model(where, CREDITS[credit])
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    saved = model.state_dict()
    own = {name: value for name, value in saved.items() if "._credit." not in name}
    assert list(own) == list(plain.state_dict())
    assert (len(own) < len(saved)) == (credit == "fa")
    plain.load_state_dict(own)
    other = _model(where, CREDITS[credit])
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    other.load_state_dict(plain.state_dict())
    other.load_state_dict(saved)
    for name, g in _gradients(other).items():
        assert torch.equal(g, _gradients(copy.deepcopy(model))[name]), name


@every_place
@every_credit
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_change_nothing(where: str, credit: str, reentrant: bool) -> None:
    """The first batch among them, at which stages look at themselves more closely than later."""
    model, other = _model(where, CREDITS[credit]), _model(where, CREDITS[credit])
    other.reentrant = reentrant
    for _ in range(2):
        right = _gradients(model)
        for name, g in _gradients(other).items():
            assert torch.equal(g, right[name]), name


def test_feedback_takes_the_place_of_both_weights_of_a_block() -> None:
    """Those of the first layer, too, which units of the same network come into."""
    torch.manual_seed(0)
    mlp = Mlp().double().eval()
    block = CreditBlock(mlp, "fa", cuts="linear")
    feedback = block.credit.feedback  # type: ignore[attr-defined]
    assert list(feedback) == ["c_fc.weight", "c_proj.weight"]
    h, delta = torch.randn(4, 5, 6, dtype=D, requires_grad=True), torch.randn(4, 5, 6, dtype=D)
    block(h).backward(delta)
    a = mlp.c_fc(h).detach().requires_grad_()
    value = F.gelu(a)
    (at_a,) = torch.autograd.grad(value, a, delta @ feedback["c_proj.weight"].T)
    for found, right in (
        (mlp.c_proj.weight.grad, value.detach().flatten(0, 1).T @ delta.flatten(0, 1)),
        (mlp.c_fc.weight.grad, h.detach().flatten(0, 1).T @ at_a.flatten(0, 1)),
        (h.grad, at_a @ feedback["c_fc.weight"].T),
    ):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-14)


@pytest.mark.parametrize("build", [lambda: nn.Linear(6, 6), lambda: nn.Sequential(nn.ReLU(), nn.Linear(6, 6))])
def test_one_layer_alone_sends_its_delta_through_feedback(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    inner = build().double()
    block = CreditBlock(inner, "fa")
    (feedback,) = block.credit.feedback.values()  # type: ignore[attr-defined]
    h, delta = torch.randn(7, 6, dtype=D, requires_grad=True), torch.randn(7, 6, dtype=D)
    block(h).backward(delta)
    gate = 1.0 if isinstance(inner, nn.Linear) else (h.detach() > 0).to(D)
    torch.testing.assert_close(h.grad, delta @ feedback * gate, rtol=0, atol=1e-14)


def test_the_first_layer_of_a_whole_network_has_no_feedback() -> None:
    """What comes into it are data, to which no delta goes."""
    whole = Credited(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), "fa")
    assert list(whole.credit.feedback) == ["2.weight"]  # type: ignore[attr-defined]


def test_what_is_no_block_is_refused_by_name() -> None:
    model = _model("encoder")
    with pytest.raises(
        UnsupportedModelError, match=r"Model has a forward pass of its own.* CreditBlock serves any part"
    ):
        Credited(model, "fa")
    for layer in model.layers:
        layer.output = CreditBlock(layer.output, "fa")  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"CreditBlock takes one tensor.*got Tensor, Tensor"):
        model(**_batch())
    model = _model("decoder")
    model.layers[0] = CreditBlock(model.layers[0], "fa", cuts=[model.layers[0]])
    with pytest.raises(TypeError, match=r"CreditBlock takes one tensor.*got Tensor, attention_mask"):
        model(**_batch())
    with torch.no_grad():
        assert model(**_batch())["logits"].shape == (8, 3)


def test_weights_without_values_are_refused() -> None:
    with torch.device("meta"):
        block = Mlp()
    with pytest.raises(
        UnsupportedModelError, match=r"Parameter 'c_fc.weight' is on the meta device.*load the model first"
    ):
        CreditBlock(block, "am", cuts="linear")
