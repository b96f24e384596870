"""What QuantizeLinear and DequantizeLinear do to a value: scales, types, ranges, pairs, weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from compress.graph.model import WEIGHTED, attribute, channel_axis
from compress.graph.values import (
    Array,
    EditableGraph,
    constant,
    maker,
    moves,
    set_attribute,
    set_input,
)
from compress.qdq.writer import add_pair, broadcast_along, encode

DType = np.dtype[Any]

Q, DQ = "QuantizeLinear", "DequantizeLinear"
SMALLEST_SCALE = 2.0**-14  # smallest normal fp16: stays positive when the graph goes to fp16
INT8 = np.dtype(np.int8)
UINT8 = np.dtype(np.uint8)


@dataclass(frozen=True)
class Problem:
    """A finding as its rule reports it, with the edit of the graph that fixes it, if any."""

    node: str
    message: str
    edit: Callable[[], None] | None = None


@dataclass(frozen=True)
class Numbers:
    """Scale, zero point and integer type of a Q or DQ node; no scale if it is computed later."""

    scale: Array | None  # () or (C,)
    zero: Array  # int64, the shape of scale or ()
    dtype: DType

    @property
    def is_asymmetric(self) -> bool:
        """Whether zero is not the middle of what the integers hold."""
        return bool(np.any(self.zero != 0))

    @property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest real value that can be held, over all channels."""
        if self.scale is None:
            return (-np.inf, np.inf)
        info = np.iinfo(self.dtype)
        scale = self.scale.astype(np.float64)
        return float(np.min((info.min - self.zero) * scale)), float(
            np.max((info.max - self.zero) * scale)
        )

    def equals(self, other: Numbers) -> bool:
        """Return whether both say the same of every value."""
        if self.scale is None or other.scale is None or self.dtype != other.dtype:
            return False
        return np.array_equal(self.scale.ravel(), other.scale.ravel()) and np.array_equal(
            np.unique(self.zero), np.unique(other.zero)
        )


@dataclass(frozen=True)
class QdqPair:
    """An activation on its way through one Q and the DQ nodes that read it."""

    quantize: ir.Node
    dequantizes: tuple[ir.Node, ...]
    numbers: Numbers

    @property
    def source(self) -> ir.Value:
        """The float value that is quantized."""
        return _input(self.quantize, 0)

    @property
    def real(self) -> ir.Value:
        """What a reader of the quantized value reads."""
        return self.dequantizes[0].outputs[0]


@dataclass(frozen=True)
class Weight:
    """A constant that reaches a layer through DQ: stored as integers, or as floats before a Q."""

    node: ir.Node  # the op it is a weight of
    dequantize: ir.Node
    quantize: ir.Node | None  # None: the integers are stored
    stored: Array  # integers, or floats if there is a Q
    numbers: Numbers
    axis: int | None  # dimension of ``stored`` that numbers.scale runs along; None = one scale
    channel_axis: int | None  # dimension of ``stored`` that is the op's output channel, if known

    @property
    def integers(self) -> Array:
        """The integers the op computes with, as int64."""
        if self.quantize is None:
            return self.stored.astype(np.int64)
        info = np.iinfo(self.numbers.dtype)
        raw = np.rint(self.stored / broadcast_along(self._scale, self.axis, self.stored.ndim))
        zero = broadcast_along(self.numbers.zero, self.axis, self.stored.ndim)
        return np.asarray(np.clip(raw + zero, info.min, info.max), np.int64)

    @property
    def values(self) -> Array:
        """The real weights: the floats if they are stored, else what the integers stand for."""
        if self.quantize is not None:
            return self.stored
        zero = broadcast_along(self.numbers.zero, self.axis, self.stored.ndim)
        scale = broadcast_along(self._scale, self.axis, self.stored.ndim)
        return np.asarray((self.integers - zero) * scale, self._scale.dtype)

    @property
    def _scale(self) -> Array:
        if self.numbers.scale is None:
            raise ValueError("the scale is computed at run time")
        return self.numbers.scale


def numbers_of(node: ir.Node) -> Numbers:
    """Return scale, zero point and type of a Q or DQ node."""
    scale = constant(node.inputs[1])
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if zero is not None:
        return Numbers(scale, zero.astype(np.int64), zero.dtype)
    nothing = np.zeros((), np.int64)
    if node.op_type == Q:
        kind = ir.DataType(attribute(node, "output_dtype", 0) or ir.DataType.UINT8)
        return Numbers(scale, nothing, kind.numpy())
    stored, before = constant(node.inputs[0]), maker(node.inputs[0])
    if stored is not None:
        return Numbers(scale, nothing, stored.dtype)
    is_pair = before is not None and before.op_type == Q
    return Numbers(scale, nothing, numbers_of(before).dtype if before and is_pair else INT8)


