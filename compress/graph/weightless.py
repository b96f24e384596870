"""A graph without its large weights: checks and shape inference that cost the same at any size."""

from __future__ import annotations

import math
from contextlib import suppress
from copy import deepcopy
from functools import partial

import onnx
import onnx.inliner
from onnx import GraphProto, ModelProto, TensorProto, helper

from compress.errors import QuantizationError, boundary
from compress.graph.model import graphs_in

LARGEST = 1024  # elements of a constant that stays: no op reads a shape or axes from a larger one


def is_large(tensor: TensorProto) -> bool:
    """Return whether a weightless copy leaves the values of ``tensor`` out."""
    return bool(math.prod(tensor.dims) > LARGEST)


def skeleton(model: ModelProto) -> ModelProto:
    """Return a copy of ``model`` without its large constants, and without a trace of them."""
    bare = ModelProto()
    _copy_fields(model, bare, "graph")
    _copy_fields(model.graph, bare.graph, "initializer")
    bare.graph.initializer.extend(t for t in model.graph.initializer if not is_large(t))
    return bare


def infer_shapes(model: ModelProto, where: str = "the ONNX graph") -> None:
    """Fill in the shapes and types of all tensors of ``model``.

    Shapes that somebody's exporter wrote down and that contradict the nodes are dropped, as
    runtimes do, those inside branches and loops too.

    Raises:
        QuantizationError: shapes contradict each other.
    """
    with boundary(QuantizationError, "shape inference fails", where=where):
        found = _inferred(_complete(model))
    for field in ("node", "value_info", "output"):
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(getattr(found.graph, field))
    given = {value.name: value.type for value in model.graph.input}
    for output in model.graph.output:
        if output.name in given:  # it hands on what it gets
            output.type.CopyFrom(given[output.name])


def check_graph(model: ModelProto, where: str = "the ONNX graph", *, full: bool = False) -> None:
    """Check ``model`` by the rules of ONNX; with ``full``, its shapes too.

    Raises:
        QuantizationError: it breaks one.
    """
    with boundary(QuantizationError, "it is not valid ONNX", where=where):
        check_rules(model, full=full)


def check_rules(model: ModelProto, *, full: bool = False) -> None:
    """As ``check_graph``, with ONNX's own errors."""
    complete = _complete(model)
    if full:
        complete = onnx.shape_inference.infer_shapes(complete)
    for output in complete.graph.output:  # the checker asks for a shape where none is known
        if output.type.WhichOneof("value") in (None, "tensor_type"):
            output.type.tensor_type.shape.SetInParent()
    onnx.checker.check_model(complete, full_check=full)
    for tensor in model.graph.initializer:
        _check_size(tensor)


def without_functions(model: ModelProto) -> ModelProto:
    """Return ``model``, which may be changed, with its own functions written out in its opset."""
    if not model.functions:
        return model
    imported = {item.domain: item.version for item in model.opset_import}
    for function in model.functions:
        for item in function.opset_import:  # which of its own domain counts nowhere but here
            if item.domain not in ("", "ai.onnx"):
                item.version = imported.get(item.domain, item.version)
    infer_shapes(model)  # a function of another opset is converted by the types that it gets
    return onnx.inliner.inline_local_functions(model, convert_version=True)


def _inferred(model: ModelProto) -> ModelProto:
    """Return ``model`` with all shapes; those of its own are dropped where this cures an error."""
    infer = partial(onnx.shape_inference.infer_shapes, data_prop=True)
    without = deepcopy(model)
    _drop_shapes(without.graph)
    for tried in (model, without):
        with suppress(onnx.shape_inference.InferenceError):
            return infer(tried, strict_mode=True)
    return infer(model)


def _drop_shapes(graph: GraphProto) -> None:
    """Remove what ``graph``, and what is inside its nodes, says of the shapes that nodes make."""
    for part in graphs_in(graph):
        part.ClearField("value_info")
        for output in part.output:
            if output.type.HasField("tensor_type"):
                output.type.tensor_type.ClearField("shape")


def _complete(model: ModelProto) -> ModelProto:
    """Return a valid graph that has its large constants as inputs."""
    bare = skeleton(model)
    named = {value.name for value in model.graph.input}
    bare.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, t.dims)
        for t in model.graph.initializer
        if is_large(t) and t.name not in named
    )
    return bare


def _check_size(tensor: TensorProto) -> None:
    if not is_large(tensor) or not tensor.HasField("raw_data"):
        return
    kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    wanted, there = math.prod(tensor.dims) * kind.itemsize, len(tensor.raw_data)
    if there != wanted and kind.isbuiltin == 1:  # others may be packed
        raise onnx.checker.ValidationError(
            f"constant {tensor.name!r} holds {there} bytes, and its shape needs {wanted}"
        )


def _copy_fields(source: object, copy: object, without: str) -> None:
    for field, value in source.ListFields():  # type: ignore[attr-defined]
        if field.name == without:
            continue
        if field.is_repeated:
            getattr(copy, field.name).extend(value)
        elif field.message_type is not None:
            getattr(copy, field.name).CopyFrom(value)
        else:
            setattr(copy, field.name, value)
