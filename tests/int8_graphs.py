"""Tiny ONNX graphs, each naming one difficulty of int8, and images for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

SHAPE = (3, 16, 16)


class Sketch:
    """Builds a graph op by op; names of weights are made of the name of their op."""

    def __init__(self, *shapes: tuple[int, ...], seed: int = 0, batch: int | str = "batch") -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs = [
            helper.make_tensor_value_info(
                f"input_{i}" if len(shapes) > 1 else "input", 1, (batch, *s)
            )
            for i, s in enumerate(shapes)
        ]
        self.batch = batch

    def op(self, kind: str, inputs: Sequence[str], name: str, outputs: int = 1, **options) -> str:
        names = [name] if outputs == 1 else [f"{name}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=name, **options))
        return names[0]

    def constant(self, name: str, value) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def floats(self, name: str, *shape: int, scale: float = 1.0) -> str:
        return self.constant(name, (self.random.standard_normal(shape) * scale).astype(np.float32))

    def conv(
        self, x: str, name: str, cin: int, cout: int, k: int = 3, group: int = 1, **more
    ) -> str:
        fan_in = cin // group * k * k
        weight = self.floats(f"{name}_w", cout, cin // group, k, k, scale=(2 / fan_in) ** 0.5)
        bias = self.floats(f"{name}_b", cout, scale=0.1)
        more.setdefault("pads", [k // 2] * 4)
        return self.op("Conv", [x, weight, bias], name, group=group, kernel_shape=[k, k], **more)

    def relu(self, x: str) -> str:
        return self.op("Relu", [x], f"{x}_relu")

    def relu6(self, x: str) -> str:
        ends = [self.constant(f"{x}_{n}", np.float32(v)) for n, v in (("zero", 0), ("six", 6))]
        return self.op("Clip", [x, *ends], f"{x}_relu6")

    def head(self, x: str, channels: int) -> str:
        pooled = self.op("GlobalAveragePool", [x], "pool")
        flat = self.op("Flatten", [pooled], "flat")
        weight, bias = self.floats("fc_w", 10, channels), self.floats("fc_b", 10, scale=0.1)
        return self.op("Gemm", [flat, weight, bias], "logits", transB=1)

    def model(self, outputs: Sequence[str] = ("logits",), opset: int = 17) -> ModelProto:
        ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
        graph = helper.make_graph(self.nodes, "sketch", self.inputs, ends, self.constants)
        imports = [helper.make_opsetid("", opset)]
        return helper.make_model(graph, opset_imports=imports, ir_version=8)


def residual() -> ModelProto:
    s = Sketch(SHAPE)
    x = s.relu(s.conv("input", "stem", 3, 8))
    y = s.conv(s.relu(s.conv(x, "c1", 8, 8)), "c2", 8, 8)
    x = s.relu(s.op("Add", [y, x], "add"))
    y = s.conv(s.relu(s.conv(x, "c3", 8, 16, strides=[2, 2])), "c4", 16, 16)
    down = s.conv(x, "down", 8, 16, k=1, strides=[2, 2])
    s.head(s.relu(s.op("Add", [y, down], "add2")), 16)
    return s.model()


def depthwise() -> ModelProto:
    s = Sketch(SHAPE)
    x = s.relu6(s.conv("input", "stem", 3, 8))
    y = s.relu6(s.conv(x, "expand", 8, 24, k=1))
    y = s.relu6(s.conv(y, "filter", 24, 24, group=24))
    y = s.conv(y, "project", 24, 8, k=1)
    s.head(s.op("Add", [x, y], "add"), 8)
    return s.model()


def concat() -> ModelProto:
    s = Sketch(SHAPE)
    x = s.op(
        "MaxPool",
        [s.relu(s.conv("input", "stem", 3, 8))],
        "max",
        kernel_shape=[2, 2],
        strides=[2, 2],
    )
    a, b = s.relu(s.conv(x, "a", 8, 8, k=1)), s.relu(s.conv(x, "b", 8, 8))
    x = s.op("Concat", [a, b], "cat", axis=1)
    x = s.relu(s.conv(x, "c", 16, 8))
    y = s.op(
        "Concat",
        [x, s.op("AveragePool", [x], "avg", kernel_shape=[3, 3], pads=[1] * 4)],
        "cat2",
        axis=1,
    )
    s.head(s.relu(s.conv(y, "d", 16, 12, k=1)), 12)
    return s.model()


def separable() -> ModelProto:
    """Layers with nothing between them, a part of the channels, channels and edges of zeros."""
    s = Sketch(SHAPE)
    x = s.conv(s.relu(s.conv("input", "stem", 3, 8)), "point", 8, 8, k=1)
    x = s.relu(s.conv(x, "filter", 8, 8, group=8))
    w, b = s.floats("up_w", 8, 6, 2, 2, scale=0.3), s.floats("up_b", 6)
    x = s.relu(s.op("ConvTranspose", [x, w, b], "up", strides=[2, 2], kernel_shape=[2, 2]))
    ends = [
        s.constant(f"part_{n}", np.array([v])) for n, v in (("from", 1), ("to", 5), ("axis", 1))
    ]
    x = s.op("Slice", [x, *ends], "part")
    x = s.op("Pad", [x, s.constant("zeros", np.array([0, 0, 1, 1, 0, 2, 1, 1]))], "padded")
    s.head(s.relu(s.conv(x, "last", 6, 8)), 8)
    return s.model()


def shared_constants() -> ModelProto:
    """One bias for two convolutions and one scale for two BatchNorms, as converters store them."""
    s = Sketch(SHAPE)
    x = s.relu(s.conv("input", "stem", 3, 8))
    for name in ("a", "b"):
        x = norm(s, x, f"{name}_bn", 8)
        s.nodes[-1].input[1] = "a_bn_scale"
        x = s.relu(s.conv(x, name, 8, 8))
        next(n for n in s.nodes if n.name == name).input[2] = "a_b"
    s.head(x, 8)
    return s.model()


def dense() -> ModelProto:
    """BatchNorm that no convolution precedes."""
    s = Sketch(SHAPE)
    x = s.conv("input", "stem", 3, 8)
    y = s.conv(s.relu(norm(s, x, "bn1", 8)), "c1", 8, 4)
    x = s.op("Concat", [x, y], "cat", axis=1)
    s.head(s.relu(norm(s, x, "bn2", 12)), 12)
    return s.model()


def preactivated() -> ModelProto:
    """BatchNorm behind a residual sum."""
    s = Sketch(SHAPE)
    x = s.conv("input", "stem", 3, 8)
    y = s.conv(s.relu(norm(s, x, "bn1", 8)), "c1", 8, 8)
    x = s.op("Add", [x, y], "sum")
    s.head(s.relu(norm(s, x, "bn2", 8)), 8)
    return s.model()


def norm(s: Sketch, x: str, name: str, channels: int) -> str:
    parts = [s.floats(f"{name}_{part}", channels) for part in ("scale", "bias", "mean")]
    variance = s.constant(f"{name}_var", s.random.uniform(0.5, 2, channels).astype(np.float32))
    return s.op("BatchNormalization", [x, *parts, variance], name)


def folded() -> ModelProto:
    """BatchNorm behind a convolution, a grouped one, a transposed one and a linear layer."""
    s = Sketch(SHAPE)
    x = s.relu(norm(s, s.conv("input", "c1", 3, 8), "bn1", 8))
    x = s.relu(norm(s, s.conv(x, "c2", 8, 8, group=2), "bn2", 8))
    w, b = s.floats("up_w", 8, 3, 2, 2, scale=0.3), s.floats("up_b", 6)
    x = s.op("ConvTranspose", [x, w, b], "up", strides=[2, 2], kernel_shape=[2, 2], group=2)
    x = s.relu(norm(s, x, "bn3", 6))
    mean = s.op("ReduceMean", [x], "mean", axes=[2, 3], keepdims=0)
    w, b = s.floats("fc_w", 6, 10), s.floats("fc_b", 10)
    y = s.op("Gemm", [mean, w, b], "fc")
    norm(s, y, "logits", 10)
    return s.model()


def squeeze_excite() -> ModelProto:
    s = Sketch(SHAPE)
    x = s.conv("input", "stem", 3, 8)
    x = s.op("Mul", [x, s.op("Sigmoid", [x], "silu_gate")], "silu")
    gate = s.op("GlobalAveragePool", [x], "squeeze")
    gate = s.relu(s.conv(gate, "reduce", 8, 4, k=1))
    gate = s.op("Sigmoid", [s.conv(gate, "excite", 4, 8, k=1)], "gate")
    x = s.op("Mul", [x, gate], "scaled")
    x = s.op("HardSwish", [s.conv(x, "project", 8, 8, k=1)], "swish")
    s.head(x, 8)
    return s.model()


def shuffle() -> ModelProto:
    s = Sketch(SHAPE)
    x = s.relu(s.conv("input", "stem", 3, 8))
    shape = s.constant("split_shape", np.array([-1, 2, 4, 16, 16]))
    back = s.constant("back_shape", np.array([-1, 8, 16, 16]))
    x = s.op(
        "Transpose",
        [s.op("Reshape", [x, shape], "r1")],
        "t",
        perm=[0, 2, 1, 3, 4][:0] or [0, 2, 1, 3, 4],
    )
    x = s.op("Reshape", [x, back], "r2")
    parts = s.constant("parts", np.array([4, 4]))
    s.op("Split", [x, parts], "half", outputs=2, axis=1)
    y = s.relu(s.conv("half_1", "c1", 4, 4))
    s.head(s.op("Concat", ["half_0", y], "cat", axis=1), 8)
    return s.model()


def two_inputs() -> ModelProto:
    s = Sketch(SHAPE, (5,))
    x = s.op(
        "Flatten",
        [s.op("GlobalAveragePool", [s.relu(s.conv("input_0", "c", 3, 8))], "pool")],
        "flat",
    )
    w = s.floats("side_w", 5, 4)
    side = s.op("MatMul", ["input_1", w], "side")
    both = s.op("Concat", [x, side], "cat", axis=1)
    w, b = s.floats("fc_w", 12, 10), s.floats("fc_b", 10)
    s.op("Gemm", [both, w, b], "logits")
    return s.model()


def dead_channels() -> ModelProto:
    model = residual()
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor).copy()
        if tensor.name in ("c1_w", "c1_b"):
            value[::2] = 0
        if tensor.name == "c3_w":
            value[0] = 1e-12  # nearly dead, with a bias of ordinary size
        if tensor.name == "stem_b":
            value[:] = 0
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return model


GRAPHS: dict[str, Callable[[], ModelProto]] = {
    graph.__name__: graph
    for graph in (
        residual, depthwise, concat, dense, preactivated, folded, squeeze_excite, shuffle,
        two_inputs, dead_channels, separable, shared_constants,
    )
}  # fmt: skip


def images(model: ModelProto, count: int = 16, seed: int = 1) -> dict[str, NDArray[np.float32]]:
    """Return random images for every input of ``model``."""
    random = np.random.default_rng(seed)
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim[1:]] for v in model.graph.input
    }
    return {n: random.standard_normal((count, *s)).astype(np.float32) for n, s in shapes.items()}


def run(model: ModelProto, feed, *, plain: bool = False, names=None) -> list[NDArray]:
    """Return outputs in ONNX Runtime; ``plain`` = node by node, without any optimization."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.intra_op_num_threads = 1
    if plain:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = model if isinstance(model, (str, bytes)) else model.SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(names, feed)
