"""A run packed for a device runs there with numpy and one runtime, and nothing else."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from networks_of_tasks import FACTS, network
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from compress import statistics
from compress.errors import RunError, UsageError
from compress.packages import is_installed
from compress.pipeline import bundle
from compress.pipeline.bundle import on_device, write_bundle
from compress.report import numbers
from compress.tasks.detection import Detection

VARIANTS = [
    {"name": "original", "precision": "fp32", "target": None, "stage": "00-train"},
    {"name": "int8-onnxruntime", "precision": "int8", "target": "onnxruntime", "stage": "01-q"},
    {"name": "int8-tensorrt", "precision": "int8", "target": "tensorrt", "stage": "01-q"},
]


def linear(path: Path) -> None:
    """Write a linear classifier of the bundled digits, by the mean image of each class."""
    from sklearn.datasets import load_digits

    data = load_digits()
    means = np.stack([data.data[data.target == digit].mean(0) for digit in range(10)])
    weight = means - means.mean(0)
    weight -= weight.mean(1, keepdims=True)  # so that normalizing an image changes no decision
    weight = (weight / np.linalg.norm(weight, axis=1, keepdims=True)).astype(np.float32)
    bias = np.zeros(10, np.float32)
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"], name="flatten"),
        helper.make_node("Gemm", ["flat", "w", "b"], ["logits"], name="fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )
    opset = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    path.write_bytes(model.SerializeToString())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    recipe = {"name": "small", "data": {"name": "digits", "root": None}, "seed": 0, "stages": []}
    for variant in VARIANTS:
        stage = folder / str(variant["stage"])
        stage.mkdir(parents=True, exist_ok=True)
        path = stage / f"{variant['name']}.onnx"
        linear(path)
        metrics = stage / "metrics.json"
        known = json.loads(metrics.read_text())["variants"] if metrics.exists() else []
        known.append(variant | {"path": path.relative_to(folder).as_posix()})
        metrics.write_text(json.dumps({"variants": known}))
    (folder / "run.json").write_text(json.dumps({"recipe": recipe}))
    quantize = folder / "02-quantize"
    quantize.mkdir()
    (quantize / "plan.tensorrt.json").write_text("{}")
    return folder


@pytest.fixture
def unpacked(run: Path, tmp_path: Path) -> Path:
    packed = write_bundle(run, tmp_path / "small.tar.gz")
    empty = tmp_path / "device"
    empty.mkdir()
    with tarfile.open(packed) as archive:
        archive.extractall(empty, filter="data")
    return empty / "small"


DEVICE = """
import os, runpy, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        absent = name.split(".")[0] in %r
        return None if absent else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))  # as for any script
runpy.run_path(sys.argv[0], run_name="__main__")
"""
ABSENT = ("compress", "torch", "torchvision", "onnx", "onnxscript", "openvino", "nncf", "scipy")
ABSENT += ("pydantic", "yaml", "sklearn", "rich", "tensorrt", "tensorrt_rtx")


def on(folder: Path, *arguments: str, script: str = "run.py") -> subprocess.CompletedProcess[str]:
    """Run a script of a bundle where only numpy, Pillow and onnxruntime can be imported."""
    command = [sys.executable, "-c", DEVICE % (ABSENT,), str(folder / script), *arguments]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)


def test_bundle_holds_what_a_device_needs_and_nothing_of_this_machine(unpacked: Path) -> None:
    names = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}
    assert names == {
        "answers.py",
        "kernels.py",
        "bundle.json",
        "labels.txt",
        "models/int8-onnxruntime.onnx",
        "models/int8-tensorrt.onnx",
        "models/original.onnx",
        "pictures.py",
        "predict.py",
        "ranges/plan.tensorrt.json",
        "recipe.yaml",
        "run.py",
        "sample.npz",
    }
    assert (unpacked / "labels.txt").read_text().split() == [str(d) for d in range(10)]
    recipe = yaml.safe_load((unpacked / "recipe.yaml").read_text())
    assert recipe["data"] == {"name": "digits"}
    manifest = json.loads((unpacked / "bundle.json").read_text())
    assert set(manifest["sha256"]) == names - {"bundle.json"}
    assert str(unpacked.parent.parent).encode() not in (unpacked / "bundle.json").read_bytes()


def test_script_builds_checks_and_measures_with_numpy_and_onnxruntime_only(unpacked: Path) -> None:
    done = on(unpacked, "--runtime", "onnxruntime", "--seconds", "0.05", "--batch", "4")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "small: onnxruntime on CPU, batch 4"
    assert [line.split()[0] for line in lines[2:]] == ["original", "int8-onnxruntime"]
    told = json.loads((unpacked / "results.json").read_text())
    first = told["results"][0]
    assert first["parity"]
    assert first["top1_pct"] > 70  # the class means classify most digits
    assert first["speedup"] == 1.0
    assert first["latency_ms_p99"] >= first["latency_ms_p50"] > 0


def test_a_damaged_file_is_found_before_anything_runs(unpacked: Path) -> None:
    model = unpacked / "models" / "original.onnx"
    model.write_bytes(model.read_bytes()[:-4] + b"\0\0\0\0")
    done = on(unpacked)
    assert done.returncode == 2
    assert "models/original.onnx is damaged" in done.stderr
    model.unlink()
    assert "cannot read models/original.onnx" in on(unpacked).stderr


def answered(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change what the host answered, and the bundle's hash of it."""
    sample = dict(np.load(folder / "sample.npz"))
    sample["answers_original"] = change(sample["answers_original"])
    np.savez(folder / "sample.npz", **sample)
    manifest = json.loads((folder / "bundle.json").read_text())
    content = (folder / "sample.npz").read_bytes()
    manifest["sha256"]["sample.npz"] = hashlib.sha256(content).hexdigest()
    (folder / "bundle.json").write_text(json.dumps(manifest))


