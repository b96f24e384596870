"""The one writer of Q/DQ graphs: a QuantPlan and the rules of a target in, an ONNX model out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from compress.errors import QuantizationError, UnknownNameError
from compress.graph.model import BIAS_LIMIT, SAME_SCALE, GraphIndex, channel_axis
from compress.graph.preprocess import finished, prepare
from compress.graph.values import EditableGraph, constant, maker, name_of
from compress.graph.weightless import check_graph, infer_shapes
from compress.qdq.grid import put_on_grid
from compress.qdq.placement import Placement, place
from compress.qdq.plan import ActivationRange, QuantPlan, WeightScales, unpack_codes
from compress.qdq.rewrite import activate_after_pools, correct, rewrite_for

_SMALLEST_SCALE = 1e-12


@dataclass(frozen=True)
class Quantizer:
    """Scale and zero point of one tensor: code = round(value / scale) + zero_point."""

    scale: np.float32
    zero_point: NDArray[Any]  # a scalar, uint8 or int8


@dataclass(frozen=True)
class Rules:
    """What a target wants its numbers to be."""

    unsigned: bool  # activations as uint8
    asymmetric: bool  # with a zero point that fits the range
    int32_bias: bool


RULES: Mapping[str, Rules] = {
    "onnxruntime": Rules(unsigned=True, asymmetric=True, int32_bias=True),
    "openvino": Rules(unsigned=True, asymmetric=True, int32_bias=False),
    "tensorrt": Rules(unsigned=False, asymmetric=False, int32_bias=False),
}


def write_qdq(
    model: ModelProto,
    plan: QuantPlan,
    target: str | None = None,
    *,
    float_bias: bool = False,
    checked: bool = True,
) -> ModelProto:
    """Return the Q/DQ graph of ``model`` for ``target``.

    Args:
        model: The fp32 graph the plan was made for, prepared or not. Not modified.
        plan: Ranges, scales, corrections, and what stays in float.
        target: The runtime that will run it; the plan's own if absent.
        float_bias: Leave biases in float where the target would have them as int32.
        checked: Infer all shapes and check the graph; False for one that only runs here.

    Raises:
        QuantizationError: the plan does not fit the graph; the message names the tensor or node.
        UnknownNameError: there is no such target.
    """
    target = target or plan.target
    if target not in RULES:
        raise UnknownNameError("target", target, RULES)
    prepared = prepare(model)
    with np.errstate(over="ignore"):  # beyond float32: the scale made of it is refused
        written = _written(prepared, plan, target, float_bias)
    if checked:
        infer_shapes(written)
        check_graph(written, full=True)
    return written


def _written(prepared: ModelProto, plan: QuantPlan, target: str, float_bias: bool) -> ModelProto:
    rewritten = rewrite_for(put_on_grid(prepared, plan), target)
    placement = place(GraphIndex(rewritten), target, plan.float_nodes)  # corrections move nothing
    del rewritten.graph.value_info[:]  # of a copy: what shapes there are is found anew
    graph = EditableGraph(rewritten)
    correct(graph, plan)
    written = _Writer(graph, plan, target, placement, float_bias).write()
    finished(written)
    return written


def quantizer(found: ActivationRange, target: str) -> Quantizer:
    """Return scale and zero point of a range on ``target``; the scale is positive."""
    rules = RULES[target]
    low, high = min(found.low, 0.0), max(found.high, 0.0)
    if rules.unsigned and (rules.asymmetric or low == 0.0):
        scale = (high - low) / 255 or 1 / 255
        zero = np.clip(round(-low / scale), 0, 255)
        return Quantizer(_positive(scale), np.asarray(zero, np.uint8))
    return Quantizer(_positive(found.limit / 127 or 1 / 127), np.asarray(0, np.int8))


def default_scales(weight: NDArray[Any], axis: int | None) -> NDArray[np.float32]:
    """Return the largest magnitude / 127 along ``axis``, (C,) or (1,); 1/127 for a dead channel."""
    if axis is None:
        largest = np.abs(weight).max(keepdims=True).reshape(1)
    else:
        largest = np.abs(np.moveaxis(weight, axis, 0)).reshape(weight.shape[axis], -1).max(1)
    return np.where(largest > 0, largest / 127, 1 / 127).astype(np.float32)


def encode(weight: NDArray[Any], scales: NDArray[Any], axis: int | None) -> NDArray[np.int8]:
    """Return the nearest integers in [-127, 127]."""
    codes = np.rint(weight / broadcast_along(scales, axis, weight.ndim))
    nearest: NDArray[np.int8] = np.clip(codes, -127, 127).astype(np.int8)
    return nearest


def broadcast_along(values: NDArray[Any], axis: int | None, rank: int) -> NDArray[Any]:
    """Return ``values``, (C,), shaped to broadcast along ``axis`` of a tensor of ``rank``."""
    shape = [1] * rank
    if axis is not None:
        shape[axis] = -1
    return values.reshape(shape)


def scale_axis(node: NodeProto | ir.Node, rank: int) -> int | None:
    """Return the dimension of the weight of ``node`` that has scales of its own."""
    if node.op_type == "ConvTranspose":  # runtimes disagree on its axis
        return None
    return channel_axis(node) % rank


def add_pair(graph: EditableGraph, value: ir.Value, numbers: Sequence[ir.Value | None]) -> ir.Value:
    """Add Q and DQ of ``value``, with a scale and a zero point; return what comes out of them."""
    hint = value.name
    codes = graph.add("QuantizeLinear", [value, *numbers], f"{hint}_quantized", f"{hint}_q")
    return graph.add("DequantizeLinear", [codes, *numbers], f"{hint}_dequantized", f"{hint}_dq")


def add_dequantize(
    graph: EditableGraph, hint: str, codes: NDArray[Any], scales: NDArray[Any], axis: int | None
) -> ir.Value:
    """Add a constant stored as integers with symmetric ``scales``, and return its real value."""
    inputs = [
        graph.add_constant(f"{hint}_quantized", codes),
        graph.add_constant(f"{hint}_scale", scales),
        graph.add_constant(f"{hint}_zero_point", np.zeros(scales.shape, codes.dtype)),
    ]
    attributes = {} if axis is None else {"axis": axis}
    return graph.add("DequantizeLinear", inputs, f"{hint}_dequantized", f"{hint}_dq", **attributes)


class _Writer:
    def __init__(
        self,
        graph: EditableGraph,
        plan: QuantPlan,
        target: str,
        placement: Placement,
        float_bias: bool,
    ) -> None:
        self.graph, self.plan, self.target, self.placement = graph, plan, target, placement
        self.int32_bias = RULES[target].int32_bias and not float_bias
        self.nodes = {node.name: node for node in graph.nodes}
        self.joined = {name: group for group in placement.joined for name in group}
        made = [value for node in graph.nodes for value in node.outputs]
        self.values = {name_of(value): value for value in (*graph.body.inputs, *made)}

    def write(self) -> ModelProto:
        readers = self.placement.readers
        quantizers = {name: self.quantizer_of(name) for name in self.values if name in readers}
        for name in self.placement.weights:
            node = self.nodes[name]
            self._quantize_weight(node, self.quantizer_of(name_of(node.inputs[0])).scale)
        for tensor, found in quantizers.items():
            scale = self.graph.add_constant(f"{tensor}_scale", _checked(tensor, found.scale))
            zero = self.graph.add_constant(f"{tensor}_zero_point", found.zero_point)
            real = add_pair(self.graph, self.values[tensor], [scale, zero])
            for name, position in readers[tensor]:
                self.nodes[name].replace_input_with(position, real)
        if self.target == "onnxruntime":
            activate_after_pools(self.graph)
        return self.graph.to_model()

    def quantizer_of(self, tensor: str) -> Quantizer:
        source = self.placement.source(tensor)
        ranges = [self._range(name) for name in self.joined.get(source, {source})]
        return quantizer(widest(ranges), self.target)

    def _range(self, tensor: str) -> ActivationRange:
        source = tensor
        while source not in self.plan.activations:
            made = maker(self.values.get(source))
            if made is None or made.op_type not in SAME_SCALE:
                raise QuantizationError(
                    f"the plan has no range for tensor {tensor!r}, which {self.target} quantizes",
                    expected="the plan that was made for this graph",
                    fix="Calibrate again, or check that the plan and the ONNX file belong together",
                )
            source = name_of(made.inputs[0])
        return self.plan.activations[source]

    def _quantize_weight(self, node: ir.Node, incoming: np.float32) -> None:
        """Let ``node`` read its weight, and its bias where the target wants it so, from integers.

        Integers and zero point are its own even where layers share a weight: with kernels that do
        not overflow ONNX Runtime converts them once for each layer and refuses the second time.
        """
        name, weight = name_of(node.inputs[1]), constant(node.inputs[1])
        if weight is None:
            raise TypeError(f"{node.name} has no constant weight")
        axis = scale_axis(node, weight.ndim)
        planned = self.plan.weights.get(name)
        scales = self._scales(planned, weight, axis, name)
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 and self.int32_bias else None
        if bias is not None:
            floor = np.abs(bias.reshape(-1)).astype(np.float64) / BIAS_LIMIT / incoming
            scales = np.maximum(scales, floor if axis is not None else floor.max())
        scales = np.maximum(scales, _SMALLEST_SCALE).astype(np.float32)
        codes = self._codes(planned, weight, scales, axis)
        node.replace_input_with(1, self._stored(name, codes, scales, axis))
        if bias is not None:
            unit = scales.astype(np.float64) * incoming
            codes32 = np.rint(bias.reshape(-1) / unit).astype(np.int32)
            axis = 0 if axis is not None else None
            hint = f"{node.name}_bias"
            node.replace_input_with(2, self._stored(hint, codes32, unit.astype(np.float32), axis))

    def _scales(
        self, planned: WeightScales | None, weight: NDArray[Any], axis: int | None, name: str
    ) -> NDArray[Any]:
        if planned is None:
            return default_scales(weight, axis)
        expected = 1 if axis is None else weight.shape[axis]
        if planned.axis != axis or len(planned.scales) != expected:
            raise QuantizationError(
                f"the plan has {len(planned.scales)} scales along axis {planned.axis} for it",
                where=f"weight {name!r}",
                expected=f"{expected} along axis {axis}",
                fix="Make the plan again, or drop this entry from it",
            )
        return np.asarray(planned.scales, np.float32)

    def _codes(
        self,
        planned: WeightScales | None,
        weight: NDArray[Any],
        scales: NDArray[Any],
        axis: int | None,
    ) -> NDArray[np.int8]:
        codes = encode(weight, scales, axis)
        if planned is None or planned.codes is None:
            return codes
        kept = np.asarray(planned.scales, np.float32) == scales  # not raised for the bias
        return np.where(
            broadcast_along(kept, axis, weight.ndim),
            unpack_codes(planned.codes, weight.shape),
            codes,
        )

    def _stored(
        self, name: str, codes: NDArray[Any], scales: NDArray[Any], axis: int | None
    ) -> ir.Value:
        scales = _checked(name, scales if axis is not None else scales.reshape(()))
        return add_dequantize(self.graph, name, codes, scales, axis)


def _checked(tensor: str, value: Any) -> NDArray[np.float32]:
    scales = np.asarray(value, np.float32)
    if not np.isfinite(scales).all() or not (scales > 0).all():
        raise QuantizationError(
            f"the scales of {tensor!r} would be {scales.min()} to {scales.max()}",
            expected="finite and positive",
            fix="Make the plan again; look for infinite or enormous weights in the network",
        )
    return scales


def widest(ranges: Iterable[ActivationRange]) -> ActivationRange:
    """Return one range that holds all of ``ranges``."""
    found = list(ranges)
    return ActivationRange(
        min(r.low for r in found), max(r.high for r in found), max(r.limit for r in found)
    )


def _positive(scale: float) -> np.float32:
    return np.float32(max(scale, _SMALLEST_SCALE))
