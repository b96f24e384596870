"""Pixels that integers hold exactly: the same network, and nothing of the image rounded."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from int8_graphs import Sketch, residual, run
from onnx import numpy_helper

import compress
from compress.errors import QuantizationError
from compress.qdq import TARGETS, QuantPlan, prepare, write_qdq
from compress.qdq.plan import InputGrid
from compress.qdq.rewrite import apply_corrections
from compress.quantize import calibrate, make_quant_plan, pixels
from compress.quantize.pixels import with_exact_pixels
from compress.quantize.sessions import sqnr_db, with_outputs

MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def photos(count=24, *, mean=MEAN, std=STD, levels=256, seed=0):
    """Return pixels of ``levels`` values after normalization, (B, 3, 16, 16)."""
    values = np.random.default_rng(seed).integers(0, levels, (count, 16, 16, 3))
    values[0, 0, :2] = np.array([[0], [levels - 1]])
    shown = values.astype(np.float32) / np.float32(levels - 1)
    return np.ascontiguousarray(((shown - mean) / std).transpose(0, 3, 1, 2))


def planned(model, images, target="onnxruntime"):
    """Return the prepared graph, and a plan of it before and after."""
    prepared = prepare(model)
    statistics = calibrate(prepared, [images], targets=[target])
    plan = make_quant_plan(statistics, target=target, observer="minmax")
    return prepared, plan, with_exact_pixels(prepared, plan, {"input": images})


def answer(model, images, *names):
    """Return an output, or an inner tensor of that name."""
    shown = with_outputs(model, names) if names else model
    return run(shown, {"input": images}, names=list(names) or None)[0]


def around_the_first_pair(written, images):
    """Return what the first QuantizeLinear gets, and what the DequantizeLinear behind makes."""
    first = next(node for node in written.graph.node if node.op_type == "QuantizeLinear")
    behind = next(node for node in written.graph.node if first.output[0] in node.input)
    given = images if first.input[0] == "input" else answer(written, images, first.input[0])
    return given, answer(written, images, behind.output[0])


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_of_a_photo_is_rounded(target):
    images = photos()
    prepared, plain, plan = planned(residual(), images, target)
    given, held = around_the_first_pair(write_qdq(prepared, plain), images)
    assert np.abs(given - held).max() > 0.4 / 255 / STD.max()  # half a step, without it
    given, held = around_the_first_pair(write_qdq(prepared, plan), images)
    off = np.abs(given - held)[:, :, 1:-1, 1:-1].max()  # the zeros around it are no pixels
    assert plan.grids and off < 0.03 * plan.grids[0].step


@pytest.mark.parametrize("target", TARGETS)
def test_the_float_network_stays_the_same_one(target):
    images = photos()
    prepared, _, plan = planned(residual(), images, target)
    changed = apply_corrections(prepared, plan)
    others = np.random.default_rng(1).standard_normal(images.shape).astype(np.float32)
    assert [n.op_type for n in changed.graph.node[:3]] == ["Pad", "Mul", "Add"]
    for shown in (images, others):
        np.testing.assert_allclose(answer(changed, shown), answer(prepared, shown), atol=2e-5)


def test_one_step_for_all_channels_takes_an_addition():
    images = photos(mean=np.float32(0.5), std=np.float32(0.5))  # zero lies between two pixels
    prepared, _, plan = planned(residual(), images)
    ends = plan.grids
    assert not ends or "Mul" not in [
        n.op_type for n in apply_corrections(prepared, plan).graph.node
    ]
    _, _, signed = planned(residual(), images, "tensorrt")
    changed = apply_corrections(prepared, signed)
    kinds = [node.op_type for node in changed.graph.node[:2]]
    assert kinds == ["Add", "Conv"]  # half a step: what is padded stays zero
    inside = answer(changed, images, "stem")[:, :, 1:-1, 1:-1]
    wanted = answer(prepared, images, "stem")[:, :, 1:-1, 1:-1]
    np.testing.assert_allclose(inside, wanted, atol=2e-5)


@pytest.mark.parametrize(
    "images",
    [
        np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32),
        photos(mean=np.float32(0), std=np.float32(1)),  # 0 to 1: the range holds it as it is
    ],
)
def test_what_lies_on_no_grid_or_is_exact_is_left_alone(images):
    _, plain, plan = planned(residual(), images)
    assert plan is plain


def test_few_levels_leave_finer_steps_for_what_other_images_bring():
    low, step = pixels._steps_of(np.arange(17) / 16)
    assert step == pytest.approx(1 / 16 / 15) and low == pytest.approx(-7 * step)
    assert pixels._steps_of(np.arange(257.0)) is None
    assert pixels._steps_of(np.zeros(1)) is None
    assert pixels._steps_of(np.array([0.0, 1.0, 1.5, 2.2])) is None


def test_what_is_read_twice_grouped_or_behind_a_layer_is_left_alone():
    images = photos()
    s = Sketch((3, 16, 16))
    x = s.op("Add", [s.conv("input", "a", 3, 3), s.conv("input", "b", 3, 3)], "add")
    s.head(s.conv(s.relu(x), "c", 3, 8), 8)
    assert not planned(s.model(), images)[2].grids
    s = Sketch((3, 16, 16))
    s.head(s.conv(s.relu(s.conv("input", "a", 3, 3, group=3)), "c", 3, 8), 8)
    assert not planned(s.model(), images)[2].grids


def test_auto_holds_pixels_and_comes_closer(tmp_path, monkeypatch):
    images, others = photos(48), photos(32, seed=1)
    s = Sketch((3, 16, 16))
    s.conv(s.relu(s.conv("input", "stem", 3, 32)), "map", 32, 4)
    network = s.model(outputs=["map"])
    onnx.save(network, tmp_path / "net.onnx")
    wanted = answer(network, others)
    for target in TARGETS:
        plan = compress.quantize_onnx(tmp_path / "net.onnx", [images], tmp_path / "q.onnx", target)
        got = answer(onnx.load(tmp_path / "q.onnx"), others)
        assert not compress.lint_onnx(tmp_path / "q.onnx", target=target)
        with monkeypatch.context() as patch:
            patch.setattr(
                "compress.quantize.workbench.with_exact_pixels", lambda _prepared, plan, _feed: plan
            )
            bare = compress.quantize_onnx(
                tmp_path / "net.onnx", [images], tmp_path / "bare.onnx", target
            )
        without = answer(onnx.load(tmp_path / "bare.onnx"), others)
        assert plan.grids and not bare.grids
        assert sqnr_db(wanted, got) > sqnr_db(wanted, without) + 0.2, target
        assert QuantPlan.from_json(plan.to_json()) == plan
        again = write_qdq(network, plan, target)
        np.testing.assert_allclose(answer(again, others), got, atol=1e-6)


def test_a_layer_in_float_reads_what_it_did():
    prepared, _, plan = planned(residual(), photos())
    bare = apply_corrections(prepared, plan.keep_float(["stem"], "a test"))
    assert [n.op_type for n in bare.graph.node] == [n.op_type for n in prepared.graph.node]


def test_a_grid_of_another_network_is_refused():
    plan = QuantPlan("onnxruntime", grids=(InputGrid("stem", (0.1, 0.1), (0.0, 0.0), 0),))
    with pytest.raises(QuantizationError, match="does not fit node 'stem'"):
        apply_corrections(prepare(residual()), plan)
    uneven = dataclasses.replace(plan.grids[0], steps=(0.1,) * 3)
    with pytest.raises(QuantizationError, match="does not fit node 'stem'"):
        apply_corrections(prepare(residual()), plan.changed(grids=(uneven,)))
    absent = dataclasses.replace(plan.grids[0], node="nowhere")
    with pytest.raises(QuantizationError, match="does not fit node 'nowhere'"):
        apply_corrections(prepare(residual()), plan.changed(grids=(absent,)))


def test_a_layer_without_bias_gets_one():
    s = Sketch((3, 16, 16))
    weight = s.floats("stem_w", 8, 3, 3, 3)
    x = s.op("Conv", ["input", weight], "stem", kernel_shape=[3, 3])
    s.head(s.relu(x), 8)
    images = photos()
    prepared, _, plan = planned(s.model(), images)
    changed = apply_corrections(prepared, plan)
    assert "Pad" not in [node.op_type for node in changed.graph.node]
    stem = next(node for node in changed.graph.node if node.op_type == "Conv")
    (bias,) = (t for t in changed.graph.initializer if t.name == stem.input[2])
    assert numpy_helper.to_array(bias).shape == (8,)
    np.testing.assert_allclose(answer(changed, images), answer(prepared, images), atol=2e-5)


def test_pixels_that_the_network_normalizes_itself_are_held_too(tmp_path):
    s = Sketch((3, 16, 16))
    mean, std = (s.constant(n, v.reshape(1, 3, 1, 1)) for n, v in (("mean", MEAN), ("std", STD)))
    x = s.op("Div", [s.op("Sub", ["input", mean], "centred"), std], "normal")
    s.conv(s.relu(s.conv(x, "stem", 3, 32)), "map", 32, 4)
    onnx.save(s.model(outputs=["map"]), tmp_path / "net.onnx")
    images = photos(32, mean=np.float32(0), std=np.float32(1))
    plan = compress.quantize_onnx(tmp_path / "net.onnx", [images], tmp_path / "q.onnx")
    assert [grid.node for grid in plan.grids] == ["stem"]
    given, held = around_the_first_pair(onnx.load(tmp_path / "q.onnx"), images)
    assert np.abs(given - held)[:, :, 1:-1, 1:-1].max() < 0.03 * plan.grids[0].step