def test_an_engine_that_answers_otherwise_exits_with_1(unpacked: Path) -> None:
    answered(unpacked, lambda answers: answers + 100)
    done = on(unpacked, "--seconds", "0.05")
    assert done.returncode == 1
    assert "DIFFERS FROM THE HOST" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "1000"], "--batch must be from 1 to 64"),
        pytest.param(
            ["--runtime", "tensorrt"],
            "the package tensorrt is not installed",
            marks=pytest.mark.skipif(is_installed("tensorrt"), reason="tensorrt is installed"),
        ),
    ],
)
def test_what_cannot_be_done_is_said(unpacked: Path, arguments: list[str], message: str) -> None:
    done = on(unpacked, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("precision", "answers", "near"),
    [
        ("fp32", [[0.0, 1.0], [1.0, 0.0]], True),
        ("fp32", [[0.0, 1.1], [1.0, 0.0]], False),
        ("int8", [[0.0, 1.1], [1.0, 0.0]], True),
        ("int8", [[1.1, 1.0], [1.0, 0.0]], False),
        ("int8", [[0.0, np.nan], [1.0, 0.0]], False),
    ],
)
def test_parity_is_numbers_for_float_and_decisions_for_int8(
    precision: str, answers: list, near: bool
) -> None:
    host, labels = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([1, 0])
    assert on_device.compare_with_host(np.array(answers), host, labels, precision)["parity"] is near


BOXES = {"answer": {"form": "boxes", "options": dataclasses.asdict(Detection())}, "labels": "abc"}


def head_of(seed: int = 0) -> np.ndarray:
    """Return what a head gives for two images, (2, 7, 30): boxes of every size and class."""
    random = np.random.default_rng(seed)
    centre, size = random.uniform(50, 250, (2, 2, 30)), random.uniform(10, 90, (2, 2, 30))
    scores = random.uniform(0, 0.1, (2, 3, 30))
    scores[:, np.arange(30) % 3, np.arange(30)] = random.uniform(0.3, 0.9, (2, 30))
    return np.concatenate([centre, size, scores], 1).astype(np.float32)


def rows_of(head: np.ndarray) -> np.ndarray:
    """Return the same as rows of corners, score and class."""
    centre, size, scores = head[:, :2], head[:, 2:4], head[:, 4:]
    best = [scores.max(1, keepdims=True), scores.argmax(1)[:, None]]
    return np.concatenate([centre - size / 2, centre + size / 2, *best], 1).transpose(0, 2, 1)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("form", ["head", "rows"])
