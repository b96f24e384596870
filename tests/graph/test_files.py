"""ONNX files are read with suspicion."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import network
from onnx import helper, numpy_helper

from compress.errors import EngineError
from compress.graph import files
from compress.graph.fp16 import to_half
from compress.plugins import names
from compress.runtimes import build_engine, open_session


def with_external_weight(path: Path, location: str, *, length: int = 20) -> Path:
    model = onnx.load(str(network(path)))
    weight = model.graph.initializer[1]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("length", str(length))):
        entry = weight.external_data.add()
        entry.key, entry.value = key, value
    path.write_bytes(model.SerializeToString())
    return path


OUTSIDE = {
    "above": "../secret.bin",
    "absolute": "/etc/hostname",
    "through a folder": "sub/../../secret.bin",
    "nothing": "",
}


@pytest.mark.parametrize("location", OUTSIDE.values(), ids=OUTSIDE.keys())
def test_weights_outside_the_folder_are_refused_everywhere(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    path = with_external_weight(folder / "x.onnx", location)
    with pytest.raises(EngineError, match="outside the folder") as caught:
        files.load(path)
    assert "'b1'" in str(caught.value)
    for runtime in set(names("runtimes")) - {"pytorch", "tensorrt"}:
        with pytest.raises(EngineError):
            build_engine(path, folder / "x.xml", runtime=runtime)
        with pytest.raises(EngineError):
            open_session(path, runtime)


def test_a_link_out_of_the_folder_is_followed_and_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    (folder / "weights.bin").symlink_to(tmp_path / "secret.bin")
    with pytest.raises(EngineError, match="outside the folder"):
        files.check_onnx(with_external_weight(folder / "x.onnx", "weights.bin"))


def test_weights_that_are_too_short_are_named(tmp_path: Path) -> None:
    path = with_external_weight(tmp_path / "x.onnx", "weights.bin", length=32)
    with pytest.raises(EngineError, match=r"needs 32 bytes of 'weights.bin', which has 0"):
        files.check_onnx(path)
    (tmp_path / "weights.bin").write_bytes(bytes(8))
    with pytest.raises(EngineError, match=r"needs 32 bytes of 'weights.bin', which has 8"):
        files.check_onnx(path)


def test_weights_beside_the_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(32))
    model = files.load(with_external_weight(tmp_path / "x.onnx", "weights.bin", length=32))
    assert model.graph.initializer[1].raw_data == bytes(32)


def test_a_weight_hidden_in_a_subgraph_is_found(tmp_path: Path) -> None:
    outside = with_external_weight(tmp_path / "x.onnx", "../secret.bin")
    inner = onnx.load(str(outside), load_external_data=False)
    model = onnx.load(str(network(tmp_path / "y.onnx")))
    branch = onnx.helper.make_node("If", ["input"], ["z"], name="if", then_branch=inner.graph)
    model.graph.node.append(branch)
    (tmp_path / "y.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match="outside the folder"):
        files.check_onnx(tmp_path / "y.onnx")


def with_sparse_constants(path: Path, places: np.ndarray, shape: tuple[int, ...] = (4, 3)) -> Path:
    """x @ w + c, where ``w`` is a sparse initializer and ``c`` a sparse value of a Constant."""
    values = numpy_helper.from_array(np.array([2, 3], np.float32), "w")
    weight = helper.make_sparse_tensor(values, numpy_helper.from_array(places, "i"), shape)
    one = numpy_helper.from_array(np.array([5], np.float32), "v")
    place = numpy_helper.from_array(np.array([1]), "j")
    bias = helper.make_sparse_tensor(one, place, [3])
    nodes = [
        helper.make_node("Constant", [], ["c"], sparse_value=bias),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Add", ["y", "c"], ["z"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["b", size])
        for name, size in (("x", shape[0]), ("z", shape[1]))
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], sparse_initializer=[weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("places", [[1, 11], [[0, 1], [3, 2]]], ids=["numbers", "rows"])
def test_sparse_constants_are_read_as_dense_ones(tmp_path: Path, places: list) -> None:
    path = with_sparse_constants(tmp_path / "sparse.onnx", np.array(places))
    model = files.load(path)
    assert [tensor.name for tensor in model.graph.initializer] == ["w"]
    assert not model.graph.sparse_initializer
    dense, half = tmp_path / "dense.onnx", tmp_path / "half.onnx"
    onnx.save(model, dense)
    onnx.save(to_half(model), half)  # a pass over the graph
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    with open_session(path) as own, open_session(dense) as one, open_session(half) as other:
        np.testing.assert_array_equal(own.run(x)[0], one.run(x)[0])
        np.testing.assert_allclose(own.run(x)[0], other.run(x)[0], atol=1e-2)


def test_a_sparse_constant_of_a_huge_shape_takes_no_memory(tmp_path: Path) -> None:
    path = with_sparse_constants(tmp_path / "a.onnx", np.array([1, 11]), (1 << 20, 1 << 20))
    with pytest.raises(EngineError, match=r"sparse constant 'w' has 2 values for the shape"):
        files.load(path)
    with_sparse_constants(path, np.array([1, 12]))
    with pytest.raises(EngineError, match="is no valid ONNX file"):
        files.load(path)
