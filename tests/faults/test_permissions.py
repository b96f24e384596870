"""Files and folders that may not be read are told by their names, and never left out in silence."""

import ctypes
from pathlib import Path

import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from compress.data import load_data, parse_reference
from compress.errors import DataError

CAPABILITIES = 0x20080522  # version 3 of the call
NETWORK = """
from torch import nn


class Net(nn.Sequential):
    def __init__(self, num_classes=2):
        super().__init__(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, num_classes))
"""


@pytest.fixture
def closed():
    """Return a function that closes files and folders to this thread, if it is root's as well."""
    libc, header = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(CAPABILITIES, 0)
    held = (ctypes.c_uint32 * 6)()
    if not hasattr(libc, "capset") or libc.capget(header, held):
        pytest.skip("no capabilities here")
    fewer = type(held)(*held)
    fewer[0] &= ~0b110  # to read and write whatever the permissions say
    libc.capset(header, fewer)
    modes = {}

    def close(path):
        modes[path] = path.stat().st_mode
        path.chmod(0)
        return path

    yield close
    for path, mode in modes.items():
        path.chmod(mode)
    libc.capset(header, held)


def pictures(*folders, kind="RGB"):
    for folder in folders:
        folder.mkdir(parents=True)
        for number in range(24):
            Image.new(kind, (16, 16), number % 2).save(folder / f"{folder.name}{number}.png")


@pytest.mark.parametrize("kind", ["imagefolder", "images"])
def test_a_closed_folder_of_pictures_is_refused(tmp_path, closed, kind):
    pictures(*(tmp_path / name for name in ("ants/a", "ants/b", "bees/a", "bees/b")))
    place = closed(tmp_path / "bees" / "b")
    with pytest.raises(DataError, match=f"{place}: cannot be read: Permission denied. Check its"):
        load_data(parse_reference(f"{kind}:{tmp_path}"))


def test_a_closed_folder_of_yolo_is_refused(tmp_path, closed):
    pictures(tmp_path / "images" / "a", tmp_path / "images" / "b")
    (tmp_path / "data.yaml").write_text("train: images\nval: images\nnames: [a, b]\n")
    place = closed(tmp_path / "images" / "b")
    with pytest.raises(DataError, match=f"{place}: cannot be read"):
        load_data(parse_reference(f"yolo:{tmp_path / 'data.yaml'}"))


def test_a_closed_picture_is_refused(tmp_path, closed):
    pictures(tmp_path / "ants", tmp_path / "bees")
    file = closed(tmp_path / "bees" / "bees2.png")
    with pytest.raises(DataError, match=f"{file}: cannot be read: Permission denied. Check its"):
        load_data(parse_reference(f"imagefolder:{tmp_path}"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A network, weights, an ONNX file with its weights outside, photos and a recipe."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NETWORK)
    pictures(Path("photos", "ants"), Path("photos", "bees"))
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
    save_file(network.state_dict(), "net.safetensors")
    torch.save(network.state_dict(), "net.pt")
    torch.onnx.export(
        network.eval(), torch.zeros(1, 3, 16, 16), "net.onnx", dynamo=True, verbose=False
    )
    onnx.save(onnx.load("net.onnx"), "apart.onnx", save_as_external_data=True, location="apart.bin",
              size_threshold=0)  # fmt: skip
    Path("r.yaml").write_text("model: {name: net.onnx}\ndata: {name: images, root: photos}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("photos/ants", "check r.yaml"),
        ("r.yaml", "check r.yaml"),
        ("net.onnx", "lint net.onnx --target onnxruntime"),
        ("net.onnx", "bench net.onnx"),
        ("apart.bin", "lint apart.onnx --target onnxruntime"),
        ("net.py", "export net.py:Net --input-size 3,16,16 --out x.onnx"),
        ("net.pt", "export net.py:Net --weights net.pt --input-size 3,16,16 --out x.onnx"),
        ("net.safetensors",
         "export net.py:Net --weights net.safetensors --input-size 3,16,16 --out x.onnx"),
    ],
)  # fmt: skip
def test_a_closed_file_is_told_in_a_sentence(here, closed, compress, file, command):
    closed(Path(file))
    code, _, err = compress(*command.split())
    assert code == 2, err
    last = err.splitlines()[-1]
    assert file in last and "ermission" in last and "amaged" not in last, err
    assert not Path("x.onnx").exists()


def test_what_cannot_be_read_is_left_out_with_a_word_where_a_folder_is_searched(
    here, closed, compress
):
    pictures(Path("other", "a"))
    closed(Path("other"))
    code, _, err = compress("init", "--model", "net.py:Net")
    assert code == 0, err
    assert err.count("other is left out: its permissions do not allow to read it") == 1
