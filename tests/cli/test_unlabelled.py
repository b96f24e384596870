"""An ONNX file and a folder of pictures: what most people hold who want int8."""

import json
from functools import partial

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from compress.errors import RecipeError
from compress.graph.metadata import metadata
from compress.measure import Timing, benchmark
from compress.packages import is_installed
from compress.pipeline.task import prepared
from compress.recipe.loading import validate_recipe
from compress.runtimes._session import Session

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


def network(path, *, size=(12, 16), layout="NHWC", threshold=False, classes=None, channels=3):
    """Write two convolutions as tf2onnx would, with two outputs or scores of classes."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.normal(0, 0.4, (8, channels, 3, 3)),
        "w2": rng.normal(0, 0.3, (6, 8, 3, 3)),
    }
    shape = ["n", *size, channels] if layout == "NHWC" else ["n", channels, *size]
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
        ({"size": ("h", "w")}, ("--input-size", "3,20,24")),
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
    assert "not measured: accuracy: the images have no labels" in out
    assert ("the usual way is taken: RGB in 0..1" in err) == ("--input-range" not in options)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    (result,) = report["variants"][1]["results"]
    assert result["sqnr_db"] > 20
    assert "top1_pct" not in result
    assert result["skipped"]["accuracy"] == "the images have no labels"
    off = float(report["verdict"].partition("outputs ")[2].partition(" % off")[0])
    assert off == pytest.approx(100 * 10 ** (-result["sqnr_db"] / 20), rel=0.01)
    assert any("usual way" in each for each in report["cautions"]) == ("usual way" in err)
    told, page = ((tmp_path / "run" / f"report.{form}").read_text() for form in ("md", "html"))
    assert "## Agreement with the original" in told and "<h3>Agreement with the original" in page
    assert (
        "## Accuracy" not in told and "Accuracy</h3>" not in page and "against latency" not in page
    )
    assert metadata(onnx.load(int8))["color"] == ("BGR" if "BGR" in options else "RGB")


@pytest.mark.parametrize(
    ("size", "given", "assumed"),
    [
        (("h", "w"), {}, ["RGB in 0..1", "224 x 224 pixels"]),
        (("h", "w"), {"image_size": [20, 24]}, ["RGB in 0..1"]),
        ((12, 16), {"color": "BGR"}, ["BGR in 0..1"]),
        (("h", "w"), {"input_range": [0, 255]}, ["224 x 224 pixels"]),
        ((12, 16), {"mean": [0.5], "std": [0.5]}, []),
    ],
)
def test_what_nobody_said_of_the_images_is_told(tmp_path, pictures, size, given, assumed):
    path = network(tmp_path / "x.onnx", size=size)
    data = {"name": "images", "root": str(pictures)} | given
    content = {"model": {"name": str(path)}, "data": data, "stages": ["quantize"]}
    content["targets"] = [{"runtime": "onnxruntime"}]
    told = prepared(validate_recipe(content, where="test"))[0].assumed
    parts = told.split(") and ") if told else []
    assert [each.split(" less ")[0].split(" (")[0] for each in parts] == assumed


def test_what_nobody_said_of_grey_images_is_told_as_well(tmp_path, pictures):
    path = network(tmp_path / "x.onnx", channels=1, layout="NCHW")
    content = {"model": {"name": str(path)}, "data": {"name": "images", "root": str(pictures)}}
    content |= {"stages": ["quantize"], "targets": [{"runtime": "onnxruntime"}]}
    told = prepared(validate_recipe(content, where="test"))[0].assumed
    assert told == (
        "grey in 0..1 less 0.5, over 0.5 (data.mean, data.std, data.input_range and data.color of "
        "a recipe; --mean, --std, --input-range and --color)"
    )


@pytest.mark.parametrize(
    ("task", "gate", "said"),
    [
        ("restoration", "agreement_pct", "predictions are in dB, not in percent. Leave it out"),
        ("restoration", "metric_drop", "the images have no labels. Leave it out"),
        ("segmentation", "metric_drop", "the images have no labels. Use gates.agreement_pct"),
        ("segmentation", "agreement_pct", None),
    ],
)
def test_a_gate_that_no_figure_can_meet_is_refused(tmp_path, pictures, task, gate, said):
    content = {
        "model": {"name": str(network(tmp_path / "x.onnx"))},
        "data": {"name": "images", "root": str(pictures)},
        "stages": ["quantize"],
        "targets": [{"runtime": "onnxruntime"}],
        "task": task,
        "gates": {gate: 1},
    }
    if said is None:
        assert prepared(validate_recipe(content, where="test"))[1].agreement_unit == "pct"
        return
    with pytest.raises(RecipeError, match=f"gates.{gate}: .*{said}"):
        prepared(validate_recipe(content, where="test"))


@pytest.mark.skipif(not is_installed("tensorrt_rtx"), reason="tensorrt_rtx is not installed")
@pytest.mark.parametrize(("dims", "told"), [
    ((1, 12, 16, 3), "the engines are built"),
    (("n", "h", "w", 3), "free dimension besides the batch"),
])  # fmt: skip
def test_tensorrt_of_sizes_that_the_file_fixes_or_leaves_free(
    compress, tmp_path, pictures, dims, told
):
    model = onnx.load(network(tmp_path / "x.onnx"))
    shapes = [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)]
    del model.graph.input[:]
    model.graph.input.extend(shapes)
    onnx.save(model, tmp_path / "x.onnx")
    options = ("--target", "tensorrt", "--image-size", "12,16", "--out", tmp_path / "run")
    code, out, err = compress(
        "quantize", tmp_path / "x.onnx", "--data", f"images:{pictures}", *options, *QUICK
    )
    assert code == 0, err
    assert "model.tensorrt.onnx" in out
    assert (tmp_path / "run" / "01-quantize" / "model.tensorrt.onnx").is_file()
    skipped = json.loads((tmp_path / "run" / "report.json").read_text())["skipped"]
    assert any(told in why for why in skipped.values()) or is_installed("tensorrt"), skipped


def test_what_was_noted_is_what_compare_feeds(compress, tmp_path, pictures):
    path = network(tmp_path / "x.onnx")
    run = tmp_path / "run"
    flags = ("--input-range", "0,255", "--mean", "127.5", "--std", "128", "--color", "BGR")
    data = ("--data", f"images:{pictures}")
    code, _, err = compress("quantize", path, *data, "--out", run, *flags, *QUICK)
    assert code == 0, err
    pair = (run / "00-original", run / "01-quantize")
    report = json.loads((run / "report.json").read_text())
    (result,) = report["variants"][1]["results"]
    for each in (pair, (path, run)):  # of a run only the files know
        code, _, err = compress("compare", *each, *data, "--json", tmp_path / "c.json")
        assert code == 0, err
        told = json.loads((tmp_path / "c.json").read_text())
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
        (("--task", "detection"), "task detection does not fit the network's outputs: maps"),
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


@pytest.mark.parametrize(
    ("made", "options", "said"),
    [
        ({"size": ("h", "w")}, ("--image-size", "20,24"), {"x": [1, 20, 24, 3]}),
        (
            {"size": ("h", "w"), "layout": "NCHW"},
            ("--image-size", "20"),
            {"x": [1, 3, 20, 20]},
        ),
        (
            {"threshold": True},
            ("--input", "threshold=0.5"),
            {"threshold": 0.5, "x": [1, 12, 16, 3]},
        ),
    ],
    ids=["NHWC", "NCHW", "a threshold"],
)
def test_bench_without_pictures_makes_some_of_the_size_that_is_given(
    compress, tmp_path, monkeypatch, made, options, said
):
    path = network(tmp_path / "x.onnx", **made)
    fed = {}

    def run(session, *arrays):
        told = [list(array.shape) if array.ndim else array.item() for array in arrays]
        fed.update(zip((spec.name for spec in session.inputs), told, strict=True))
        return original(session, *arrays)

    original = Session.run
    monkeypatch.setattr(Session, "run", run)
    quick = Timing(0.05, 0.01, 0.0, 3, 0.01, 0.05)
    monkeypatch.setattr(
        benchmark, "bench_artifacts", partial(benchmark.bench_artifacts, timing=quick)
    )
    code, _, err = compress("bench", path, *options, "--json", tmp_path / "b.json")
    assert code == 0, err
    assert fed == said
    (row,) = json.loads((tmp_path / "b.json").read_text())["results"]
    assert row["peak_memory_mib"] >= 0
    assert not {"outputs", "top1_pct"} & row.keys()


@pytest.mark.parametrize(
    ("made", "options", "said"),
    [
        ({"size": ("h", "w")}, (), "Give the size of its images, --image-size H,W"),
        ({"size": ("h", "w")}, ("--mean", "0.5"), "Give --image-size SIDE, or H,W"),
        ({}, ("--image-size", "20,24"), "Leave --image-size out"),
        ({}, ("--layout", "NCHW"), "Leave --layout out"),
    ],
)
def test_bench_says_what_it_lacks(compress, tmp_path, made, options, said):
    code, _, err = compress("bench", network(tmp_path / "x.onnx", **made), *options)
    assert code == 2
    assert said in err


def test_int8_training_learns_from_the_original_where_there_are_no_labels(
    compress, tmp_path, pictures
):
    path = network(tmp_path / "x.onnx")  # whose layout is NHWC
    data = ("--data", f"images:{pictures}", "--target", "onnxruntime", "--out", tmp_path / "run")
    code, _, err = compress("quantize", path, *data, "--qat-epochs", "1", *QUICK)
    assert code == 0, err
    (result,) = json.loads((tmp_path / "run" / "report.json").read_text())["variants"][1]["results"]
    assert result["sqnr_db"] > 20


@pytest.mark.parametrize("task", [None, "classification"])
def test_pictures_are_enough_to_prune_and_to_learn_from_the_original(
    compress, tmp_path, pictures, task
):
    """Channels are scored, weights fitted and a student taught without one label."""
    run = tmp_path / "run"
    quick = ["--set", "measure.rounds=3", "--set", "measure.round_ms=5", "--image-size", "16"]
    quick += [] if task is None else ["--task", task]
    model = ("compress.models.cifar:resnet8", "--num-classes", "5", "--data", f"images:{pictures}")
    training = ("--epochs", "1", "--batch-size", "4")
    teacher = ("--teacher", "compress.models.cifar:resnet8", "--set",
               "stages.1.distill.teacher_num_classes=5")  # fmt: skip
    code, out, err = compress("prune", *model, *training, *teacher, "--out", run, *quick)
    assert code == 0, err
    report = json.loads((run / "report.json").read_text())
    assert [each["name"] for each in report["variants"]] == ["original", "pruned", "distilled"]
    before, *others = report["variants"]
    assert all(each["macs"] < 0.55 * before["macs"] for each in others)
    for each in others:
        (result,) = each["results"]
        assert result["sqnr_db"] > 0 and 0 <= result["agreement_pct"] <= 100
        assert result["skipped"]["accuracy"] == "the images have no labels"
        assert not {"top1_pct", "metrics"} & result.keys()
    assert "top-1" not in out


def test_a_whole_recipe_needs_no_labels(compress, tmp_path, pictures):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"""
model: {{name: "compress.models.cifar:unet", num_classes: 3, options: {{width: 4}}}}
data: {{name: images, root: "{pictures}", image_size: 16}}
task: segmentation
stages:
  - prune: {{keep_macs: 0.5}}
  - distill: {{epochs: 1, batch_size: 4}}
  - quantize: {{method: plain}}
