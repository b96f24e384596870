"""Layers that spoil an int8 network alone are found and left in float; in others none is sought."""

import onnx
import pytest
from int8_graphs import GRAPHS, Sketch, images
from test_methods import bench_of

from compress.graph.model import GraphIndex
from compress.qdq import prepare
from compress.quantize import calibrate, sparing
from compress.quantize.images import CalibrationImages
from compress.quantize.methods import plan_by
from compress.quantize.search import auto
from compress.quantize.sparing import spare_layers
from compress.quantize.workbench import Workbench


def spoiled():
    """Seven layers; the third is depthwise, and one of its input channels takes the whole range."""
    s = Sketch((3, 8, 8))

    def silu(name, tensor):
        gate = s.op("Sigmoid", [tensor], f"{name}_gate")
        return s.op("Mul", [tensor, gate], f"{name}_silu")

    x = silu("a", s.conv("input", "a", 3, 8, 3))
    x = silu("b", s.conv(x, "b", 8, 8, 1))
    x = silu("c", s.conv(x, "c", 8, 8, 3, group=8))
    for name in "def":
        x = silu(name, s.conv(x, name, 8, 8, 1))
    s.head(x, 8)
    model = s.model()
    for tensor in model.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor).copy()
        if tensor.name in ("b_w", "b_b", "b_bias"):
            value[0] *= 300
        elif tensor.name == "c_w":
            value[0] /= 300
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    return model


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_the_layer_that_spoils_the_network_is_left_in_float(target):
    bench = bench_of(spoiled(), target)
    plain = bench.ranges()
    spared = spare_layers(bench, plain)
    assert "c" in spared.float_nodes and len(spared.float_nodes) <= 2
    assert "dB closer without it" in spared.float_nodes["c"]
    gain = bench.judge(spared).weakest_db - bench.judge(plain).weakest_db
    assert gain > 5
    plan = auto(bench)
    assert "c" in plan.float_nodes
    assert any(note.startswith("c") and "in float:" in note for note in plan.notes)
    assert bench.judge(plan).weakest_db > bench.judge(spared).weakest_db - 0.1


def test_sizes_that_the_file_leaves_free_are_those_of_the_images():
    model = spoiled()
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_param = "any"
    prepared = prepare(model)
    feed = images(spoiled(), 32)
    calibration = CalibrationImages(GraphIndex(prepared), [feed])
    statistics = calibrate(prepared, calibration, targets=["openvino"])
    bench = Workbench(prepared, calibration, statistics, "openvino", None, {})
    spared = spare_layers(bench, bench.ranges())
    assert spared.float_nodes["c"].endswith("% of the MACs")


def test_nothing_is_looked_for_in_a_network_that_is_well(monkeypatch):
    monkeypatch.setattr(sparing, "_worst_layer", lambda *asked: pytest.fail("was looked for"))
    bench = bench_of(GRAPHS["residual"]())
    assert not plan_by("auto", bench).float_nodes


def test_layers_that_help_nothing_are_not_spared(monkeypatch):
    monkeypatch.setattr(sparing, "POOR_DB", 1000.0)
    bench = bench_of(GRAPHS["residual"]())
    plan = bench.ranges()
    spared = spare_layers(bench, plan)
    gains = [bench.judge(each).weakest_db for each in (plan, spared)]
    assert gains[1] - gains[0] >= 2 * len(spared.float_nodes)


def test_runs_cover_all_names_once():
    names = [str(n) for n in range(11)]
    for count in (1, 2, 8, 11, 20):
        runs = sparing._split(names, count)
        assert [name for run in runs for name in run] == names and all(runs)
