"""Training of a simulated network through the project's one loop, into the writer's graph."""

import numpy as np
import onnx
import pictures
import pytest
from sketch import Sketch, run

from compress.errors import QuantizationError
from compress.qdq import ActivationRange, write_qdq
from compress.quantize import calibrate, make_quant_plan
from compress.quantize.qat import train_quantized
from compress.recipe.settings import QuantizeSettings, TrainSettings


@pytest.fixture(scope="module")
def dataset():
    return pictures.dataset()


def small_graph() -> onnx.ModelProto:
    s = Sketch(("batch", 3, 8, 8))
    y = s.add("Relu", s.conv("input", s.constant(s.kernel(8, 3, 3, 3)), s.constant(np.zeros(8))))
    y = s.add("Relu", s.conv(y, s.constant(s.kernel(8, 8, 3, 3)), s.constant(np.zeros(8))))
    y = s.add("Flatten", s.add("GlobalAveragePool", y))
    head = [s.constant(s.kernel(3, 8)), s.constant(np.zeros(3))]
    return s.model(s.add("Gemm", y, *head, transB=1))


def right_pct(model: onnx.ModelProto, dataset) -> float:
    right = [
        run(model, images.numpy()).argmax(1) == labels.numpy()
        for images, labels in dataset.batches("validation")
    ]
    return 100 * float(np.concatenate(right).mean())


@pytest.mark.parametrize("learned_scales", [False, True])
def test_written_graph_is_as_right_as_training_said(dataset, tmp_path, learned_scales):
    model = small_graph()
    calibration = [images.numpy() for images, _ in dataset.batches("calibration")]
    plan = make_quant_plan(calibrate(model, calibration), target="tensorrt")
    narrow = {
        name: ActivationRange(r.low / 2, r.high / 2, r.limit / 2)
        for name, r in plan.activations.items()
    }
    plan = plan.changed(activations=narrow)
    settings = QuantizeSettings(
        qat=TrainSettings(epochs=8, lr=0.03, batch_size=16, precision="fp32"),
        learned_scales=learned_scales,
    )
    before = right_pct(write_qdq(model, plan), dataset)
    trained = train_quantized(model, plan, dataset, settings, folder=tmp_path)
    after = right_pct(trained.written, dataset)
    assert after == pytest.approx(trained.result.last_top1_pct, abs=1e-6)
    assert after > before + 20
    again = write_qdq(trained.model, trained.plan)
    x = next(iter(dataset.batches("test")))[0].numpy()
    assert np.array_equal(run(again, x), run(trained.written, x))
    assert [n.op_type for n in again.graph.node] == [
        n.op_type for n in write_qdq(model, plan).graph.node
    ]
    moved = any(
        trained.plan.activations[name].limit != plan.activations[name].limit
        for name in plan.activations
    )
    assert moved == learned_scales


def test_plan_of_another_graph_is_refused(dataset):
    model = small_graph()
    calibration = [images.numpy() for images, _ in dataset.batches("calibration")]
    plan = make_quant_plan(calibrate(model, calibration), target="tensorrt").changed(activations={})
    with pytest.raises(QuantizationError, match="the plan has no range for tensor"):
        train_quantized(model, plan, dataset, QuantizeSettings())
