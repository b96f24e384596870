"""What follows a weighted layer before its output is quantized, as a function of its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto
from scipy.special import expit

from compress.graph.model import GraphIndex, attribute

Array = NDArray[Any]
Function = Callable[[Array], Array]


@dataclass(frozen=True)
class ActivationFunction:
    """A pointwise function and its derivative.

    Args:
        output: The tensor that holds its value in the graph.
        value: The function.
        slope: Its derivative.
    """

    output: str
    value: Function
    slope: Function


def activation_of(graph: GraphIndex, node: NodeProto) -> ActivationFunction:
    """Return what ``node`` is followed by: Relu, Clip, SiLU, hard-swish, a gate or nothing."""
    tensor = node.output[0]
    readers = [] if graph.is_seen(tensor) else [r for r, _ in graph.readers.get(tensor, [])]
    kinds = sorted(reader.op_type for reader in readers)
    if kinds == ["Relu"]:
        return _clip(readers[0].output[0], 0.0, np.inf)
    if kinds == ["Clip"]:
        low, high = (_bound(graph, readers[0], i) for i in (1, 2))
        return _clip(
            readers[0].output[0],
            -np.inf if low is None else low,
            np.inf if high is None else high,
        )
    if kinds == ["HardSwish"]:
        return ActivationFunction(readers[0].output[0], _hard_swish, _hard_swish_slope)
    if kinds in (["Sigmoid"], ["HardSigmoid"]):
        return ActivationFunction(readers[0].output[0], *_gate(readers[0]))
    if kinds in (["Mul", "Sigmoid"], ["HardSigmoid", "Mul"]):
        product, gate = sorted(readers, key=lambda r: r.op_type != "Mul")
        if set(product.input) == {tensor, gate.output[0]}:
            value, slope = _gate(gate)
            return ActivationFunction(
                product.output[0],
                lambda z: z * value(z),
                lambda z: value(z) + z * slope(z),
            )
    return ActivationFunction(tensor, identity, np.ones_like)


def identity(z: Array) -> Array:
    """Return ``z``."""
    return z


def _bound(graph: GraphIndex, node: NodeProto, position: int) -> float | None:
    name = node.input[position] if len(node.input) > position else ""
    value = graph.constant(name) if name else None
    return None if value is None else float(value.reshape(-1)[0])


def _clip(output: str, low: float, high: float) -> ActivationFunction:
    return ActivationFunction(
        output, lambda z: np.clip(z, low, high), lambda z: ((z > low) & (z < high)).astype(z.dtype)
    )


def _gate(node: NodeProto) -> tuple[Function, Function]:
    """Return the function and the derivative of a Sigmoid or HardSigmoid."""
    if node.op_type == "Sigmoid":
        return _sigmoid, _sigmoid_slope
    steep, middle = attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5)

    def slope(z: Array) -> Array:
        inside = np.abs(steep * z + middle - 0.5) < 0.5
        return np.asarray(inside * steep, z.dtype)

    return lambda z: np.clip(steep * z + middle, 0, 1), slope


def _sigmoid(z: Array) -> Array:
    return np.asarray(expit(z))


def _sigmoid_slope(z: Array) -> Array:
    gate = _sigmoid(z)
    return np.asarray(gate * (1 - gate))


def _hard_swish(z: Array) -> Array:
    return np.asarray(z * np.clip(z / 6 + 0.5, 0, 1))


def _hard_swish_slope(z: Array) -> Array:
    return np.where(z <= -3, 0.0, np.where(z >= 3, 1.0, z / 3 + 0.5)).astype(z.dtype)
