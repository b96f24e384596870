"""One pass, flat memory, any order; and every way in which a file or images can be wrong."""

from __future__ import annotations

import tracemalloc

import numpy as np
import onnx
import pytest
from int8_graphs import GRAPHS, Sketch, images, residual, run

from compress.errors import QuantizationError, UnknownNameError, UsageError
from compress.graph.model import GraphIndex
from compress.graph.weightless import is_large, skeleton
from compress.qdq import prepare, read_onnx
from compress.qdq.plan import TARGETS
from compress.quantize import calibrate, make_quant_plan, quantize_onnx
from compress.quantize.calibration import SAMPLE, observed_tensors
from compress.quantize.equalization import scalable
from compress.quantize.images import CalibrationImages
from compress.quantize.observers import Histogram
from compress.quantize.observers.minmax import Minmax
from compress.quantize.sessions import session_of, with_outputs


@pytest.mark.parametrize("name", ["residual", "squeeze_excite", "two_inputs"])
def test_statistics_are_those_of_the_tensors(name):
    model = prepare(GRAPHS[name]())
    feed = images(model, 12)
    statistics = calibrate(model, [feed])
    names = observed_tensors(model, TARGETS)
    inside = [n for n in names if n not in feed]
    values = dict(zip(inside, run(with_outputs(model, inside), feed, names=inside), strict=True))
    assert set(statistics.tensors) == set(names) and statistics.images == 12
    for tensor, value in (values | {n: feed[n] for n in feed if n in names}).items():
        histogram = statistics.tensors[tensor]
        assert histogram.low == pytest.approx(value.min(), abs=1e-5)
        assert histogram.high == pytest.approx(value.max(), abs=1e-5)
        assert histogram.total == value.size <= 12 * SAMPLE


def test_the_same_images_in_any_order_and_batches_give_the_same_plan():
    model = residual()
    feed = images(model, 24)["input"]
    order = np.random.default_rng(0).permutation(24)
    plans = [
        make_quant_plan(calibrate(model, batches)).to_json()
        for batches in ([feed], [feed[order]], [feed[order][:5], feed[order][5:]])
    ]
    assert plans[0] == plans[1] == plans[2]


def test_a_stream_gives_what_a_list_gives():
    model = residual()
    feed = images(model, 24)["input"]
    listed = make_quant_plan(calibrate(model, [feed]))
    streamed = make_quant_plan(calibrate(model, lambda: iter(np.array_split(feed, 4))))
    assert streamed.activations.keys() == listed.activations.keys()
    for name, found in streamed.activations.items():
        assert found.high == pytest.approx(listed.activations[name].high, rel=0.02)


@pytest.mark.parametrize("parts", [24, 5, 1])
def test_a_stream_is_cut_into_equal_batches(parts):
    model = residual()
    feed = images(model, 24)["input"]
    stream = CalibrationImages(
        GraphIndex(prepare(model)), lambda: iter(np.array_split(feed, parts))
    )
    batches = [batch["input"] for batch in stream.feeds(7)]
    assert [len(batch) for batch in batches] == [7, 7, 7, 3]
    assert np.array_equal(np.concatenate(batches), feed)


def test_large_weights_are_handed_to_onnxruntime_beside_the_graph():
    s = Sketch((24, 6, 6))
    s.head(s.relu(s.conv("input", "c", 24, 24)), 24)
    model = s.model()
    weight = next(t for t in model.graph.initializer if t.name == "c_w")
    assert is_large(weight) and len(skeleton(model).graph.initializer) == 3
    feed = images(model, 3)
    (found,) = session_of(model).run(None, feed)
    assert np.array_equal(found, run(model, feed)[0])


def test_memory_does_not_grow_with_the_number_of_images():
    model = prepare(residual())
    feed = images(model, 8)["input"]

    def peak(batches: int) -> int:
        tracemalloc.start()
        calibrate(model, lambda: (feed for _ in range(batches)))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1)
    assert peak(40) < peak(4) * 1.1


def test_extremes_alone_serve_minmax_only():
    statistics = calibrate(residual(), [images(residual())], histograms=False)
    full = calibrate(residual(), [images(residual())])
    assert make_quant_plan(statistics, observer="minmax") == make_quant_plan(
        full, observer="minmax"
    )
    with pytest.raises(UsageError, match="observer 'mse' needs histograms"):
        make_quant_plan(statistics, observer="mse")


