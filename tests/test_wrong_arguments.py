"""Arguments of the Python interface that cannot be right are told in a sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import compress
from tests.zoo import build

BATCHES = [np.random.default_rng(0).normal(size=(8, 3, 16, 16)).astype(np.float32)]


def network() -> nn.Module:
    return build("Plain")


EXAMPLE = torch.randn(1, 3, 16, 16)
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "a network for a reference": (
        lambda: compress.load_model(network()),  # type: ignore[arg-type]
        "is no reference to a network",
    ),
    "a state dict for a file": (
        lambda: compress.load_model("torchvision:resnet18", network().state_dict()),  # type: ignore[arg-type]
        "weights is of type OrderedDict",
    ),
    "classes in letters": (
        lambda: compress.load_model("torchvision:resnet18", num_classes="10"),  # type: ignore[arg-type]
        "num_classes is '10'. Expected a whole number",
    ),
    "classes below zero": (
        lambda: compress.load_model("torchvision:resnet18", num_classes=-1),
        "num_classes is -1",
    ),
    "no criterion": (
        lambda: compress.plan_pruning(network(), EXAMPLE, criterion=None, keep_macs=0.5),  # type: ignore[arg-type]
        "criterion None does not name one plug-in",
    ),
    "no task": (
        lambda: compress.load_task(None),  # type: ignore[arg-type]
        "task None does not name one plug-in",
    ),
    "an example of no image": (
        lambda: compress.plan_pruning(network(), EXAMPLE[:0], keep_macs=0.5),
        r"the example input of shape \(0, 3, 16, 16\) is empty",
    ),
    "a file for a plan to cut by": (
        lambda: compress.apply_pruning(network(), "plan.json"),  # type: ignore[arg-type]
        r"str is no pruning plan. .* Read a file with compress.PrunePlan.load",
    ),
    "a file for a plan to mask by": (
        lambda: compress.mask_pruning(network(), "plan.json"),  # type: ignore[arg-type]
        "str is no pruning plan",
    ),
    "threads in letters": (
        lambda: compress.open_session("net.onnx", threads="2"),  # type: ignore[arg-type]
        "threads is '2'. Expected a whole number, 1 or more",
    ),
    "one loss for a list": (
        lambda: compress.distiller(network(), network(), losses="kd"),
        "losses is 'kd'. Expected a list of losses",
    ),
    "arrays for tensors": (
        lambda: compress.distiller(network(), network(), ["mse"]).loss(BATCHES[0]),  # type: ignore[arg-type]
        "images is of type ndarray. Expected a tensor",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_that_cannot_be_right_are_told_in_a_sentence(case: str) -> None:
    call, told = WRONG[case]
    with pytest.raises(compress.CompressError, match=told):
        call()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return compress.export_onnx(network(), EXAMPLE, tmp_path / "net.onnx")


def test_the_file_that_is_read_is_not_written_over(file: Path, tmp_path: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(compress.CompressError, match="is the file that is read, and would be lost"):
        compress.quantize_onnx(file, BATCHES, f"{file.parent}/../{file.parent.name}/net.onnx")
    with pytest.raises(compress.CompressError, match="would be lost"):
        compress.build_engine(file, file, runtime="onnxruntime")
    assert file.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["net.onnx"]


def test_folders_are_no_files_to_write(file: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for write in (
        lambda: compress.export_onnx(network(), EXAMPLE, tmp_path / "folder"),
        lambda: compress.quantize_onnx(file, BATCHES, tmp_path / "folder"),
        lambda: compress.build_engine(file, tmp_path / "folder", runtime="onnxruntime"),
        lambda: compress.export_onnx(network(), EXAMPLE, "."),
    ):
        with pytest.raises(
            compress.CompressError, match=r"is a folder\. Expected the name of a file"
        ):
            write()
    assert not list((tmp_path / "folder").iterdir())


def test_engines_are_built_for_whole_batches(file: Path, tmp_path: Path) -> None:
    with pytest.raises(compress.CompressError, match="cannot be built for"):
        compress.build_engine(file, tmp_path / "e.onnx", runtime="onnxruntime", batch=(1.5, 2, 3))  # type: ignore[arg-type]


def test_calibration_images_are_tensors_as_well_and_never_absent(
    file: Path, tmp_path: Path
) -> None:
    compress.quantize_onnx(file, [torch.from_numpy(b) for b in BATCHES], tmp_path / "a.onnx")  # type: ignore[misc]
    compress.quantize_onnx(file, BATCHES, tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    with pytest.raises(
        compress.CompressError, match=r"batches is of type NoneType\. Expected a list"
    ):
        compress.quantize_onnx(file, None, tmp_path / "c.onnx")  # type: ignore[arg-type]


def test_a_distiller_outside_with_leaves_no_hooks() -> None:
    student, teacher = network(), network()
    told = compress.distiller(student, teacher, ["mse", {"hint": {"layers": "auto"}}])
    loss = told.loss(torch.from_numpy(BATCHES[0]))
    loss.backward()  # type: ignore[no-untyped-call]
    again = told.loss(torch.from_numpy(BATCHES[0]))
    torch.testing.assert_close(again, loss)
    assert list(told.parameters())
    for net in (student, teacher):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
        assert not any(m.training for m in net.modules())
