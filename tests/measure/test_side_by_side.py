"""Real artifacts of a linear network on the bundled digits, timed and compared."""

from __future__ import annotations

import io
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import saved
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from compress.cli import app
from compress.data import Dataset, load_data, parse_reference
from compress.errors import CompressError, EngineError, UnknownNameError, UsageError
from compress.evaluate.predictions import Predictions
from compress.graph.metadata import stamp
from compress.measure import Timing
from compress.measure.artifacts import candidates_of
from compress.measure.benchmark import bench_artifacts
from compress.measure.compare import chain, compare_artifacts

QUICK = Timing(
    seconds=0.05, block_seconds=0.005, settle_seconds=0.001, min_rounds=10, warmup_seconds=0.01
)


@cache
def digits() -> Dataset:
    return load_data(parse_reference("digits"))


@cache
def fitted() -> tuple[np.ndarray, np.ndarray]:
    """Weights of a linear network that knows most digits."""
    from sklearn.linear_model import RidgeClassifier

    images, labels = zip(*digits().batches("train"), strict=True)
    flat = np.concatenate([batch.flatten(1).numpy() for batch in images])
    found = RidgeClassifier(alpha=1000.0).fit(flat, np.concatenate([t.numpy() for t in labels]))
    return found.coef_.astype(np.float32), found.intercept_.astype(np.float32)


def linear(
    noise: float = 0.0, step: float | None = None, batch: Any = "batch", outputs: int = 1
) -> onnx.ModelProto:
    """Flatten and Gemm; with ``step``, its input is quantized to uint8 in such steps."""
    weight, bias = fitted()
    weight = weight + noise * weight.std() * np.random.default_rng(0).normal(size=weight.shape)
    constants = {"w": weight.astype(np.float32), "b": bias}
    before = "input"
    nodes = []
    if step is not None:
        constants |= {"s": np.float32(step), "z": np.uint8(128)}
        nodes.append(helper.make_node("QuantizeLinear", ["input", "s", "z"], ["q"]))
        nodes.append(helper.make_node("DequantizeLinear", ["q", "s", "z"], ["dq"]))
        before = "dq"
    nodes.append(helper.make_node("Flatten", [before], ["flat"]))
    nodes.append(helper.make_node("Gemm", ["flat", "w", "b"], ["logits"], transB=1, name="head"))
    ends = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 10])]
    if outputs == 2:
        nodes.append(helper.make_node("Softmax", ["logits"], ["chances"]))
        ends.append(helper.make_tensor_value_info("chances", TensorProto.FLOAT, [batch, 10]))
    height, width = digits().image_size
    shape = [batch, digits().channels, height, width]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        ends,
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    return model


def printed(renderable: Any) -> str:
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=200).print(renderable)
    return text.getvalue()


def test_bench_measures_every_artifact_on_every_runtime_and_batch(tmp_path: Path) -> None:
    paths = saved(tmp_path, fp32=linear(), int8=linear(step=0.02))
    found = bench_artifacts(
        paths, runtimes=["onnxruntime"], batches=(1, 4), threads=1, dataset=digits(), timing=QUICK
    )
    assert [(row["artifact"], row["batch"]) for row in found.rows] == [
        ("fp32.onnx", 1),
        ("int8.onnx", 1),
        ("fp32.onnx", 4),
        ("int8.onnx", 4),
    ]
    for row in found.rows:
        assert row["throughput_ips"] == pytest.approx(
            1000 * row["batch"] / row["latency_ms_mean"], rel=1e-6
        )
        assert row["peak_memory_mib"] >= 0
        assert row["top1_pct"] > 80
    assert found.rows[0]["verdict"] == "reference"
    assert found.rows[1]["agreement_pct"] > 90
    json.dumps(found.to_json(), allow_nan=False)
    text = printed(found.table())
    assert "int8.onnx" in text
    assert "p50 ms" in text


