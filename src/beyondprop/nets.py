"""Networks by name, as the command line takes them: `mlp:100x2:tanh:bn`, `lenet5`, `conv:32x4`, `rnn:15`, `resnet20`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from beyondprop.nn.binary import TARGET_RULES, Sign
from beyondprop.nn.recurrent import ElmanCell, Recurrent
from beyondprop.nn.residual import Residual, Shortcut
from beyondprop.nn.transformer import MeanOverPositions, Patches, Positions

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
}

_CELLS: dict[str, Callable[[int, int], Any]] = {"elman": ElmanCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}
_GATES = {"gru": 3, "lstm": 4}
"""Parts of a cell's input weights; the third makes the new state."""

_GAINS: dict[type[nn.Module], float] = {
    nn.ReLU: math.sqrt(2),
    nn.LeakyReLU: math.sqrt(2),
    nn.GELU: math.sqrt(2),
    nn.Tanh: 5 / 3,
    nn.Sigmoid: 1.0,
    nn.Softplus: 1.0,
}

FORMS: dict[str, str] = {
    "mlp:WIDTHxDEPTH[:ACTIVATION][:bn][:dropout=P]": "fully connected, DEPTH hidden layers of WIDTH units",
    "lenet5": "LeNet-5 with ReLU: 6-16 channels of 5x5, 2x2 max-pooling, 120-84 units",
    "conv:WIDTHxDEPTH[:ACTIVATION][:bn]": "DEPTH 3x3 convolutions from WIDTH channels, pooling and doubling every second one",
    "binary:WIDTHxDEPTH[:first][:rule=NAME][:dropout=P]": (
        "fully connected with BatchNorm and units that send signs (`first`: the lowest hidden layer's only, others are tanh)"
    ),
    "rnn:WIDTH[:ACTIVATION][:pixels|rows][:elman|gru|lstm]": (
        "WIDTH recurrent units over an image, by pixels (one output a step, all read at the end) or by rows (the last state)"
    ),
    "transformer:WIDTHxDEPTH[:patch=SIZE]": "image transformer, DEPTH encoder blocks of WIDTH features on patches, averaged",
    "resnetDEPTH": "residual net of He et al. (2016) for small images, DEPTH = 6 n + 2 layers such as resnet20",
}
"""What `build` accepts, for help texts."""


def build(spec: str, input_shape: Sequence[int], num_classes: int) -> nn.Sequential:
    """Build the network that `spec` names; weights come from torch's global random state.

    Args:
        spec: such as `"mlp:100x2"`; see `FORMS`.
        input_shape: shape of one sample, `(C, H, W)` for images.
        num_classes: number of outputs.

    Raises:
        ValueError: if `spec` is none of the accepted forms, or does not fit `input_shape`.
    """
    kind, *parts = spec.split(":")
    _each_once(spec, parts[1:])
    if kind == "mlp" and parts:
        return _mlp(spec, parts, input_shape, num_classes)
    if kind == "conv" and parts:
        return _conv(spec, parts, input_shape, num_classes)
    if kind == "binary" and parts:
        return _binary(spec, parts, input_shape, num_classes)
    if kind == "transformer" and parts:
        return _transformer(spec, parts, input_shape, num_classes)
    if kind == "rnn" and parts:
        return _rnn(spec, parts, input_shape, num_classes)
    if spec == "lenet5":
        return _lenet5(input_shape, num_classes)
    if spec.startswith("resnet"):
        return _resnet(spec, input_shape, num_classes)
    kinds = [form.partition(":")[0].replace("DEPTH", "20") for form in FORMS]
    close = difflib.get_close_matches(kind, kinds, n=1)
    hint = f"; perhaps you meant {close[0]!r}" if close and close[0] != kind else ""
    raise ValueError(f"net must be one of {', '.join(FORMS)}, got {spec!r}{hint}.")


def _each_once(spec: str, options: Sequence[str]) -> None:
    """Refuse options that contradict each other: the last would win, under the name of all."""
    names = [option.partition("=")[0] for option in options]
    for group in (tuple(ACTIVATIONS), ("pixels", "rows"), tuple(_CELLS), *((name,) for name in names)):
        given = [option for option, name in zip(options, names, strict=True) if name in group]
        if len(given) > 1:
            raise ValueError(f"{spec!r}: {' and '.join(map(repr, given))} are given; take one of them.")


def _mlp(spec: str, parts: list[str], input_shape: Sequence[int], num_classes: int) -> nn.Sequential:
    width, depth, activation, norm, dropout = _options(spec, parts)
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = math.prod(input_shape)
    for _ in range(depth):
        layers.append(nn.Linear(inputs, width))
        if norm:
            layers.append(nn.BatchNorm1d(width))
        layers.append(activation())
        if dropout:
            layers.append(nn.Dropout(dropout))
        inputs = width
    return _initialise(nn.Sequential(*layers, nn.Linear(inputs, num_classes)))


