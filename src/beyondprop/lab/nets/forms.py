"""Networks by form, as the command line takes them: `mlp:100x2:tanh:bn`, `lenet5`, `resnet20`, `my_nets.py:build`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from beyondprop import _checks
from beyondprop.lab.nets.blackbox import blackbox
from beyondprop.lab.nets.convolutional import conv, lenet5, resnet
from beyondprop.lab.nets.fully_connected import autoencoder, binary, mlp
from beyondprop.lab.nets.recurrent import rnn
from beyondprop.lab.nets.reversible import revnet, revtransformer
from beyondprop.lab.nets.spiking import spike_loss, spiking
from beyondprop.lab.nets.transformer import transformer
from beyondprop.lab.registry import NetSpec, load_file, nets, register

# fmt: off
for _row in (
    ("mlp", "mlp:WIDTH[xDEPTH][:ACTIVATION][:bn][:dropout=P]", "fully connected, DEPTH hidden layers of WIDTH units", mlp),
    ("lenet5", "lenet5", "LeNet-5 with ReLU: 6-16 channels of 5x5, 2x2 max-pooling, 120-84 units", lenet5),
    ("conv", "conv:WIDTHxDEPTH[:ACTIVATION][:bn]",
     "DEPTH 3x3 convolutions from WIDTH channels, pooling and doubling every second one", conv),
    ("binary", "binary:WIDTHxDEPTH[:first][:rule=NAME][:dropout=P]",
     "fully connected with BatchNorm and units that send signs (`first`: the lowest hidden layer's only, others are tanh)",
     binary),
    ("rnn", "rnn:WIDTH[:ACTIVATION][:pixels|rows][:elman|gru|lstm][:identity]",
     "WIDTH recurrent units over a sequence or the rows of an image (the last state is read), or over its pixels (all are)",
     rnn),
    ("transformer", "transformer:WIDTHxDEPTH[:patch=SIZE]",
     "image transformer, DEPTH encoder blocks of WIDTH features on patches, averaged", transformer),
    ("resnet", "resnetDEPTH[:preact][:bottleneck]",
     "residual net of He et al. (2016) for small images, DEPTH = 6 n + 2 layers such as resnet20 (`preact`: with the block of "
     "revnet; `bottleneck`: 9 n + 2)", resnet),
    ("revnet", "revnetDEPTH[:mode=inverse|checkpoint|store]",
     "reversible net of Gomez et al. (2017): revnet38, revnet110, revnet164; revnet56, revnet104 for large images", revnet),
    ("revtransformer", "revtransformer:WIDTHxDEPTH[:patch=SIZE][:dropout=P][:mode=inverse|checkpoint|store]",
     "image transformer of DEPTH reversible encoder layers on two streams of WIDTH features", revtransformer),
    ("autoencoder", "autoencoder[:ACTIVATION][:wide][:deep]",
     "1000-500-250-30-250-500-1000 units, tanh where none is named; twice as wide, or with 500 twice", autoencoder),
    ("blackbox", "blackbox:WIDTH[:METHOD][:noise=S][:probes=K][:conv]",
     "a simulator in NumPy between two layers: WIDTH oscillators in a ring; its gradient by auto, dense, coloring, regression, "
     "robust, rainbow, discover, spsa, exact (in torch) or stopped (none); `conv`: behind convolutions", blackbox),
    ("spiking", "spiking:WIDTH[xDEPTH][:hm2bp|surrogate][:T=STEPS][:target=COUNT][:conv][:events]",
     "spiking neurons, DEPTH hidden layers of WIDTH, read by their counts, with a loss of its own; gradients by HM2-BP or by a "
     "surrogate slope; `conv`: behind convolutions; `events`: samples (T, ...) are spikes already", spiking, spike_loss),
):
    register(NetSpec(*_row))  # type: ignore[arg-type]
# fmt: on


def spec_of(form: str) -> NetSpec:
    """Return the family of a form.

    Raises:
        ValueError: if there is none; the message has those that there are.
    """
    kind = form.partition(":")[0]
    for name in (kind, kind.rstrip("0123456789")):
        if name in nets:
            return nets.get(name)
    forms, hint = ", ".join(spec.form for spec in nets), _checks.hint(kind, nets.names())
    raise ValueError(f"net must be one of {forms}, or FILE.py:FUNCTION, got {form!r}{hint}.")


def build(form: str, input_shape: Sequence[int], outputs: int) -> nn.Module:
    """Build the network that `form` names; weights come from torch's global random state.

    Args:
        form: such as `"mlp:100x2"`, or `"my_nets.py:build"` for a function `build(input_shape, outputs)` of one's own.
        input_shape: shape of one sample, `(C, H, W)` for images.
        outputs: number of outputs.

    Raises:
        ValueError: if `form` is none of the accepted ones, or does not fit `input_shape`.
    """
    file, colon, function = form.rpartition(":")
    if not (colon and file.endswith(".py")):
        return spec_of(form).build(form, input_shape, outputs)
    made = getattr(load_file(file), function, None)
    if not callable(made):
        raise ValueError(f"net {form!r}: {file} has no function {function!r}.")
    model = made(tuple(input_shape), outputs)
    if not isinstance(model, nn.Module):
        raise ValueError(f"net {form!r} must return a torch.nn.Module, got {type(model).__name__}.")
    return model
