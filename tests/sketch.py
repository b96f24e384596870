"""Draw small ONNX graphs, Q/DQ nodes included, in a few lines; and run them in plain arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Sketch:
    """A graph being drawn: ``input`` (B, 3, 8, 8), or another shape, to ``logits``."""

    def __init__(self, shape: tuple[Any, ...] = ("batch", 3, 8, 8), seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.shape = shape
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def constant(self, array: Any, dtype: Any = np.float32) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = np.asarray(array, dtype)
        return name

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = attributes.pop("name", f"{op.lower()}_{len(self.nodes)}")
        domain = attributes.pop("domain", "")
        node = helper.make_node(op, inputs, [f"{name}_out"], name, domain=domain, **attributes)
        self.nodes.append(node)
        return f"{name}_out"

    def pair(
        self, value: str, scale: Any, zero: Any = 0, dtype: Any = np.int8, dq_scale: Any = None
    ) -> str:
        """Q and DQ."""
        zeros = np.broadcast_to(zero, np.shape(scale))
        numbers = [self.constant(scale), self.constant(zeros, dtype)]
        axis = {"axis": 1} if np.ndim(scale) else {}
        integers = self.add("QuantizeLinear", value, *numbers, **axis)
        if dq_scale is not None:
            numbers = [self.constant(dq_scale), numbers[1]]
        return self.add("DequantizeLinear", integers, *numbers, **axis)

    def weight(self, values: np.ndarray, axis: int | None = 0, scale: Any = None) -> str:
        """Weights stored as int8 before a DQ."""
        if scale is None:
            others = None if axis is None else tuple(d for d in range(values.ndim) if d != axis)
            scale = np.maximum(np.abs(values).max(axis=others) / 127, 1e-9)
        scale = np.asarray(scale, np.float32)
        wide = scale.reshape([-1 if d == axis else 1 for d in range(values.ndim)])
        with np.errstate(invalid="ignore"):  # 0 / 0: a dead channel
            codes = np.nan_to_num(np.rint(values / (wide if scale.ndim else scale)))
        axes = {"axis": axis} if scale.ndim else {}
        inputs = [
            self.constant(np.clip(codes, -128, 127), np.int8),
            self.constant(scale),
            self.constant(np.zeros(scale.shape), np.int8),
        ]
        return self.add("DequantizeLinear", *inputs, **axes)

    def kernel(self, *shape: int) -> np.ndarray:
        fan_in = int(np.prod(shape[1:]))
        return (self.random.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)

    def conv(self, value: str, weight: str, *more: str, **attributes: Any) -> str:
        return self.add("Conv", value, weight, *more, pads=[1, 1, 1, 1], **attributes)

    def model(self, output: str, opset: int = 21) -> onnx.ModelProto:
        self.nodes.append(helper.make_node("Identity", [output], ["logits"], "last"))
        graph = helper.make_graph(
            self.nodes,
            "sketch",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(array, name) for name, array in self.constants.items()],
        )
        imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=10)
        return onnx.shape_inference.infer_shapes(model)


def run(model: onnx.ModelProto | str, images: np.ndarray) -> np.ndarray:
    """Run in ONNX Runtime with every optimization off: Q and DQ as the standard defines them."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    content = model if isinstance(model, str) else model.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def sqnr_db(reference: np.ndarray, other: np.ndarray) -> float:
    error = float(np.square(reference - other, dtype=np.float64).sum())
    return 10 * float(np.log10(np.square(reference, dtype=np.float64).sum() / max(error, 1e-30)))


def as_tensorrt_reads(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph as TensorRT takes it: uint8 zero points read as int8, the scale unchanged.

    Source: onnx-tensorrt, onnxOpImporters.cpp, "UINT8 zero_point ... Defaulting to INT8 instead".
    """
    read = onnx.ModelProto()
    read.CopyFrom(model)
    kinds = ("QuantizeLinear", "DequantizeLinear")
    zeros = {node.input[2] for node in read.graph.node if node.op_type in kinds}
    for tensor in read.graph.initializer:
        if tensor.name in zeros and tensor.data_type == TensorProto.UINT8:
            array = numpy_helper.to_array(tensor).astype(np.int8)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    del read.graph.value_info[:]
    return read
