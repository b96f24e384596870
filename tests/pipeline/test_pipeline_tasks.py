"""Runs of networks that do not tell classes apart: metrics, gates and verdict of their task."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_detectors
import torch
from PIL import Image
from torch import Tensor, nn

import compress
from compress import progress
from compress.data import load_data, targets_of
from compress.data._augment import CHANCES, Chance, augment_with_labels
from compress.errors import CompressError, UsageError
from compress.modules.objective import TaskLoss
from compress.pipeline.report_images import drawn_changes
from compress.pipeline.stages.prune import outputs_read
from compress.recipe.loading import validate_recipe
from compress.recipe.settings import AugmentSettings, PruneSettings, TrainSettings
from compress.report.html import html
from compress.report.schema import Details, Report
from compress.tasks import load_task
from compress.train import train

COLOURS = np.array([(20, 20, 160), (230, 40, 30), (40, 220, 60)], np.uint8)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Red and green rectangles on blue, and their masks."""
    root, random = tmp_path_factory.mktemp("masks"), np.random.default_rng(0)
    for part, count in (("train", 48), ("val", 6), ("test", 8)):
        for kind in ("images", "masks"):
            (root / part / kind).mkdir(parents=True)
        for n in range(count):
            mask = np.zeros((16, 20), np.uint8)
            for label in (1, 2):
                y, x = random.integers(0, 8, 2)
                mask[y : y + 8, x : x + 8] = label
            pixels = COLOURS[mask].astype(np.int64) + random.integers(-15, 16, (16, 20, 3))
            picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            picture.save(root / part / "images" / f"{n:02d}.png")
            Image.fromarray(mask).save(root / part / "masks" / f"{n:02d}.png")
    return root


def content(root: Path, **changes: object) -> dict[str, object]:
    training = {"epochs": 6, "batch_size": 4, "optimizer": "adamw", "lr": 0.01, "keep": "best"}
    return {
        "name": "seg",
        "model": {"name": "compress.models.cifar:unet", "options": {"width": 4}},
        "data": {"name": "masks", "root": str(root), "image_size": [16, 20], "calibration": 8},
        "stages": [
            {"train": {**training, "augment": {"flip": True, "crop_padding": 2}}},
            {"prune": {"keep_macs": 0.6}},
            {"finetune": {**training, "epochs": 1, "lr": 0.002}},
            {"quantize": {"samples": 8}},
        ],
        "targets": [{"runtime": "onnxruntime", "precision": "int8"}],
        "gates": {"metric_drop": 30.0},
        "measure": {"rounds": 3, "round_ms": 1},
    } | changes


