"""The ONNX graph an engine is built from: read safely, in the precision that was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnx import ModelProto, helper

from compress.errors import EngineError
from compress.graph import files
from compress.graph.shapes import real_inputs


def of_precision(path: Path, precision: str | None) -> ModelProto:
    """Return the graph in ``path``; converted to fp16 if asked for.

    Raises:
        EngineError: the file is damaged, or int8 is asked of a graph without Q/DQ nodes, or fp32
            of one with them.
    """
    model = files.load(path)
    has_qdq = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    if precision == "int8" and not has_qdq:
        raise EngineError(
            "precision int8 was asked for, and the graph holds no Q/DQ nodes",
            where=str(path),
            fix="Quantize it first: compress quantize FILE.onnx --data DATA",
        )
    if precision == "fp32" and has_qdq:
        raise EngineError(
            "precision fp32 was asked for, and the graph holds Q/DQ nodes",
            where=str(path),
            fix="Build the ONNX file from before quantization",
        )
    if precision == "fp16":
        from compress.graph.fp16 import to_half

        model = to_half(model)
    return model


def inputs(model: ModelProto) -> list[dict[str, Any]]:
    """Return name, shape and dtype of every input, as JSON-able data."""
    return [
        {
            "name": value.name,
            "shape": [
                dim.dim_value if dim.dim_value > 0 else dim.dim_param or f"free_{axis}"
                for axis, dim in enumerate(value.type.tensor_type.shape.dim)
            ],
            "dtype": helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
        }
        for value in real_inputs(model)
    ]
