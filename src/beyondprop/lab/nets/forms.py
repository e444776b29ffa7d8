"""Networks by name, as the command line takes them: `mlp:100x2:tanh:bn`, `lenet5`, `conv:32x4`, `rnn:15`, `resnet20`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn

from beyondprop.lab.nets.convolutional import conv, lenet5, resnet
from beyondprop.lab.nets.fully_connected import binary, mlp
from beyondprop.lab.nets.options import ACTIVATIONS
from beyondprop.lab.nets.recurrent import CELLS, rnn
from beyondprop.lab.nets.transformer import transformer

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
        return mlp(spec, parts, input_shape, num_classes)
    if kind == "conv" and parts:
        return conv(spec, parts, input_shape, num_classes)
    if kind == "binary" and parts:
        return binary(spec, parts, input_shape, num_classes)
    if kind == "transformer" and parts:
        return transformer(spec, parts, input_shape, num_classes)
    if kind == "rnn" and parts:
        return rnn(spec, parts, input_shape, num_classes)
    if spec == "lenet5":
        return lenet5(input_shape, num_classes)
    if spec.startswith("resnet"):
        return resnet(spec, input_shape, num_classes)
    kinds = [form.partition(":")[0].replace("DEPTH", "20") for form in FORMS]
    close = difflib.get_close_matches(kind, kinds, n=1)
    hint = f"; perhaps you meant {close[0]!r}" if close and close[0] != kind else ""
    raise ValueError(f"net must be one of {', '.join(FORMS)}, got {spec!r}{hint}.")


def _each_once(spec: str, options: Sequence[str]) -> None:
    """Refuse options that contradict each other: the last would win, under the name of all."""
    names = [option.partition("=")[0] for option in options]
    for group in (tuple(ACTIVATIONS), ("pixels", "rows"), tuple(CELLS), *((name,) for name in names)):
        given = [option for option, name in zip(options, names, strict=True) if name in group]
        if len(given) > 1:
            raise ValueError(f"{spec!r}: {' and '.join(map(repr, given))} are given; take one of them.")