@pytest.fixture(scope="module")
def report(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    out = tmp_path_factory.mktemp("run")
    assert compress.run(validate_recipe(content(root), where="test"), out) is not None
    told: dict[str, object] = json.loads((out / "report.json").read_text())
    told["folder"] = out
    return told


@pytest.mark.slow
def test_a_segmentation_network_goes_through_the_whole_pipeline(report):
    names = [variant["name"] for variant in report["variants"]]
    assert names == ["original", "pruned", "finetuned", "int8-onnxruntime"]
    original, *others = [variant["results"][0] for variant in report["variants"]]
    assert original["primary"] == "miou" and original["metrics"]["miou"]["value"] > 70
    low, high = original["metrics"]["miou"]["ci95"]
    assert low <= original["metrics"]["miou"]["value"] <= high
    for result in others:
        before, after = (each["metrics"]["miou"]["value"] for each in (original, result))
        assert result["changes"]["miou"]["value"] == pytest.approx(after - before)
        assert result["changes"]["miou"]["drop"] == pytest.approx(before - after)
        assert 0 < result["agreement_pct"] <= 100
        assert "top1_pct" not in result


@pytest.mark.slow
def test_its_gate_and_verdict_are_about_its_primary_metric(report):
    gates = [gate for gate in report["gates"] if gate["name"] == "metric_drop"]
    last = report["variants"][-1]["results"][0]
    assert gates[0]["measured"] == pytest.approx(last["changes"]["miou"]["drop"])
    assert gates[0]["passed"] == (gates[0]["measured"] <= 30)
    assert "mIoU" in report["verdict"] and "top-1" not in report["verdict"]
    assert not report["details"].get("confusions")


@pytest.mark.slow
def test_its_tables_have_its_metrics_and_no_top_1(report):
    text = (report["folder"] / "report.md").read_text()
    assert "mIoU, %" in text and "Change of pixel accuracy" in text
    assert "Top-1" not in text and "miou" not in text and "pixel_accuracy" not in text


def test_images_on_which_nothing_changed_are_not_drawn_as_changed(root):
    dataset = load_data(validate_recipe(content(root), where="test").data)
    context: Any = SimpleNamespace(
        task=load_task("segmentation", classes=dataset.classes), dataset=dataset
    )
    before = [{"class_map": np.zeros((16, 20), np.uint8)} for _ in range(8)]
    after = [*before]
    after[3] = {"class_map": np.ones((16, 20), np.uint8)}

    def drawn(candidate: list[dict[str, Any]]) -> list[int]:
        pair: Any = [SimpleNamespace(predictions=each) for each in (before, candidate)]
        return [each.index for each in drawn_changes(context, ("pruned", "onnxruntime"), *pair)]

    assert drawn(after) == [3]
    assert drawn(before) == [0, 1]  # how it looks at all
    assert len(drawn([{"class_map": each["class_map"] + 1} for each in before])) == 6


def test_where_neither_detector_finds_anything_no_agreement_is_told(root):
    dataset = load_data(validate_recipe(content(root), where="test").data)
    task = load_task("detection", classes=dataset.classes)
    object.__setattr__(task, "kinds", {})  # nothing is wanted: the data has masks
    context: Any = SimpleNamespace(task=task, dataset=dataset)
    row = np.array([[4.0, 2, 12, 10, 0.9, 1]], np.float32)
    one = task.predict({"output": row[None]})[0]
    none = {name: value[:0] for name, value in one.items()}

    def drawn(*found: dict[str, Any]) -> list[tuple[int, float | None]]:
        pair: Any = [SimpleNamespace(predictions=found)] * 2
        changes = drawn_changes(context, ("pruned", "onnxruntime"), *pair)
        page = html(Report(details=Details(drawn=changes, tells_classes=False)))
        told = sum(each.agreement is None for each in changes)
        assert page.count("; neither network finds anything<") == told
        return [(each.index, each.agreement) for each in changes]

    assert drawn(none, none, none) == [(0, None), (1, None)]
    assert drawn(none, none, one) == [(2, 100.0), (0, None)]


@pytest.mark.parametrize("task", ["detection", {"fidelity": {"of": "detection"}}])
def test_boxes_on_small_images_are_drawn_enlarged_where_they_are(root, task):
    dataset = load_data(validate_recipe(content(root), where="test").data)
    chosen: Any = load_task(task, classes=dataset.classes)
    object.__setattr__(chosen, "kinds", {})  # nothing is wanted: the data has masks
    row = np.array([[4.0, 2, 12, 10, 0.9, 1]], np.float32)  # of 16 x 20 pixels
    found = {"output": row} if task != "detection" else chosen.predict({"output": row[None]})[0]
    lost = {"output": row * [1, 1, 1, 1, 0, 1]} if task != "detection" else {
        name: value[:0] for name, value in found.items()
    }  # fmt: skip
    pair: Any = [SimpleNamespace(predictions=[each] * 8) for each in (found, lost)]
    context: Any = SimpleNamespace(task=chosen, dataset=dataset)
    first = drawn_changes(context, ("pruned", "onnxruntime"), *pair)[0]
    before, after, change = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(each.split(",")[1]))).convert("RGB"))
        for each in (first.before, first.after, str(first.change))
    )
    assert before.shape[:2] == (192, 240)
    for drawn in (before, change):
        seen = np.abs(drawn.astype(int) - after).sum(2) > 90  # more than few colours change
        rows, columns = np.nonzero(seen[30:])  # below its name
        assert (columns.min(), columns.max(), rows.max() + 30) == (48, 144, 120)


