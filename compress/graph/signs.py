"""Which tensors are certainly not negative, judged by the ops that make them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compress.graph.model import SAME_SCALE, attribute
from compress.graph.values import constant, maker

# Operators that pick or move values and compute none: quantizing before or after is the same.
MOVING = (SAME_SCALE - {"Resize"}) | {"Identity", "GlobalMaxPool", "Expand", "Tile"}
AVERAGING = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})
_NEVER_NEGATIVE = frozenset(
    {"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Exp", "Abs", "Softplus", "ReduceL1", "Sqrt"}
)
_KEEPS_SIGN = MOVING | AVERAGING | {"ReduceMax", "Dropout"}
_KEEPS_SIGN_OF_ALL = frozenset({"Concat", "Add", "Mul", "Max", "Sum"})


def is_never_negative(value: ir.Value | None, depth: int = 12) -> bool:
    """Return whether ``value``, of a float or a Q/DQ graph, is certainly not negative."""
    node = maker(value)
    if node is None or depth == 0:
        return False
    if node.op_type in _NEVER_NEGATIVE:
        return True
    if node.op_type == "Clip":
        low = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        low = low if low is not None else np.asarray(attribute(node, "min", -1.0))
        return bool(low >= 0)
    if node.op_type == "DequantizeLinear":
        zero = constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros((), np.uint8)
        return zero is not None and bool(np.all(zero <= np.iinfo(zero.dtype).min))
    if node.op_type in _KEEPS_SIGN_OF_ALL:
        return all(is_never_negative(each, depth - 1) for each in node.inputs)
    return node.op_type in _KEEPS_SIGN and is_never_negative(node.inputs[0], depth - 1)
