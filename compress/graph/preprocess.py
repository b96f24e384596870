"""An fp32 ONNX file made ready for int8: read, checked, of a new opset, BatchNorm folded."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import ModelProto
from onnx_ir.passes import common as passes

from compress.errors import EngineError, QuantizationError
from compress.graph import files
from compress.graph.lenient import modern
from compress.graph.model import (
    WEIGHTED,
    GraphIndex,
    attribute,
    channel_axis,
    fresh_name,
    layers_inside,
)
from compress.graph.plain import OF_ONE_CPU, to_single, unfused
from compress.graph.rewrites import (
    is_spatial_mean,
    join_hard_swish,
    keep_batch,
    pad_every_axis,
    pad_plainly,
    say_plainly,
    take_dilation,
    take_padding,
    write_pool,
)
from compress.graph.transposes import cancel_transposes, drop_reshapes
from compress.graph.values import (
    EditableGraph,
    constant,
    has_body,
    is_read_once,
    maker,
    name_of,
    set_input,
)
from compress.graph.weightless import check_graph, infer_shapes, without_functions

_INT8_OPS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "ConvInteger", "MatMulInteger", "FakeQuantize"}
    | {"DynamicQuantizeLinear", "QGemm", "FakeQuantizeLearnablePerTensorAffine"}
)
_DONE = "compress.prepared"  # key in the metadata of a prepared graph
# A Cast where it changes no type, a Slice where it takes all
_NO_EFFECT = frozenset({"Identity", "Dropout", "Cast", "Slice"})
_END = 2**31 - 1  # of a Slice: wherever that is


def read_onnx(path: Path | str) -> ModelProto:
    """Return the model of an ONNX file, with its external data.

    Raises:
        QuantizationError: the file is absent, damaged, or its data lies outside its folder.
    """
    try:
        return files.load(path)
    except EngineError as error:
        raise QuantizationError(
            error.what, where=error.where, expected=error.expected, fix=error.fix
        ) from None


def prepare(model: ModelProto, where: str = "the ONNX graph", *, fold: bool = True) -> ModelProto:
    """Return a copy in the form that calibration, plan and writer share; the same every time.

    Constants are initializers and folded, BatchNorm is part of the convolution before it, a mean
    over space is a GlobalAveragePool, every node has a name of its own, shapes are inferred.

    Args:
        model: An fp32 graph of any opset that can be converted. Not modified.
        where: What to call it in errors.
        fold: Make BatchNorm part of the convolution before it; else it stays.

    Raises:
        QuantizationError: it is quantized already, has nothing to quantize, is too old to convert,
            or is not valid ONNX.
    """
    prepared = deepcopy(model)
    if any(entry.key == _DONE for entry in model.metadata_props):
        return prepared
    _refuse_quantized(prepared, where)
    _refuse_of_one_cpu(prepared, where)
    files.free_negative_sizes(prepared.graph)
    prepared = without_functions(prepared)  # runtimes do not know the operators of others
    prepared = to_single(prepared)
    prepared.ir_version = max(prepared.ir_version, 8)  # before 4 all weights were inputs
    prepared = unfused(modern(prepared, where))
    infer_shapes(prepared, where)  # some exporters leave outputs without
    check_graph(prepared, where)
    prepared = _tidied(prepared, fold=fold)
    infer_shapes(prepared, where)
    if fold:
        prepared.metadata_props.add(key=_DONE, value="1")
    _refuse_without_weights(prepared, where)
    return prepared


def _refuse_of_one_cpu(model: ModelProto, where: str) -> None:
    for node in model.graph.node:
        if node.domain in OF_ONE_CPU:
            raise QuantizationError(
                f"node {node.name or node.output[0]!r} is a {node.op_type} for the CPU that ONNX "
                f"Runtime optimized the file on ({node.domain})",
                where=where,
                expected="operators of ONNX",
                fix="Quantize the file from before, or save it at level 'extended' at most",
            )


def finished(model: ModelProto) -> None:
    """Remove the mark that says a graph is prepared."""
    kept = [entry for entry in model.metadata_props if entry.key != _DONE]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)


def _refuse_quantized(model: ModelProto, where: str) -> None:
    for node in model.graph.node:
        if node.op_type in _INT8_OPS or node.op_type.startswith("QLinear"):
            raise QuantizationError(
                f"quantized already: node {node.name or node.output[0]!r} is a {node.op_type}",
                where=where,
                expected="an fp32 graph",
                fix="Quantize the fp32 original, or fix this file with `compress lint --fix`",
            )


def _refuse_without_weights(model: ModelProto, where: str) -> None:
    graph = GraphIndex(model)
    if any(graph.weight(node) for node in graph.nodes):
        return
    weighted = [node for node in graph.nodes if node.op_type in WEIGHTED]
    weights = [graph.initializers.get(name) for node in weighted for name in node.input[1:2]]
    kinds = {onnx.TensorProto.DataType.Name(w.data_type).lower() for w in weights if w is not None}
    if kinds:
        raise QuantizationError(
            f"its weights are {' and '.join(sorted(kinds))}",
            where=where,
            expected="an fp32 network",
            fix="Convert it to fp32 first: export model.float() and quantize that file",
        )
    inside = {node.name: layers for node in graph.nodes if (layers := layers_inside(node))}
    if inside:
        (name, count), *more = inside.items()
        several = f"{count} layers" if count > 1 else "one layer"
        others = f", others inside {len(more)} more" if more else ""
        raise QuantizationError(
            f"there is nothing to quantize: {several} inside {name!r}{others}, and int8 does not "
            "reach into branches and loops",
            where=where,
            fix="Export the part that runs, with that input or condition fixed, as a network",
        )
    raise QuantizationError(
        "there is nothing to quantize: no convolution or linear layer with constant weights",
        where=where,
        expected=f"at least one of {', '.join(sorted(WEIGHTED))}",
    )


def _tidied(model: ModelProto, *, fold: bool) -> ModelProto:
    graph = EditableGraph(model)
    passes.RemoveInitializersFromInputsPass()(graph.model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph.model)
    _write_as_casts(graph)
    _drop_no_effect(graph)
    _fold_sizes(graph)
    _fold_constants(graph)
    _name_nodes(graph)
    drop_reshapes(graph)
    take_dilation(graph)
    cancel_transposes(graph)
    join_hard_swish(graph)
    for node in graph.of_type("MatMul"):
        _write_as_gemm(graph, node)
    for node in graph.of_type("Gemm"):
        _add_apart(graph, node)
    graph.sweep()
    shared: dict[tuple[ir.Value | None, ...], ir.Value] = {}
    for node in graph.nodes if fold else ():
        _fold_into_layer(graph, node, shared)
    graph.sweep()
    graph.infer_shapes()
    for node in graph.of_type("Add", "Sub") if fold else ():
        _write_as_batchnorm(graph, node)
    for node in graph.of_type("AveragePool"):
        say_plainly(node)
    for node in graph.of_type("ReduceMean", "AveragePool"):
        if is_spatial_mean(graph, node):
            write_pool(graph, node)
    drop_reshapes(graph)
    for node in graph.of_type("ConvTranspose"):
        pad_plainly(node)
    for node in graph.of_type("Pad"):
        pad_every_axis(graph, node)
    take_padding(graph)
    keep_batch(graph)
    tidied = graph.to_model()
    del tidied.graph.value_info[:]
    return tidied


def _write_as_casts(graph: EditableGraph) -> None:
    """Write casts to the type of another tensor as plain ones, where that type is known.

    PyTorch's exporter makes the zeros of a missing bias so; computed from an image, they would be
    no constant, and keep BatchNorm out of the layer.
    """
    for node in graph.of_type("CastLike"):
        like = node.inputs[1]
        if like is not None and like.dtype is not None:
            graph.substitute(node, "Cast", node.inputs[:1], to=int(like.dtype))


def _drop_no_effect(graph: EditableGraph) -> None:
    for node in graph.of_type(*_NO_EFFECT):
        value, source = node.outputs[0], node.inputs[0]
        mask_read = any(mask.uses() or mask.is_graph_output() for mask in node.outputs[1:])
        if source is None or value.is_graph_output() or mask_read:
            continue
        if (
            node.op_type in ("Identity", "Dropout")
            or (node.op_type == "Cast" and source.dtype == attribute(node, "to"))
            or (node.op_type == "Slice" and _takes_all(node))
        ):
            value.replace_all_uses_with(source)
            graph.body.remove(node, safe=True)


def _takes_all(node: ir.Node) -> bool:
    starts, ends, _, steps = (constant(value) for value in (*node.inputs[1:], None, None, None)[:4])
    is_stepped = len(node.inputs) > 4 and (steps is None or bool((steps != 1).any()))
    is_from_first = starts is not None and not starts.any()
    return is_from_first and ends is not None and bool((ends >= _END).all()) and not is_stepped


def _fold_sizes(graph: EditableGraph) -> None:
    """Write sizes that are picked from a shape, and are known, as constants; never the batch.

    Exporters compute shapes in this way whose images have one size.
    """
    for node in graph.of_type("Gather"):
        shape, index = maker(node.inputs[0]), constant(node.inputs[1])
        if shape is None or shape.op_type != "Shape" or index is None:
            continue
        image = shape.inputs[0]
        if image is None or not image.shape or shape.attributes:  # a part of the shape
            continue
        sizes = dict(enumerate(image.shape))
        axes = [int(i) % len(sizes) for i in index.reshape(-1)]
        picked = [sizes[axis] if axis else None for axis in axes]
        if all(isinstance(size, int) for size in picked) and index.size:
            graph.set_constant(node.outputs[0], np.array(picked, np.int64).reshape(index.shape))


def _fold_constants(graph: EditableGraph) -> None:
    """Compute every node that depends on constants only, with ONNX's own reference evaluator.

    What that cannot compute, an operator of a runtime's own or a default that it does not know, is
    left to the runtime.
    """
    for node in graph.nodes:
        given = {name_of(value): constant(value) for value in node.inputs if value is not None}
        arrays = {name: array for name, array in given.items() if array is not None}
        is_fixed = not node.op_type.startswith("Random") and not has_body(node)
        if given and is_fixed and len(arrays) == len(given):
            for value, array in zip(node.outputs, _computed(graph, node, arrays), strict=False):
                graph.set_constant(value, array)
    graph.sweep()


def _computed(
    graph: EditableGraph, node: ir.Node, arrays: Mapping[str, NDArray[Any]]
) -> list[NDArray[Any]]:
    """Return the outputs of ``node`` for constants by name; none if it cannot be computed here."""
    from onnx.reference import ReferenceEvaluator

    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    ends = [onnx.helper.make_empty_tensor_value_info(name_of(value)) for value in node.outputs]
    part = onnx.helper.make_graph([ir.to_proto(node)], "constants", [], ends, tensors)
    opsets = [onnx.helper.make_opsetid(*each) for each in graph.body.opset_imports.items()]
    whole = onnx.helper.make_model(part, opset_imports=opsets, ir_version=graph.model.ir_version)
    try:
        return [np.asarray(array) for array in ReferenceEvaluator(whole).run(None, {})]
    except Exception:  # noqa: BLE001 - numpy and onnx raise several kinds
        return []


def _name_nodes(graph: EditableGraph) -> None:
    taken: set[str] = set()
    for node in graph.nodes:
        node.name = fresh_name(taken, node.name or f"{node.op_type}_{node.outputs[0].name}")


def _write_as_gemm(graph: EditableGraph, node: ir.Node) -> None:
    """Write a product of a matrix and a constant one as Gemm, which takes the bias behind it."""
    given, weight = node.inputs[0], constant(node.inputs[1])
    is_linear = weight is not None and weight.ndim == 2 and weight.dtype == np.float32
    if is_linear and given is not None and constant(given) is None and graph.rank(given) == 2:
        graph.substitute(node, "Gemm", node.inputs)


def _add_apart(graph: EditableGraph, node: ir.Node) -> None:
    """Write what a Gemm adds, where it is no bias of output channels, as an Add behind it."""
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    is_bias = bias is None or bias.size == 1 or bias.shape[-1] == bias.size
    if not is_bias and attribute(node, "beta", 1.0) == 1.0:
        given = {name: attribute(node, name) for name in node.attributes}
        product = graph.add("Gemm", node.inputs[:2], f"{node.outputs[0].name}_product", **given)
        graph.substitute(node, "Add", [product, node.inputs[2]])


def _fold_into_layer(
    graph: EditableGraph, node: ir.Node, shared: dict[tuple[ir.Value | None, ...], ir.Value]
) -> None:
    """Let the weighted op before an affine one compute both.

    A weight that other layers read as well stays theirs: the layer gets one of its own, which it
    shares with those that have the same BatchNorm, as a module that is called twice has.
    """
    affine = _affine_of(graph, node)
    before = maker(node.inputs[affine[2]]) if affine is not None else None
    if affine is None or before is None or before.op_type not in ("Conv", "ConvTranspose", "Gemm"):
        return
    given, bias = before.inputs[1], before.inputs[2] if len(before.inputs) > 2 else None
    weight, old = constant(given), constant(bias)
    if given is None or weight is None or weight.dtype != np.float32 or not _plain(before):
        return
    key = (given, *node.inputs[1:])
    is_shared = key in shared or given in shared.values() or not is_read_once(given)
    if not is_read_once(before.outputs[0]) or (is_shared and node.op_type != "BatchNormalization"):
        return
    channels = _channels(before, weight)
    factor, offset, _ = affine
    if factor.size not in (1, channels) or (bias is not None and old is None):
        return
    if old is not None and old.size not in (1, channels):
        return
    factor, offset = (np.broadcast_to(v, (channels,)) for v in (factor, offset))
    start = np.broadcast_to(0.0 if old is None else old.reshape(-1), (channels,))
    total = (start * factor + offset).astype(weight.dtype)
    scaled = _scaled(before, weight, factor).astype(weight.dtype)
    if is_shared:
        shared[key] = shared.get(key) or graph.add_constant(f"{given.name}_folded", scaled)
        before.replace_input_with(1, shared[key])
    else:
        graph.set_constant(given, scaled)
    if bias is not None and is_read_once(bias):
        graph.set_constant(bias, total)
    else:
        set_input(before, 2, graph.add_constant(f"{before.name}_bias", total))
    graph.take_over(node, before)


def _write_as_batchnorm(graph: EditableGraph, node: ir.Node) -> None:
    """Write factors and offsets of channels, which no layer could take, as BatchNormalization.

    So DenseNets come from TensorFlow, with their BatchNorm in front of layers. Factors and offsets
    of the images themselves stay float.
    """
    second = _affine_of(graph, node)
    before = maker(node.inputs[second[2]]) if second is not None else None
    first = _affine_of(graph, before) if before is not None else None
    if second is None or before is None or first is None or before.op_type not in ("Mul", "Div"):
        return
    image = before.inputs[first[2]]
    channels = (
        image.shape[1] if image is not None and image.shape and len(image.shape) > 2 else None
    )
    source = maker(image)
    is_input = source is None or (source.op_type == "Transpose" and maker(source.inputs[0]) is None)
    if not isinstance(channels, int) or is_input or not is_read_once(before.outputs[0]):
        return
    factor, offset = first[0] * second[0], first[1] * second[0] + second[1]
    if max(factor.size, offset.size) not in (1, channels) or second[0].size != second[1].size:
        return
    values = (factor, offset, np.zeros(channels), np.ones(channels))
    given = [
        graph.add_constant(
            f"{node.name}_{name}", np.broadcast_to(value, channels).astype(np.float32)
        )
        for name, value in zip(("factor", "offset", "mean", "variance"), values, strict=True)
    ]
    graph.substitute(node, "BatchNormalization", [image, *given], epsilon=0.0)


Affine = tuple[NDArray[Any], NDArray[Any], int]  # factor (C,) or (1,), offset, data input


def _affine_of(graph: EditableGraph, node: ir.Node) -> Affine | None:
    """Return y = factor * x + offset, per channel, where ``node`` computes just that."""
    if node.op_type == "BatchNormalization" and not attribute(node, "training_mode", 0):
        scale, bias, mean, variance = (constant(value) for value in node.inputs[1:5])
        if scale is None or bias is None or mean is None or variance is None:
            return None
        factor = scale / np.sqrt(variance.astype(np.float64) + attribute(node, "epsilon", 1e-5))
        return factor, bias - mean * factor, 0
    if node.op_type not in ("Mul", "Add", "Sub", "Div"):
        return None
    constants = [constant(value) for value in node.inputs]
    if (constants[0] is None) == (constants[1] is None):
        return None
    data = 0 if constants[0] is None else 1
    value = constants[1 - data]
    rank = next((v.shape.rank() for v in (node.outputs[0], node.inputs[data]) if v and v.shape), 4)
    if value is None or not _is_per_channel(value, rank):
        return None
    flat = value.reshape(-1).astype(np.float64)
    if node.op_type == "Mul":
        return flat, np.zeros_like(flat), data
    if node.op_type == "Div":
        return (1 / flat, np.zeros_like(flat), data) if data == 0 and flat.all() else None
    sign = -1.0 if node.op_type == "Sub" else 1.0
    factor, offset = (1.0, sign) if data == 0 else (sign, 1.0)
    return np.full_like(flat, factor), offset * flat, data


def _is_per_channel(value: NDArray[Any], rank: int) -> bool:
    if value.dtype.kind != "f":
        return False
    if value.size == 1:
        return value.ndim <= rank
    padded = (1,) * (rank - value.ndim) + value.shape
    return bool(len(padded) == rank and rank in (2, 4) and padded[1] == value.size)


def _plain(node: ir.Node) -> bool:
    alpha, beta = (float(attribute(node, name, 1.0)) for name in ("alpha", "beta"))
    return node.op_type != "Gemm" or alpha == 1.0 == beta


def _channels(node: ir.Node, weight: NDArray[Any]) -> int:
    groups = attribute(node, "group", 1) if node.op_type == "ConvTranspose" else 1
    return int(weight.shape[channel_axis(node)]) * int(groups)


def _scaled(node: ir.Node, weight: NDArray[Any], factor: NDArray[Any]) -> NDArray[Any]:
    """Return ``weight`` with output channel c multiplied by factor[c]."""
    if node.op_type == "ConvTranspose":  # (in, out/groups, ...)
        groups = attribute(node, "group", 1)
        grouped = weight.reshape(groups, -1, *weight.shape[1:])
        per_group = factor.reshape((groups, 1, weight.shape[1]) + (1,) * (weight.ndim - 2))
        return np.asarray((grouped * per_group).reshape(weight.shape))
    shape = [1] * weight.ndim
    shape[channel_axis(node)] = -1
    return np.asarray(weight * factor.reshape(shape))
