"""An fp32 ONNX file made ready for int8: read safely, checked, BatchNorm folded, names unique."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from compress.errors import EngineError, QuantizationError
from compress.graph import files
from compress.graph.hard_swish import join_hard_swish
from compress.graph.model import (
    WEIGHTED,
    Graph,
    all_names,
    attribute,
    channel_axis,
    fresh_name,
    reads,
    replace_nodes,
    set_constant,
)
from compress.graph.reshapes import keep_batch
from compress.graph.weightless import check, infer_shapes

OLDEST_OPSET = 13  # the first whose Q/DQ takes a scale for each channel
CONVERTED_OPSET = 17
_INT8_OPS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "ConvInteger", "MatMulInteger", "FakeQuantize"}
    | {"DynamicQuantizeLinear", "QGemm", "FakeQuantizeLearnablePerTensorAffine"}
)
_DONE = "compress.prepared"  # key in the metadata of a prepared graph
_NO_EFFECT = frozenset({"Identity", "Dropout"})


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
    prepared = ModelProto()
    prepared.CopyFrom(model)
    if any(entry.key == _DONE for entry in model.metadata_props):
        return prepared
    _refuse_quantized(prepared, where)
    files.free_negative_sizes(prepared.graph)
    if prepared.functions:  # runtimes do not know the operators of others
        prepared = onnx.inliner.inline_local_functions(prepared)
    prepared = _modern(prepared, where)
    _drop_initializer_inputs(prepared)
    steps = (_lift_constants, _drop_no_effect, _fold_constants, _name_nodes, join_hard_swish)
    for step in steps:
        step(prepared)
    while fold and _fold_one_round(prepared):
        pass
    _pool_globally(prepared)
    keep_batch(prepared)
    _drop_unused(prepared)
    del prepared.graph.value_info[:]
    infer_shapes(prepared, where)
    if fold:
        prepared.metadata_props.add(key=_DONE, value="1")
    _refuse_without_weights(prepared, where)
    return prepared


def finished(model: ModelProto) -> None:
    """Take the mark off that tells a prepared graph."""
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
                fix="Quantize the fp32 original, or mend this file with `compress lint --fix`",
            )


def _refuse_without_weights(model: ModelProto, where: str) -> None:
    graph = Graph(model)
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
    raise QuantizationError(
        "there is nothing to quantize: no convolution or linear layer with constant weights",
        where=where,
        expected=f"at least one of {', '.join(sorted(WEIGHTED))}",
    )


def _modern(model: ModelProto, where: str) -> ModelProto:
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < OLDEST_OPSET:
        try:
            model = onnx.version_converter.convert_version(model, CONVERTED_OPSET)
        except Exception as error:  # noqa: BLE001 - the converter raises bare exceptions of many kinds
            raise QuantizationError(
                f"opset {opset} cannot be converted to {CONVERTED_OPSET}: {error}",
                where=where,
                expected=f"opset {OLDEST_OPSET} or newer",
                fix="Export the network again with a newer opset",
            ) from None
    infer_shapes(model, where)  # some exporters leave outputs without
    check(model, where)
    model.ir_version = max(model.ir_version, 8)
    return model


def _drop_initializer_inputs(model: ModelProto) -> None:
    constants = {t.name for t in model.graph.initializer}
    kept = [i for i in model.graph.input if i.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(kept)


def _lift_constants(model: ModelProto) -> None:
    kept = []
    for node in model.graph.node:
        value = _constant_value(node) if node.op_type == "Constant" else None
        if value is None:
            kept.append(node)
        else:
            set_constant(model, node.output[0], value)
    replace_nodes(model, kept)


def _constant_value(node: NodeProto) -> NDArray[Any] | None:
    found = node.attribute[0]
    value = onnx.helper.get_attribute_value(found)
    if found.name == "value":
        return onnx.numpy_helper.to_array(value)
    kind = {"value_float": "f4", "value_floats": "f4", "value_int": "i8", "value_ints": "i8"}
    return np.asarray(value, kind[found.name]) if found.name in kind else None


def _drop_no_effect(model: ModelProto) -> None:
    outputs = {o.name for o in model.graph.output}
    renamed: dict[str, str] = {}
    kept = []
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = renamed.get(name, name)
        mask_read = any(node.output[1:])
        if node.op_type in _NO_EFFECT and node.output[0] not in outputs and not mask_read:
            renamed[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    replace_nodes(model, kept)


def _fold_constants(model: ModelProto) -> None:
    """Compute every node that depends on constants only, with ONNX's own reference evaluator."""
    from onnx.reference import ReferenceEvaluator

    known = {t.name for t in model.graph.initializer}
    folded, kept = [], []
    for node in model.graph.node:
        constant = bool(node.input) and all(not n or n in known for n in node.input)
        if constant and not node.op_type.startswith("Random") and not _has_subgraph(node):
            folded.append(node)
            known.update(node.output)
        else:
            kept.append(node)
    if not folded:
        return
    read = {n for node in kept for n in node.input} | {o.name for o in model.graph.output}
    wanted = [n for node in folded for n in node.output if n in read]
    outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in wanted]
    part = onnx.helper.make_graph(folded, "constants", [], outputs, list(model.graph.initializer))
    values = ReferenceEvaluator(
        onnx.helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
    ).run(None, {})
    for name, value in zip(wanted, values, strict=True):
        set_constant(model, name, np.asarray(value))
    replace_nodes(model, kept)


