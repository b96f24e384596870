"""ONNX files are read with suspicion."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from graphs import network

from compress.errors import EngineError
from compress.graph import files
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
        files.check(with_external_weight(folder / "x.onnx", "weights.bin"))


def test_weights_that_are_too_short_are_named(tmp_path: Path) -> None:
    path = with_external_weight(tmp_path / "x.onnx", "weights.bin", length=32)
    with pytest.raises(EngineError, match=r"needs 32 bytes of 'weights.bin', which has 0"):
        files.check(path)
    (tmp_path / "weights.bin").write_bytes(bytes(8))
    with pytest.raises(EngineError, match=r"needs 32 bytes of 'weights.bin', which has 8"):
        files.check(path)


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
        files.check(tmp_path / "y.onnx")