@pytest.mark.slow
def test_its_metrics_are_those_of_the_file_that_ships(report, root):
    recipe = validate_recipe(content(root), where="test")
    dataset = load_data(recipe.data, recipe.seed)
    row = report["variants"][-1]
    with compress.open_session(report["folder"] / row["artifact"], "onnxruntime") as session:
        again = compress.evaluate(session, dataset, "segmentation")
    assert again.metrics["miou"].value == row["results"][0]["metrics"]["miou"]["value"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task": "detection"},
            r"task: needs labels of the form 'boxes'; data 'masks' has 'mask'.*task: segm",
        ),
        ({"task": "segmentatoin"}, r"no such task 'segmentatoin'. Did you mean 'segmentation'"),
        ({"gates": {"top1_drop_pct": 1}}, r"gates.top1_drop_pct: .* Use gates.metric_drop"),
        (
            {"stages": [{"distill": {"losses": ["dkd"]}}]},
            r"stages\[0\].distill.losses: .* probabilities of one class for each image",
        ),
        (
            {"stages": [{"distill": {"control": True}}]},
            r"stages\[0\].distill.control: needs one class an image",
        ),
        ({"measure": {"explain_images": 2}}, r"measure.explain_images: needs one class an image"),
        ({"model": {"name": "compress.models.cifar:resnet20"}}, r"does not fit the network's o"),
    ],
)
def test_what_does_not_fit_the_task_is_refused(root, tmp_path, changes, message):
    changes = {"stages": [], "targets": [], "gates": {}} | changes
    with pytest.raises(CompressError, match=message):
        compress.run(validate_recipe(content(root, **changes), where="test"), tmp_path / "run")


@pytest.mark.parametrize("kind", ["ssd", "retinanet"])
def test_a_detector_of_images_with_classes_names_the_nearest_task(kind, tmp_path):
    recipe = {
        "model": {"name": f"{tiny_detectors.__file__}:{kind}"},
        "data": {"name": "digits", "image_size": 64, "channels": 3},
        "stages": [{"prune": {"keep_macs": 0.7}}],
    }
    with pytest.raises(
        CompressError, match=r"classification does not .*\(4, \d+, \d+\).* detection"
    ):
        compress.run(validate_recipe(recipe, where="test"), tmp_path / "run")


@pytest.mark.slow
def test_a_detector_is_pruned_on_images_without_labels(root, tmp_path, monkeypatch):
    recipe = {
        "model": {"name": "torchvision:ssdlite320_mobilenet_v3_large"},
        "data": {"name": "images", "root": str(root / "train" / "images"), "image_size": 64},
        "task": "detection",
        "stages": [{"prune": {"keep_macs": 0.7}}],
        "measure": {"rounds": 3, "round_ms": 1},
    }
    warned: list[str] = []
    monkeypatch.setattr(progress, "warn", warned.append)
    report = compress.run(validate_recipe(recipe, where="test"), tmp_path / "run")
    assert report is not None
    resized = "the network resizes images of 64 x 64 to 320 x 320 inside"
    assert [line for line in report.cautions if line.startswith(resized)]
    assert warned[0].startswith(resized)
    small = compress.load_model(tmp_path / "run" / "01-prune")  # of the 91 classes it comes with
    assert small.head.classification_head.num_columns == 91


def test_the_best_checkpoint_is_that_of_the_primary_metric(root):
    recipe = validate_recipe(content(root), where="test")
    dataset, task = load_data(recipe.data), load_task("segmentation", classes=("a", "b", "c"))
    model = compress.load_model("compress.models.cifar:unet", num_classes=3)
    settings = TrainSettings(epochs=3, batch_size=8, lr=0.05, keep="best")
    result = train(model, dataset, settings, task=task)
    scores = [row["validation_miou"] for row in result.history if "validation_miou" in row]
    assert len(scores) == 3 and result.metric == "miou"
    found = compress.evaluate(model, dataset, task, split="validation")
    assert found.metrics["miou"].value == pytest.approx(max(scores))
    assert TaskLoss(task)(model, *next(dataset.batches("test", 2))).ndim == 0


