"""Sensitivity, accuracy budgets and training of int8 graphs in the unit of any task."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch

import compress
from compress.data import Dataset
from compress.data._images import MemoryImages
from compress.evaluate import primary_value
from compress.prune.sensitivity import PruneSensitivity, prune_sensitivity
from compress.qdq import QuantPlan, read_onnx
from compress.quantize.accuracy_budget import meet_budget
from compress.quantize.qat import train_quantized
from compress.quantize.sensitivity import quantize_sensitivity
from compress.recipe.settings import QuantizeSettings, TrainSettings
from compress.tasks import Kind, Task, load_task, primary_of
from compress.tasks.restoration import Restoration


class Error(Restoration):
    """Restoration by the mean absolute error, of which less is better."""

    kinds: ClassVar = {"error": Kind("grey levels", higher_is_better=False)}
    primary: ClassVar[str] = "error"

    def score(self, prediction: Any, target: Any) -> dict[str, float]:
        return {"error": 255 * float(np.abs(prediction["image"] - target.numpy()).mean())}


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return compress.load_model(
        "compress.models.cifar:super_resolution", options={"width": 8, "depth": 1}
    )


def pictures(network: torch.nn.Module, brightness: float = 1.0) -> Dataset:
    """Pictures whose targets are what the network makes of them, darkened, and a little noise."""
    draw = torch.Generator().manual_seed(1)
    coarse = torch.rand(36, 3, 4, 4, generator=draw)
    pixels = torch.nn.functional.interpolate(coarse, (12, 12), mode="bilinear").mul(255).byte()
    with torch.no_grad():
        wanted = network(pixels.float() / 255)
    wanted = brightness * wanted + 0.01 * torch.randn(wanted.shape, generator=draw)
    wanted = wanted.clamp(0, 1).numpy()
    parts = {"train": (0, 16), "validation": (16, 28), "calibration": (0, 16), "test": (28, 36)}
    splits = {n: MemoryImages(pixels[a:b], wanted[a:b]) for n, (a, b) in parts.items()}
    return Dataset("made", (), (0.0,) * 3, (1.0,) * 3, splits, batch_size=8, target="image")


@pytest.fixture(scope="module")
def dataset(network: torch.nn.Module) -> Dataset:
    return pictures(network)


@pytest.fixture(scope="module")
def graph(network: Any, dataset: Dataset, tmp_path_factory: Any) -> tuple[Path, QuantPlan]:
    folder = tmp_path_factory.mktemp("graph")
    path = compress.export_onnx(network, dataset.example, folder / "model.onnx")
    images = [each.numpy() for each, _ in dataset.batches("calibration")]
    return path, compress.quantize_onnx(path, images, folder / "int8.onnx", method="plain")


def measured(path: Path, dataset: Dataset, task: Task, **options: Any) -> float:
    """The primary metric of a file by the evaluation that reports use."""
    with compress.open_session(path, "onnxruntime", **options) as session:
        found = compress.evaluate(session, dataset, task, split="validation")
    return found.metrics[task.primary].value


@pytest.mark.parametrize("task", [load_task("restoration"), Error()])
def test_sensitivity_is_in_the_metric_of_the_task(graph, dataset, task):
    path, plan = graph
    model = read_onnx(path)
    found = quantize_sensitivity(model, plan, dataset.batches("validation"), task=task)
    assert found.images == 12 and found.metric == primary_of(task)
    assert found.float_value == pytest.approx(measured(path, dataset, task), rel=1e-6)
    sign = 1 if found.metric.kind.higher_is_better else -1
    for layer in found.layers:
        assert layer.drop == pytest.approx(sign * (found.float_value - layer.value))
    assert max(layer.drop for layer in found.layers) > 0  # noise costs, whichever way is better
    written = found.to_json()
    assert written["metric"]["name"] == task.primary and "top1_pct" not in str(written)


@pytest.mark.parametrize("task", [load_task("restoration"), Error()])
def test_a_budget_is_met_in_the_unit_of_the_metric(graph, dataset, task, tmp_path):
    path, plan = graph
    model = read_onnx(path)
    batches = list(dataset.batches("validation"))
    whole = meet_budget(model, plan, batches, max_drop=1e9, folder=tmp_path, task=task)
    assert whole.met and whole.best.float_nodes == () and whole.best.drop > 0
    limit = whole.best.drop / 2
    found = meet_budget(model, plan, batches, max_drop=limit, folder=tmp_path, task=task)
    assert found.met and found.best.float_nodes and found.best.drop <= limit
    shipped = measured(tmp_path / "model.onnxruntime.onnx", dataset, task)
    assert found.best.value == pytest.approx(shipped, rel=1e-3)


def test_training_with_rounding_takes_the_loss_of_the_task(graph, network):
    """Targets darker than what the network makes: the loss of the task darkens it."""
    path, plan = graph
    settings = QuantizeSettings(
        qat=TrainSettings(epochs=8, batch_size=8, lr=5e-3, optimizer="adamw")
    )
    task = load_task("restoration")
    darker = pictures(network, brightness=0.8)
    trained = train_quantized(read_onnx(path), plan, darker, settings, task=task)
    history = [row for row in trained.result.history if "validation_psnr" in row]
    scores = [row["validation_psnr"] for row in history]
    assert trained.result.metric == "psnr" and len(scores) > 1
    assert scores[-1] > scores[0] + 1
    onnx.checker.check_model(trained.written)


def test_cuts_are_judged_in_the_direction_of_the_metric(network, dataset):
    task = Error()
    judged = prune_sensitivity(
        network,
        dataset.example,
        lambda cut: primary_value(cut, dataset, task) or 0.0,
        shares=(0.25,),
    )
    found = dataclasses.replace(judged, metric=primary_of(task))
    assert found.metric.title == "error, grey levels"
    least = min(p.value - found.baseline for curve in found.curves for p in curve.points)
    assert least > 0  # cutting makes the error larger, which is a loss
    assert set(found.keep_channels(least / 2).values()) == {1.0}
    assert 0.25 in found.keep_channels(1e6).values()
    again = PruneSensitivity.from_json(found.to_json())
    assert again == found