def _binary(spec: str, parts: list[str], input_shape: Sequence[int], num_classes: int) -> nn.Sequential:
    width, depth = _size(spec, parts[0])
    first, rule, dropout = False, "hardtanh", 0.0
    for option in parts[1:]:
        if option == "first":
            first = True
        elif option.startswith("dropout="):
            dropout = _probability(spec, option.removeprefix("dropout="))
        elif option.startswith("rule=") and option.removeprefix("rule=") in TARGET_RULES:
            rule = option.removeprefix("rule=")
        else:
            rules = ", ".join(f"rule={name}" for name in TARGET_RULES)
            raise ValueError(f"{spec!r}: unknown option {option!r}; accepted: first, dropout=P, {rules}.")
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = math.prod(input_shape)
    for index in range(depth):
        layers += [nn.Linear(inputs, width), nn.BatchNorm1d(width)]
        layers += [nn.Dropout(dropout)] if dropout else []
        layers.append(nn.Tanh() if first and index else Sign(rule))
        inputs = width
    return _initialise(nn.Sequential(*layers, nn.Linear(inputs, num_classes)))


def _conv(spec: str, parts: list[str], input_shape: Sequence[int], num_classes: int) -> nn.Sequential:
    width, depth, activation, norm, dropout = _options(spec, parts)
    channels, height, breadth = _image(spec, input_shape)
    layers: list[nn.Module] = []
    for i in range(depth):
        layers.append(nn.Conv2d(channels, width, 3, padding=1))
        if norm:
            layers.append(nn.BatchNorm2d(width))
        layers.append(activation())
        channels = width
        if i % 2 and min(height, breadth) >= 2:
            layers.append(nn.MaxPool2d(2))
            height, breadth, width = height // 2, breadth // 2, width * 2
    layers.append(nn.Flatten())
    if dropout:
        layers.append(nn.Dropout(dropout))
    return _initialise(nn.Sequential(*layers, nn.Linear(channels * height * breadth, num_classes)))


