"""Rules about the numbers of activations: scales, zero points and integer types."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import onnx_ir as ir

from compress.graph.model import attribute
from compress.graph.values import (
    MOVING,
    EditableGraph,
    constant,
    is_never_negative,
    label,
    maker,
    name_of,
)
from compress.qdq.lint.patterns import (
    DQ,
    INT8,
    SMALLEST_SCALE,
    UINT8,
    DType,
    Numbers,
    Problem,
    Q,
    QdqPair,
    numbers_of,
    pair_before,
    pairs,
    pairs_on,
    set_numbers,
)
from compress.qdq.writer import broadcast_along

SPARED = 0.01  # share of a range below zero that is no waste: a zero point of 1 or 2


def scale_not_constant(graph: EditableGraph) -> Iterator[Problem]:
    """Scales computed at run time: no runtime makes int8 kernels of them."""
    for node in graph.of_type(Q, DQ):
        if constant(node.inputs[1]) is None:
            yield Problem(
                label(node),
                f"the scale {name_of(node.inputs[1])!r} is computed at run time, so no int8 kernel "
                "can be chosen; quantize statically, from calibration images",
            )


def scale_not_positive(graph: EditableGraph) -> Iterator[Problem]:
    """Zero, negative or non-finite scales, as pruned or dead channels leave them."""
    for node in graph.of_type(Q, DQ):
        scale = numbers_of(node).scale
        if scale is None or bool(np.all(scale > 0) and np.all(np.isfinite(scale))):
            continue
        finite = bool(np.all(np.isfinite(scale)))
        bad = int(np.sum(~(scale > 0) | ~np.isfinite(scale)))
        yield Problem(
            label(node),
            f"{bad} of {scale.size} scales are zero, negative or not finite; TensorRT refuses "
            "them and division by zero gives NaN"
            + ("" if finite else "; the range was lost, quantize again"),
            (partial(_make_positive, graph, node)) if finite else None,
        )


def pair_mismatch(graph: EditableGraph) -> Iterator[Problem]:
    """A DQ whose numbers are not those of the Q it reads: values come back scaled or shifted."""
    for pair in _constant_pairs(graph):
        for node in pair.dequantizes:
            if pair.numbers.equals(numbers_of(node)):
                continue
            yield Problem(
                label(node),
                f"scale or zero point differ from those of {label(pair.quantize)!r} before it: "
                "every value comes back wrong",
                partial(_set_pair, graph, pair, pair.numbers),
            )


def activation_per_channel(graph: EditableGraph) -> Iterator[Problem]:
    """Activations with a scale for each channel, which no int8 convolution can use."""
    for pair in _constant_pairs(graph):
        if pair.numbers.scale is not None and pair.numbers.scale.size > 1:
            yield Problem(
                label(pair.quantize),
                f"{pair.numbers.scale.size} scales on an activation; int8 kernels sum over "
                "channels and need one",
                partial(_one_scale, graph, pair),
            )


def unsigned_activation(graph: EditableGraph) -> Iterator[Problem]:
    """uint8 (or 16-bit) activations, which TensorRT takes for int8 with the same scale."""
    for pair in _constant_pairs(graph):
        if pair.numbers.dtype == UINT8:
            yield Problem(
                label(pair.quantize),
                "uint8: TensorRT reads it as int8 with the same scale, so every value above half "
                "of the range is clipped, without an error; int8 with scale x 255/127 keeps it",
                partial(_make_symmetric, graph, pair),
            )
        elif pair.numbers.dtype != INT8:
            yield Problem(
                label(pair.quantize),
                f"{pair.numbers.dtype} activation: TensorRT has no kernels for it",
                partial(_make_symmetric, graph, pair),
            )


def activation_zero_point(graph: EditableGraph) -> Iterator[Problem]:
    """int8 activations with a zero point, where TensorRT knows symmetric ones only."""
    for pair in _constant_pairs(graph):
        if pair.numbers.dtype == INT8 and pair.numbers.is_asymmetric:
            yield Problem(
                label(pair.quantize),
                f"zero point {int(pair.numbers.zero.flat[0])}: TensorRT quantizes symmetrically "
                "and refuses or ignores it",
                partial(_make_symmetric, graph, pair),
            )


def signed_activation(graph: EditableGraph) -> Iterator[Problem]:
    """int8 (or 16-bit) activations, which ONNX Runtime on a CPU barely fuses."""
    for pair in _constant_pairs(graph):
        if pair.numbers.dtype != UINT8:
            yield Problem(
                label(pair.quantize),
                f"{pair.numbers.dtype} activation: ONNX Runtime's fast kernels take uint8; the "
                "int8 graph can be slower than fp32",
                partial(_make_unsigned, graph, pair),
            )


def signed_activation_with_zero_point(graph: EditableGraph) -> Iterator[Problem]:
    """int8 activations with a zero point, at which OpenVINO falls back to float or fails."""
    for pair in _constant_pairs(graph):
        wide = pair.numbers.dtype not in (INT8, UINT8)
        if wide or (pair.numbers.dtype == INT8 and pair.numbers.is_asymmetric):
            yield Problem(
                label(pair.quantize),
                f"{pair.numbers.dtype} activation with zero point "
                f"{int(pair.numbers.zero.flat[0])}: OpenVINO fails to compile it or computes in "
                "float; the same numbers as uint8 are fast",
                partial(_make_unsigned, graph, pair),
            )


def wasted_range(graph: EditableGraph) -> Iterator[Problem]:
    """Values that are never negative in a range that reaches below zero."""
    for pair in _constant_pairs(graph):
        low, high = pair.numbers.limits
        if -low > SPARED * (high - low) and is_never_negative(pair.source):
            yield Problem(
                label(pair.quantize),
                f"the range [{low:.4g}, {high:.4g}] holds values that are never negative: "
                f"{100 * -low / (high - low):.0f} % of the levels are never used"
                " and the Relu before it is not absorbed",
                partial(_make_unsigned, graph, pair),
            )


def moved_with_another_scale(graph: EditableGraph) -> Iterator[Problem]:
    """Pooling or reshaping between two different scales: rounded twice, and not done in int8."""
    for pair in _constant_pairs(graph):
        node = maker(pair.source)
        if node is None or node.op_type not in MOVING:
            continue
        before = pair_before(node.inputs[0])
        if before is None or before.numbers.equals(pair.numbers) or not _is_usable(before):
            continue
        yield Problem(
            label(pair.quantize),
            f"{node.op_type} only moves values, yet they are quantized again with another scale: "
            "one rounding too many, and no int8 kernel",
            partial(_set_pair, graph, pair, before.numbers),
        )


def concat_scales(graph: EditableGraph) -> Iterator[Problem]:
    """Concatenated tensors with different scales, each of which is then converted at run time."""
    for node in graph.of_type("Concat"):
        joined = [pair_before(value) for value in node.inputs]
        around = [p for p in joined if p is not None and _is_usable(p)]
        if len(around) < len(joined):
            continue
        around += [pair for pair in pairs_on(node.outputs[0]) if _is_usable(pair)]
        if all(pair.numbers.equals(around[0].numbers) for pair in around):
            continue
        scales = [float(np.max(p.numbers.scale)) for p in around if p.numbers.scale is not None]
        yield Problem(
            label(node),
            f"its inputs and output have scales from {min(scales):.4g} to {max(scales):.4g}; "
            "with one scale they are joined in place, else each is converted first",
            partial(_share_scale, graph, around),
        )


def implied_clip(graph: EditableGraph, pair: QdqPair) -> ir.Value:
    """Return the value that bypasses ``pair``: its source, or the source clipped as Q clipped it.

    A quantizer whose smallest integer stands for zero acts as a Relu; ONNX Runtime's tools delete
    the Relu itself. Where the quantizer goes, the Relu has to come back.
    """
    low, high = pair.numbers.limits
    source = pair.source
    if low < 0 or is_never_negative(source):
        return source
    like_relu6 = abs(high - 6) < high / 255
    op = "Clip" if like_relu6 else "Relu"
    for node, index in source.uses():
        if node.op_type == op and index == 0:
            return node.outputs[0]
    if not like_relu6:
        return graph.add("Relu", [source], f"{source.name}_relu")
    limits = [
        graph.add_constant(f"{source.name}_{v}", np.asarray(v, _scale_dtype(pair))) for v in (0, 6)
    ]
    return graph.add("Clip", [source, *limits], f"{source.name}_relu6")


def _make_symmetric(graph: EditableGraph, pair: QdqPair) -> None:
    low, high = pair.numbers.limits
    pair.quantize.replace_input_with(0, implied_clip(graph, pair))
    scale = np.asarray(max(-low, high) / 127, _scale_dtype(pair))
    _set_pair(graph, pair, Numbers(scale, np.zeros((), np.int64), INT8))


def _make_unsigned(graph: EditableGraph, pair: QdqPair) -> None:
    low, high = pair.numbers.limits
    if is_never_negative(pair.source):
        low = 0.0
    if pair.numbers.dtype == INT8 and low < 0:  # the same integers, 128 higher
        shifted = Numbers(pair.numbers.scale, pair.numbers.zero + 128, UINT8)
        _set_pair(graph, pair, shifted)
        return
    scale = max(high - low, SMALLEST_SCALE) / 255
    zero = np.asarray(round(-low / scale), np.int64)
    _set_pair(graph, pair, Numbers(np.asarray(scale, _scale_dtype(pair)), zero, UINT8))


def _one_scale(graph: EditableGraph, pair: QdqPair) -> None:
    low, high = pair.numbers.limits
    info = np.iinfo(pair.numbers.dtype)
    if pair.numbers.is_asymmetric or info.min == 0:
        scale = max(high - low, SMALLEST_SCALE) / (info.max - info.min)
        zero = round(info.min - low / scale)
    else:
        scale, zero = max(-low / -info.min, high / info.max), 0
    shared = np.asarray(scale, _scale_dtype(pair))
    _set_pair(graph, pair, Numbers(shared, np.asarray(zero), pair.numbers.dtype))


def _share_scale(graph: EditableGraph, around: list[QdqPair]) -> None:
    low = min(pair.numbers.limits[0] for pair in around)
    high = max(pair.numbers.limits[1] for pair in around)
    dtype = around[0].numbers.dtype
    if dtype == INT8 and not any(pair.numbers.is_asymmetric for pair in around):
        scale, zero = max(-low / 128, high / 127), 0
    else:
        dtype, scale = UINT8, max(high - low, SMALLEST_SCALE) / 255
        zero = round(-low / scale)
    shared = np.asarray(scale, _scale_dtype(around[0]))
    for pair in around:
        _set_pair(graph, pair, Numbers(shared, np.asarray(zero), dtype))


def _make_positive(graph: EditableGraph, node: ir.Node) -> None:
    numbers = numbers_of(node)
    if numbers.scale is None:
        return
    scale = np.where(numbers.scale == 0, SMALLEST_SCALE, np.abs(numbers.scale))
    scale = scale.astype(numbers.scale.dtype)
    stored = constant(node.inputs[0]) if node.op_type == DQ else None
    if stored is not None:
        axis = attribute(node, "axis", 1) % stored.ndim if stored.ndim else None
        sign = broadcast_along(np.sign(numbers.scale).astype(np.int64), axis, stored.ndim)
        zero = broadcast_along(numbers.zero, axis, stored.ndim)
        integers = (sign * (stored.astype(np.int64) - zero) + zero).astype(stored.dtype)
        fixed = graph.add_constant(f"{node.outputs[0].name}_fixed", integers)
        node.replace_input_with(0, fixed)
    hint = f"{node.outputs[0].name}_fixed_scale"
    node.replace_input_with(1, graph.add_constant(hint, scale))


def _set_pair(graph: EditableGraph, pair: QdqPair, numbers: Numbers) -> None:
    if numbers.scale is None:
        return
    for node in (pair.quantize, *pair.dequantizes):
        set_numbers(graph, node, numbers.scale, numbers.zero, numbers.dtype)


def _constant_pairs(graph: EditableGraph) -> Iterator[QdqPair]:
    return (pair for pair in pairs(graph) if _is_usable(pair))


def _is_usable(pair: QdqPair) -> bool:
    scale, kind = pair.numbers.scale, pair.numbers.dtype
    is_integer = kind in [np.dtype(d) for d in (np.int8, np.uint8, np.int16, np.uint16)]
    return scale is not None and bool(np.all(np.isfinite(scale))) and is_integer


def _scale_dtype(pair: QdqPair) -> DType:
    return np.dtype(np.float32) if pair.numbers.scale is None else pair.numbers.scale.dtype