def test_bench_goes_on_without_what_cannot_be_opened(tmp_path: Path) -> None:
    good, fixed = saved(tmp_path, good=linear(), fixed=linear(batch=2))
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"nothing")
    found = bench_artifacts([good, fixed, broken], threads=1, timing=QUICK)
    assert [row["artifact"] for row in found.rows] == ["good.onnx"]
    assert "takes batches of 2 only" in found.skipped["fixed.onnx, batch 1"]
    assert "no ONNX file" in found.skipped["broken.onnx, batch 1"]
    assert "not measured: broken.onnx" in printed(found.table())


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        (lambda folder: bench_artifacts([]), UsageError, "0 artifacts"),
        (lambda folder: bench_artifacts([folder], batches=(0,)), UsageError, r"batch sizes \[0\]"),
        (lambda folder: bench_artifacts([folder / "no.onnx"]), EngineError, "no such file"),
        (
            lambda folder: bench_artifacts(saved(folder, a=linear()), runtimes=["onnxrt"]),
            UnknownNameError,
            "onnxruntime",
        ),
    ],
)
def test_what_cannot_be_measured_is_explained(
    tmp_path: Path, attempt: Any, error: type[CompressError], message: str
) -> None:
    with pytest.raises(error, match=message):
        attempt(tmp_path)


def test_when_nothing_can_be_measured_the_error_says_why(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(EngineError, match=r"broken\.onnx, batch 1: .*no ONNX file"):
        bench_artifacts([tmp_path / "broken.onnx"], timing=QUICK)


def test_names_tell_artifacts_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        onnx.save(linear(), tmp_path / name / "model.onnx")
    paths = [tmp_path / "a/model.onnx", tmp_path / "b/model.onnx", tmp_path / "a/model.onnx"]
    assert [candidate.name for candidate in candidates_of(paths)] == [
        "a/model.onnx",
        "b/model.onnx",
        "a/model.onnx #2",
    ]
    names = [candidate.name for candidate in candidates_of(paths[:1], ["onnxruntime", "openvino"])]
    assert names == ["model.onnx on onnxruntime", "model.onnx on openvino"]


def test_compare_blames_quantization_and_not_the_engine(tmp_path: Path) -> None:
    found = compare_artifacts(
        *saved(tmp_path, fp32=linear(), int8=linear(step=0.5)), digits(), threads=1
    )
    blame = {link.error: link.added for link in found.steps}
    assert list(blame) == ["", "quantization", "engine"]
    assert blame["quantization"] is not None
    assert blame["engine"] is not None
    assert blame["quantization"].agreement_pct < 100
    assert blame["engine"].agreement_pct > blame["quantization"].agreement_pct
    assert found.answers.images == len(digits().splits["test"])
    json.dumps(found.to_json(), allow_nan=False)
    text = printed(found.table())
    assert "quantization" in text
    assert "was right, now wrong" in text


def test_the_chain_names_the_step_that_erred() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 5, 300)
    logits = generator.normal(size=(300, 5)).astype(np.float32)
    logits[np.arange(300), labels] += 2
    moved = logits + generator.normal(size=logits.shape).astype(np.float32)
    plain, quantized = Predictions(logits, labels), Predictions(moved, labels)
    steps = chain(
        [
            ("torch fp32", "", plain),
            ("onnxruntime fp32", "export", plain),
            ("onnxruntime Q/DQ", "quantization", quantized),
            ("openvino int8", "engine", quantized),
        ]
    )
    blame = {step.error: step.added.agreement_pct for step in steps if step.added}
    assert blame["export"] == blame["engine"] == 100
    assert blame["quantization"] < 100
    assert steps[-1].change["agreement_pct"] == blame["quantization"]
    assert steps[0].added is None
    json.dumps([step.to_json() for step in steps], allow_nan=False)


def test_compare_finds_the_first_tensor_on_request(tmp_path: Path) -> None:
    old, new = saved(tmp_path, old=linear(), new=linear(noise=0.5))
    found = compare_artifacts(old, new, digits(), bisect=True, threads=1)
    assert found.bisection is not None
    assert found.bisection.first is not None
    assert found.bisection.first.name == "logits"
    assert "First tensor below 60 dB: logits (Gemm)" in printed(found.table())
    assert found.to_json()["bisect"]["first"]["name"] == "logits"


