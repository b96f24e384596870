"""Int8 at a cut: float tensors cross as uint8, with the range they have at that moment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnx import ModelProto, NodeProto, TensorProto, helper

from compress.errors import UsageError
from compress.pipeline.split.cutting import Parts

OPSET = 11  # DynamicQuantizeLinear


def check_opset(model: ModelProto) -> None:
    """Check that a graph can hold what quantizes at run time.

    Raises:
        UsageError: it is older.
    """
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < OPSET:
        raise UsageError(
            f"int8 at the cut needs opset {OPSET}, the file has {opset}",
            fix="Export it again with a newer opset, or split it without int8",
        )


def quantize_between(parts: Parts, tensors: Sequence[str]) -> None:
    """Let ``tensors`` cross as uint8 with scale and zero point; both graphs are changed."""
    head, tail = (part.graph for part in parts)
    rest = list(tail.node)
    del tail.node[:]
    for name in tensors:
        head.node.extend(_packing(name))
        tail.node.extend(_unpacking(name))
        _rename(head.output, name)
        _rename(tail.input, name)
    tail.node.extend(rest)


def _rename(values: Any, name: str) -> None:
    """Put what crosses for a float tensor in its place: values, scale and zero point."""
    packed, scale, zero = _packed(name)
    value = next(each for each in values if each.name == name)
    value.name, value.type.tensor_type.elem_type = packed, TensorProto.UINT8
    values.append(helper.make_tensor_value_info(scale, TensorProto.FLOAT, [1]))
    values.append(helper.make_tensor_value_info(zero, TensorProto.UINT8, [1]))


def _packed(name: str) -> tuple[str, str, str]:
    return f"{name}_uint8", f"{name}_scale", f"{name}_zero_point"


def _packing(name: str) -> list[NodeProto]:
    """Return what quantizes a tensor; scale and zero point get a dimension that sessions want."""
    packed, scale, zero = _packed(name)
    scalars = [f"{scale}_scalar", f"{zero}_scalar"]
    return [
        helper.make_node("DynamicQuantizeLinear", [name], [packed, *scalars]),
        *_reshaped(name, [1], zip(scalars, (scale, zero), strict=True)),
    ]


def _unpacking(name: str) -> list[NodeProto]:
    packed, scale, zero = _packed(name)
    scalars = [f"{scale}_scalar", f"{zero}_scalar"]
    return [
        *_reshaped(name, [], zip((scale, zero), scalars, strict=True)),
        helper.make_node("DequantizeLinear", [packed, *scalars], [name]),
    ]


def _reshaped(name: str, dims: list[int], pairs: zip[tuple[str, str]]) -> list[NodeProto]:
    """Return what gives each of some tensors other dimensions."""
    shape = helper.make_tensor("shape", TensorProto.INT64, [len(dims)], dims)
    return [
        helper.make_node("Constant", [], [f"{name}_dims"], value=shape),
        *(helper.make_node("Reshape", [old, f"{name}_dims"], [new]) for old, new in pairs),
    ]
