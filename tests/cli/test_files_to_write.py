"""What commands read and write: folders for files, sizes of a run, inputs that are not there."""

from pathlib import Path

import onnx
import pytest
import torch
from PIL import Image

import compress as package
from tests.zoo import build

NET = "compress.models.cifar:resnet8"
WITH_FOLDERS = {
    "json": (["lint", "x.onnx", "--target", "tensorrt", "--json", "folder"], "is a folder"),
    "plot": (["sensitivity", NET, "--data", "digits", "--prune", "--out", "folder"], "is a folder"),
    "kind of plot": (
        ["sensitivity", NET, "--data", "digits", "--prune", "--out", "a.txt"],
        "--out a.txt. Expected a name that ends in .png or .svg",
    ),
    "kind of export": (
        ["export", NET, "--input-size", "3,16,16", "--out", "net.py"],
        "--out net.py. Expected a name that ends in .onnx",
    ),
    "graph of a folder": (
        ["build", "folder", "--runtime", "openvino", "--out", "a.xml"],
        "folder: holds no ONNX file. Expected an ONNX file, or the folder of a stage",
    ),
    "range": (
        ["quantize", "x.onnx", "--data", "digits", "--input-range", "0"],
        "--input-range '0'. Expected 2 numbers",
    ),
}


@pytest.mark.parametrize("case", WITH_FOLDERS)
def test_a_folder_or_a_wrong_name_is_refused_before_any_work(compress, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    arguments, said = WITH_FOLDERS[case]
    code, _, err = compress(*arguments)
    assert code == 2
    assert said in err
    assert [each.name for each in tmp_path.rglob("*")] == ["folder"]


@pytest.fixture
def file(tmp_path):
    return package.export_onnx(build("Plain"), torch.randn(1, 3, 16, 16), tmp_path / "net.onnx")


def test_a_split_that_is_refused_leaves_no_folder(compress, file, tmp_path):
    parts = tmp_path / "parts"
    wrong = (["--runtime", "ort"], "no such runtime"), (["--threads", "0"], "threads is 0")
    for options, said in wrong:
        code, _, err = compress("split", file, "--at", "auto", "--out", parts, *options)
        assert (code, parts.exists()) == (2, False)
        assert said in err
    code, _, err = compress("split", file, "--at", "auto", "--out", file)
    assert code == 2
    assert "cannot be written" in err


def test_an_input_that_is_not_there_is_told(compress, file, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    code, _, err = compress("predict", file, tmp_path / "a.png", "--input", "foo=2")
    assert code == 2
    assert "no such input 'foo'. Known: input" in err


def test_files_are_made_of_a_run_in_its_own_size(compress, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = package.load_model(NET, num_classes=10)
    package.save_model(model, "saved", reference=NET)
    code, _, err = compress("build", "saved", "--runtime", "onnxruntime", "--out", "a.onnx")
    assert code == 2
    assert "saved: holds no ONNX file" in err
    assert "compress export saved --out net.onnx" in err
    package.export_onnx(model, torch.randn(1, 3, 24, 16), "saved/model.onnx")
    assert compress("export", "saved", "--out", "own.onnx")[0] == 0
    assert compress("build", "saved", "--runtime", "onnxruntime", "--out", "a.onnx")[0] == 0
    for name in ("own.onnx", "a.onnx"):
        dims = onnx.load(name).graph.input[0].type.tensor_type.shape.dim
        assert [dim.dim_value for dim in dims][1:] == [3, 24, 16]


def test_a_run_that_is_refused_leaves_no_folder(compress, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("w.pt").write_bytes(b"no weights")
    code, _, err = compress("prune", NET, "--data", "digits", "--weights", "w.pt")
    assert code == 2, err
    assert [each.name for each in tmp_path.rglob("*")] == ["w.pt"]