def test_boxes_are_sets_for_near_scores_come_in_any_order(form: str, precision: str) -> None:
    order = np.random.default_rng(1).permutation(30)
    host, here = head_of(), head_of()[:, :, order]
    if form == "rows":
        host, here = rows_of(host), rows_of(here)
    found = on_device.parity_of(here, host, None, precision, BOXES)
    assert found["parity"]
    assert found["boxes"] == found["boxes_with_partner"] > 30


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(
    "change",
    [
        lambda head: head * (np.arange(7) < 4)[:, None],  # scores lost, as by a scale for pixels
        lambda head: np.where(np.arange(7)[:, None] < 4, head, 0.5 * head),
        lambda head: head + 40 * (np.arange(7) < 2)[:, None],  # boxes elsewhere
        lambda head: head[:, [0, 1, 2, 3, 5, 6, 4]],  # other classes
        lambda head: head[:, :, :20],  # a third is not found
        lambda head: np.concatenate([head, head_of(7)], 2),  # as many that are not there
        lambda head: np.full_like(head, np.nan),
    ],
)
def test_boxes_that_differ_are_seen(change, precision: str) -> None:
    host = head_of()
    assert not on_device.parity_of(change(host), host, None, precision, BOXES)["parity"]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_without_boxes_here_and_there_is_nothing_to_differ(precision: str) -> None:
    none = head_of() * (np.arange(7) < 4)[:, None]
    found = on_device.parity_of(none, none, None, precision, BOXES)
    assert found["parity"] and found["boxes"] == 0
    assert not on_device.parity_of(head_of(), none, None, precision, BOXES)["parity"]


@pytest.mark.parametrize("form", ["head", "rows", "objectness", "of one class", "apart"])
def test_boxes_are_read_as_the_task_reads_them(form: str) -> None:
    head, names, classes = head_of(), ["out"], 3
    outputs = [head]
    if form == "of one class":
        classes, outputs = 1, [head[:, :5]]
    elif form == "rows":
        outputs = [rows_of(head)]
    elif form == "objectness":
        sure = np.full((2, 1, 30), 0.5, np.float32)
        outputs = [np.concatenate([head[:, :4], sure, head[:, 4:]], 1).transpose(0, 2, 1)]
    elif form == "apart":
        rows = rows_of(head)
        names, outputs = ["labels", "boxes", "scores"], [rows[..., 5], rows[..., :4], rows[..., 4]]
    task = Detection(classes=list("abc")[:classes])
    wanted = task.predict(dict(zip(names, outputs, strict=True)))
    for image, answer in zip(on_device.joined(names, outputs), wanted, strict=True):
        boxes, scores, labels = on_device.detected(image, classes, BOXES["answer"]["options"])
        assert np.allclose(boxes, answer["boxes"], atol=1e-4)
        assert np.allclose(scores, answer["scores"]) and (labels == answer["labels"]).all()


def test_bundled_boxes_that_come_in_another_order_are_alike(tmp_path: Path) -> None:
    picture_files(tmp_path / "pictures")
    folder = bundled(tmp_path, "yolo", FACTS | {"task": "detection"})
    answered(folder, lambda answers: answers[:, :, ::-1])
    done = on(folder, "--seconds", "0.05")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "boxes with partner" in done.stdout
    result = json.loads((folder / "results.json").read_text())["results"][0]
    assert result["boxes"] == result["boxes_with_partner"] > 0


def test_what_is_known_of_no_network_has_no_column() -> None:
    row = {"name": "original", "precision": "fp32", "latency_ms_p50": 1, "latency_ms_p99": 2,
           "speedup": 1, "speedup_ci95": [1, 1], "parity": True, "top1_pct": None,
           "agreement_with_host_pct": None, "sqnr_to_host_db": 61.23}  # fmt: skip
    head, line = on_device.table_of([row])
    assert head[5:] == ["to host, dB", ""] and line[5:] == ["61.2", "ok"]
    head, line = on_device.table_of([row | {"top1_pct": 90, "agreement_with_host_pct": 99}])
    assert head[5:] == ["top-1 %", "as on host %", ""] and line[5:] == ["90.0", "99.0", "ok"]


def test_a_speed_up_has_the_interval_of_turns_drawn_in_pairs() -> None:
    random = np.random.default_rng(1)
    busy = random.choice([1.0, 3.0], size=(200, 1), p=[0.5, 0.5])  # slows both networks alike
    first, own = (mean * busy * random.uniform(0.9, 1.1, (200, on_device.CALLS)) for mean in (2, 1))
    low, high = on_device.speedup_interval([*first.flat], [*own.flat])
    wanted = statistics.ratio_interval(first, own)
    assert (low, high) == pytest.approx(wanted, rel=0.02)
    assert low < 2 < high < 1.2 * low


def test_a_speed_up_that_no_one_number_tells_is_printed_as_its_interval() -> None:
    assert on_device.speedup_of({"speedup": 50.5, "speedup_ci95": [1.2, 72.4]}) == "1.2..72x"
    assert on_device.speedup_of({"speedup": 3.9, "speedup_ci95": [3.2, 4.7]}) == "3.90x"
    assert on_device.LOOSE == numbers.LOOSE


