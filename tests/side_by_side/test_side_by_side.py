"""Real artifacts of a linear network on the bundled digits, timed and compared."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.data import Dataset, load_data, parse_reference
from compress.errors import CompressError, EngineError, UnknownNameError, UsageError
from compress.measure import Timing
from compress.side_by_side import bench_artifacts, compare_artifacts
from compress.side_by_side.artifacts import rivals_of

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


def saved(folder: Path, **models: onnx.ModelProto) -> list[Path]:
    for name, model in models.items():
        onnx.save(model, folder / f"{name}.onnx")
    return [folder / f"{name}.onnx" for name in models]


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
    assert [rival.name for rival in rivals_of(paths)] == [
        "a/model.onnx",
        "b/model.onnx",
        "a/model.onnx #2",
    ]
    names = [rival.name for rival in rivals_of(paths[:1], ["onnxruntime", "openvino"])]
    assert names == ["model.onnx on onnxruntime", "model.onnx on openvino"]


def test_compare_blames_quantization_and_not_the_engine(tmp_path: Path) -> None:
    found = compare_artifacts(
        *saved(tmp_path, fp32=linear(), int8=linear(step=0.5)), digits(), threads=1
    )
    blame = {link.error: link.added for link in found.links}
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
    assert set(found.outputs) == {"logits", "chances"}
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
    with pytest.raises(UsageError, match=r"two ONNX files for --bisect"):
        compare_artifacts(path, tmp_path, digits(), bisect=True)
    few = linear()
    few.graph.initializer[0].CopyFrom(numpy_helper.from_array(fitted()[0][:5], "w"))
    few.graph.initializer[1].CopyFrom(numpy_helper.from_array(fitted()[1][:5], "b"))
    few.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 5
    (other,) = saved(tmp_path, few=few)
    with pytest.raises(CompressError, match=r"few\.onnx: labels reach from 0 to 9, .* 5 classes"):
        compare_artifacts(path, other, digits())


def test_a_candidate_that_cannot_be_opened_is_told_before_any_image_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = saved(tmp_path, fp32=linear())
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(path.read_bytes()[:100])
    ran: list[Any] = []
    monkeypatch.setattr("compress.side_by_side.comparing.answers_of", lambda *a: ran.append(a))
    with pytest.raises(CompressError, match=r"broken\.onnx"):
        compare_artifacts(path, broken, digits())
    assert not ran
