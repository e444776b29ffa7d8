"""What a reversible chain cannot do right is refused: what was wrong, what was given, what is accepted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chains import chain, conv, every_mode, images, in_mode
from torch import Tensor, nn

from beyondprop import UnsupportedModelError
from beyondprop.nn import (
    AdditiveCoupling,
    AffineCoupling,
    MomentumCoupling,
    Recomputed,
    ReversibleSequential,
    reversible_sequential,
)


def refused(words: str) -> Any:
    return pytest.raises(UnsupportedModelError, match=words)


def linear(f: nn.Module | None = None) -> ReversibleSequential:
    first, *others = (nn.Linear(3, 3) for _ in range(4))
    return ReversibleSequential(AdditiveCoupling(others[0], others[1]), AdditiveCoupling(f or first, others[2]))


# ---- construction --------------------------------------------------------------------------------------------------------


def test_functions_must_be_modules() -> None:
    for kind in (AdditiveCoupling, AffineCoupling):
        with pytest.raises(
            TypeError, match=r"g must be a torch.nn.Module, so that its weights are known, got function"
        ):
            kind(nn.Linear(2, 2), lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"f must be a torch.nn.Module.*got NoneType"):
        MomentumCoupling(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module.*got int"):
        Recomputed(3)  # type: ignore[arg-type]


def test_blocks_must_be_couplings() -> None:
    with pytest.raises(TypeError, match=r"Block '1' must be a coupling, such as AdditiveCoupling\(f, g\), got Linear"):
        ReversibleSequential(chain()[0], nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Block '0' must be a coupling.*got Conv2d"):
        reversible_sequential([nn.Conv2d(2, 2, 1)], images())  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"mode": "inverted"}, ValueError, "mode must be one of 'inverse', 'checkpoint', 'store', got 'inverted'"),
        ({"split_dim": 1.5}, TypeError, r"split_dim must be an integer, got 1\.5"),
        (
            {"stream_dtype": torch.int32},
            TypeError,
            r"stream_dtype must be a floating-point torch\.dtype or None, got torch\.int32",
        ),
        ({"exact_bits": -1}, ValueError, "exact_bits must be an integer >= 0, got -1"),
        ({"check": 0.0}, ValueError, r"check must be a finite number > 0, got 0\.0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        ReversibleSequential(*chain(), **options)
    model = ReversibleSequential(*chain())
    for name, value in options.items():
        setattr(model, name, value)
    with pytest.raises(kind, match=words):
        model(images())


def test_couplings_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"beta must be a number in \(0, 1\), got 1\.0"):
        MomentumCoupling(conv(4), beta=1.0)
    with pytest.raises(ValueError, match="limit must be a finite number > 0, got -1"):
        AffineCoupling(conv(4), conv(4), limit=-1)
    with pytest.raises(TypeError, match="split_dim must be an integer, got True"):
        AdditiveCoupling(conv(4), conv(4), split_dim=True)
    with pytest.raises(ValueError, match="mode must be one of 'checkpoint', 'store', got 'inverse'"):
        Recomputed(conv(4), mode="inverse")


# ---- inputs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["inverse", "checkpoint", "store"])
def test_inputs_that_are_no_two_streams(mode: str) -> None:
    model = in_mode(chain().float(), mode)
    for one in (model, model[0]):
        with refused(r"splits dimension 1 into equal halves, and got 7 there, an odd number \(shape \(3, 7, 5, 5\)\)"):
            one(torch.randn(3, 7, 5, 5))
        with refused(r"splits dimension 1, and got a tensor of shape \(3,\)"):
            one(torch.randn(3))
        with refused(r"both streams must have one shape.*\(3, 4, 5, 5\) torch.float32 on cpu and \(3, 3, 5, 5\)"):
            one((torch.randn(3, 4, 5, 5), torch.randn(3, 3, 5, 5)))
        with refused("both streams must have one shape, dtype"):
            one((torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5).double()))
        with refused(r"takes floating-point streams, got torch.int64"):
            one(torch.ones(3, 8, 5, 5, dtype=torch.int64))
        for given, words in (
            (3.0, "float"),
            ([torch.ones(2)] * 3, r"\(Tensor, Tensor, Tensor\)"),
            ([1, 2], r"\(int, int\)"),
        ):
            with pytest.raises(TypeError, match=f"takes a tensor or a pair of tensors, its two streams, got {words}"):
                one(given)


# ---- functions -----------------------------------------------------------------------------------------------------------


class Tuple(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None


class Integers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.long()


@pytest.mark.parametrize("mode", ["inverse", "checkpoint", "store"])
def test_functions_of_another_shape_or_kind(mode: str) -> None:
    where = r"Function 'f' of block '1' \(AdditiveCoupling\) must return"
    for f, words in (
        (nn.Linear(3, 2), r"the shape \(4, 3\) for a stream of shape \(4, 3\), got \(4, 2\)"),
        (nn.Linear(3, 1), r"the shape \(4, 3\) for a stream of shape \(4, 3\), got \(4, 1\)"),
        (Tuple(), "one tensor, got tuple"),
        (Integers(), r"a floating-point tensor, got torch\.int64"),
    ):
        with refused(f"{where} {words}"):
            in_mode(linear(f), mode)(torch.randn(4, 6))
    with refused(
        r"'f' of block '0' \(AffineCoupling\) must return the shape \(4, 6\) for a stream of shape \(4, 3\), got \(4, 3\)"
    ):
        ReversibleSequential(AffineCoupling(nn.Linear(3, 3), nn.Linear(3, 6)), mode=mode)(torch.randn(4, 6))


@pytest.mark.parametrize("mode", ["inverse", "checkpoint", "store"])
def test_functions_that_change_their_input_in_place(mode: str) -> None:
    model = in_mode(linear(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3))), mode)
    with refused(
        r"'f' of block '1' \(AdditiveCoupling\) changes its input in place, which is the other stream: use inplace=False"
    ):
        model(torch.randn(4, 6))
    with torch.no_grad(), refused("changes its input in place"):
        model(torch.randn(4, 6))


class Borrowing(nn.Module):
    """Uses a tensor that is nobody's."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensors = [tensor]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.tensors[0]