def test_compare_of_one_file_with_itself_finds_nothing(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, m=linear(outputs=2))
    found = compare_artifacts(path, path, digits(), bisect=True, limit=50, threads=1)
    assert found.answers.images == 50
    assert found.answers.agreement_pct == 100
    assert set(found.outputs["outputs"]) == {"logits", "chances"}
    assert found.bisection is not None
    assert found.bisection.first is None
    assert "No tensor falls below" in printed(found.table())


def test_a_graph_that_normalizes_by_itself_gets_images_as_they_are(tmp_path: Path) -> None:
    """uint8 NHWC in: the same answers as normalized float NCHW."""
    plain = linear()
    raw = linear()
    mean, std = (
        np.array(v, np.float32).reshape(1, -1, 1, 1) for v in (digits().mean, digits().std)
    )
    height, width = digits().image_size
    raw.graph.input[0].CopyFrom(
        helper.make_tensor_value_info(
            "image", TensorProto.UINT8, ["batch", height, width, digits().channels]
        )
    )
    front = [
        helper.make_node("Transpose", ["image"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["nchw"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["float", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["input"]),
    ]
    nodes = [*front, *raw.graph.node]
    del raw.graph.node[:]
    raw.graph.node.extend(nodes)
    for name, value in (("mean", 255 * mean), ("std", 255 * std)):
        raw.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    found = compare_artifacts(*saved(tmp_path, plain=plain, raw=raw), digits(), threads=1)
    assert found.answers.agreement_pct == 100
    assert found.answers.logits.max_abs_diff < 1e-4


def test_what_cannot_be_compared_is_explained(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, m=linear())
    with pytest.raises(UsageError, match=r"--bisect cannot read .* Expected two ONNX files"):
        compare_artifacts(path, tmp_path, digits(), bisect=True)
    few = linear()
    few.graph.initializer[0].CopyFrom(numpy_helper.from_array(fitted()[0][:5], "w"))
    few.graph.initializer[1].CopyFrom(numpy_helper.from_array(fitted()[1][:5], "b"))
    few.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 5
    (other,) = saved(tmp_path, few=few)
    told = r"few\.onnx: labels reach from 0 to 9, .* 5 class outputs"
    with pytest.raises(CompressError, match=told):
        compare_artifacts(path, other, digits())


def test_a_candidate_that_cannot_be_opened_is_told_before_any_image_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = saved(tmp_path, fp32=linear())
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(path.read_bytes()[:100])
    ran: list[Any] = []
    monkeypatch.setattr("compress.evaluate.of_task", lambda *a, **_: ran.append(a))
    with pytest.raises(CompressError, match=r"broken\.onnx"):
        compare_artifacts(path, broken, digits())
    assert not ran


def with_facts(model: onnx.ModelProto, **facts: Any) -> onnx.ModelProto:
    stamp(model, facts)
    return model


def accuracy_of(path: Path, dataset: Dataset) -> float:
    """Top-1 by ONNX Runtime alone, percent."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    right = [
        (session.run(None, {"input": images.numpy()})[0].argmax(1) == labels.numpy())
        for images, labels in dataset.batches("test")
    ]
    return 100 * float(np.concatenate(right).mean())


def command(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        app.main()
    return ended.value.code


def test_compare_and_bench_feed_what_the_files_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"mean": [0.1], "std": [0.9]}  # not those of the data
    old, new = saved(
        tmp_path, old=with_facts(linear(), **facts), new=with_facts(linear(noise=0.5), **facts)
    )
    dataset = load_data(parse_reference("digits", mean=(0.1,), std=(0.9,)))
    expected = [accuracy_of(path, dataset) for path in (old, new)]
    assert accuracy_of(old, digits()) != expected[0]
    out = tmp_path / "x.json"
    assert command(monkeypatch, "compare", old, new, "--data", "digits", "--json", out) == 0
    change = json.loads(out.read_text())["top1_change_pct"]
    assert change == pytest.approx(expected[1] - expected[0])
    assert command(monkeypatch, "bench", old, new, "--data", "digits", "--json", out) == 0
    rows = json.loads(out.read_text())["results"]
    assert [row["top1_pct"] for row in rows] == pytest.approx(expected)


def test_flags_that_contradict_a_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    old, new = saved(tmp_path, old=with_facts(linear(), mean=[0.1], std=[0.9]), new=linear())
    code = command(monkeypatch, "compare", old, new, "--data", "digits", "--mean", "0.5")
    assert code == 2
    assert "mean is 0.5 by the data's settings, and 0.1 by the file" in capsys.readouterr().err


def detector(layout: str, noise: float = 0.0) -> onnx.ModelProto:
    """Two outputs of a network that names no class, for digits in either order of dimensions."""
    weight = np.random.default_rng(0).normal(size=(6, 1, 3, 3)).astype(np.float32)
    weight += noise * np.random.default_rng(1).normal(size=weight.shape).astype(np.float32)
    shape = ["n", 1, 8, 8] if layout == "NCHW" else ["n", 8, 8, 1]
    first = (
        []
        if layout == "NCHW"
        else [helper.make_node("Transpose", ["input"], ["t"], perm=[0, 3, 1, 2])]
    )
    nodes = [
        *first,
        helper.make_node("Conv", ["input" if layout == "NCHW" else "t", "w"], ["maps"]),
        helper.make_node("Sigmoid", ["maps"], ["scores"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 6, 6, 6])
        for name in ("maps", "scores")
    ]
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        ends,
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    return model


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_networks_that_name_no_class_are_compared_by_their_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    old, new = saved(tmp_path, old=detector(layout), new=detector("NCHW", noise=0.01))
    out = tmp_path / "x.json"
    assert command(monkeypatch, "compare", old, new, "--data", "digits", "--json", out) == 0
    told = json.loads(out.read_text())
    images = digits().normalize(digits().with_fewer("test", 64).splits["test"].take(range(64)))
    answers = []
    import onnxruntime as ort

    for path, is_last in ((old, layout == "NHWC"), (new, False)):
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        fed = images.permute(0, 2, 3, 1) if is_last else images
        answers.append(session.run(None, {"input": fed.contiguous().numpy()}))
    for name, before, after in zip(("maps", "scores"), *answers, strict=True):
        noise = 10 * np.log10((before**2).sum() / ((after - before) ** 2).sum())
        assert told["outputs"][name]["sqnr_db"] == pytest.approx(noise, abs=0.01)
    assert "top1_change_pct" not in told
    assert command(monkeypatch, "bench", old, new, "--data", "digits", "--json", out) == 0
    rows = json.loads(out.read_text())["results"]
    assert rows[1]["outputs"]["maps"]["sqnr_db"] == pytest.approx(
        told["outputs"]["maps"]["sqnr_db"]
    )


def test_bisection_looks_into_networks_of_either_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = saved(tmp_path, old=detector("NHWC"), new=detector("NHWC", noise=0.3))
    out = tmp_path / "x.json"
    options = ("--data", "digits", "--bisect", "--json", out)
    assert command(monkeypatch, "compare", old, new, *options) == 0
    assert json.loads(out.read_text())["bisect"]["first"]["name"] == "maps"


def test_stages_and_runs_stand_for_their_files(tmp_path: Path) -> None:
    stage = tmp_path / "run" / "01-quantize"
    stage.mkdir(parents=True)
    (tmp_path / "run" / "00-original").mkdir()
    saved(tmp_path / "run" / "00-original", model=linear())
    onnx.save(linear(noise=0.1), stage / "model.onnxruntime.onnx")
    for path in (stage, tmp_path / "run"):
        assert [r.path for r in candidates_of([path])] == [stage / "model.onnxruntime.onnx"]
    onnx.save(linear(noise=0.1), stage / "model.openvino.onnx")
    assert len(candidates_of([stage])) == 2
    with pytest.raises(CompressError, match="holds 2 networks"):
        compare_artifacts(stage, stage, digits())


COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255))


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three colours, with masks that say which is where."""
    root, random = tmp_path_factory.mktemp("coloured"), np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 6)):
        for kind in ("images", "masks"):
            (root / part / kind).mkdir(parents=True)
        for n in range(count):
            mask = random.integers(0, 3, (4, 4)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
            pixels = np.array(COLOURS, np.uint8)[mask]
            Image.fromarray(pixels).save(root / part / "images" / f"{n}.png")
            Image.fromarray(mask).save(root / part / "masks" / f"{n}.png")
    return root


def segmenter(wrong: bool = False) -> onnx.ModelProto:
    """Return the class of each pixel by its colour; ``wrong``: never the third."""
    weight = np.eye(3, dtype=np.float32)[:, :, None, None]
    weight[2] *= not wrong
    bias = np.array([0, 0, -9 if wrong else 0], np.float32)
    shape = [TensorProto.FLOAT, ["n", 3, 16, 16]]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["input", "w", "b"], ["out"], name="head")],
        "segmenter",
        [helper.make_tensor_value_info("input", *shape)],
        [helper.make_tensor_value_info("out", *shape)],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    facts = {"mean": [0.0] * 3, "std": [1.0] * 3, "image_size": [16, 16]}
    return with_facts(model, **facts)


