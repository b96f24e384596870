"""Files that keep even their sizes outside, beside the weights: runtimes look for them inside."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from int8_graphs import Sketch, images, run

import compress
from compress.packages import is_installed
from compress.runtimes import open_session


@pytest.fixture
def outside(tmp_path):
    """Return a file of which every constant lies beside it, and the model in one piece."""
    s = Sketch((3, 16, 16))
    pads = s.constant("pads", np.array([0, 1, 0, 0, 0, 0, 0, 0]))
    x = s.op("Pad", [s.relu(s.conv("input", "one", 3, 7)), pads], "padded")
    x = s.op(
        "Reshape", [s.conv(x, "two", 8, 8), s.constant("target", np.array([-1, 128, 16]))], "r"
    )
    s.op("Sigmoid", [x], "logits")
    model, path = s.model(), tmp_path / "outside.onnx"
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    onnx.save_model(model, str(path), save_as_external_data=True, size_threshold=0)
    return path, whole


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_they_run(outside, runtime):
    if not is_installed(runtime):
        pytest.skip(f"{runtime} is not installed")
    path, whole = outside
    feed = images(whole)
    with open_session(path, runtime) as session:
        (found,) = session.run(feed["input"])
    np.testing.assert_allclose(found, run(whole, feed)[0], atol=1e-5)


def test_they_are_built_and_quantized(outside, tmp_path):
    path, whole = outside
    feed = images(whole, 16)
    compress.build_engine(path, tmp_path / "built.onnx")
    compress.quantize_onnx(path, [feed["input"]], tmp_path / "int8.onnx", method="plain")
    for name in ("built.onnx", "int8.onnx"):
        with open_session(tmp_path / name) as session:
            np.testing.assert_allclose(session.run(feed["input"])[0], run(whole, feed)[0], atol=0.1)
