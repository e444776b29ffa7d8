"""Spiking layers as nodes of the Neuromorphic Intermediate Representation, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from beyondprop.errors import UnsupportedModelError
from beyondprop.nn.spiking import CubaLIF
from beyondprop.nn.spiking.scans import SLACK


def parts(op: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of an operator one after the other."""
    if type(op) is nn.Sequential:
        for child in op:
            yield from parts(child)
    elif not isinstance(op, nn.Identity):
        yield op


def linear_node(nir: Any, module: nn.Module, shape: Sequence[int], name: str) -> Any:
    """Return the node of a linear module for one sample of a shape, without time.

    Raises:
        UnsupportedModelError: if there is none in NIR.
    """
    if module._forward_hooks:
        raise UnsupportedModelError(
            f"{name} has a {type(module).__name__} with forward hooks, which NIR does not have; remove them."
        )
    weight = getattr(module, "weight", None)
    array = None if weight is None else weight.detach().cpu().float().numpy()
    if type(module) is nn.Linear and len(shape) == 1:
        return nir.Linear(weight=array)
    # The reader of NIR 1.0 takes the shapes of other convolutions for wrong.
    is_readable = isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == len(set(module.kernel_size)) == 1
    if type(module) is nn.Conv2d and module.padding_mode == "zeros" and is_readable:
        padding = module.padding if isinstance(module.padding, str) else tuple(module.padding)
        no_bias = np.zeros(module.out_channels, dtype=np.float32)
        return nir.Conv2d(tuple(shape[1:]), array, module.stride, padding, module.dilation, module.groups, no_bias)
    if type(module) is nn.Conv1d and module.padding_mode == "zeros" and is_readable:
        padding = module.padding if isinstance(module.padding, str) else module.padding[0]
        no_bias = np.zeros(module.out_channels, dtype=np.float32)
        return nir.Conv1d(shape[1], array, module.stride[0], padding, module.dilation[0], module.groups, no_bias)
    if type(module) is nn.Flatten and module.end_dim == -1 and module.start_dim == 1:
        return nir.Flatten({"input": np.array(shape)}, start_dim=0, end_dim=-1)
    if type(module) is nn.AvgPool2d and not module.ceil_mode and (module.count_include_pad or not _any(module.padding)):
        sizes = [np.array(_pair(value)) for value in (module.kernel_size, module.stride, module.padding)]
        if module.divisor_override == 1:
            return nir.SumPool2d(*sizes)
        if module.divisor_override is None:
            return nir.AvgPool2d(*sizes)
    raise UnsupportedModelError(
        f"{name} has a {module}, for which NIR has no node with an input of shape {tuple(shape)}; Linear of rows, Conv1d and "
        "Conv2d (square, in one group, with zeros around), AvgPool2d and Flatten have one."
    )


def neuron_node(nir: Any, neuron: CubaLIF, shape: Sequence[int]) -> Any:
    """Return the node of neurons: their currents, then their membranes, by forward Euler in steps of `dt`."""

    def full(value: float) -> Any:
        return np.full(tuple(shape), value, dtype=np.float32)

    tau_mem, tau_syn, dt = neuron.tau_mem, neuron.tau_syn, neuron.dt
    return nir.CubaLIF(
        tau_syn=full(tau_syn * dt),
        tau_mem=full(tau_mem * dt),
        r=full(tau_mem / tau_syn),
        v_leak=full(0.0),
        v_threshold=full(neuron.threshold - SLACK),
        v_reset=full(0.0),
        w_in=full(tau_syn),
    )


def neuron_of(node: Any, name: str, dt: float, delay: int) -> CubaLIF:
    """Return the neuron of a node.

    Raises:
        UnsupportedModelError: if its neurons differ, or have what ours have not.
    """
    values: dict[str, float] = {}
    for key in ("tau_syn", "tau_mem", "r", "v_leak", "v_threshold", "v_reset", "w_in"):
        array = np.asarray(getattr(node, key), dtype=np.float64)
        if not _alike(array, array.flat[0]):
            raise UnsupportedModelError(f"Node {name!r}: neurons with different {key} are not supported.")
        values[key] = float(array.flat[0])
    for key in ("v_leak", "v_reset"):
        if values[key]:
            raise UnsupportedModelError(f"Node {name!r}: {key} must be 0, got {values[key]:g}.")
    tau_syn, tau_mem = values["tau_syn"] / dt, values["tau_mem"] / dt
    # Membranes may be counted in any unit; ours takes up 1 / tau_syn of a spike of weight 1 at once.
    scale = values["w_in"] * values["r"] / tau_mem
    if not scale > 0:
        raise UnsupportedModelError(
            f"Node {name!r}: w_in and r must be > 0, got {values['w_in']:g} and {values['r']:g}."
        )
    threshold = values["v_threshold"] / scale + SLACK
    try:
        return CubaLIF(_whole(tau_mem), _whole(tau_syn), threshold, 0, delay, dt)
    except ValueError as error:
        raise UnsupportedModelError(f"Node {name!r}, in steps of {dt:g} s (dt): {error}") from error