@pytest.mark.parametrize("task", [None, "segmentation"])
def test_two_files_are_compared_by_the_task_of_the_labels(
    tmp_path: Path, coloured: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, task: str | None
) -> None:
    pair, out = saved(tmp_path, old=segmenter(), new=segmenter(wrong=True)), tmp_path / "x.json"
    chosen = ("--task", task) if task else ()
    data = ("--data", f"masks:{coloured}", *chosen, "--json", out)
    assert command(monkeypatch, "compare", *pair, *data) == 0
    told = json.loads(out.read_text())
    masks = [np.array(Image.open(file)) for file in sorted((coloured / "test/masks").iterdir())]
    right = 100 * np.mean([mask != 2 for mask in masks])  # the second never says 2
    before, plain, after = told["chain"]
    assert before["metrics"]["miou"]["value"] == 100
    assert after["metrics"]["pixel_accuracy"]["value"] == pytest.approx(right)
    assert told["changes"]["pixel_accuracy"]["value"] == pytest.approx(right - 100)
    assert plain["metrics"] == after["metrics"] and plain["error"] == "conversion"
    assert told["images"] == 6 and told["agreement_pct"] < 100 and "skipped" not in told
    shown = capsys.readouterr().out
    assert "mIoU, %" in shown and "worse" in shown


