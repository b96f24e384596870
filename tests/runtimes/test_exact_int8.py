"""Which int8 kernels ONNX Runtime is told to take: exact ones, and not where they cost time."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import onnx
import pytest
from int8_graphs import GRAPHS, images, run

from compress.qdq import write_qdq
from compress.quantize import calibrate, make_quant_plan
from compress.quantize.sessions import sqnr_db
from compress.runtimes import _plain_kernels, build_engine, open_session
from compress.runtimes.onnxruntime import Onnxruntime

OPTION, ON = "session.x64quantprecision", "1"


class Options(dict[str, str]):
    """Session options as far as entries go."""

    def add_session_config_entry(self, key: str, value: str) -> None:
        self[key] = value


@pytest.fixture
def int8(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    model = GRAPHS["residual"]()
    feed = images(model, 8)
    statistics = calibrate(model, [feed])
    path = tmp_path / "int8.onnx"
    onnx.save(write_qdq(model, make_quant_plan(statistics, target="onnxruntime")), path)
    return path, feed


def test_the_probe_is_a_product_of_bytes():
    model = onnx.load_from_string(_plain_kernels._PRODUCT)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["MatMulInteger"]
    kinds = [value.type.tensor_type.elem_type for value in model.graph.input]
    assert kinds == [onnx.TensorProto.UINT8, onnx.TensorProto.INT8]


def test_processors_with_vnni_do_not_overflow_and_others_do():
    info = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not info.exists():
        pytest.skip("which instructions there are is not known")
    assert _plain_kernels.sums_overflow() == ("vnni" not in info.read_text())


@pytest.mark.parametrize("overflows", [True, False])
def test_the_option_is_given_only_where_kernels_overflow(overflows, monkeypatch):
    monkeypatch.setattr(_plain_kernels, "sums_overflow", lambda: overflows)
    options = Options()
    _plain_kernels.take_exact_kernels(options)
    assert options == ({OPTION: ON} if overflows else {})


def test_a_session_of_the_runtime_is_exact_and_has_the_option_only_where_it_must(int8):
    path, feed = int8
    session = Onnxruntime().open(path)
    options = session.session.get_session_options()
    if _plain_kernels.sums_overflow():
        assert options.get_session_config_entry(OPTION) == ON
    else:
        with pytest.raises(RuntimeError, match=OPTION):
            options.get_session_config_entry(OPTION)
    (found,) = session.run(tuple(feed.values()))
    assert sqnr_db(run(onnx.load(path), feed, plain=True), [found]) > 35


def test_a_built_file_keeps_signed_weights_for_whatever_processor_opens_it(int8, tmp_path):
    path, feed = int8
    built = tmp_path / "built.onnx"
    build_engine(path, built, runtime="onnxruntime")
    kinds = {t.data_type for t in onnx.load(built).graph.initializer if len(t.dims) == 4}
    assert kinds == {onnx.TensorProto.INT8}
    (found,) = open_session(built).run(*feed.values())
    assert sqnr_db(run(onnx.load(path), feed, plain=True), [found]) > 35


def test_layers_that_share_integers_are_opened_where_kernels_must_be_exact(tmp_path, monkeypatch):
    """NNCF stores one zero point for several layers; ONNX Runtime converts it for each."""
    monkeypatch.setattr(_plain_kernels, "sums_overflow", lambda: True)
    model = GRAPHS["residual"]()
    feed = images(model, 8)
    plan = make_quant_plan(calibrate(model, [feed]), target="onnxruntime")
    written = write_qdq(model, plan)
    same = {"stem_w_zero_point", "c1_w_zero_point"}  # of eight channels each
    assert same <= {t.name for t in written.graph.initializer}
    middle = onnx.numpy_helper.from_array(np.zeros(8, np.int8), "middle")
    for node in written.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[2] in same:
            node.input[2] = middle.name
    written.graph.initializer.append(middle)
    path = tmp_path / "shared.onnx"
    onnx.save(written, path)
    (found,) = open_session(path, "onnxruntime").run(*feed.values())
    assert sqnr_db(run(written, feed, plain=True), [found]) > 35