def set_numbers(
    graph: EditableGraph, node: ir.Node, scale: Array, zero: Array, dtype: DType
) -> None:
    """Give a Q or DQ node another scale, zero point and type."""
    hint = f"{node.outputs[0].name}_fixed"
    node.replace_input_with(1, graph.add_constant(f"{hint}_scale", scale))
    point = np.broadcast_to(zero, scale.shape).astype(dtype)
    set_input(node, 2, graph.add_constant(f"{hint}_zero_point", point))
    set_attribute(node, "output_dtype", None)
    if scale.ndim == 0:
        set_attribute(node, "axis", None)


def pairs(graph: EditableGraph) -> Iterator[QdqPair]:
    """Yield every activation pair; a Q that no DQ reads has none."""
    for node in graph.of_type(Q):
        if constant(node.inputs[0]) is None:
            yield pair_of(node)


def pair_of(quantize: ir.Node) -> QdqPair:
    """Return the pair of a Q node."""
    readers = [node for node, _ in quantize.outputs[0].uses() if node.op_type == DQ]
    return QdqPair(quantize, tuple(readers), numbers_of(quantize))


def pair_before(value: ir.Value | None) -> QdqPair | None:
    """Return the activation pair whose DQ makes ``value``."""
    node = maker(value)
    if node is None or node.op_type != DQ:
        return None
    before = maker(node.inputs[0])
    if before is None or before.op_type != Q or constant(before.inputs[0]) is not None:
        return None
    return pair_of(before)


def pairs_on(value: ir.Value) -> list[QdqPair]:
    """Return the pairs that quantize ``value``."""
    found = [pair_of(node) for node, _ in value.uses() if node.op_type == Q]
    return [pair for pair in found if pair.dequantizes]


def insert_pair(graph: EditableGraph, value: ir.Value, numbers: Sequence[ir.Value | None]) -> None:
    """Let all that reads ``value`` read it quantized, with ``numbers`` as scale and zero point."""
    readers = {node for node, _ in value.uses()}
    real = add_pair(graph, value, numbers)
    graph.replace(value, real, keep=[node for node, _ in value.uses() if node not in readers])


def is_quantized(value: ir.Value | None) -> bool:
    """Return whether ``value`` comes from DQ nodes, directly or through ops that move values."""
    node = maker(value)
    if node is None:
        return False
    if node.op_type == DQ:
        return True
    if node.op_type == "Concat":
        return all(is_quantized(each) for each in node.inputs)
    return moves(node) and is_quantized(node.inputs[0])


def weights(graph: EditableGraph) -> Iterator[Weight]:
    """Yield the quantized weight of every weighted op whose scale is constant."""
    for node in graph.of_type(*WEIGHTED):
        weight = weight_of(node)
        if weight is not None and weight.numbers.scale is not None:
            yield weight


def weight_of(node: ir.Node) -> Weight | None:
    """Return the quantized constant weight of ``node``, seen through Transpose and Identity."""
    axis = _channel_axis(node)
    value = node.inputs[1]
    while (made := maker(value)) is not None and made.op_type in ("Transpose", "Identity"):
        if made.op_type == "Transpose" and axis is not None:
            order = attribute(made, "perm")
            axis = order[axis] if order is not None else -1 - axis if axis >= 0 else None
        value = made.inputs[0]
    if made is None or made.op_type != DQ:
        return None
    numbers = numbers_of(made)
    stored = constant(made.inputs[0])
    quantize = None if stored is not None else maker(made.inputs[0])
    if quantize is not None and quantize.op_type == Q:
        stored = constant(quantize.inputs[0])
    if stored is None:
        return None
    several = numbers.scale is not None and numbers.scale.size > 1
    along_axis = attribute(made, "axis", 1) % stored.ndim if several else None
    channel = axis % stored.ndim if axis is not None else None
    return Weight(node, made, quantize, stored, numbers, along_axis, channel)


def store_weight(graph: EditableGraph, weight: Weight, scale: Array, axis: int | None) -> None:
    """Store the real values of ``weight`` as symmetric int8, with ``scale`` along ``axis``."""
    dtype = weight.values.dtype if weight.values.dtype.kind == "f" else np.dtype(np.float32)
    scale = scale.astype(dtype)
    if weight.quantize is None:
        integers = encode(weight.values, scale, axis)
        hint = f"{_input(weight.dequantize, 0).name}_fixed"
        weight.dequantize.replace_input_with(0, graph.add_constant(hint, integers))
    for node in (weight.quantize, weight.dequantize):
        if node is not None:
            set_numbers(graph, node, scale, np.zeros(scale.shape, np.int8), INT8)
            set_attribute(node, "axis", axis)


def best_scale(values: Array, axis: int | None) -> Array:
    """Return the symmetric int8 scale of weights, positive, for each index along ``axis``."""
    others = None if axis is None else tuple(d for d in range(values.ndim) if d != axis)
    peak = np.asarray(np.abs(values).max(axis=others), dtype=np.float64)
    return np.maximum(peak / 127, SMALLEST_SCALE).astype(values.dtype)


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise ValueError(f"input {index} of {node.name!r} is left out")
    return value


def _channel_axis(node: ir.Node) -> int | None:
    grouped = node.op_type == "ConvTranspose" and attribute(node, "group", 1) > 1
    return None if grouped else channel_axis(node)
