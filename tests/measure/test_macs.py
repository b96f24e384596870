"""Counts against closed formulas, torch against ONNX."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from compress.errors import EngineError, ModelError
from compress.graph.shapes import shapes_of
from compress.measure import complete_shapes, count_module, count_onnx, node_macs, size_mib


class Shared(nn.Module):
    """One convolution used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x))


class Loose(nn.Module):
    """Holds a tensor that is no buffer, which a copy on meta leaves behind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.offset = nn.Conv2d(4, 2, 1), torch.ones(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.offset


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.left(left) + self.right(right)


CASES = {
    "conv": (nn.Conv2d(4, 8, 3, stride=2, padding=1), 4 * 8 * 9 + 8, 8 * 4 * 4 * 4 * 9),
    "grouped": (nn.Conv2d(4, 8, 3, groups=2, bias=False), 8 * 2 * 9, 8 * 2 * 9 * 6 * 6),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, bias=False), 4 * 9, 4 * 9 * 6 * 6),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False), 4 * 6 * 4, 4 * 64 * 6 * 4),
    "linear": (nn.Sequential(nn.Flatten(), nn.Linear(256, 10)), 2570, 2560),
    "batchnorm": (nn.BatchNorm2d(4), 8, 0),
    "shared": (Shared(), 4 * 4 * 9, 2 * 4 * 4 * 9 * 64),
    "loose": (Loose(), 10, 4 * 2 * 64),
}


@pytest.mark.parametrize("name", CASES)
def test_count_equals_the_closed_formula(name: str) -> None:
    model, params, macs = CASES[name]
    counted = count_module(model, torch.zeros(1, 4, 8, 8))
    assert (counted.params, counted.macs) == (params, macs)


def test_count_takes_several_inputs_by_position_or_name() -> None:
    left, right = torch.zeros(1, 4), torch.zeros(1, 5)
    assert count_module(TwoInputs(), (left, right)).macs == 27
    assert count_module(TwoInputs(), {"right": right, "left": left}).macs == 27


def test_count_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).train()
    before = copy.deepcopy(model.state_dict())
    count_module(model, torch.randn(1, 4, 8, 8))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_count_explains_an_input_that_does_not_fit() -> None:
    with pytest.raises(ModelError, match=r"forward pass fails.*shape of the example input"):
        count_module(nn.Conv2d(4, 8, 3), torch.zeros(1, 3, 8, 8))


def graph_of(
    nodes: list[onnx.NodeProto],
    constants: dict[str, Any],
    batch: Any = "batch",
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 4, 8, 8])],
        [helper.make_tensor_value_info("output", kind, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def conv(name: str = "output", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node("Conv", ["input", "w"], [name], **attributes)


@pytest.mark.parametrize("batch", [1, 16, "batch"])
def test_onnx_convolutions_equal_the_closed_formula(batch: Any) -> None:
    weight = np.zeros((8, 2, 3, 3), np.float32)
    model = graph_of([conv(group=2, strides=[2, 2], pads=[1] * 4)], {"w": weight}, batch)
    assert count_onnx(model).macs == 8 * 2 * 9 * 4 * 4
    assert count_onnx(model).params == weight.size


def test_onnx_products_equal_the_closed_formula() -> None:
    model = graph_of(
        [
            helper.make_node("ConvTranspose", ["input", "w"], ["a"], strides=[2, 2]),
            helper.make_node("Flatten", ["a"], ["b"]),
            helper.make_node("Gemm", ["b", "g", "c"], ["d"], transB=1),
            helper.make_node("MatMul", ["d", "m"], ["output"]),
        ],
        {
            "w": np.zeros((4, 6, 2, 2), np.float32),
            "g": np.zeros((10, 6 * 256), np.float32),
            "c": np.zeros(10, np.float32),
            "m": np.zeros((10, 5), np.float32),
        },
    )
    assert node_macs(model) == {"a": 4 * 64 * 6 * 4, "d": 15360, "output": 50}
    assert count_onnx(model).params == 96 + 15360 + 10 + 50


def test_a_shape_that_the_graph_computes_is_seen_by_running_it() -> None:
    """As PyTorch exports ReflectionPad2d: amounts through arithmetic that inference gives up."""
    model = graph_of(
        [
            helper.make_node("Mul", ["half", "two"], ["amounts"]),
            helper.make_node("Cast", ["amounts"], ["whole"], to=TensorProto.INT64),
            helper.make_node("Pad", ["input", "whole"], ["padded"]),
            helper.make_node("Conv", ["padded", "w"], ["output"]),
        ],
        {
            "half": np.array([0, 0, 0.5, 0.5, 0, 0, 0.5, 0.5], np.float32),
            "two": np.array(2, np.float32),
            "w": np.zeros((8, 4, 3, 3), np.float32),
        },
    )
    assert shapes_of(model)[0].get("padded", (None,)) != (1, 4, 10, 10)
    assert complete_shapes(model)[0]["padded"] == (1, 4, 10, 10)
    assert count_onnx(model).macs == 8 * 4 * 9 * 8 * 8


def test_quantized_onnx_counts_weights_but_not_scales() -> None:
    quantize = [
        helper.make_node("QuantizeLinear", ["input", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["x"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wf"], axis=0),
        helper.make_node("Conv", ["x", "wf"], ["output"]),
    ]
    model = graph_of(
        quantize,
        {
            "s": np.float32(1),
            "z": np.uint8(0),
            "w": np.zeros((8, 4, 3, 3), np.int8),
            "ws": np.ones(8, np.float32),
            "wz": np.zeros(8, np.int8),
        },
    )
    assert (count_onnx(model).params, count_onnx(model).macs) == (288, 288 * 36)


def test_qlinearconv_counts_as_a_convolution() -> None:
    scalars = {name: np.float32(1) for name in ("s", "ws", "os")}
    zeros = {"z": np.uint8(0), "wz": np.int8(0), "oz": np.uint8(0)}
    model = graph_of(
        [
            helper.make_node("QuantizeLinear", ["input", "s", "z"], ["q"]),
            helper.make_node(
                "QLinearConv", ["q", "s", "z", "w", "ws", "wz", "os", "oz"], ["output"]
            ),
        ],
        {**scalars, **zeros, "w": np.zeros((8, 4, 3, 3), np.int8)},
        kind=TensorProto.UINT8,
    )
    assert (count_onnx(model).params, count_onnx(model).macs) == (288, 288 * 36)


def test_exported_network_has_the_macs_of_its_module(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    exported = graph_of(
        [
            helper.make_node("Conv", ["input", "w", "b"], ["a"], pads=[1] * 4),
            helper.make_node("Relu", ["a"], ["r"]),
            helper.make_node("GlobalAveragePool", ["r"], ["p"]),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("Gemm", ["f", "g", "c"], ["output"], transB=1),
        ],
        dict(
            zip(("w", "b", "g", "c"), (p.detach().numpy() for p in model.parameters()), strict=True)
        ),
    )
    onnx.save(exported, tmp_path / "m.onnx")
    assert count_onnx(tmp_path / "m.onnx") == count_module(model, torch.zeros(1, 4, 8, 8))


def test_free_image_size_is_an_error_that_says_where() -> None:
    model = graph_of([conv()], {"w": np.zeros((8, 4, 3, 3), np.float32)})
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    with pytest.raises(
        ModelError, match=r"Conv 'output': the shape of 'input' is not known: .*fixed image"
    ):
        count_onnx(model)


def test_damaged_onnx_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\xff\xff nothing")
    with pytest.raises(EngineError, match=r"m\.onnx: is no ONNX file"):
        count_onnx(tmp_path / "m.onnx")


def test_size_counts_external_data_and_the_other_half_of_openvino(tmp_path: Path) -> None:
    model = graph_of([conv()], {"w": np.zeros((256, 4, 3, 3), np.float32)})
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data")
    both = (tmp_path / "m.onnx").stat().st_size + (tmp_path / "m.data").stat().st_size
    assert both > 256 * 36 * 4
    assert size_mib(tmp_path / "m.onnx") == both / 2**20
    assert size_mib(tmp_path) == both / 2**20
    (tmp_path / "n.xml").write_bytes(b"x" * 10)
    (tmp_path / "n.bin").write_bytes(b"x" * 1000)
    assert size_mib(tmp_path / "n.xml") == 1010 / 2**20


def test_size_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.onnx: does not exist"):
        size_mib(tmp_path / "absent.onnx")
