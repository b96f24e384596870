"""Other people's ONNX files: quantized for every target, clean for the linter, close to fp32."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest

import compress
from compress.errors import CompressError
from compress.packages import is_installed
from compress.qdq import TARGETS
from compress.quantize.sessions import answers, sqnr_each

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import real_files

DATA = Path(os.environ.get("COMPRESS_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
IMAGES, HELD_BACK = 16, 4
SMALL = {"mnist": 22.0, "mtcnn_pnet": 17.0}  # least SQNR of any output with plain ranges, decibels
LARGE = {
    "mtcnn_onet": 18.0,
    "yunet_n320": 3.0,  # scores of faces, which few of the photos raise
    "yunet_n_dyn": 1.0,
    "ultra_rfb320": 28.0,
    "yolox_nano": 6.0,
    "ppocr2_det": 0.0,
    "ppocr2_cls": 14.0,
    "deeplab_v3": 20.0,
    "litemono_dec": 45.0,
}
FILES = [
    *(pytest.param(name, floor, id=name) for name, floor in SMALL.items()),
    *(pytest.param(name, floor, id=name, marks=pytest.mark.slow) for name, floor in LARGE.items()),
]


EVERY = [*SMALL, *LARGE]


def loaded(name):
    path = DATA / "onnx" / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"{path} is not there: set COMPRESS_DATA")
    model = onnx.load(path)
    return path, real_files.feeds(model, name, DATA / "photos", 8)


def transposed(array):
    """Return an array of the other layout: NCHW as NHWC, NHWC as NCHW."""
    return (
        np.moveaxis(array, 1, -1) if array.shape[1] < array.shape[3] else np.moveaxis(array, 3, 1)
    )


WRONG = {
    "layout": (lambda a: np.ascontiguousarray(transposed(a)), "Expected a batch of shape"),
    "rank": (lambda a: a[0], "Expected a batch of shape"),
    "kind": (lambda a: a.astype(np.uint8), "holds uint8"),
    "NaN": (lambda a: np.where(a == a.max(), np.nan, a), "holds NaN or infinity"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", EVERY)
def test_images_that_a_real_file_does_not_take_are_refused(name, wrong, tmp_path):
    path, feeds = loaded(name)
    change, told = WRONG[wrong]
    first = next(iter(feeds[0]))
    broken = [feed | {first: change(feed[first])} for feed in feeds]
    with pytest.raises(CompressError) as caught:
        compress.quantize_onnx(path, broken, tmp_path / "q.onnx", method="plain")
    message = str(caught.value)
    assert told in message and path.name in message and f"{first!r}" in message
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize("name", ["mtcnn_onet", "ultra_rfb320", "ppocr2_cls", "deeplab_v3"])
def test_pixels_that_a_real_file_wants_normalized_are_warned_of(name, tmp_path):
    path, feeds = loaded(name)
    pixels = [{n: np.abs(a) * 127 for n, a in feed.items()} for feed in feeds]
    with pytest.warns(UserWarning, match="look like pixels from 0 to 255"):
        compress.quantize_onnx(path, pixels, tmp_path / "q.onnx", method="plain")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "floor_db"), FILES)
def test_a_real_file_is_quantized_clean_and_close(name, floor_db, target, tmp_path):
    path = DATA / "onnx" / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"{path} is not there: set COMPRESS_DATA")
    model = onnx.load(path)
    feeds = real_files.feeds(model, name, DATA / "photos", IMAGES + HELD_BACK)
    out = tmp_path / "int8.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some want pixels from 0 to 255
        compress.quantize_onnx(path, feeds[HELD_BACK:], out, target=target, method="plain")
    assert compress.lint_onnx(out, target=target) == []
    written = onnx.load(out)
    wanted = [answers(model, feed) for feed in feeds[:HELD_BACK]]
    found = [answers(written, feed) for feed in feeds[:HELD_BACK]]
    for k, output in enumerate(model.graph.output):
        want, got = (np.concatenate([a[k].reshape(1, -1) for a in x], 1) for x in (wanted, found))
        (db,) = sqnr_each([want], [got])
        assert np.isnan(db) or db > floor_db, f"{output.name}: {db:.1f} dB"
    fixed = all(d.dim_value > 0 for d in model.graph.input[0].type.tensor_type.shape.dim)
    if target == "tensorrt" and fixed and is_installed("tensorrt_rtx"):
        engine = compress.build_engine(
            out, tmp_path / "int8.engine", runtime="tensorrt-rtx", batch=1
        )
        assert engine.stat().st_size > 0
