"""Synthetic images match what BatchNorm stored; that int8 ranges come from them is said."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import compress
from compress.data import load_data
from compress.data.synthetic import matching_loss
from compress.errors import CompressError
from compress.models.cifar import resnet8
from compress.pipeline.task import as_torch
from compress.recipe.settings import DataSettings

TINY = {"images": 12, "steps": 12}


def trained(width: int = 4) -> nn.Module:
    """A network whose BatchNorm has seen coloured, correlated images."""
    torch.manual_seed(0)
    model = resnet8(width=width)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(30):
            coarse = torch.randn(16, 3, 4, 4, generator=generator) + torch.tensor(
                [0.5, 0.0, -0.5]
            ).view(-1, 1, 1)
            model(nn.functional.interpolate(coarse, (16, 16), mode="bilinear"))
    return model.eval()


def made(model: nn.Module, seed: int = 0, **options: object) -> torch.Tensor:
    settings = DataSettings(name="synthetic", image_size=16, options=TINY | options)
    dataset = load_data(settings, seed, lambda: model)
    return torch.cat([images for images, _ in dataset.batches("train")])


def deviations(model: nn.Module, images: torch.Tensor) -> float:
    """How far means are off in units of the stored deviation, by hooks: another way to look."""
    found: list[torch.Tensor] = []

    def look(norm: nn.BatchNorm2d, inputs: tuple[torch.Tensor]) -> None:
        off = inputs[0].mean((0, 2, 3)) - norm.running_mean
        found.append((off.abs() / (norm.running_var + norm.eps).sqrt()).mean())

    hooks = [
        m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return float(torch.stack(found).mean())


def test_images_match_the_stored_statistics_better_than_noise_does() -> None:
    model = trained()
    images = made(model, steps=60)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert deviations(model, images) < 0.25 * deviations(model, noise)


def test_the_loss_is_0_for_the_images_that_the_statistics_are_of() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    images = torch.randn(8, 3, 9, 9)
    read = model[0](images).detach()
    model[1].running_mean.copy_(read.mean((0, 2, 3)))
    model[1].running_var.copy_(read.var((0, 2, 3), unbiased=False))
    model.train()
    assert matching_loss(model, images).item() < 1e-10
    assert model.training  # left as it was found
    model[1].running_mean.add_(1.0)
    expected = 1 / model[1].running_var.mean()
    torch.testing.assert_close(matching_loss(model, images).detach(), expected)


def test_the_seed_decides_and_nothing_else() -> None:
    model = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, again, other = made(model), made(model), made(model, seed=1)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert (first - other).abs().max() > 0.1
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_pixels_are_of_the_range_and_the_colour_order_that_the_network_takes() -> None:
    model = trained()
    given = {"mean": (0.5,), "std": (0.25,), "options": TINY, "image_size": 16}
    sets = [
        load_data(DataSettings(name="synthetic", color=color, **given), 0, lambda: model)
        for color in ("RGB", "BGR")
    ]
    plain, turned = (next(iter(each.batches("test")))[0] for each in sets)
    assert plain.min() >= -2 and plain.max() <= 2
    torch.testing.assert_close(plain, turned)  # as the network takes them
    stored = [each.splits["test"].take([0]) for each in sets]
    torch.testing.assert_close(stored[0], stored[1].flip(1))


def onnx_with_batchnorm(path: Path, *, channels_last: bool = False) -> Path:
    """Write Conv, BatchNormalization, Relu, mean and a dense layer, as exporters of others do."""
    generator = np.random.default_rng(0)
    arrays = {
        "w": generator.normal(size=(6, 3, 3, 3)) * 0.2,
        "g": np.ones(6),
        "b": np.zeros(6),
        "m": generator.normal(size=6) * 0.3,
        "v": generator.uniform(0.2, 1, 6),
        "d": generator.normal(size=(6, 4)),
    }
    nodes = [
        helper.make_node("Conv", ["n", "w"], ["c"], pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        helper.make_node("BatchNormalization", ["c", "g", "b", "m", "v"], ["y"]),
        helper.make_node("Relu", ["y"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "d"], ["scores"]),
    ]
    perm = [0, 3, 1, 2] if channels_last else [0, 1, 2, 3]
    nodes.insert(0, helper.make_node("Transpose", ["x"], ["n"], perm=perm))
    shape = ["N", 16, 16, 3] if channels_last else ["N", 3, 16, 16]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )
    return path


@pytest.mark.parametrize("channels_last", [False, True])
def test_an_onnx_file_with_its_batchnorm_is_calibrated(tmp_path: Path, channels_last: bool) -> None:
    path = onnx_with_batchnorm(tmp_path / "bn.onnx", channels_last=channels_last)
    measure = {"rounds": 3, "round_ms": 1.0}
    recipe = {
        "model": {"name": str(path)},
        "data": {"synthetic": TINY},
        "stages": [{"quantize": {"method": "plain"}}],
        "targets": [{"runtime": "onnxruntime"}],
        "measure": measure,
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    report = compress.run(tmp_path / "r.yaml", tmp_path / "run")
    assert any("int8 ranges come from synthetic images" in line for line in report.cautions)
    assert any("measured on synthetic images" in line for line in report.cautions)
    plan = json.loads((tmp_path / "run/01-quantize/plan.onnxruntime.json").read_text())
    assert any("calibrated on synthetic images" in note for note in plan["notes"])
    assert "synthetic" in (tmp_path / "run/report.html").read_text()


def test_calibration_may_be_synthetic_where_the_tests_are_real(tmp_path: Path) -> None:
    recipe = {
        "model": {"name": "compress.models.cifar:resnet8", "options": {"width": 4}},
        "data": {"digits": {"image_size": 16, "channels": 3}},
        "stages": [
            {"train": {"epochs": 1}},
            {"quantize": {"method": "plain", "data": {"synthetic": TINY}}},
        ],
        "targets": [{"runtime": "onnxruntime"}],
        "measure": {"rounds": 3, "round_ms": 1.0},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    report = compress.run(tmp_path / "r.yaml", tmp_path / "run")
    assert [line for line in report.cautions if "synthetic" in line] == [
        "int8 ranges come from synthetic images, made to match the statistics of the network's "
        "BatchNorm layers"
    ]
    assert report.variants[-1].results[0].top1_pct is not None
    real = tmp_path / "run/report.json"
    used = json.loads(real.read_text())["provenance"]["data"]["calibration_sha256"]
    assert len(used) == 64


@pytest.mark.parametrize(
    ("settings", "network", "said"),
    [
        ({"image_size": 16}, None, "made from the network of a recipe"),
        ({}, trained, "how large the network's images are"),
        ({"image_size": 16, "options": {"steps": 0}}, trained, "0 steps: at least 2 and 1"),
        ({"image_size": 16, "root": "x"}, trained, "takes no folder or file, and 'x' is given"),
        (
            {"image_size": 16},
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()),
            "no BatchNorm with stored statistics",
        ),
        (
            {"image_size": 16, "channels": 1},
            trained,
            r"does not run on images of shape \(1, 16, 16\)",
        ),
    ],
)
def test_what_cannot_be_made_is_said(settings: dict, network: object, said: str) -> None:
    with pytest.raises(CompressError, match=said):
        load_data(DataSettings(name="synthetic", **settings), 0, network)


def test_a_file_whose_batchnorm_was_folded_is_refused(tmp_path: Path) -> None:
    path = compress.export_onnx(trained(), torch.zeros(1, 3, 16, 16), tmp_path / "folded.onnx")
    settings = DataSettings(name="synthetic", image_size=16)
    with pytest.raises(CompressError, match="folded into the convolutions"):
        load_data(settings, 0, partial(as_torch, path))