def test_a_range_is_chosen_once_for_each_histogram(monkeypatch):
    prepared = prepare(residual())
    scaled = scalable(GraphIndex(prepared), observed_tensors(prepared, TARGETS))
    statistics = calibrate(prepared, [images(prepared)], by_channel=scaled)
    asked = []
    choose = Minmax.__call__

    def counted(self, seen, *, symmetric):
        asked.append((seen, symmetric))
        return choose(self, seen, symmetric=symmetric)

    monkeypatch.setattr(Minmax, "__call__", counted)
    plain = make_quant_plan(statistics, observer="minmax")
    one = scaled[0]
    factors = {one: np.full(len(statistics.by_channel[one].low), 0.5)}
    moved = [
        make_quant_plan(statistics.of(scaled).divided(factors), target=target, observer="minmax")
        for target in TARGETS
    ]
    assert len(asked) == len(set(asked)) == 2 * (len(statistics.tensors) + 1)
    for plan in moved:
        assert plan.activations[one].high == pytest.approx(2 * plain.activations[one].high)
        assert all(plan.activations[name] == plain.activations[name] for name in scaled[1:])


def test_a_fixed_batch_is_filled_up_and_not_counted_twice():
    fixed = Sketch((3, 8, 8), batch=5)
    fixed.head(fixed.relu(fixed.conv("input", "c", 3, 4)), 4)
    free = Sketch((3, 8, 8))
    free.head(free.relu(free.conv("input", "c", 3, 4)), 4)
    feed = np.random.default_rng(0).standard_normal((13, 3, 8, 8)).astype(np.float32)
    one, other = (calibrate(s.model(), [feed]).tensors for s in (fixed, free))
    for name in one:
        assert one[name].total == other[name].total
        assert one[name].high == pytest.approx(other[name].high, rel=1e-5)


@pytest.mark.parametrize("opset", [11, 13, 21])
def test_old_and_new_opsets(opset, tmp_path):
    s = Sketch((3, 8, 8))
    s.head(s.relu(s.conv("input", "c", 3, 4)), 4)
    onnx.save(s.model(opset=opset), str(tmp_path / "m.onnx"))
    feed = images(s.model())
    quantize_onnx(tmp_path / "m.onnx", [feed["input"]], tmp_path / "q.onnx", method="plain")
    want = run(s.model(opset=opset), feed)[0]
    np.testing.assert_allclose(run(str(tmp_path / "q.onnx"), feed)[0], want, atol=0.1)


def broken_images(case: str):
    good = np.random.default_rng(0).standard_normal((16, 3, 16, 16)).astype(np.float32)
    spoiled = good.copy()
    spoiled[3, 1, 2, 2] = np.nan
    return {
        "few": [good[:5]],
        "none": [],
        "shape": [good[:, :, :8]],
        "rank": [good[0]],
        "type": [good.astype(np.float64)],
        "bytes": [(good * 50).astype(np.uint8)],
        "nan": [spoiled],
        "name": [{"picture": good}],
    }[case]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("few", "5 calibration images are too few"),
        ("none", "0 calibration images are too few"),
        ("shape", r"batch 0, input 'input': has shape \(16, 3, 8, 16\).*\(any, 3, 16, 16\)"),
        ("rank", r"has shape \(3, 16, 16\)"),
        ("type", "holds float64. Expected float32"),
        ("bytes", "holds uint8"),
        ("nan", "holds NaN or infinity"),
        ("name", "has inputs picture. Expected a dict with input"),
    ],
)
def test_images_that_do_not_fit(case, message, tmp_path):
    onnx.save(residual(), str(tmp_path / "m.onnx"))
    with pytest.raises(QuantizationError, match=message) as caught:
        quantize_onnx(tmp_path / "m.onnx", broken_images(case), tmp_path / "q.onnx")
    assert "m.onnx" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_images_that_were_not_normalized_are_told_with_numbers():
    pixels = np.random.default_rng(0).uniform(0, 255, (8, 3, 16, 16)).astype(np.float32)
    graph_images = images(residual())["input"]
    from compress.graph.model import GraphIndex

    with pytest.warns(UserWarning, match=r"range from 0\.\d+ to 2\d\d.*0 to 255"):
        CalibrationImages(GraphIndex(residual()), [pixels])
    with pytest.warns(UserWarning, match="divided by 255 twice"):
        CalibrationImages(GraphIndex(residual()), [graph_images * 1e-3])