targets: [{{runtime: onnxruntime}}]
measure: {{rounds: 3, round_ms: 5}}
gates: {{agreement_pct: 101}}
""")
    code, out, err = compress("run", recipe, "--out", tmp_path / "run")
    assert code == 1, err  # nothing agrees to 101 %
    assert "agreement with the original at least 101 %" in out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    last = report["variants"][-1]
    assert last["name"] == "int8-onnxruntime" and last["results"][0]["speedup"] > 0
    assert 0 < last["results"][0]["agreement_pct"] <= 100
    assert report["details"]["drawn"][0]["change"]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("train: {epochs: 1}", "the images have no labels to learn. Learn from a teacher: distill"),
        ("quantize: {max_drop: 1}", "max_drop: the images have no labels to measure it on"),
        ("quantize: {max_drop_pct: 1}", "max_drop_pct: this task does not name one class"),
        ("distill: {augment: {mixup: 0.2}}", "mixup and cutmix mix labels"),
    ],
)
def test_what_needs_labels_is_refused_without(compress, tmp_path, pictures, stage, message):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"""
model: {{name: "compress.models.cifar:resnet8"}}
data: {{name: images, root: "{pictures}", image_size: 16}}
stages: [{{{stage}}}]
""")
    code, _, err = compress("run", recipe, "--out", tmp_path / "run")
    assert code == 2 and message in err
