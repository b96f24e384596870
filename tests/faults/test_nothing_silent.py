"""What was not done as asked is said: another device or precision, a gate without a figure, test
images that were learnt."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from attempts import RECIPE
from graphs import network
from shards import picture, sample, write_shard

import compress
from compress.data import _images, load_data, parse_reference
from compress.data._images import FileImages, MemoryImages, Names, Subset
from compress.data._pictures import Fit
from compress.errors import DataError, EngineError
from compress.pipeline import cautions, reporting
from compress.pipeline.overlap import overlap
from compress.recipe.settings import Gates
from compress.report.schema import Result, Variant
from compress.runtimes import onnxruntime as ort_runtime
from compress.runtimes import openvino as ov_runtime


def test_onnx_runtime_that_falls_back_is_named(tmp_path, monkeypatch, tried):
    """What it does when a GPU's libraries are missing: a warning, and a session on the CPU."""
    tried("a runtime that falls back (provider, device, precision) is refused by name", 1)
    real = ort_runtime._package()

    class Fallen(real.InferenceSession):
        def __init__(self, model, options, providers):
            super().__init__(model, options, providers=["CPUExecutionProvider"])

    names = [*real.get_available_providers(), "CUDAExecutionProvider"]
    stand = SimpleNamespace(**vars(real))
    stand.InferenceSession, stand.get_available_providers = Fallen, lambda: names
    monkeypatch.setattr(ort_runtime, "_package", lambda: stand)
    path = network(tmp_path / "x.onnx")
    with pytest.raises(EngineError, match=r"could not start CUDA.* fell back to CPUExecution"):
        compress.open_session(path, "onnxruntime", device="cuda")
    compress.open_session(path, "onnxruntime", device="cpu").close()


@pytest.mark.parametrize("wanted", ["f32", "bf16", "f16"])
def test_openvino_computes_in_the_precision_asked_for_or_says_so(wanted, tmp_path, tried):
    tried("a runtime that falls back (provider, device, precision) is refused by name", 1)
    path = network(tmp_path / "x.onnx")
    core = ov_runtime._core()
    told = core.compile_model(
        core.read_model(str(path)), "CPU", {"INFERENCE_PRECISION_HINT": wanted}
    ).get_property("INFERENCE_PRECISION_HINT")
    if told.get_type_name() == wanted:
        compress.open_session(path, "openvino", inference_precision=wanted).close()
    else:
        with pytest.raises(EngineError, match=f"computes in f32 .* instead of {wanted}"):
            compress.open_session(path, "openvino", inference_precision=wanted)


def test_openvino_on_another_device_is_named(tmp_path, monkeypatch, tried):
    tried("a runtime that falls back (provider, device, precision) is refused by name", 1)
    compiled = SimpleNamespace(get_property=lambda name: ["CPU"])
    with pytest.raises(EngineError, match="runs it on CPU instead of GPU"):
        ov_runtime.Openvino()._check_kept(compiled, "GPU", tmp_path)
    ov_runtime.Openvino(inference_precision="auto")._check_kept(compiled, "CPU", tmp_path)


LIMITS = {"top1_drop_pct": 1.0, "speedup": 1.0, "size_ratio": 1.0, "latency_ms_p50": 5.0}


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [n for n in LIMITS if n in Gates.model_fields])
def test_a_gate_without_a_figure_fails(name, value, tried):
    tried("a gate whose figure is missing, NaN or infinite: it fails and says so")
    figures = {"top1_drop_pct": "top1_change_pct"}.get(name, name)
    one = Result.model_construct(runtime="onnxruntime", precision="fp32", batch=1, threads=None)
    rows = []
    for variant in ("original", "pruned"):
        result = one.model_copy(update={figures: value, "size_mib": value})
        rows.append(
            Variant.model_construct(name=variant, results=(result,), size_mib=value, skipped={})
        )
    (gate,) = reporting.gates(Gates(**{name: LIMITS[name]}), rows)
    assert not gate.passed and gate.measured is None and gate.reason


def images(count, seed=0, size=32):
    draw = np.random.default_rng(seed)
    pixels = torch.from_numpy(4 * draw.integers(0, 64, (count, 1, size, size)).astype(np.uint8))
    return MemoryImages(pixels, np.arange(count) % 2)