def _lenet5(input_shape: Sequence[int], num_classes: int) -> nn.Sequential:
    channels, height, breadth = _image("lenet5", input_shape)
    if min(height, breadth) < 16:
        raise ValueError(
            f"lenet5 needs images of 16x16 or more, got {height}x{breadth}; use 'mlp:100x2' or 'conv:16x2'."
        )
    rows, columns = ((((size - 4) // 2) - 4) // 2 for size in (height, breadth))
    model = nn.Sequential(
        nn.Conv2d(channels, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * rows * columns, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, num_classes),
    )
    return _initialise(model)


def _rnn(spec: str, parts: list[str], input_shape: Sequence[int], num_classes: int) -> nn.Sequential:
    width, *options = parts
    if not (width.isdecimal() and int(width) > 0):
        raise ValueError(f"{spec!r}: {width!r} must be the number of units, >= 1, such as 15.")
    channels, height, breadth = _image(spec, input_shape)
    if channels != 1:
        raise ValueError(f"{spec!r} reads grey images as sequences, got {channels} channels; use a conv or resnet.")
    activation: Callable[[], nn.Module] = nn.Tanh
    order, cell = "pixels", "elman"
    for option in options:
        if option in ACTIVATIONS:
            activation = ACTIVATIONS[option]
        elif option in ("pixels", "rows"):
            order = option
        elif option in _CELLS:
            cell = option
        else:
            accepted = ", ".join([*ACTIVATIONS, "pixels", "rows", *_CELLS])
            raise ValueError(f"{spec!r}: unknown option {option!r}; accepted: {accepted}.")
    if cell != "elman" and set(options) & set(ACTIVATIONS):
        raise ValueError(f"{spec!r}: a {cell} cell has activations of its own; leave the activation out, or the cell.")
    steps, size = (height * breadth, 1) if order == "pixels" else (height, breadth)
    units = int(width)
    unit = ElmanCell(size, units, activation()) if cell == "elman" else _CELLS[cell](size, units)
    head = [activation()] if cell == "elman" else []  # an Elman cell's state is its pre-activation
    layout: list[nn.Module] = [nn.Flatten(), nn.Unflatten(1, (steps, size))]
    if order == "rows":
        return nn.Sequential(*layout, Recurrent(unit), *head, nn.Linear(units, num_classes))
    read = nn.Linear(units, 1)
    # One output unit, seen through a ReLU: with signs at random, every third net starts dead. It rises with its pixel instead.
    reads_pixel = unit.weight_ih if cell == "elman" else unit.weight_ih.chunk(_GATES[cell])[2]
    with torch.no_grad():
        read.weight.copysign_(reads_pixel.t())
        read.bias.zero_()
    top = [nn.Flatten(), nn.ReLU(), nn.Linear(steps, num_classes)]
    return nn.Sequential(*layout, Recurrent(unit, "all"), *head, read, *top)


def _transformer(spec: str, parts: list[str], input_shape: Sequence[int], num_classes: int) -> nn.Sequential:
    width, depth = _size(spec, parts[0])
    channels, height, breadth = _image(spec, input_shape)
    side = 4
    for option in parts[1:]:
        value = option.removeprefix("patch=")
        if value == option or not value.isdecimal() or not 1 <= int(value) <= min(height, breadth):
            raise ValueError(
                f"{spec!r}: accepted is patch=SIZE with 1 <= SIZE <= {min(height, breadth)}, got {option!r}."
            )
        side = int(value)
    heads = max(1, width // 32)
    if width % heads:
        raise ValueError(f"{spec!r}: the width must be a multiple of its {heads} heads of 32 features, got {width}.")
    blocks = [
        nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
        for _ in range(depth)
    ]
    return nn.Sequential(
        Patches(side),
        nn.Linear(channels * side * side, width),
        Positions((height // side) * (breadth // side), width),
        *blocks,
        nn.LayerNorm(width),
        MeanOverPositions(),
        nn.Linear(width, num_classes),
    )


def _basic_block(channels: int, width: int, stride: int) -> Residual:
    """Two 3x3 convolutions with BatchNorm and a skip without weights: He et al., CVPR 2016, figure 2 and option A."""
    branch = nn.Sequential(
        nn.Conv2d(channels, width, 3, stride, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
    )
    changes = stride > 1 or width > channels
    return Residual(branch, Shortcut(stride, (width - channels) // 2) if changes else None, nn.ReLU())


def _resnet(spec: str, input_shape: Sequence[int], num_classes: int) -> nn.Sequential:
    depth = spec.removeprefix("resnet")
    if not depth.isdecimal() or int(depth) < 8 or (int(depth) - 2) % 6:
        raise ValueError(f"{spec!r}: the depth must be 6 n + 2, such as resnet20 or resnet32.")
    channels, *_ = _image(spec, input_shape)
    layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    channels = 16
    for width in (16, 32, 64):
        for i in range((int(depth) - 2) // 6):
            layers.append(_basic_block(channels, width, 2 if i == 0 and width > 16 else 1))
            channels = width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model


def _initialise(model: nn.Sequential) -> nn.Sequential:
    """Draw weights so that signals keep their size at any depth (He et al. 2015); biases are 0.

    torch's own default shrinks them by 2.4 a ReLU layer: at depth 16, nothing learns in an epoch, whatever the rule.
    """
    carriers = [m for m in model if isinstance(m, nn.Linear | nn.Conv2d)]
    activations = [m for m in model if type(m) in _GAINS]
    gain = _GAINS[type(activations[0])] if activations else 1.0
    for layer in carriers:
        fan_in = layer.weight[0].numel()
        nn.init.normal_(layer.weight, std=(1.0 if layer is carriers[-1] else gain) / math.sqrt(fan_in))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return model


def _image(spec: str, input_shape: Sequence[int]) -> tuple[int, int, int]:
    if len(input_shape) != 3:
        raise ValueError(f"{spec!r} takes images (C, H, W), got samples of shape {tuple(input_shape)}; use an mlp.")
    channels, height, breadth = input_shape
    return channels, height, breadth


def _size(spec: str, size: str) -> tuple[int, int]:
    width, _, depth = size.partition("x")
    if not (width.isdecimal() and depth.isdecimal() and int(width) > 0 and int(depth) > 0):
        raise ValueError(f"{spec!r}: {size!r} must be WIDTHxDEPTH with both >= 1, such as 100x2.")
    return int(width), int(depth)


def _options(spec: str, parts: list[str]) -> tuple[int, int, Callable[[], nn.Module], bool, float]:
    size, *options = parts
    width, depth = _size(spec, size)
    activation: Callable[[], nn.Module] = nn.ReLU
    norm, dropout = False, 0.0
    for option in options:
        if option in ACTIVATIONS:
            activation = ACTIVATIONS[option]
        elif option == "bn":
            norm = True
        elif option.startswith("dropout="):
            dropout = _probability(spec, option.removeprefix("dropout="))
        else:
            raise ValueError(f"{spec!r}: unknown option {option!r}; accepted: {', '.join(ACTIVATIONS)}, bn, dropout=P.")
    return width, depth, activation, norm, dropout


def _probability(spec: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise ValueError(f"{spec!r}: dropout must be in [0, 1), got {text!r}.")
    return value