def test_a_task_compares_predictions_for_images_without_labels(
    tmp_path: Path, coloured: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pair, out = saved(tmp_path, old=segmenter(), new=segmenter(wrong=True)), tmp_path / "x.json"
    data = ("--data", f"images:{coloured}/test/images", "--task", "segmentation", "--json", out)
    assert command(monkeypatch, "compare", *pair, *data) == 0
    told = json.loads(out.read_text())
    assert 0 < told["agreement_pct"] < 100 and "sqnr_db" in told["outputs"]["out"]
    assert "the images have no labels" in told["chain"][0]["skipped"]["accuracy"]
    assert "agreement" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "task", "said"),
    [
        ("masks", "segmentatoin", "Did you mean 'segmentation'?"),
        ("masks", "detection", "the labels are of the form 'mask', the task needs 'boxes'"),
        ("digits", "classification", "the network's outputs"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(
    tmp_path: Path, coloured: Path, monkeypatch: Any, capsys: Any, data: str, task: str, said: str
) -> None:
    pair = saved(tmp_path, old=detector("NCHW"), new=detector("NCHW"))
    given = "digits" if data == "digits" else f"masks:{coloured}"
    code = command(monkeypatch, "compare", *pair, "--data", given, "--task", task)
    assert (code, said in capsys.readouterr().err) == (2, True)
