"""What QuantizeLinear and DequantizeLinear do to a value: scales, types, ranges, pairs, weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx

from compress.qdq.lint.graph import Array, DType, Graph, Use, attribute, set_attribute

Q, DQ = "QuantizeLinear", "DequantizeLinear"
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# Operators that pick or move values and compute none: quantizing before or after is the same.
MOVING = frozenset(
    {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split"}
    | {"Identity", "DepthToSpace", "SpaceToDepth", "Gather", "GlobalMaxPool", "Expand", "Tile"}
)
NEVER_NEGATIVE = frozenset(
    {"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Exp", "Abs", "Softplus", "ReduceL1", "Sqrt"}
)
AVERAGING = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})
KEEPS_SIGN = MOVING | AVERAGING | {"ReduceMax", "Dropout"}
KEEPS_SIGN_OF_ALL = frozenset({"Concat", "Add", "Mul", "Max", "Sum"})
SMALLEST_SCALE = 2.0**-14  # smallest normal fp16: stays positive when the graph goes to fp16
INT8 = np.dtype(np.int8)
UINT8 = np.dtype(np.uint8)


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
class Pair:
    """An activation on its way through one Q and the DQ nodes that read it."""

    quantize: onnx.NodeProto
    dequantizes: tuple[onnx.NodeProto, ...]
    numbers: Numbers

    @property
    def source(self) -> str:
        """Name of the float value that is quantized."""
        return str(self.quantize.input[0])


@dataclass(frozen=True)
class Weight:
    """A constant that reaches a layer through DQ: stored as integers, or as floats before a Q."""

    node: onnx.NodeProto  # the op it is a weight of
    dequantize: onnx.NodeProto
    quantize: onnx.NodeProto | None  # None: the integers are stored
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
        raw = np.rint(self.stored / along(self._scale, self.axis, self.stored.ndim))
        zero = along(self.numbers.zero, self.axis, self.stored.ndim)
        return np.asarray(np.clip(raw + zero, info.min, info.max), np.int64)

    @property
    def values(self) -> Array:
        """The real weights: the floats if they are stored, else what the integers stand for."""
        if self.quantize is not None:
            return self.stored
        zero = along(self.numbers.zero, self.axis, self.stored.ndim)
        scale = along(self._scale, self.axis, self.stored.ndim)
        return np.asarray((self.integers - zero) * scale, self._scale.dtype)

    @property
    def _scale(self) -> Array:
        if self.numbers.scale is None:
            raise ValueError("the scale is computed at run time")
        return self.numbers.scale


def numbers_of(graph: Graph, node: onnx.NodeProto) -> Numbers:
    """Return scale, zero point and type of a Q or DQ node."""
    scale = graph.constant(node.input[1])
    zero = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if zero is not None:
        return Numbers(scale, zero.astype(np.int64), zero.dtype)
    nothing = np.zeros((), np.int64)
    if node.op_type == Q:
        kind = attribute(node, "output_dtype", 0) or onnx.TensorProto.UINT8
        return Numbers(scale, nothing, onnx.helper.tensor_dtype_to_np_dtype(kind))
    stored = graph.constant(node.input[0])
    if stored is not None:
        return Numbers(scale, nothing, stored.dtype)
    maker = graph.maker(node.input[0])
    return Numbers(
        scale, nothing, numbers_of(graph, maker).dtype if maker and maker.op_type == Q else INT8
    )


def set_numbers(
    graph: Graph,
    node: onnx.NodeProto,
    scale: Array,
    zero: Array,
    dtype: DType,
) -> None:
    """Give a Q or DQ node another scale, zero point and type."""
    hint = f"{node.output[0]}_mended"
    graph.rewire(Use(node, 1), graph.add_constant(f"{hint}_scale", scale))
    name = graph.add_constant(
        f"{hint}_zero_point", np.broadcast_to(zero, scale.shape).astype(dtype)
    )
    if len(node.input) > 2:
        graph.rewire(Use(node, 2), name)
    else:
        graph.extend_input(node, name)
    set_attribute(node, "output_dtype", None)
    if scale.ndim == 0:
        set_attribute(node, "axis", None)


def pairs(graph: Graph) -> Iterator[Pair]:
    """Yield every activation pair; a Q that no DQ reads has none."""
    for node in graph.of_type(Q):
        if graph.constant(node.input[0]) is None:
            yield pair_of(graph, node)


def pair_of(graph: Graph, quantize: onnx.NodeProto) -> Pair:
    """Return the pair of a Q node."""
    readers = [u.node for u in graph.readers(quantize.output[0]) if u.node.op_type == DQ]
    return Pair(quantize, tuple(readers), numbers_of(graph, quantize))


def pair_before(graph: Graph, value: str) -> Pair | None:
    """Return the activation pair whose DQ makes ``value``."""
    node = graph.maker(value)
    if node is None or node.op_type != DQ:
        return None
    before = graph.maker(node.input[0])
    if before is None or before.op_type != Q or graph.constant(before.input[0]) is not None:
        return None
    return pair_of(graph, before)


def is_quantized(graph: Graph, value: str) -> bool:
    """Return whether ``value`` comes from DQ nodes, directly or through ops that move values."""
    node = graph.maker(value)
    if node is None:
        return False
    if node.op_type == DQ:
        return True
    if node.op_type == "Concat":
        return all(is_quantized(graph, name) for name in node.input)
    return node.op_type in MOVING and is_quantized(graph, node.input[0])


def is_never_negative(graph: Graph, value: str, depth: int = 12) -> bool:
    """Return whether ``value`` is certainly not negative, judged by the ops that make it."""
    node = graph.maker(value)
    if node is None or depth == 0:
        return False
    if node.op_type in NEVER_NEGATIVE:
        return True
    if node.op_type == "Clip":
        low = graph.constant(node.input[1]) if len(node.input) > 1 and node.input[1] else None
        low = low if low is not None else np.asarray(attribute(node, "min", -1.0))
        return bool(low >= 0)
    if node.op_type == DQ:
        pair = pair_before(graph, value)
        return pair is not None and pair.numbers.limits[0] >= 0
    if node.op_type in KEEPS_SIGN_OF_ALL:
        return all(is_never_negative(graph, name, depth - 1) for name in node.input)
    return node.op_type in KEEPS_SIGN and is_never_negative(graph, node.input[0], depth - 1)


def weights(graph: Graph) -> Iterator[Weight]:
    """Yield the quantized weight of every weighted op whose scale is constant."""
    for node in graph.of_type(*WEIGHTED):
        weight = weight_of(graph, node)
        if weight is not None and weight.numbers.scale is not None:
            yield weight


def weight_of(graph: Graph, node: onnx.NodeProto) -> Weight | None:
    """Return the quantized constant weight of ``node``, seen through Transpose and Identity."""
    axis = _channel_axis(graph, node)
    value = node.input[1]
    while (maker := graph.maker(value)) is not None and maker.op_type in ("Transpose", "Identity"):
        if maker.op_type == "Transpose" and axis is not None:
            order = attribute(maker, "perm")
            axis = order[axis] if order is not None else -1 - axis if axis >= 0 else None
        value = maker.input[0]
    if maker is None or maker.op_type != DQ:
        return None
    numbers = numbers_of(graph, maker)
    stored = graph.constant(maker.input[0])
    quantize = None if stored is not None else graph.maker(maker.input[0])
    if quantize is not None and quantize.op_type == Q:
        stored = graph.constant(quantize.input[0])
    if stored is None:
        return None
    several = numbers.scale is not None and numbers.scale.size > 1
    along_axis = attribute(maker, "axis", 1) % stored.ndim if several else None
    channel = axis % stored.ndim if axis is not None else None
    return Weight(node, maker, quantize, stored, numbers, along_axis, channel)


def store_weight(graph: Graph, weight: Weight, scale: Array, axis: int | None) -> None:
    """Store the real values of ``weight`` as symmetric int8, with ``scale`` along ``axis``."""
    dtype = weight.values.dtype if weight.values.dtype.kind == "f" else np.dtype(np.float32)
    scale = scale.astype(dtype)
    zero = np.zeros(scale.shape, np.int8)
    if weight.quantize is None:
        raw = np.rint(weight.values / along(scale, axis, weight.stored.ndim))
        integers = np.clip(raw, -127, 127).astype(np.int8)
        hint = f"{weight.dequantize.input[0]}_mended"
        graph.rewire(Use(weight.dequantize, 0), graph.add_constant(hint, integers))
    for node in (weight.quantize, weight.dequantize):
        if node is not None:
            set_numbers(graph, node, scale, zero, INT8)
            set_attribute(node, "axis", axis)


def best_scale(values: Array, axis: int | None) -> Array:
    """Return the symmetric int8 scale of weights, positive, for each index along ``axis``."""
    others = None if axis is None else tuple(d for d in range(values.ndim) if d != axis)
    peak = np.asarray(np.abs(values).max(axis=others), dtype=np.float64)
    return np.maximum(peak / 127, SMALLEST_SCALE).astype(values.dtype)


def along(array: Array, axis: int | None, rank: int) -> Array:
    """Reshape a scale or zero point (C,) to broadcast along ``axis`` of ``rank`` dimensions."""
    if array.size == 1 or axis is None:
        return array.reshape(())
    return array.reshape([-1 if d == axis else 1 for d in range(rank)])


def _channel_axis(graph: Graph, node: onnx.NodeProto) -> int | None:
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1 if attribute(node, "group", 1) == 1 else None
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return -1