def test_equal_and_alike_images_are_counted(tried):
    tried("splits that share images: equal and nearly equal ones are counted, in memory and files")
    train, test = images(50), images(20, seed=1)
    assert overlap([train], test).equal == 0
    assert overlap([train], test).alike == 0
    mixed = MemoryImages(
        torch.cat([test.pixels, train.pixels[:3], (train.pixels[3:5] // 2 + 60)]), np.zeros(25)
    )
    found = overlap([Subset(train, np.arange(40)), images(5, seed=3)], mixed)
    assert (found.images, found.equal, found.alike) == (25, 3, 2)
    even = MemoryImages(torch.full((4, 1, 32, 32), 7, dtype=torch.uint8), np.zeros(4))
    other = MemoryImages(torch.full((4, 1, 32, 32), 9, dtype=torch.uint8), np.zeros(4))
    assert overlap([even], other).alike == 0  # nothing to tell them by


def test_equal_files_are_found_without_decoding(tmp_path, tried):
    tried("splits that share images: equal and nearly equal ones are counted, in memory and files")
    draw = np.random.default_rng(0)
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(draw.bytes(100 + number % 3))
    (tmp_path / "copy.png").write_bytes((tmp_path / "4.png").read_bytes())

    def of(*names):
        found = [f"{name}.png" for name in names]
        return FileImages(tmp_path, Names.of(found), np.zeros(len(found)), Fit((8, 8), "squash"), 1)

    assert overlap([of(*range(6))], of(6, 7, "copy", 8)).equal == 1
    assert overlap([Subset(of(*range(6)), np.arange(4))], of(6, 7, "copy", 8)).equal == 0
    assert overlap([of(0), images(3)], of(1)) is None


def folder_of(root, splits):
    for split, numbers in splits.items():
        for number in numbers:
            place = root / split / f"class{number % 2}" / f"{split}{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(picture(number, number % 2))
    return f"imagefolder:{root}"


def shards_of(root, splits):
    for split, numbers in splits.items():
        write_shard(root / f"{split}-000.tar", [sample(number) for number in numbers])
    return f"webdataset:{root}"


@pytest.mark.parametrize("written", [folder_of, shards_of])
@pytest.mark.parametrize("bytes_in_memory", [0, 8 * 3 * 32 * 32, 1 << 30])
def test_learnt_images_are_found_wherever_each_split_is_held(
    bytes_in_memory, written, tmp_path, monkeypatch, tried
):
    """On disk, in memory, and the large training set on disk with the small test set in memory."""
    tried("splits that share images: equal and nearly equal ones are counted, in memory and files")
    monkeypatch.setattr(_images, "LARGEST_IN_MEMORY_BYTES", bytes_in_memory)
    reference = written(tmp_path / "x", {"train": range(40), "val": [100, 101, 6, 7, 8, 102]})
    data = load_data(parse_reference(reference, image_size=32))
    learned = [data.splits[name] for name in ("train", "validation", "calibration")]
    found = overlap(learned, data.splits["test"])
    assert (found.images, found.equal) == (6, 3)
    with pytest.raises(DataError, match="3 of 6 test images are training images as well"):
        list(cautions.of_splits(data))


def test_what_cannot_be_compared_is_said(tmp_path, monkeypatch, tried):
    tried("splits of images that are made anew each time: that they were not compared is said")
    monkeypatch.setattr(cautions, "overlap", lambda *_: None)
    data = load_data(parse_reference(archive(tmp_path / "few.npz", 3)))
    assert [line[:18] for line in cautions.of_splits(data)] == ["it was not checked"]


def archive(path, test):
    train = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1)).astype(np.uint8)
    others = np.random.default_rng(1).integers(0, 256, (40, 8, 8, 1)).astype(np.uint8)
    chosen = np.concatenate([train[:test], others[test:]])
    labels = np.arange(60) % 2
    np.savez(path, x_train=train, y_train=labels, x_test=chosen, y_test=labels[:40])
    return f"npz:{path}"


def test_a_run_on_learnt_test_images_is_refused(tmp_path, tried):
    """A tenth of them is a caution in the report, more is no accuracy at all."""
    tried("a run whose test images are training images: refused, or counted where they are few", 2)
    few = load_data(parse_reference(archive(tmp_path / "few.npz", 3)))
    assert list(cautions.of_splits(few)) == ["3 of 40 test images are training images as well."]
    recipe = tmp_path / "x.yaml"
    reference = archive(tmp_path / "many.npz", 30)
    data = {"name": "npz", "root": reference.removeprefix("npz:"), "calibration": 8}
    options = {"in_channels": 1, "width": 4, "num_classes": 2}
    model = RECIPE["model"] | {"options": options}
    recipe.write_text(yaml.safe_dump(RECIPE | {"data": data, "model": model}))
    with pytest.raises(DataError, match="30 of 40 test images are training images as well"):
        compress.run(recipe, tmp_path / "run")