@every_mode
def test_tensors_that_nobody_knows_of_would_lose_their_gradient(mode: str) -> None:
    scale = torch.ones(3, requires_grad=True)
    for tensor in (scale, scale * 2):
        y = in_mode(linear(), mode)
        y[1].f = Borrowing(tensor)
        with refused(
            r"'f' of block '1'.*uses a tensor of shape \(3,\) that requires a gradient and is neither a parameter"
        ):
            y(torch.randn(4, 6)).sum().backward()
    y = in_mode(linear(Borrowing(torch.ones(3))), mode)
    y(torch.randn(4, 6)).sum().backward()  # one without gradient is a constant


def test_blocks_with_hooks() -> None:
    model = chain()
    model[2].register_forward_hook(lambda *_: None)
    with refused(
        "Block '2' has hooks, and a chain calls the functions of its blocks, not the blocks. Put them on its functions"
    ):
        model(images())


def test_lazy_functions() -> None:
    model = ReversibleSequential(AdditiveCoupling(nn.LazyLinear(3), nn.Linear(3, 3)))
    with refused(r"Function 'f' of block '0' \(AdditiveCoupling\) has lazy parameters.*call it once by itself"):
        model(torch.randn(4, 6))
    first: Any = model[0].f
    first(torch.randn(4, 3))
    assert model(torch.randn(4, 6)).requires_grad


# ---- between forward and backward ----------------------------------------------------------------------------------------


@every_mode
def test_weights_changed_in_place(mode: str) -> None:
    model = in_mode(chain(), mode)
    value = model(images()).sum()
    with torch.no_grad():
        model[1].g[2].weight.neg_()  # the norm is the same
    with refused(
        r"Parameter '2.weight' of function 'g' of block '1' .* was changed in place between.*backward\(\) before"
    ):
        value.backward()
    model = in_mode(chain(), mode)
    model[2].f[0].weight.requires_grad_(False)
    value = model(images()).sum()
    with torch.no_grad():
        model[2].f[0].weight.add_(0.1)
    with refused("Parameter '0.weight' of function 'f' of block '2'"):
        value.backward()


@every_mode
def test_weights_changed_by_a_fused_optimizer_which_leaves_no_version(mode: str) -> None:
    model = in_mode(chain(), mode)
    model(images()).square().sum().backward()
    value = model(images()).sum()
    versions = [p._version for p in model.parameters()]
    torch.optim.Adam(model.parameters(), lr=1e-3, fused=True).step()
    assert [p._version for p in model.parameters()] == versions
    with refused("Parameter '0.weight' of function 'f' of block '0'.*was changed in place"):
        value.backward()


@every_mode
def test_weights_that_are_not_finite_are_not_taken_for_changed_ones(mode: str) -> None:
    model = in_mode(chain(), mode)
    with torch.no_grad():
        model[1].f[2].weight[0, 0, 0, 0] = torch.nan
        model[2].f[2].weight[0, 0, 0, 0] = torch.inf
    model(images()).sum().backward()


@every_mode
def test_buffers_changed_in_place(mode: str) -> None:
    model = in_mode(chain().eval(), mode)
    value = model(images()).sum()
    model[1].f[0].running_var.mul_(2)
    with refused(
        r"Buffer 'running_var' of function 'f' of block '1' \(AdditiveCoupling\) was changed in place between"
    ):
        value.backward()


@every_mode
def test_outputs_and_arguments_changed_in_place(mode: str) -> None:
    y = in_mode(chain(), mode)(images())
    with refused(
        "output of a reversible chain, or a further argument, was changed in place after the forward pass.*inplace=False"
    ):
        y.relu_().sum().backward()


# ---- Recomputed ----------------------------------------------------------------------------------------------------------


def test_recomputed_modules() -> None:
    x = images(torch.float32)
    with refused("Module 'Sequential' changes its input in place: use inplace=False"):
        Recomputed(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1)))(x * 1)
    with refused("Module 'Dictionary' must return a tensor or a tuple of tensors, got dict"):
        Recomputed(Dictionary())(x)
    with refused("Function 'Borrowing' uses a tensor of shape"):
        Recomputed(Borrowing(torch.ones(5, requires_grad=True)))(x).sum().backward()
    module: Any = Recomputed(nn.Conv2d(8, 8, 1))
    value = module(x).sum()
    with torch.no_grad():
        module.module.weight.add_(1)
    with refused("Parameter 'weight' of function 'Conv2d' was changed in place"):
        value.backward()
    for inputs in ([x], [*module.parameters()]):
        (slope, *_) = torch.autograd.grad(module(x).sum(), inputs, create_graph=True)
        for wanted in ([x], [*module.parameters()]):
            with refused("cannot be differentiated twice"):
                torch.autograd.grad(slope.sum(), wanted, allow_unused=True, retain_graph=True)
    inner = x * 2
    value = module(inner).square().sum()
    with torch.no_grad():
        inner.add_(1)
    with refused("An input of 'Conv2d', or a further argument, was changed in place"):
        value.backward()


class Dictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": self.linear(x)}