def test_the_node_that_makes_nan_is_named():
    s = Sketch((3, 8, 8))
    x = s.relu(s.conv("input", "c", 3, 4))
    x = s.op("Log", [x], "log")
    s.head(s.conv(x, "d", 4, 4), 4)
    with pytest.raises(QuantizationError, match=r"tensor 'log', made by node 'log' \(Log\)"):
        calibrate(s.model(), [images(s.model())])


def damaged(folder, case: str):
    path = folder / "m.onnx"
    model = residual()
    if case == "absent":
        return path
    if case == "quantized":
        written = folder / "fp32.onnx"
        onnx.save(model, str(written))
        quantize_onnx(written, [images(model)], path, method="plain")
        return path
    if case == "nothing":
        s = Sketch((3, 8, 8))
        s.op("Relu", ["input"], "logits")
        onnx.save(s.model(), str(path))
        return path
    content = model.SerializeToString()
    path.write_bytes({"cut": content[:-700], "noise": b"\x07\xff" * 99, "empty": b""}[case])
    return path


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("absent", "no such file"),
        ("quantized", "quantized already: node .* is a (De)?[Qq]uantizeLinear"),
        ("nothing", "there is nothing to quantize"),
        ("cut", "is no ONNX file, or only a part of one"),
        ("noise", "is no ONNX file, or only a part of one"),
        ("empty", "holds no graph"),
    ],
)
def test_files_that_cannot_be_quantized(case, message, tmp_path):
    path = damaged(tmp_path, case)
    with pytest.raises(QuantizationError, match=message) as caught:
        quantize_onnx(path, [images(residual())], tmp_path / "q.onnx")
    assert "m.onnx" in str(caught.value) and not (tmp_path / "q.onnx").exists()


def test_a_weight_that_is_cut_short_is_named():
    s = Sketch((24, 6, 6))
    s.head(s.relu(s.conv("input", "c", 24, 24)), 24)
    model = s.model()
    weight = next(t for t in model.graph.initializer if t.name == "c_w")
    weight.raw_data = weight.raw_data[:-4]
    with pytest.raises(QuantizationError, match=r"'c_w' holds 20732 bytes, .* needs 20736"):
        prepare(model)


def test_external_data_outside_its_folder_is_refused(tmp_path):
    (tmp_path / "inner").mkdir()
    path = tmp_path / "inner" / "m.onnx"
    onnx.save(
        residual(), str(path), save_as_external_data=True, location="w.bin", size_threshold=16
    )
    assert read_onnx(path).graph.initializer[0].raw_data
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../w.bin"
    (tmp_path / "w.bin").write_bytes((tmp_path / "inner" / "w.bin").read_bytes())
    path.write_bytes(model.SerializeToString())
    with pytest.raises(QuantizationError, match=r"'\.\./w\.bin', outside the folder"):
        read_onnx(path)
    (tmp_path / "inner" / "w.bin").unlink()


def test_an_opset_too_old_to_convert():
    model = residual()
    model.opset_import[0].version = 1
    with pytest.raises(QuantizationError, match="opset 1 cannot be converted"):
        prepare(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "tflite"}, "no such target 'tflite'"),
        ({"method": "autos"}, "no such method 'autos'. Did you mean 'auto'"),
        ({"observer": "mmse"}, "no such observer 'mmse'. Did you mean 'mse'"),
        ({"exclude": ["c11"]}, "no such node 'c11'"),
    ],
)
def test_wrong_names(change, message, tmp_path):
    onnx.save(residual(), str(tmp_path / "m.onnx"))
    with pytest.raises(UnknownNameError, match=message):
        quantize_onnx(tmp_path / "m.onnx", [images(residual())], tmp_path / "q.onnx", **change)
    assert not (tmp_path / "q.onnx").exists()


def test_an_empty_histogram_is_of_no_value():
    assert Histogram().total == 0