def delay_of(node: Any, name: str, dt: float) -> int:
    """Return the steps of a Delay.

    Raises:
        UnsupportedModelError: if they are no whole number, the same for all.
    """
    steps = np.asarray(node.delay, dtype=np.float64) / dt
    whole = round(float(steps.flat[0]))
    if not np.all(np.abs(steps - whole) <= 1e-3) or whole < 0:
        raise UnsupportedModelError(
            f"Node {name!r}: delays must be one whole number of steps of {dt:g} s, got {steps.flat[0]:g}."
        )
    return whole


def _alike(array: Any, expected: Any) -> bool:
    """Return whether numbers are the same in single precision, in whatever unit they are."""
    return bool(np.all(np.abs(array - expected) <= 1e-5 * np.abs(expected)))


def _whole(value: float) -> float:
    """Return it without the last digits of single precision."""
    return round(value, 5)


def module_of(nir: Any, node: Any, name: str) -> nn.Module:
    """Return the linear module of a node.

    Raises:
        UnsupportedModelError: if it has a bias, or is another node.
    """
    bias = getattr(node, "bias", None)
    if bias is not None and np.any(np.asarray(bias)):
        raise UnsupportedModelError(f"Node {name!r}: a spiking layer has no bias.")
    if isinstance(node, nir.Linear | nir.Affine):
        return _with_weight(nn.Linear(*reversed(node.weight.shape), bias=False), node.weight)
    if isinstance(node, nir.Conv1d | nir.Conv2d):
        kind: Any = nn.Conv2d if isinstance(node, nir.Conv2d) else nn.Conv1d
        outputs, inputs, *size = node.weight.shape
        module = kind(
            inputs * node.groups,
            outputs,
            tuple(size),
            _numbers(node.stride),
            node.padding if isinstance(node.padding, str) else _numbers(node.padding),
            _numbers(node.dilation),
            int(node.groups),
            bias=False,
        )
        return _with_weight(module, node.weight)
    if isinstance(node, nir.SumPool2d | nir.AvgPool2d):
        divisor = 1 if isinstance(node, nir.SumPool2d) else None
        sizes = (_numbers(value) for value in (node.kernel_size, node.stride, node.padding))
        return nn.AvgPool2d(*sizes, divisor_override=divisor)  # type: ignore[arg-type]
    if isinstance(node, nir.Flatten):
        shape = None if node.input_type is None else node.input_type.get("input")
        rank = 2 if shape is None else len(shape)
        if (node.start_dim, node.end_dim) not in ((0, -1), (0, rank - 1)) and rank > 1:
            raise UnsupportedModelError(
                f"Node {name!r} flattens some dimensions of a sample; all of them alone are supported."
            )
        return nn.Flatten(1)
    raise UnsupportedModelError(f"Node {name!r} is a {type(node).__name__}, of which no spiking layer is made.")


def lateral_of(weight: Any) -> float | None:
    """Return the strength of a recurrent matrix that inhibits all others alike; None for another one."""
    array = np.asarray(weight)
    strength = -float(array[0, 1]) if array.ndim == 2 and array.shape[0] == array.shape[1] > 1 else 0.0
    expected = strength * (np.eye(len(array)) - 1.0)
    return strength if strength > 0 and _alike(array, expected) else None


def _with_weight(module: nn.Module, weight: Any) -> nn.Module:
    module.weight = nn.Parameter(torch.from_numpy(np.array(weight, dtype=np.float32)))
    return module


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _numbers(value: Any) -> Any:
    array = np.asarray(value)
    return int(array) if array.ndim == 0 else tuple(int(one) for one in array)


def _any(value: Any) -> bool:
    return bool(np.any(np.asarray(value)))
