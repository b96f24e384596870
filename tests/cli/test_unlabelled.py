"""An ONNX file and a folder of pictures: what most people hold who want int8."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from compress.graph.metadata import metadata

QUICK = ["--set", "measure.rounds=3", "--set", "measure.round_ms=5", "--method", "plain"]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(16):
        pixels = rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


def network(path, *, size=(12, 16), layout="NHWC", threshold=False, classes=None):
    """Write two convolutions as tf2onnx would, with two outputs or scores of classes."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.normal(0, 0.4, (8, 3, 3, 3)),
        "w2": rng.normal(0, 0.3, (6, 8, 3, 3)),
    }
    shape = ["n", *size, 3] if layout == "NHWC" else ["n", 3, *size]
    nodes = [helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2])]
    if layout == "NCHW":
        nodes = [helper.make_node("Identity", ["x"], ["t"])]
    nodes += [
        helper.make_node("Conv", ["t", "w1"], ["c1"], pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r"]),
        helper.make_node("Conv", ["r", "w2"], ["maps"], pads=[1] * 4),
        helper.make_node("Sigmoid", ["maps"], ["scores"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    ends = ["maps", "scores"]
    if threshold:
        inputs.append(helper.make_tensor_value_info("threshold", TensorProto.FLOAT, []))
        nodes.append(helper.make_node("Sub", ["scores", "threshold"], ["above"]))
        ends = ["above"]
    if classes:
        weights["w3"] = rng.normal(size=(6, classes))
        nodes += [
            helper.make_node("GlobalAveragePool", ["maps"], ["p"]),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("MatMul", ["f", "w3"], ["logits"]),
        ]
        ends = ["logits"]
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            inputs,
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ends],
            [numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 13)],
        ir_version=8,
    )
    onnx.save(made, path)
    return path


@pytest.mark.parametrize(
    ("made", "options"),
    [
        ({}, ()),
        ({"layout": "NCHW"}, ("--input-range", "0,255", "--color", "BGR")),
        ({"size": ("h", "w")}, ("--image-size", "20,24")),
        ({"size": ("h", "w")}, ("--input-size", "3,20,24", "--image-size", "20,24")),
        ({"threshold": True}, ("--input", "threshold=0.5")),
    ],
    ids=["NHWC", "pixels in BGR", "free sizes", "sizes fixed", "a threshold"],
)
def test_pictures_are_enough_to_quantize(compress, tmp_path, pictures, made, options):
    path = network(tmp_path / "x.onnx", **made)
    data = ("--data", f"images:{pictures}", "--target", "onnxruntime", "--out", tmp_path / "run")
    code, out, err = compress("quantize", path, *data, *options, *QUICK)
    assert code == 0, err
    int8 = tmp_path / "run" / "01-quantize" / "model.onnxruntime.onnx"
    assert str(int8) in out
    assert "the images have no labels" in out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    (result,) = report["variants"][1]["results"]
    assert result["sqnr_db"] > 20
    assert "top1_pct" not in result
    assert result["skipped"]["accuracy"] == "the images have no labels"
    assert "dB of the original's" in report["verdict"]
    assert metadata(onnx.load(int8))["color"] == ("BGR" if "BGR" in options else "RGB")


def test_what_was_noted_is_what_compare_feeds(compress, tmp_path, pictures):
    path = network(tmp_path / "x.onnx")
    run = tmp_path / "run"
    flags = ("--input-range", "0,255", "--mean", "127.5", "--std", "128", "--color", "BGR")
    data = ("--data", f"images:{pictures}")
    code, _, err = compress("quantize", path, *data, "--out", run, *flags, *QUICK)
    assert code == 0, err
    pair = (run / "00-original", run / "01-quantize")
    assert compress("compare", *pair, *data, "--json", tmp_path / "c.json")[0] == 0
    told = json.loads((tmp_path / "c.json").read_text())
    report = json.loads((run / "report.json").read_text())
    (result,) = report["variants"][1]["results"]
    assert told["sqnr_db"] == pytest.approx(result["sqnr_db"], abs=0.01)
    code, _, err = compress("compare", *pair, *data, "--color", "RGB")
    assert code == 2
    assert "color is RGB by the data's settings, and BGR by the file" in err


def test_labelled_images_calibrate_a_network_that_names_no_class(compress, tmp_path, caplog):
    path = network(tmp_path / "x.onnx", size=(8, 8))
    run = tmp_path / "run"
    code, out, err = compress("quantize", path, "--data", "digits", "--out", run, *QUICK)
    assert code == 0, err
    assert "outputs are compared with those of the original" in caplog.text
    assert "answers an image with 2 outputs" in json.loads((run / "report.json").read_text())[
        "variants"][1]["results"][0]["skipped"]["accuracy"]  # fmt: skip
    assert "Int8: " in out


def test_scores_of_classes_agree_without_labels(compress, tmp_path, pictures):
    path = network(tmp_path / "x.onnx", classes=5)
    run = tmp_path / "run"
    code, out, err = compress(
        "quantize", path, "--data", f"images:{pictures}", "--out", run, *QUICK
    )
    assert code == 0, err
    (result,) = json.loads((run / "report.json").read_text())["variants"][1]["results"]
    assert 0 <= result["agreement_pct"] <= 100
    assert "the same answer for" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--image-size", "32"), "image_size is 32,32 by the data's settings, and 12,16 by"),
        (("--layout", "NCHW"), "layout is NCHW by the data's settings, and NHWC by the file"),
        (("--input-range", "255,0"), "black below white"),
        (("--input", "threshold"), "NAME=0.5"),
        (("--set", "gates.metric_drop=1"), "the images have no labels. Use gates.agreement_pct"),
    ],
)
def test_what_cannot_be_right_is_told_before_any_work(
    compress, tmp_path, pictures, options, message
):
    path = network(tmp_path / "x.onnx")
    data = ("--data", f"images:{pictures}", "--out", tmp_path / "run")
    code, _, err = compress("quantize", path, *data, *options, *QUICK)
    assert code == 2
    assert message in err
    assert not (tmp_path / "run").exists()


