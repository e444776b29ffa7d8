"""The chain that a forward pass of its own makes of a model's modules, found by `torch.fx`.

A forward pass is a chain where everything after some value depends on that value alone. Between two such values lies one
module, a function such as `F.relu`, which the module of the same meaning stands for, or a branch, which stays one block.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from beyondprop.errors import UnsupportedModelError

Named = tuple[str, nn.Module]
_DIMS = {1: (nn.MaxPool1d, nn.AvgPool1d), 2: (nn.MaxPool2d, nn.AvgPool2d), 3: (nn.MaxPool3d, nn.AvgPool3d)}


def _same(kind: Callable[..., nn.Module], *names: str) -> Callable[..., nn.Module]:
    """Return a function of a call's further arguments, those called `names`, that makes the module of the same meaning."""

    def make(*given: Any, **named: Any) -> nn.Module:
        named |= dict(zip((*names, "inplace"), given, strict=False))
        named.pop("inplace", None)  # the value is used once
        return kind(**{name: value for name, value in named.items() if name in names})

    return make


def _dropped(p: float = 0.5, training: bool = True, inplace: bool = False) -> nn.Module:
    del inplace
    return nn.Dropout(p).train(training)


_POOL = ("kernel_size", "stride", "padding")
_MODULES: dict[Any, Callable[..., nn.Module]] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_"), _same(nn.ReLU)),
    **dict.fromkeys((F.tanh, torch.tanh, "tanh", "tanh_"), _same(nn.Tanh)),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, "sigmoid", "sigmoid_"), _same(nn.Sigmoid)),
    F.relu6: _same(nn.ReLU6),
    F.silu: _same(nn.SiLU),
    F.gelu: _same(nn.GELU, "approximate"),
    F.elu: _same(nn.ELU, "alpha"),
    F.leaky_relu: _same(nn.LeakyReLU, "negative_slope"),
    F.hardtanh: _same(nn.Hardtanh, "min_val", "max_val"),
    F.softplus: _same(nn.Softplus, "beta", "threshold"),
    F.log_softmax: _same(nn.LogSoftmax, "dim"),
    F.softmax: _same(nn.Softmax, "dim"),
    F.dropout: _dropped,
    **{getattr(F, f"max_pool{n}d"): _same(kinds[0], *_POOL, "dilation", "ceil_mode") for n, kinds in _DIMS.items()},
    **{getattr(F, f"avg_pool{n}d"): _same(kinds[1], *_POOL, "ceil_mode") for n, kinds in _DIMS.items()},
    F.adaptive_avg_pool2d: _same(nn.AdaptiveAvgPool2d, "output_size"),
    **dict.fromkeys((torch.flatten, "flatten"), _same(nn.Flatten, "start_dim", "end_dim")),
}


def traced(model: nn.Module, is_open: Callable[[nn.Module], bool]) -> tuple[list[Named], list[nn.Module]]:
    """Return the modules that a model's forward pass applies one after the other, with their names.

    Args:
        model: any module that takes one tensor; further arguments must have defaults.
        is_open: whether a submodule is looked into; all others stay as they are.

    Returns:
        The modules, and those among them that follow the model's own mode because it asked for `self.training`.

    Raises:
        UnsupportedModelError: if the forward pass cannot be traced, such as where it depends on values.
    """
    in_training, in_evaluation = (_chain(model, is_open, mode) for mode in (True, False))
    followers = []
    for (name, a), (other, b) in zip(in_training, in_evaluation, strict=False):
        if name != other or getattr(a, "code", type(a)) != getattr(b, "code", type(b)):
            break
        if isinstance(a, nn.Dropout) and a.training != b.training:
            followers.append(a)
    else:
        if len(in_training) == len(in_evaluation):
            return in_training, followers
    raise UnsupportedModelError(
        f"{type(model).__name__} has a forward pass of its own that applies other operations in training than in evaluation, "
        "such as a functional dropout inside a branch. Use modules for them, or pass cuts=[block, block, ...]."
    )


