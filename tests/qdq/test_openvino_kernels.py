"""Which kernels OpenVINO runs our graphs with: its execution graph says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from int8_graphs import GRAPHS, images
from openvino_core import compiled
from torch import nn

from compress.export import export_onnx
from compress.models.cifar import CifarResNet
from compress.qdq import placement, write_qdq
from compress.qdq.lint import lint_onnx
from compress.quantize import quantize_onnx
from compress.quantize.calibration import calibrate, make_quant_plan
from compress.quantize.sessions import answers, sqnr_db

SAID = ("layerType", "originalLayersNames", "runtimePrecision")


class PreActivated(nn.Module):
    """DenseNet's order: nested concats, BatchNorm, Relu, conv; no conv takes the BatchNorm up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.inner, self.third = nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3, padding=1)
        self.outer, self.fourth = nn.BatchNorm2d(24), nn.Conv2d(24, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
        for norm in (self.inner, self.outer):
            nn.init.normal_(norm.running_mean, 0, 0.3)
            nn.init.uniform_(norm.weight, 0.5, 1.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = torch.cat([x, self.second(x)], 1)
        x = torch.cat([x, self.third(torch.relu(self.inner(x)))], 1)
        return self.head(self.fourth(torch.relu(self.outer(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, np.ndarray]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("graphs")
    path = export_onnx(PreActivated().eval(), torch.randn(1, 3, 16, 16), folder / "fp32.onnx")
    images = np.random.default_rng(0).standard_normal((32, 3, 16, 16)).astype(np.float32)
    out = folder / "openvino.onnx"
    quantize_onnx(path, [images], out, "openvino", method="plain")
    return path, out, images


def executed(path: Path) -> list[dict[str, str]]:
    """Return what OpenVINO says of each node that it executes."""
    graph = compiled(path)
    return [
        {key: value.astype(str) for key, value in op.get_rt_info().items() if key in SAID}
        for op in graph.get_runtime_model().get_ops()
    ]


def zero_points(path: Path) -> dict[str, int]:
    """Return the zero point of each quantized activation, by the kind of node that makes it."""
    graph = onnx.load(path).graph
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    relus = [node for node in graph.node if node.op_type == "Relu"]
    behind = {node.output[0]: made_by[node.input[0]] for node in relus}
    return {
        behind[node.input[0]]: int(constants[node.input[2]])
        for node in graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] in behind
    }


def test_only_the_relu_behind_a_batchnorm_is_kept_apart(graphs: tuple[Path, Path, np.ndarray]):
    assert zero_points(graphs[1]) == {"Conv": 0, "BatchNormalization": 1}


def test_so_it_is_with_the_ranges_of_nncf(graphs: tuple[Path, Path, np.ndarray], tmp_path: Path):
    pytest.importorskip("nncf")
    path, _, images = graphs
    quantize_onnx(path, [images], tmp_path / "nncf.onnx", "openvino", method="nncf")
    assert zero_points(tmp_path / "nncf.onnx")["BatchNormalization"] == 1


def test_it_costs_no_fidelity_and_no_finding(graphs: tuple[Path, Path, np.ndarray]):
    path, out, images = graphs
    feed = {"input": images}
    reference = answers(onnx.load(path), feed)
    assert sqnr_db(reference, answers(onnx.load(out), feed)) > 30
    assert lint_onnx(out, target="openvino") == []


def test_openvino_pads_with_that_zero_point(graphs: tuple[Path, Path, np.ndarray]):
    """Its answers are those of the same graph in plain arithmetic, node by node."""
    _, out, images = graphs
    graph = compiled(out, {"INFERENCE_PRECISION_HINT": "f32"})
    plain = answers(onnx.load(out), {"input": images})
    # without VNNI its kernels halve the weights, so that 16-bit sums hold them: a bit is lost
    has_vnni = any(flag in Path("/proc/cpuinfo").read_text() for flag in ("vnni", "amx_int8"))
    assert sqnr_db(plain, [graph(images)[0]]) > (35 if has_vnni else 20)


def test_openvino_quantizes_behind_the_relu_in_one_kernel_with_it(
    graphs: tuple[Path, Path, np.ndarray],
):
    parts = executed(graphs[1])
    alone = [p["originalLayersNames"] for p in parts if p["layerType"] == "FakeQuantize"]
    assert "input_q" in alone
    assert not any("relu" in name for name in alone)


def test_openvino_concatenates_bytes_though_a_float_op_reads_them(
    graphs: tuple[Path, Path, np.ndarray],
):
    concats = [part for part in executed(graphs[1]) if part["layerType"] == "Concatenation"]
    assert concats
    assert {part["runtimePrecision"] for part in concats} <= {"u8", "i8"}


def test_each_part_of_nested_concats_keeps_a_scale_of_its_own(
    graphs: tuple[Path, Path, np.ndarray],
):
    graph = onnx.load(graphs[1]).graph
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    concats = [node for node in graph.node if node.op_type == "Concat"]
    inner, outer = ([made_by[name] for name in node.input] for node in concats)
    assert inner == ["DequantizeLinear", "DequantizeLinear"]
    assert outer == ["Concat", "DequantizeLinear"]


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Hardswish, nn.LeakyReLU])
def test_an_activation_runs_in_the_kernel_of_the_convolution_before_it(
    activation: type[nn.Module], tmp_path: Path
):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), activation(), nn.Conv2d(16, 16, 3), activation()
    model = nn.Sequential(*layers, nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(8 * 100, 5))
    path = export_onnx(model.eval(), torch.randn(1, 3, 16, 16), tmp_path / "fp32.onnx")
    images = np.random.default_rng(0).standard_normal((32, 3, 16, 16)).astype(np.float32)
    quantize_onnx(path, [images], tmp_path / "int8.onnx", "openvino", method="plain")
    parts = executed(tmp_path / "int8.onnx")
    layers = [part for part in parts if part["layerType"] == "Convolution"]
    assert [part["runtimePrecision"] for part in layers] == ["u8"] * 3
    assert not [part for part in parts if part["layerType"] in ("Subgraph", "Eltwise")]
    reference = answers(onnx.load(path), {"input": images})
    written = answers(onnx.load(tmp_path / "int8.onnx"), {"input": images})
    assert sqnr_db(reference, written) > 30


def test_a_shortcut_padded_with_zeros_stays_as_it_was_quantized(tmp_path: Path):
    """ResNet-20's shortcuts: every second pixel, and zeros for the channels that are missing."""
    torch.manual_seed(0)
    network, images = CifarResNet(8).eval(), np.random.default_rng(0)
    fp32 = export_onnx(network, torch.randn(1, 3, 16, 16), tmp_path / "fp32.onnx")
    batches = [images.standard_normal((32, 3, 16, 16)).astype(np.float32)]
    out = tmp_path / "int8.onnx"
    quantize_onnx(fp32, batches, out, "openvino", method="plain")
    assert lint_onnx(out, target="openvino") == []
    parts = executed(out)
    pads = [part for part in parts if part["layerType"] == "Pad"]
    assert pads and {part["runtimePrecision"] for part in pads} == {"u8"}
    rounded = [p["originalLayersNames"] for p in parts if p["layerType"] == "FakeQuantize"]
    assert rounded == ["input_q"]
    slices = [part for part in parts if part["layerType"] == "StridedSlice"]
    assert len(slices) == len(pads) == 2  # of rows and columns at once


@pytest.mark.parametrize("name", ["residual", "concat", "dense", "shuffle", "depthwise"])
def test_openvino_answers_the_same_without_repeated_pairs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = GRAPHS[name]()
    feed = images(model, 8)
    plan = make_quant_plan(calibrate(model, [feed]), target="openvino")
    written = [write_qdq(model, plan)]
    monkeypatch.setattr(placement, "_drop_repeated", lambda graph, found: None)
    written.append(write_qdq(model, plan))
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    found = []
    for graph in written:
        onnx.save(graph, tmp_path / "int8.onnx")
        found.append(list(compiled(tmp_path / "int8.onnx", exact)(feed).values()))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