def test_an_input_without_a_value_is_named(compress, tmp_path, pictures):
    path = network(tmp_path / "x.onnx", threshold=True)
    data = ("--data", f"images:{pictures}", "--out", tmp_path / "run")
    code, _, err = compress("quantize", path, *data, *QUICK)
    assert code == 2
    assert "the network also takes 'threshold' of shape ()" in err


def test_build_fixes_free_sizes(compress, tmp_path):
    path = network(tmp_path / "x.onnx", size=("h", "w"), layout="NCHW")
    pytest.importorskip("openvino")
    out = tmp_path / "x.xml"
    options = ("--runtime", "openvino", "--out", out, "--batch", "1,1,1")
    assert compress("build", path, *options, "--input-size", "3,20,24")[0] == 0
    from compress.runtimes import open_session

    with open_session(out, "openvino") as session:
        assert session.run(np.zeros((1, 3, 20, 24), np.float32))[0].shape == (1, 6, 20, 24)


def test_bench_takes_pictures(compress, tmp_path, pictures):
    path = network(tmp_path / "x.onnx")
    options = ("--data", f"images:{pictures}", "--json", tmp_path / "b.json")
    code, _, err = compress("bench", path, *options)
    assert code == 0, err
    (row,) = json.loads((tmp_path / "b.json").read_text())["results"]
    assert "top1_pct" not in row
    assert row["latency_ms_p50"] > 0


def test_int8_training_learns_from_the_original_where_there_are_no_labels(
    compress, tmp_path, pictures
):
    path = network(tmp_path / "x.onnx")  # whose layout is NHWC
    data = ("--data", f"images:{pictures}", "--target", "onnxruntime", "--out", tmp_path / "run")
    code, _, err = compress("quantize", path, *data, "--qat-epochs", "1", *QUICK)
    assert code == 0, err
    (result,) = json.loads((tmp_path / "run" / "report.json").read_text())["variants"][1]["results"]
    assert result["sqnr_db"] > 20