def _chain(model: nn.Module, is_open: Callable[[nn.Module], bool], mode: bool) -> list[Named]:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return not is_open(m)

    signature = inspect.signature(type(model).forward).parameters.values()
    optional = {p.name: p.default for p in signature if p.default is not inspect.Parameter.empty}
    with _root_mode(model, mode):
        try:
            graph = Tracer().trace(model, concrete_args=optional or None)
        except Exception as error:  # whatever a user's forward does with a value that has no numbers
            raise UnsupportedModelError(
                f"{type(model).__name__} has a forward pass of its own that cannot be traced ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}). Pass an nn.Sequential (its blocks may be any modules), or "
                "cuts=[block, block, ...] with the modules that make up its forward pass; a CreditBlock serves any part of it "
                "that takes one tensor and returns one."
            ) from error
    for node in [n for n in graph.nodes if n.op == "placeholder" and n.args]:
        _erase(graph, node)  # an argument with a default, whose value is in the graph: what is left only asserts it
    inputs = [n for n in graph.nodes if n.op == "placeholder" and n.users]
    (end,) = (n for n in graph.nodes if n.op == "output")
    if len(inputs) != 1 or not isinstance(end.args[0], fx.Node):
        raise UnsupportedModelError(
            f"{type(model).__name__} has a forward pass of its own with {len(inputs)} tensor(s) in and {end.args[0]} out; a "
            "chain has one in and one out. Wrap it in a module that does, or pass cuts=[block, block, ...]; a CreditBlock "
            "serves any part of it that takes one tensor and returns one."
        )
    return [_module(model, *segment) for segment in _segments(graph, inputs[0])]


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)


@contextmanager
def _root_mode(model: nn.Module, mode: bool) -> Iterator[None]:
    before = model.training
    model.training = mode
    try:
        yield
    finally:
        model.training = before


def _is_free(node: fx.Node) -> bool:
    """Whether a value can be had anywhere: a parameter, or the batch's size."""
    return node.op == "get_attr" or _is_batch_size(node) or _is_shape(node)


def _is_shape(node: fx.Node) -> bool:
    is_shape = node.op == "call_function" and node.target is getattr and node.args[1] == "shape"
    is_size = node.op == "call_method" and node.target == "size" and len(node.args) == 1 and not node.kwargs
    return (is_shape or is_size) and all(map(_is_batch_size, node.users))


def _is_batch_size(node: fx.Node) -> bool:
    if node.op == "call_method" and node.target == "size":
        return (*node.args[1:], *node.kwargs.values()) == (0,)
    if node.op != "call_function" or node.target is not operator.getitem or node.args[1] != 0:
        return False
    of = node.args[0]
    return isinstance(of, fx.Node) and (
        (of.op == "call_method" and of.target == "size") or (of.op == "call_function" and of.target is getattr)
    )


def _segments(graph: fx.Graph, start: fx.Node) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Yield the parts between values that all later ones depend on alone, each with the value that it begins with."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    last = {node: max((order[user] for user in node.users), default=-1) for node in order}
    for node in reversed(order):
        if _is_free(node):  # its users take it along
            last[node] = -1
    for node in list(order):
        # What a free value comes from is not needed for it: its numbers are those of any value of the batch.
        last[node] = (
            max((order[user] for user in node.users if not _is_free(user)), default=-1) if last[node] >= 0 else -1
        )
    part: list[fx.Node] = []
    begin = start
    for node in order:
        if node.op in ("placeholder", "output") or _is_free(node):
            continue
        part.append(node)
        live = [other for other in order if order[other] <= order[node] and last[other] > order[node]]
        if live == [node]:
            yield begin, part
            begin, part = node, []


def _module(model: nn.Module, begin: fx.Node, part: list[fx.Node]) -> Named:
    """Return the module that computes a part."""
    names = [str(node.target) for node in part if node.op == "call_module"]
    if len(part) == 1:
        (node,) = part
        takes_one = node.args[:1] == (begin,) and not any(isinstance(a, fx.Node) for a in node.args[1:])
        if node.op == "call_module" and node.args == (begin,) and not node.kwargs:
            return names[0], model.get_submodule(names[0])
        if takes_one and node.target in _MODULES and not any(isinstance(a, fx.Node) for a in node.kwargs.values()):
            return node.name, _MODULES[node.target](*node.args[1:], **node.kwargs)
        if node.op == "call_method" and node.target in ("view", "reshape") and node.args[0] is begin:
            size = node.args[1:] if not isinstance(node.args[1], tuple | list) else tuple(node.args[1])
            if len(size) == 2 and size[1] == -1 and isinstance(size[0], fx.Node) and _is_batch_size(size[0]):
                return node.name, nn.Flatten(1)
    return (names or [part[-1].name])[-1], _block(model, begin, part)


def _block(model: nn.Module, begin: fx.Node, part: list[fx.Node]) -> fx.GraphModule:
    """Return a part as a module of the model's own modules and parameters."""
    graph = fx.Graph()
    z = graph.placeholder("z")
    made: dict[fx.Node, fx.Node] = {begin: z}

    def copied(node: fx.Node) -> fx.Node:
        if node not in made:
            if _is_batch_size(node):
                made[node] = graph.call_method("size", (z, 0))
            else:
                made[node] = graph.node_copy(node, copied)
        return made[node]

    graph.output(copied(part[-1]))
    block = fx.GraphModule(model, graph, type(model).__name__)
    block.training = model.training
    return block