def test_a_run_without_networks_is_refused(run: Path, tmp_path: Path) -> None:
    (run / "00-train" / "original.onnx").unlink()
    with pytest.raises(RunError, match=r"original\.onnx: is gone from the run"):
        write_bundle(run, tmp_path / "x.tar.gz")
    for metrics in run.glob("*/metrics.json"):
        metrics.unlink()
    with pytest.raises(RunError, match="no stage of this run has left a network"):
        write_bundle(run, tmp_path / "x.tar.gz")
    with pytest.raises(RunError, match="holds no run"):
        write_bundle(tmp_path, tmp_path / "x.tar.gz")
    assert not (tmp_path / "x.tar.gz").exists()


def test_labels_are_left_out_where_an_image_has_no_single_class(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script compares the host's decisions alone, as for segmentation."""
    digits = bundle.load_data
    monkeypatch.setattr(
        bundle, "load_data", lambda *given: dataclasses.replace(digits(*given), target="mask")
    )
    with tarfile.open(write_bundle(run, tmp_path / "masks.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    assert "labels" not in np.load(tmp_path / "masks" / "sample.npz").files
    done = on(tmp_path / "masks", "--seconds", "0.1")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "masks" / "results.json").read_text())["results"]
    assert {result["top1_pct"] for result in results} == {None}
    assert all(result["agreement_with_host_pct"] == 100 for result in results)


# --- answers to pictures: those of `compress predict`, with numpy, Pillow and one runtime ---


def picture_files(folder: Path) -> list[Path]:
    """Write one picture of each kind that files come in: modes, depths, turned, transparent."""
    folder.mkdir()
    rows, columns = np.mgrid[:70, :90]
    ramp = np.stack([2 * columns, 255 - 3 * rows, 100 + columns - rows], 2).clip(0, 255)
    colours = Image.fromarray(ramp.astype(np.uint8))
    deep = Image.fromarray((257 * (rows + columns)).astype(np.uint16))
    exif = colours.getexif()
    exif[0x0112] = 6
    glass = colours.copy()
    glass.putalpha(Image.fromarray((2 * columns).astype(np.uint8)))
    colours.save(folder / "rgb.png")
    colours.save(folder / "turned.jpg", exif=exif)
    glass.save(folder / "glass.png")
    colours.convert("P").save(folder / "palette.gif")
    colours.convert("L").save(folder / "grey.bmp")
    colours.convert("CMYK").save(folder / "inks.tif")
    deep.save(folder / "deep.png")
    Image.fromarray((rows / 70).astype(np.float32)).save(folder / "float.tif")
    colours.resize((20, 200)).save(folder / "tall.webp", lossless=True)
    return sorted(folder.iterdir())


def bundled(tmp_path: Path, form: str, facts: dict[str, object], *, nhwc: bool = False) -> Path:
    """Pack a run of one network and unpack it as on a device."""
    stage = tmp_path / "run" / "00-original"
    stage.mkdir(parents=True)
    network(stage / "model.onnx", form, facts, nhwc=nhwc)
    variant = {"name": "original", "precision": "fp32", "target": None, "stage": stage.name}
    variant |= {"path": f"{stage.name}/model.onnx"}
    (stage / "metrics.json").write_text(json.dumps({"variants": [variant]}))
    data = {"name": "images", "root": str(tmp_path / "pictures")}
    recipe = {"name": "small", "data": data, "seed": 0, "stages": []}
    (tmp_path / "run" / "run.json").write_text(json.dumps({"recipe": recipe}))
    with tarfile.open(write_bundle(tmp_path / "run", tmp_path / "small.tar.gz")) as archive:
        archive.extractall(tmp_path / "device", filter="data")
    return tmp_path / "device" / "small"


LETTERBOX = {"resize": "letterbox", "interpolation": "bicubic", "crop": 1.0}
SQUASH = {"resize": "squash", "interpolation": "lanczos", "crop": 0.9, "color": "BGR"}


@pytest.mark.parametrize(
    ("form", "told", "nhwc"),
    [
        ("classes", {"task": "classification"}, False),
        ("classes", {"task": "classification", **SQUASH}, True),
        ("softmax", {"task": "classification"}, False),
        ("classes", {"task": {"multilabel": {"threshold": 0.6}}}, False),
        ("class map", {"task": "segmentation", **LETTERBOX}, False),
        ("class map", {"task": "segmentation"}, True),
        ("boxes", {"task": "detection"}, False),
        ("yolo", {"task": {"detection": {"nms_iou": 0.5}}, **LETTERBOX}, False),
        ("image", {"task": "restoration", "mean": [0.0] * 3, "std": [1.0] * 3}, False),
        ("image", {"task": "restoration", "mean": [0.0] * 3, "std": [1.0] * 3}, True),
        ("embedding", {"task": "embedding"}, False),
        ("classes", {}, False),
    ],
)
def test_pictures_are_answered_on_the_device_as_by_compress_predict(
    tmp_path: Path, compress, form: str, told: dict[str, object], nhwc: bool
) -> None:
    pictures = picture_files(tmp_path / "pictures")
    folder = bundled(tmp_path, form, FACTS | told, nhwc=nhwc)
    here, there = tmp_path / "here.json", tmp_path / "there.json"
    code, _, err = compress("predict", tmp_path / "run", *pictures, "--json", here)
    assert code == 0, err
    done = on(folder, *map(str, pictures), "--json", str(there), script="predict.py")
    assert done.returncode == 0, done.stderr
    wanted, found = (json.loads(path.read_text())["images"] for path in (here, there))
    assert [each["image"] for each in found] == [each["image"] for each in wanted]
    for one, two in zip(found, wanted, strict=True):
        assert [list(row) for row in one["answer"]] == [list(row) for row in two["answer"]]
        for mine, theirs in zip(one["answer"], two["answer"], strict=True):
            for key, value in theirs.items():
                if isinstance(value, float):
                    assert mine[key] == pytest.approx(value, rel=1e-4, abs=1e-4), (
                        one["image"],
                        key,
                    )
                elif key not in ("output",):  # a file may name what torch does not
                    assert mine[key] == value, (one["image"], key)
    drawn = tmp_path / "drawn"
    assert on(folder, str(pictures[0]), "--out", str(drawn), script="predict.py").returncode == 0
    assert len(list(drawn.glob("*.png"))) == 1
    checked = on(folder, "--seconds", "0.05", "--batch", "2")
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.jpg"], "absent.jpg is not a readable picture"),
        (["{folder}/run.py"], "run.py is not a readable picture"),
        (
            ["{folder}/../../pictures/rgb.png", "--model", "other"],
            "no network 'other'. Known: original",
        ),
    ],
)
def test_what_cannot_be_answered_there_is_said(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    picture_files(tmp_path / "pictures")
    folder = bundled(tmp_path, "classes", FACTS | {"task": "classification"})
    done = on(folder, *(each.format(folder=folder) for each in arguments), script="predict.py")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_network_with_further_inputs_is_refused(tmp_path: Path) -> None:
    picture_files(tmp_path / "pictures")
    bundled(tmp_path, "classes", FACTS)
    path = tmp_path / "run" / "00-original" / "model.onnx"
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("also", TensorProto.FLOAT, [1]))
    onnx.save(model, path)
    with pytest.raises(RunError, match="takes 2 inputs"):
        write_bundle(tmp_path / "run", tmp_path / "two.tar.gz")