def _has_subgraph(node: NodeProto) -> bool:
    graphs = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    return any(found.type in graphs for found in node.attribute)


def _name_nodes(model: ModelProto) -> None:
    taken: set[str] = set()
    for node in model.graph.node:
        node.name = fresh_name(taken, node.name or f"{node.op_type}_{node.output[0]}")


def _fold_one_round(model: ModelProto) -> bool:
    """Fold each affine op into the weighted op before it; return whether one was."""
    graph = Graph(model)
    taken = all_names(model)
    gone: set[str] = set()
    for node in graph.nodes:
        affine = _affine_of(graph, node)
        if affine is None or node.input[affine[2]] not in graph.producer:
            continue
        before = graph.producer[node.input[affine[2]]]
        foldable = (
            before.op_type in ("Conv", "ConvTranspose", "Gemm")
            and graph.weight(before) is not None
            and graph.only_reader(before.output[0]) is node
            and before.name not in gone
            and len(graph.readers[before.input[1]]) == 1
            and (len(before.input) < 3 or graph.is_constant(before.input[2]))
        )
        if foldable and _fold(model, graph, before, affine, taken):
            before.output[0] = node.output[0]
            gone.add(node.name)
            break  # the index is stale now
    replace_nodes(model, [node for node in model.graph.node if node.name not in gone])
    return bool(gone)


Affine = tuple[NDArray[Any], NDArray[Any], int]  # factor (C,) or (1,), offset, data input


def _affine_of(graph: Graph, node: NodeProto) -> Affine | None:
    """Return y = factor * x + offset, per channel, where ``node`` computes just that."""
    if node.op_type == "BatchNormalization":
        scale, bias, mean, variance = (graph.constant(n) for n in node.input[1:5])
        if scale is None or bias is None or mean is None or variance is None:
            return None
        factor = scale / np.sqrt(variance.astype(np.float64) + attribute(node, "epsilon", 1e-5))
        return factor, bias - mean * factor, 0
    if node.op_type not in ("Mul", "Add"):
        return None
    constants = [graph.constant(name) for name in node.input]
    if (constants[0] is None) == (constants[1] is None):
        return None
    data = 0 if constants[0] is None else 1
    value = constants[1 - data]
    rank = graph.rank(node.output[0]) or graph.rank(node.input[data]) or 4
    if value is None or not _is_per_channel(value, rank):
        return None
    flat = value.reshape(-1).astype(np.float64)
    if node.op_type == "Mul":
        return flat, np.zeros_like(flat), data
    return np.ones_like(flat), flat, data


def _is_per_channel(value: NDArray[Any], rank: int) -> bool:
    if value.dtype.kind != "f":
        return False
    if value.size == 1:
        return value.ndim <= rank
    padded = (1,) * (rank - value.ndim) + value.shape
    return bool(len(padded) == rank and rank in (2, 4) and padded[1] == value.size)


