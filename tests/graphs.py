"""Small ONNX graphs written node by node, so that no exporter is needed to test a runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Return the weights of ``network``: two convolutions with a residual add, and a classifier."""
    rng = np.random.default_rng(seed)
    return {
        "w1": rng.normal(0, 0.3, (8, 3, 3, 3)).astype(np.float32),
        "b1": rng.normal(0, 0.3, 8).astype(np.float32),
        "w2": rng.normal(0, 0.1, (8, 8, 3, 3)).astype(np.float32),
        "b2": rng.normal(0, 0.3, 8).astype(np.float32),
        "wf": rng.normal(0, 0.3, (5, 8)).astype(np.float32),
    }


def network(path: Path, *, batch: str | int = "batch", dtype: int = TensorProto.FLOAT) -> Path:
    """Write a residual network for (batch, 3, 8, 8) images of 5 classes."""
    conv = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["input", "w1", "b1"], ["c1"], name="conv1", **conv),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="conv2", **conv),
        helper.make_node("Add", ["c2", "r1"], ["a"], name="add"),
        helper.make_node("Relu", ["a"], ["r2"], name="relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "wf"], ["logits"], name="fc", transB=1),
    ]
    arrays = weights()
    if dtype != TensorProto.FLOAT:
        kind = helper.tensor_dtype_to_np_dtype(dtype)
        arrays = {name: array.astype(kind) for name, array in arrays.items()}
    return save(path, nodes, arrays, [batch, 3, 8, 8], [batch, 5], dtype)


def expected(images: np.ndarray) -> np.ndarray:
    """Return what ``network`` answers, computed by torch."""
    import torch
    import torch.nn.functional as F

    w = {name: torch.from_numpy(array) for name, array in weights().items()}
    x = F.relu(F.conv2d(torch.from_numpy(images), w["w1"], w["b1"], padding=1))
    x = F.relu(F.conv2d(x, w["w2"], w["b2"], padding=1) + x)
    answer: np.ndarray = (x.mean((2, 3)) @ w["wf"].T).numpy()
    return answer


def one_node(path: Path, operator: str, *, domain: str = "") -> Path:
    """Write a graph of one node "strange" with this operator."""
    node = helper.make_node(operator, ["input"], ["logits"], name="strange", domain=domain)
    return save(path, [node], {}, ["batch", 3], ["batch", 3], TensorProto.FLOAT, domain=domain)


def quantized(path: Path, kind: int) -> Path:
    """Write Q/DQ around one convolution, with zero points of type ``kind``."""
    zero = helper.tensor_dtype_to_np_dtype(kind)
    arrays = {
        "w1": weights()["w1"],
        "scale": np.array(0.05, np.float32),
        "zero": np.array(0, zero),
        "w_scale": np.array(0.01, np.float32),
        "w_zero": np.array(0, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "scale", "zero"], ["q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="dequantize"),
        helper.make_node("QuantizeLinear", ["w1", "w_scale", "w_zero"], ["wq"], name="wq"),
        helper.make_node("DequantizeLinear", ["wq", "w_scale", "w_zero"], ["wd"], name="wd"),
        helper.make_node("Conv", ["d", "wd"], ["logits"], name="conv1", kernel_shape=[3, 3]),
    ]
    shape = ["batch", 3, 8, 8]
    return save(path, nodes, arrays, shape, ["batch", 8, 6, 6], TensorProto.FLOAT)


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    arrays: dict[str, np.ndarray],
    shape: list[str | int],
    answer: list[str | int],
    dtype: int,
    *,
    domain: str = "",
) -> Path:
    """Write a graph of ``nodes`` with one input and one output."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("input", dtype, shape)],
        [helper.make_tensor_value_info("logits", dtype, answer)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 20)]
    if domain:
        opsets.append(helper.make_opsetid(domain, 1))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def saved(folder: Path, **models: onnx.ModelProto) -> list[Path]:
    """Write each model to a file of its name."""
    for name, model in models.items():
        onnx.save(model, folder / f"{name}.onnx")
    return [folder / f"{name}.onnx" for name in models]