def test_without_pillow_the_script_says_what_to_install(tmp_path: Path) -> None:
    picture_files(tmp_path / "pictures")
    folder = bundled(tmp_path, "classes", FACTS | {"task": "classification"})
    command = [
        sys.executable,
        "-c",
        DEVICE % ((*ABSENT, "PIL"),),
        str(folder / "predict.py"),
        "x.png",
    ]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install pillow" in done.stderr


@pytest.mark.parametrize("script", list(bundle.SCRIPTS.values()))
def test_scripts_are_written_for_the_python_of_old_devices(script: str) -> None:
    source = (bundle.PACKAGE / script).read_text()
    ast.parse(source, feature_version=(3, 8))


def test_names_of_classes_are_not_obeyed_on_the_device(tmp_path: Path) -> None:
    pictures = picture_files(tmp_path / "pictures")
    facts = FACTS | {"task": "classification", "labels": ["\x1b[31mred", "b", "c"]}
    folder = bundled(tmp_path, "classes", facts)
    done = on(folder, str(pictures[0]), script="predict.py")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "?[31mred" in done.stdout


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"nothing: no such folder\. Expected a folder with run\.json"
    ):
        write_bundle(tmp_path / "nothing", tmp_path / "x.tar.gz")


@pytest.mark.parametrize("name", ["bundle.zip", "bundle"])
def test_a_name_that_is_no_tar_gz_is_refused(tmp_path, name):
    with pytest.raises(UsageError, match=rf"{name}: .*FILE\.tar\.gz"):
        write_bundle(tmp_path / "run", tmp_path / name)
    assert not list(tmp_path.iterdir())
