"""The share of work in int8, and what keeps the rest in float, told by the runtimes themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.errors import EngineError, UsageError
from compress.graph.shapes import macs
from compress.packages import is_installed
from compress.runtimes import _trt_build
from compress.runtimes._fusion import Fusion, Kernel, check_fusion, islands

FIRST, SECOND, LAST = 8 * 64 * 3 * 9, 8 * 64 * 8 * 9, 5 * 8  # MACs of the three layers below


class Sketch:
    """A graph drawn node by node: (batch, 3, 8, 8) -> 5 logits."""

    def __init__(self, kind: str) -> None:
        self.zero = np.array(0, np.uint8 if kind == "uint8" else np.int8)
        self.nodes: list[onnx.NodeProto] = []
        self.arrays: dict[str, np.ndarray] = {
            "w1": np.full((8, 3, 3, 3), 1, np.int8),
            "w2": np.full((8, 8, 3, 3), 1, np.int8),
            "wf": np.full((5, 8), 1, np.int8),
            "scale": np.array(0.05, np.float32),
            "zero": self.zero,
            "wscale": np.array(0.01, np.float32),
            "wzero": np.array(0, np.int8),
        }

    def add(self, operator: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        name = name or f"{operator}{len(self.nodes)}"
        node = helper.make_node(operator, list(inputs), [f"{name}_out"], name=name, **attributes)
        self.nodes.append(node)
        return f"{name}_out"

    def rounded(self, tensor: str) -> str:
        stored = self.add("QuantizeLinear", tensor, "scale", "zero")
        return self.add("DequantizeLinear", stored, "scale", "zero")

    def weight(self, name: str) -> str:
        return self.add("DequantizeLinear", name, "wscale", "wzero")

    def float_weight(self, name: str) -> str:
        self.arrays[f"{name}f"] = self.arrays[name].astype(np.float32) * np.float32(0.01)
        return f"{name}f"

    def conv(self, tensor: str, weight: str, name: str) -> str:
        return self.add("Conv", tensor, weight, name=name, kernel_shape=[3, 3], pads=[1, 1, 1, 1])

    def save(self, path: Path, logits: str) -> Path:
        self.nodes[-1].output[0] = "logits"
        used = {name for node in self.nodes for name in node.input}
        graph = helper.make_graph(
            self.nodes,
            "sketch",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 8, 8])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5])],
            [numpy_helper.from_array(a, n) for n, a in self.arrays.items() if n in used],
        )
        opset = [helper.make_opsetid("", 20)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=10)
        onnx.checker.check_model(model)
        path.write_bytes(model.SerializeToString())
        return path


def residual(path: Path, kind: str, *, second: str = "int8", between: str = "") -> Path:
    """Write conv1 -> [between] -> conv2 -> add -> pool -> fc, as the runtime of ``kind`` wants it.

    With "uint8" every tensor is quantized, as ONNX Runtime and OpenVINO want it. With "int8" the
    inputs of weighted layers and the identity side of the Add are, as TensorRT wants it.
    """
    sketch = Sketch(kind)

    def rounded(tensor: str) -> str:
        return sketch.rounded(tensor) if kind == "uint8" else tensor

    x = sketch.conv(sketch.rounded("input"), sketch.weight("w1"), "conv1")
    x = sketch.rounded(x)
    if between:
        x = sketch.rounded(sketch.add(between, x, name="between"))
    weight = sketch.weight("w2") if second == "int8" else sketch.float_weight("w2")
    y = rounded(sketch.conv(x, weight, "conv2"))
    y = rounded(sketch.add("Add", y, x, name="add"))
    y = rounded(sketch.add("GlobalAveragePool", y, name="pool"))
    y = sketch.rounded(sketch.add("Flatten", y, name="flatten"))
    return sketch.save(path, sketch.add("Gemm", y, sketch.weight("wf"), name="fc", transB=1))


def checked(path: Path, runtime: str) -> Fusion:
    if runtime != "onnxruntime" and not is_installed(runtime.replace("-", "_")):
        pytest.skip(f"{runtime} is not installed")
    return check_fusion(path, runtime, threads=1)


RUNTIMES = [("onnxruntime", "uint8"), ("openvino", "uint8"), ("tensorrt-rtx", "int8")]


@pytest.mark.parametrize(("runtime", "kind"), RUNTIMES)
def test_a_whole_int8_graph_runs_in_int8(tmp_path: Path, runtime: str, kind: str) -> None:
    fusion = checked(residual(tmp_path / "x.onnx", kind), runtime)
    assert fusion.macs == FIRST + SECOND + LAST
    assert fusion.int8_macs == fusion.macs
    assert fusion.float_layers == ()
    assert fusion.islands == ()


@pytest.mark.parametrize(("runtime", "kind"), RUNTIMES[1:])  # ONNX Runtime quantizes it itself
def test_a_float_weight_keeps_its_layer_in_float_and_is_the_reason(
    tmp_path: Path, runtime: str, kind: str
) -> None:
    fusion = checked(residual(tmp_path / "x.onnx", kind, second="fp32"), runtime)
    assert [(layer.node, layer.macs, layer.reason) for layer in fusion.float_layers] == [
        ("conv2", SECOND, "its weight is not quantized")
    ]
    assert fusion.int8_macs == FIRST + LAST


@pytest.mark.parametrize(("runtime", "kind"), RUNTIMES[:2])
def test_float_work_between_int8_layers_is_an_island(
    tmp_path: Path, runtime: str, kind: str
) -> None:
    fusion = checked(residual(tmp_path / "x.onnx", kind, between="Sin"), runtime)
    assert fusion.int8_macs == fusion.macs
    assert [len(island) for island in fusion.islands] == [1]
    assert fusion.islands[0][0].startswith("between")


def test_onnxruntime_leaves_the_tensorrt_form_in_float_and_says_why(tmp_path: Path) -> None:
    fusion = checked(residual(tmp_path / "x.onnx", "int8"), "onnxruntime")
    reasons = {layer.node: layer.reason for layer in fusion.float_layers}
    assert reasons["conv2"] == "its output is not quantized"


def test_a_float_graph_has_no_int8_and_names_the_largest_layers_first(tmp_path: Path) -> None:
    sketch = Sketch("uint8")
    x = sketch.conv("input", sketch.float_weight("w1"), "conv1")
    x = sketch.conv(x, sketch.float_weight("w2"), "conv2")
    x = sketch.add("Flatten", sketch.add("GlobalAveragePool", x))
    path = sketch.save(
        tmp_path / "x.onnx", sketch.add("Gemm", x, sketch.float_weight("wf"), name="fc", transB=1)
    )
    fusion = check_fusion(path, "onnxruntime", threads=1)
    assert fusion.int8_share == 0
    assert [layer.node for layer in fusion.float_layers] == ["conv2", "conv1", "fc"]


def test_nodes_without_names_get_some(tmp_path: Path) -> None:
    path = residual(tmp_path / "x.onnx", "uint8")
    model = onnx.load(str(path))
    for node in model.graph.node:
        node.name = ""
    path.write_bytes(model.SerializeToString())
    assert check_fusion(path, "onnxruntime", threads=1).int8_share == 1
    assert onnx.load(str(path)).graph.node[0].name == ""


@pytest.mark.parametrize(
    ("operator", "shapes", "answer", "attributes", "expected"),
    [
        ("Conv", [(1, 8, 5, 5), (16, 2, 3, 3)], (1, 16, 5, 5), {"group": 4}, 16 * 25 * 2 * 9),
        ("ConvTranspose", [(1, 8, 5, 5), (8, 4, 2, 2)], (1, 4, 10, 10), {}, 8 * 25 * 4 * 4),
        ("Gemm", [(1, 8), (5, 8)], (1, 5), {"transB": 1}, 40),
        ("Gemm", [(8, 1), (8, 5)], (1, 5), {"transA": 1}, 40),
        ("MatMul", [(1, 7, 8), (8, 5)], (1, 7, 5), {}, 7 * 8 * 5),
    ],
)
def test_macs_follow_the_closed_formula(
    operator: str, shapes: list, answer: tuple, attributes: dict, expected: int
) -> None:
    node = helper.make_node(operator, ["a", "b"], ["c"], **attributes)
    known = dict(zip("abc", [*shapes, answer], strict=True))
    assert macs(node, known) == expected
    assert macs(node, {}) is None


def kernel(
    name: str, precision: str, inputs: str, outputs: str, *, reformat: bool = False
) -> Kernel:
    return Kernel(
        name, precision, frozenset({name}), tuple(inputs), tuple(outputs), is_reformat=reformat
    )


def test_islands_are_regions_and_ends_are_none() -> None:
    chain = [
        kernel("start", "fp32", "a", "b"),
        kernel("q1", "int8", "b", "c"),
        kernel("left", "fp32", "c", "d"),
        kernel("move", "fp32", "d", "e", reformat=True),
        kernel("right", "fp32", "e", "f"),
        kernel("q2", "int8", "f", "g"),
        kernel("alone", "fp32", "g", "h"),
        kernel("q3", "int8", "h", "i"),
        kernel("end", "fp32", "i", "j"),
    ]
    assert islands(chain) == [("left", "right"), ("alone",)]


def tensors(*kinds: str) -> list[dict[str, Any]]:
    return [
        {"Name": f"t{kind}{i}", "Dimensions": [1], "Format/Datatype": f"Row major {kind}"}
        for i, kind in enumerate(kinds)
    ]


def layer(name: str, kind: str, inputs: list, outputs: list, *nodes: str) -> dict[str, Any]:
    metadata = "\x1f".join(f"[ONNX Layer: {node}]" for node in nodes)
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": inputs,
        "Outputs": outputs,
        "Metadata": metadata,
    }


def test_the_inspector_of_tensorrt_is_read(tmp_path: Path) -> None:
    told = {
        "Layers": [
            layer("Reformatting 1", "Reformat", tensors("FP32"), tensors("Int8")),
            layer(
                "conv1 + relu1",
                "CaskConvolution",
                tensors("Int8"),
                tensors("Int8"),
                "conv1",
                "relu1",
            ),
            layer("conv2", "CaskConvolution", tensors("Int8"), tensors("FP32"), "conv2"),
            layer("add", "PointWiseV2", tensors("FP32", "FP32"), tensors("FP32"), "add"),
            layer("fc", "CaskGemm", tensors("FP16"), tensors("FP32"), "fc"),
        ],
        "Bindings": ["input", "logits"],
    }
    source = residual(tmp_path / "x.onnx", "int8")
    file = tmp_path / "x.engine.layers.json"
    file.write_text(json.dumps(_trt_build.normalized_layers(told)))
    fusion = check_fusion(source, "tensorrt", engine=tmp_path / "x.engine")
    assert fusion.reformats == ("Reformatting 1",)
    assert [(f.node, f.precision) for f in fusion.float_layers] == [("fc", "fp16")]


def test_an_engine_without_layers_is_an_error(tmp_path: Path) -> None:
    source = residual(tmp_path / "x.onnx", "int8")
    with pytest.raises(EngineError, match=r"Expected x\.engine\.layers\.json beside it"):
        check_fusion(source, "tensorrt", engine=tmp_path / "x.engine")


def test_a_runtime_that_cannot_tell_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not tell what it fuses"):
        check_fusion(residual(tmp_path / "x.onnx", "int8"), "pytorch")