def _fold(
    model: ModelProto, graph: Graph, node: NodeProto, affine: Affine, taken: set[str]
) -> bool:
    weight = graph.constant(node.input[1])
    has_bias = len(node.input) > 2 and bool(node.input[2])
    bias = graph.constant(node.input[2]) if has_bias else None
    if weight is None or not _plain(node):
        return False
    channels = _channels(node, weight)
    factor, offset, _ = affine
    if factor.size not in (1, channels) or (bias is not None and bias.size not in (1, channels)):
        return False
    factor, offset = (np.broadcast_to(v, (channels,)) for v in (factor, offset))
    old = np.broadcast_to(0.0 if bias is None else bias.reshape(-1), (channels,))
    set_constant(model, node.input[1], _scaled(node, weight, factor).astype(weight.dtype))
    name = node.input[2] if has_bias else fresh_name(taken, f"{node.name}_bias")
    if has_bias and len(graph.readers[name]) > 1:
        name = fresh_name(taken, f"{node.name}_bias")
    set_constant(model, name, (old * factor + offset).astype(weight.dtype))
    del node.input[2:]
    node.input.append(name)
    return True


def _plain(node: NodeProto) -> bool:
    if node.op_type != "Gemm":
        return True
    alpha, beta = (float(attribute(node, name, 1.0)) for name in ("alpha", "beta"))
    return alpha == 1.0 == beta


def _channels(node: NodeProto, weight: NDArray[Any]) -> int:
    groups = attribute(node, "group", 1) if node.op_type == "ConvTranspose" else 1
    return int(weight.shape[channel_axis(node)]) * int(groups)


def _scaled(node: NodeProto, weight: NDArray[Any], factor: NDArray[Any]) -> NDArray[Any]:
    """Return ``weight`` with output channel c multiplied by factor[c]."""
    if node.op_type == "ConvTranspose":  # (in, out/groups, ...)
        groups = attribute(node, "group", 1)
        grouped = weight.reshape(groups, -1, *weight.shape[1:])
        per_group = factor.reshape((groups, 1, weight.shape[1]) + (1,) * (weight.ndim - 2))
        return np.asarray((grouped * per_group).reshape(weight.shape))
    shape = [1] * weight.ndim
    shape[channel_axis(node)] = -1
    return np.asarray(weight * factor.reshape(shape))


def _pool_globally(model: ModelProto) -> None:
    """Write a mean over space as GlobalAveragePool, which has int8 kernels."""
    infer_shapes(model)
    graph = Graph(model)
    taken = all_names(model)
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        nodes.extend(_as_pool(model, graph, node, taken) or [node])
    replace_nodes(model, nodes)


def _as_pool(
    model: ModelProto, graph: Graph, node: NodeProto, taken: set[str]
) -> list[NodeProto] | None:
    if node.op_type != "ReduceMean" or graph.rank(node.input[0]) != 4:
        return None
    axes = attribute(node, "axes")
    if axes is None and len(node.input) > 1:
        constant = graph.constant(node.input[1])
        axes = None if constant is None else constant.tolist()
    if axes is None or sorted(a % 4 for a in axes) != [2, 3]:
        return None
    if attribute(node, "keepdims", 1):
        pool = onnx.helper.make_node(
            "GlobalAveragePool", [node.input[0]], [node.output[0]], name=node.name
        )
        return [pool]
    pooled = fresh_name(taken, f"{node.output[0]}_pooled")
    return [
        onnx.helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=node.name),
        onnx.helper.make_node(
            "Flatten", [pooled], [node.output[0]], name=fresh_name(taken, f"{node.name}_flatten")
        ),
    ]


def _drop_unused(model: ModelProto) -> None:
    """Remove nodes and constants that nothing reads."""
    needed = {o.name for o in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if any(name in needed for name in node.output):
            needed.update(reads(node))
            kept.append(node)
    replace_nodes(model, reversed(kept))
    for position in reversed(range(len(model.graph.initializer))):
        if model.graph.initializer[position].name not in needed:
            del model.graph.initializer[position]