def chances(count: int, **fixed: float) -> Tensor:
    found = torch.rand((count, CHANCES), generator=torch.Generator().manual_seed(0))
    for name, value in fixed.items():
        found[:, Chance[name]] = value
    return found


@pytest.mark.parametrize(
    "settings",
    [
        AugmentSettings(flip=True),
        AugmentSettings(crop_padding=4),
        AugmentSettings(rotation_degrees=30, scale=(0.7, 1.3)),
        AugmentSettings(flip=True, crop_padding=3, rotation_degrees=10),
    ],
)
def test_masks_move_with_images(root, settings):
    dataset = load_data(validate_recipe(content(root), where="test").data)
    index = np.arange(8)
    images, masks = dataset.splits["train"].take(index), targets_of(dataset.splits["train"], index)
    moved, moved_masks = augment_with_labels(images, masks, chances(8), settings, Tensor.float)
    assert not torch.equal(moved_masks, masks)
    distance = (moved[:, None] - torch.tensor(COLOURS)[None, :, :, None, None]).abs().sum(2)
    counted = moved_masks != 255
    agreement = (distance.argmin(1) == moved_masks)[counted].float().mean()
    assert agreement > (0.999 if not settings.rotation_degrees else 0.9)


@pytest.mark.parametrize(
    "settings",
    [
        AugmentSettings(flip=True),
        AugmentSettings(crop_padding=6),
        AugmentSettings(scale=(0.5, 1.5)),
    ],
)
def test_boxes_move_with_images(settings):
    images = torch.zeros((6, 3, 32, 40), dtype=torch.uint8)
    images[:, :, 8:18, 10:26] = 255
    target = {"boxes": torch.tensor([[10.0, 8, 26, 18]]), "labels": torch.tensor([3])}
    moved, targets = augment_with_labels(images, [target] * 6, chances(6), settings, Tensor.float)
    for image, found in zip(moved, targets, strict=True):
        rows, columns = (image[0] > 127).nonzero(as_tuple=True)
        bright = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert found["boxes"][0].tolist() == pytest.approx([float(v) for v in bright], abs=1.01)
        assert found["labels"].tolist() == [3]


def test_boxes_that_leave_the_image_are_dropped():
    images = torch.zeros((1, 3, 20, 20), dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0, 3, 3], [8, 8, 12, 12]])
    targets = [{"boxes": boxes, "labels": torch.tensor([0, 1])}]
    settings = AugmentSettings(crop_padding=5)
    far = chances(1, CROP_Y=0.99, CROP_X=0.99)
    _, (found,) = augment_with_labels(images, targets, far, settings, Tensor.float)
    assert found["labels"].tolist() == [1] and found["boxes"].tolist() == [[3, 3, 7, 7]]


def test_changes_that_labels_cannot_follow_are_refused():
    with pytest.raises(UsageError, match="mixup cannot be applied to masks and boxes"):
        augment_with_labels(
            torch.zeros((1, 3, 8, 8), dtype=torch.uint8),
            torch.zeros((1, 8, 8), dtype=torch.uint8),
            chances(1),
            AugmentSettings(mixup=0.2),
            Tensor.float,
        )


def test_criteria_take_the_gradients_of_the_tasks_own_loss():
    """Labels of an embedding look like classes of its numbers, and are none."""
    task = load_task("embedding", classes=("a", "b"))
    example = torch.zeros(1, 3, 16, 16)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 2

    def read(criterion: str) -> dict[str, Any]:
        settings = PruneSettings(criterion=criterion, keep_macs=0.5)
        return outputs_read(task, net, example, settings)

    loss = read("taylor")["loss"]
    expected = task.loss(net, images, labels)
    torch.testing.assert_close(loss(net(images), labels), expected)
    assert "loss" not in read("obs")
