"""A disk that is full, or that nothing may be written to: a sentence, and the run goes on later."""

import contextlib
import os
import resource
import shutil
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from attempts import attempt, files, recorded, wreck

import compress
from compress import artifact
from compress.errors import RunError
from compress.evaluate import Predictions
from compress.models.cifar import resnet8
from compress.runtimes import build_engine
from compress.train import checkpoints

RESNET = "compress.models.cifar:resnet8"
is_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a disk")


@contextlib.contextmanager
def largest_file(size):
    """Let no file grow beyond ``size`` bytes in this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def network():
    return resnet8(in_channels=1, width=4).eval()


@pytest.fixture(scope="module")
def graphs(network, tmp_path_factory):
    """A float graph and its int8 twin."""
    folder = tmp_path_factory.mktemp("graphs")
    images = torch.rand(16, 1, 8, 8)
    compress.export_onnx(network, images[:1], folder / "model.onnx")
    compress.quantize_onnx(
        folder / "model.onnx", [images.numpy()], folder / "int8.onnx", target="onnxruntime"
    )
    return folder


def writers(network, graphs):
    """Return everything that writes a file of a run, by name: path -> None."""
    images, model = torch.rand(8, 1, 8, 8), graphs / "model.onnx"
    scores = np.random.default_rng(0).random((2000, 10)).astype(np.float32)
    return {
        "text": lambda path: artifact.write_text(path, "x" * 9000),
        "json": lambda path: artifact.write_json(path, ["x"] * 9000),
        "checkpoint": lambda path: checkpoints.save_state(path, {"weights": torch.rand(9000)}),
        "network": lambda path: compress.save_model(
            network, path, reference=RESNET, options={"in_channels": 1, "width": 4}
        ),
        "onnx": lambda path: compress.export_onnx(network, images[:1], path),
        "int8": lambda path: compress.quantize_onnx(
            model, [images.numpy()], path, target="openvino"
        ),
        "predictions": lambda path: Predictions(scores, scores.argmax(1)).save(path),
        "openvino": lambda path: build_engine(model, path, runtime="openvino"),
        "onnxruntime": lambda path: build_engine(model, path, runtime="onnxruntime"),
    }


NAMES = {"openvino": "x.xml", "checkpoint": "x.pt", "predictions": "x.npz", "json": "x.json"}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(writers(None, artifact.Path())))
def test_a_file_that_cannot_be_written_whole_is_a_sentence(name, network, graphs, tmp_path, tried):
    tried("a full disk while one file is written (9 kinds of file)")
    path = tmp_path / NAMES.get(name, "x.onnx")
    write = writers(network, graphs)[name]
    with largest_file(2000), pytest.raises(RunError, match="larger than a file may be here"):
        write(path)
    assert [each for each in files(tmp_path) if artifact.TEMPORARY in each] == []
    write(path)  # with room it goes


def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    without_memory()


def without_memory():
    """Leave the fresh processes out in which memory is measured: they write nothing."""
    from compress.pipeline import measure

    measure.Entry.memory = lambda *_: {}


def stops_and_goes_on(small, folder, whole, fault, *, stopped="code 2"):
    """Check that a run under ``fault`` ends in a sentence and is then finished to equal files."""
    log = folder.with_name(f"{folder.name}.log")
    ended = attempt("run", small, "--out", folder, log=log, fault=fault)
    assert ended.fault is None, ended.fault
    again = attempt("run", small, "--out", folder, log=log, fault=without_memory)
    assert again.code == 0, again.told
    assert recorded(folder) == recorded(whole)
    assert wreck(folder) == []
    return ended


PARTS = pytest.mark.parametrize("part", range(4))  # minutes each


@PARTS
@pytest.mark.slow
def test_a_full_disk_at_every_file_of_a_run(part, small, whole, tmp_path, tried):
    sizes = sorted({(whole / name).stat().st_size for name in files(whole)})[part::4]
    tried("a run in which no file may grow beyond the size of one of its files", len(sizes))
    for size in sizes:
        fault = partial(limit, size - 1)
        ended = stops_and_goes_on(small, tmp_path / str(size), whole, fault)
        assert ended.code == 2, (size, ended.told)
        said = ("larger than a file may be", "File too large", "a file may not be so large")
        assert any(words in ended.told for words in said)


@contextlib.contextmanager
def disk(folder, kib):
    """Mount a disk of so many KiB; yields a function that mounts it again with other options."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder]
    subprocess.run(mount, check=True)
    try:
        yield lambda options: subprocess.run(
            ["mount", "-o", f"remount,{options}", folder], check=True
        )
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@PARTS
@is_root
@pytest.mark.slow
def test_a_disk_that_is_full_at_any_time(part, small, whole, tmp_path, tried):
    total = sum((whole / name).stat().st_size for name in files(whole)) // 1024
    steps = [8, *range(40, total, 60)][part::4]
    tried("a run on a disk with too little room (tmpfs), then with enough", len(steps))
    for kib in steps:
        place, log = tmp_path / str(kib), tmp_path / "log"
        with disk(place, kib) as again:
            ended = attempt("run", small, "--out", place / "run", log=log, fault=without_memory)
            assert ended.code == 2 and "disk is full" in ended.told, (kib, ended.told)
            again("size=64m")
            ended = attempt("run", small, "--out", place / "run", log=log, fault=without_memory)
            assert ended.code == 0, (kib, ended.told)
            assert recorded(place / "run") == recorded(whole)
            assert wreck(place / "run") == []


@is_root
@pytest.mark.slow
def test_a_run_folder_that_is_read_only(small, whole, tmp_path, tried):
    tried("a folder that is read-only: a new run, a finished one run again, its report", 3)
    with disk(tmp_path / "disk", 4096) as again:
        shutil.copytree(whole, tmp_path / "disk" / "run")
        again("ro")
        for command in (
            ("run", small, "--out", tmp_path / "disk" / "new"),
            ("run", small, "--out", tmp_path / "disk" / "run"),
            ("report", tmp_path / "disk" / "run"),
        ):
            ended = attempt(*command, log=tmp_path / "log")
            assert ended.code == 2, ended.told
            assert "Read-only file system" in ended.sentence, ended.told
        assert attempt("verify", tmp_path / "disk" / "run", log=tmp_path / "log").code == 0


def memory(mib):
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (mib << 20),) * 2)


@PARTS
@pytest.mark.slow
def test_too_little_memory(part, small, whole, tmp_path, tried):
    steps = [1, 4, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048][part::4]
    codes = []
    for mib in steps:
        fault = partial(memory, mib)
        ended = stops_and_goes_on(small, tmp_path / str(mib), whole, fault)
        said = ("address space", "out of memory")
        assert mib > 1023 or any(each in ended.sentence for each in said), (mib, ended.sentence)
        codes.append(ended.code)
    tried("a run with 1 MiB to 2 GiB of memory (RLIMIT_AS)", len(steps))
    assert codes[0] == 2 or part
