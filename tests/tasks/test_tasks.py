"""Every task keeps the contract; metrics equal those computed by hand and by other packages."""

from __future__ import annotations

import base64
import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from compress import evaluate, plugins, statistics, tasks
from compress.data import load_data
from compress.errors import DataError, EngineError, TrainingError, UnknownNameError, UsageError
from compress.evaluate import Evaluation
from compress.modules.objective import TaskLoss
from compress.recipe.settings import DataSettings
from compress.report.pictures import thumbnail
from compress.tasks import Kind, detection, load_task
from compress.tasks._drawing import boxed
from compress.tasks._metrics import change_of

NAMES = [name for name in plugins.names("tasks") if plugins.plugin_class("tasks", name).kinds]
IMAGES = 6
RANDOM = np.random.default_rng(0)


class Detector(nn.Module):
    """Returns its own losses in training, as torchvision's detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor, targets: object = None) -> object:
        return {"boxes": self.scale**2, "classes": self.scale * 2}


def a_box_target(n: int) -> dict[str, Tensor]:
    corner = torch.tensor(RANDOM.uniform(0, 20, (n, 2)), dtype=torch.float32)
    size = torch.tensor(RANDOM.uniform(4, 12, (n, 2)), dtype=torch.float32)
    return {
        "boxes": torch.cat([corner, corner + size], 1),
        "labels": torch.tensor(RANDOM.integers(0, 3, n)),
    }


def detections(target: dict[str, Tensor], noise: float) -> dict[str, Tensor]:
    boxes = target["boxes"] + torch.tensor(RANDOM.normal(0, noise, target["boxes"].shape)).float()
    scores = torch.tensor(RANDOM.uniform(0.4, 1, len(boxes))).float()
    return {"boxes": boxes, "scores": scores, "labels": target["labels"]}


BOXES = [a_box_target(n) for n in (3, 1, 0, 5, 2, 4)]


@dataclasses.dataclass(frozen=True)
class Case:
    """A network for a task, targets, outputs, and outputs that are exactly right."""

    model: nn.Module
    targets: object
    outputs: dict[str, object]
    right: dict[str, object]


def conv(out: int, *, dense: bool) -> nn.Module:
    layers = [nn.Conv2d(3, out, 3, padding=1)]
    return nn.Sequential(*layers, *([] if dense else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]))


def normal(*shape: int) -> Tensor:
    return torch.tensor(RANDOM.normal(size=shape), dtype=torch.float32)


def case(name: str) -> Case:
    RANDOM.bit_generator.state = np.random.default_rng(1).bit_generator.state  # in any order
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    hot = torch.tensor(RANDOM.integers(0, 2, (IMAGES, 3)))
    hot[0] = 1
    mask = torch.tensor(RANDOM.integers(0, 3, (IMAGES, 8, 10)))
    picture = torch.tensor(RANDOM.uniform(size=(IMAGES, 3, 16, 16)), dtype=torch.float32)
    one_hot = nn.functional.one_hot
    return {
        "classification": Case(
            conv(3, dense=False),
            labels,
            {"logits": normal(IMAGES, 3)},
            {"logits": one_hot(labels, 3).float()},
        ),
        "multilabel": Case(
            conv(3, dense=False), hot, {"logits": normal(IMAGES, 3)}, {"logits": hot * 8.0 - 4}
        ),
        "segmentation": Case(
            conv(3, dense=True),
            mask,
            {"out": normal(IMAGES, 3, 8, 10)},
            {"out": one_hot(mask, 3).movedim(-1, 1).float()},
        ),
        "restoration": Case(
            conv(3, dense=True), picture, {"image": picture * 0.9}, {"image": picture}
        ),
        "embedding": Case(
            conv(3, dense=False),
            labels,
            {"embedding": normal(IMAGES, 3)},
            {"embedding": one_hot(labels, 3).float()},
        ),
        "detection": Case(
            Detector(),
            BOXES,
            {"output_0": [detections(each, 3.0) for each in BOXES]},
            {"output_0": [detections(each, 0.0) for each in BOXES]},
        ),
    }[name]


def made(name: str) -> tasks.Task:
    return load_task(name, classes=("a", "b", "c"))


def scores(task: tasks.Task, outputs: dict[str, object], targets: object) -> list[object]:
    predictions = task.predict(outputs)
    return [task.score(p, targets[i]) for i, p in enumerate(predictions)]  # type: ignore[index]


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_a_finite_scalar_whose_gradient_reaches_the_network(name):
    it = case(name)
    size = it.targets.shape[-2:] if getattr(it.targets, "ndim", 0) > 2 else (16, 16)
    loss = made(name).loss(it.model.train(), normal(IMAGES, 3, *size), it.targets)
    loss.backward()
    assert loss.ndim == 0 and torch.isfinite(loss)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in it.model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_right_outputs_have_the_best_metrics(name):
    it, task = case(name), made(name)
    found = tasks.metrics(task, scores(task, it.right, it.targets))
    best = {"psnr": 100.0, "ssim": 1.0}
    for key, metric in found.items():
        assert metric.value == pytest.approx(best.get(key, 100.0), abs=1e-3), key
        assert metric.unit == task.kinds[key].unit


@pytest.mark.parametrize("name", NAMES)
def test_metrics_have_intervals_around_them_and_repeat(name):
    it, task = case(name), made(name)
    found = tasks.metrics(task, scores(task, it.outputs, it.targets))
    assert task.primary in found
    for metric in found.values():
        low, high = metric.ci95
        assert low <= metric.value + 1e-9 and metric.value <= high + 1e-9
    assert found == tasks.metrics(task, scores(task, it.outputs, it.targets))


@pytest.mark.parametrize("name", NAMES)
def test_metrics_do_not_depend_on_the_order_of_the_images(name):
    it, task = case(name), made(name)
    once = scores(task, it.outputs, it.targets)
    ones = np.ones((1, IMAGES), np.int64)
    backwards = task.summarize(once[::-1], ones)
    for key, value in task.summarize(once, ones).items():
        if key != "verification":  # pairs are neighbours in the order
            assert value == pytest.approx(backwards[key])


@pytest.mark.parametrize("name", NAMES)
def test_an_image_drawn_twice_counts_as_two_images(name):
    it, task = case(name), made(name)
    once = scores(task, it.outputs, it.targets)
    drawn = np.array([[2, 1, 1, 0, 1, 1]])
    if name == "embedding":  # whose gallery stays whole
        return
    repeated = [once[0], once[0], once[1], once[2], once[4], once[5]]
    expected = task.summarize(repeated, np.ones((1, 6), np.int64))
    for key, value in task.summarize(once, drawn).items():
        assert value == pytest.approx(expected[key])


@pytest.mark.parametrize("name", NAMES)
def test_a_network_agrees_perfectly_with_itself(name):
    it, task = case(name), made(name)
    for outputs in (it.outputs, it.right):
        predictions = task.predict(outputs)
        found = tasks.agreement(task, predictions, predictions)
        assert found.value == pytest.approx(100.0, abs=1e-4)
        assert found.unit == task.agreement_unit


@pytest.mark.parametrize("name", NAMES)
def test_another_network_agrees_less(name):
    it, task = case(name), made(name)
    other = tasks.agreement(task, task.predict(it.right), task.predict(it.outputs))
    assert other.value < 99


@pytest.mark.parametrize("name", NAMES)
def test_comparing_with_itself_is_no_difference_and_with_better_is_better(name):
    it, task = case(name), made(name)
    worse, right = (scores(task, each, it.targets) for each in (it.outputs, it.right))
    same = tasks.compare_metrics(task, worse, worse)[task.primary]
    assert same.value == 0 and not same.differs
    low, high = same.ci95
    assert low < 0 < high and low == pytest.approx(-high)
    change = tasks.compare_metrics(task, worse, right)[task.primary]
    assert change.value > 0 and change.drop < 0


@pytest.mark.parametrize("name", NAMES)
def test_predictions_are_drawn_onto_images(name):
    image = np.full((16, 16, 3), 128, np.uint8)
    drawn = made(name).draw(image, made(name).predict(case(name).right)[0])
    assert drawn.shape == (16, 16, 3) and drawn.dtype == np.uint8
    assert (image == 128).all()


@pytest.mark.parametrize("name", NAMES)
def test_outputs_of_a_wrong_form_are_refused_with_their_shapes(name):
    with pytest.raises(EngineError, match=r"does not fit the network's outputs: x \(2, 3, 4, 5, 6"):
        made(name).predict({"x": np.zeros((2, 3, 4, 5, 6))})


@pytest.mark.parametrize("name", [name for name in NAMES if name != "detection"])
def test_outputs_that_are_not_finite_are_refused(name):
    value = next(iter(case(name).outputs.values())).clone()
    value[2] = float("nan")
    with pytest.raises(EngineError, match=r"not finite numbers for 1 of 6 images.*image 2"):
        made(name).predict({"x": value})


@pytest.mark.parametrize(("channels", "nearest"), [(5, "segmentation"), (3, "restoration")])
def test_the_nearest_task_is_named(channels, nearest):
    with pytest.raises(EngineError, match=f"Set task: {nearest}"):
        made("classification").predict({"out": np.zeros((2, channels, 8, 8))})


@pytest.mark.parametrize("rows", [4 + 3 + 32, 4 + 3 + 51, 4 + 80])
def test_rows_beside_the_boxes_of_the_classes_are_refused(rows):
    """As heads for instance masks and key points give them, and networks of other classes."""
    maps = {f"output_{n}": np.zeros((2, 64, 4, 5)) for n in range(1, 9)}
    task = load_task("detection", classes=("a", "b", "c"))
    with pytest.raises(EngineError) as caught:
        task.predict({"output_0": np.zeros((2, rows, 21))} | maps)
    assert f"outputs: output_0 (2, {rows}, 21), output_1 " in str(caught.value)
    assert "6 more. Expected" in str(caught.value) and "(B, 7, A)" in str(caught.value)
    assert "Instance masks, key points" in str(caught.value)
    assert "segmentation" not in str(caught.value)


@pytest.mark.parametrize("classes", [3, 6])
@pytest.mark.parametrize("names", [("logits", "pred_boxes"), ("output_0", "output_1")])
def test_scores_of_queries_are_no_boxes(classes, names):
    """As DETR gives them: of six classes, or of seven queries, they had the shape of boxes."""
    task = load_task("detection", classes=tuple("abcdef"[:classes]))
    outputs = dict(zip(names, (np.zeros((2, 7, classes)), np.zeros((2, 7, 4))), strict=True))
    with pytest.raises(
        EngineError, match=r"\(2, 7, 4\).*Boxes and scores in outputs of their own.*task: path/file"
    ):
        task.predict(outputs)


def test_feature_maps_of_a_detector_are_no_class_maps():
    maps = {f"output_{n}": np.zeros((2, 64, 8 // n, 8 // n)) for n in (1, 2, 4)}
    task = load_task("segmentation", classes=("a", "b", "c"))
    with pytest.raises(EngineError, match=r"does not fit .*output_0 \(2, 7, 84\).*task: detection"):
        task.predict({"output_0": np.zeros((2, 7, 84))} | maps)
    classes = np.zeros((2, 3, 8, 8))
    classes[:, 2] = 1
    for outputs in (maps | {"late": classes}, {"label": np.zeros((2, 5)), "mask": classes}):
        assert (task.predict(outputs)[0]["class_map"] == 2).all()
    with pytest.raises(EngineError, match="has 2 classes for each pixel, the data has 3"):
        task.predict({"mask": classes[:, :2], "label": np.zeros((2, 5))})


@pytest.mark.parametrize("name", ["embedding", "classification"])
def test_an_output_without_numbers_is_refused(name):
    with pytest.raises(EngineError, match=r"\(2, 0\) is empty. Build the network with at"):
        made(name).predict({"out": np.zeros((2, 0))})


def test_an_unknown_task_lists_the_known():
    with pytest.raises(UnknownNameError, match=r"no such task 'segmentatoin'. Did you mean 'segm"):
        load_task("segmentatoin")


def test_options_reach_the_task():
    assert load_task({"segmentation": {"ignore": 11}}).ignore == 11
    titles = {k: load_task({"embedding": {"k": k}}).kinds["recall_at_k"].title for k in (1, 5)}
    assert titles == {1: "recall at 1", 5: "recall at 5"}
    with pytest.raises(UsageError, match=r"task 'segmentation' has no option 'ingore'"):
        load_task({"segmentation": {"ingore": 11}})


# --- oracles


def test_mean_iou_by_hand():
    truth = np.array([[0, 0, 1], [1, 2, 255]])
    logits = np.zeros((1, 3, 2, 3))
    for (y, x), k in np.ndenumerate(np.array([[0, 1, 1], [1, 0, 0]])):
        logits[0, k, y, x] = 1
    task = made("segmentation")
    found = tasks.metrics(task, scores(task, {"out": logits}, [truth]))
    # class 0: 1 of {2 true, 2 found} = 1/3; class 1: 2 of 3; class 2: 0
    assert found["miou"].value == pytest.approx(100 * (1 / 3 + 2 / 3 + 0) / 3)
    assert found["pixel_accuracy"].value == pytest.approx(100 * 3 / 5)


def test_mean_iou_equals_torchmetrics():
    from torchmetrics.functional.classification import multiclass_jaccard_index

    it, task = case("segmentation"), made("segmentation")
    expected = multiclass_jaccard_index(it.outputs["out"].argmax(1), it.targets, 3, "macro")
    found = tasks.metrics(task, scores(task, it.outputs, it.targets))
    assert found["miou"].value == pytest.approx(100 * float(expected))


def test_psnr_and_ssim_by_hand_and_by_torchmetrics():
    from torchmetrics.functional.image import peak_signal_noise_ratio

    task = made("restoration")
    wanted = normal(1, 3, 16, 16).sigmoid()
    found = (wanted + 0.1).clamp(0, 1)
    one = task.score(task.predict({"image": found})[0], wanted[0])
    expected = peak_signal_noise_ratio(found, wanted, data_range=1.0)
    assert one["psnr"] == pytest.approx(float(expected), abs=1e-3)
    zeros = task.score({"image": np.zeros((1, 16, 16), np.float32)}, np.full((1, 16, 16), 0.1))
    assert zeros["psnr"] == pytest.approx(20.0, abs=1e-4)


def test_multilabel_map_and_f1_equal_torchmetrics():
    from torchmetrics.functional.classification import (
        multilabel_average_precision,
        multilabel_f1_score,
    )

    it, task = case("multilabel"), made("multilabel")
    found = tasks.metrics(task, scores(task, it.outputs, it.targets))
    chances = it.outputs["logits"].sigmoid()
    expected = multilabel_average_precision(chances, it.targets, 3)
    assert found["map"].value == pytest.approx(100 * float(expected), abs=1e-3)
    expected = multilabel_f1_score(chances, it.targets, 3, average="micro")
    assert found["f1"].value == pytest.approx(100 * float(expected), abs=1e-3)


def test_average_precision_of_boxes_by_hand():
    """Three boxes, two objects: right, wrong, right; recall 1/2 at precision 1, 1 at 2/3."""
    objects = {"boxes": [[0, 0, 10, 10], [20, 20, 30, 30]], "labels": [0, 0]}
    target = {key: np.array(value) for key, value in objects.items()}
    found = {
        "boxes": np.array([[0, 0, 10, 10], [50, 50, 60, 60], [20, 20, 30, 30]], np.float32),
        "scores": np.array([0.9, 0.8, 0.7], np.float32),
        "labels": np.array([0, 0, 0]),
    }
    task = made("detection")
    result = tasks.metrics(task, scores(task, {"output_0": [found]}, [target]))
    assert result["map50"].value == pytest.approx(100 * (51 * 1 + 50 * 2 / 3) / 101)
    assert result["map50_95"].value == pytest.approx(result["map50"].value)


def test_a_box_that_overlaps_by_two_thirds_counts_at_four_of_ten_thresholds():
    target = {"boxes": np.array([[0.0, 0, 10, 10]]), "labels": np.array([1])}
    found = {
        "boxes": np.array([[0, 2, 10, 12]], np.float32),  # 80 of 120
        "scores": np.array([0.9], np.float32),
        "labels": np.array([1]),
    }
    task = made("detection")
    result = tasks.metrics(task, scores(task, {"output_0": [found]}, [target]))
    assert result["map50"].value == pytest.approx(100)
    assert result["map50_95"].value == pytest.approx(100 * 4 / 10)  # 0.50, 0.55, 0.60, 0.65


def test_ignored_objects_neither_reward_nor_punish():
    target = {
        "boxes": np.array([[0.0, 0, 10, 10], [20, 20, 30, 30]]),
        "labels": np.array([0, 0]),
        "ignored": np.array([False, True]),
    }
    found = {
        "boxes": np.array([[20, 20, 30, 30], [0, 0, 10, 10]], np.float32),
        "scores": np.array([0.9, 0.8], np.float32),
        "labels": np.array([0, 0]),
    }
    task = made("detection")
    result = tasks.metrics(task, scores(task, {"output_0": [found]}, [target]))
    assert result["map50_95"].value == pytest.approx(100)


def test_boxes_equal_the_coco_evaluation_code():
    pytest.importorskip("pycocotools", reason="the oracle is pycocotools")
    from torchmetrics.detection import MeanAveragePrecision

    random = np.random.default_rng(1)
    targets, found = [], []
    for _ in range(20):
        corner = random.uniform(0, 60, (6, 2))
        boxes = np.concatenate([corner, corner + random.uniform(15, 40, (6, 2))], 1)
        labels = random.integers(0, 3, 6)
        targets.append({"boxes": torch.tensor(boxes), "labels": torch.tensor(labels)})
        moved = np.concatenate([boxes + random.normal(0, 2, boxes.shape), boxes[:2] + 30])
        found.append(
            {
                "boxes": torch.tensor(moved),
                "scores": torch.tensor(random.uniform(0.1, 1, 8)),
                "labels": torch.tensor(np.concatenate([labels, labels[:2]])),
            }
        )
    exact = {  # its own defaults are float32, which moves recalls such as 1 / 10 to the next step
        "rec_thresholds": np.linspace(0, 1, 101).tolist(),
        "iou_thresholds": np.linspace(0.5, 0.95, 10).tolist(),
    }
    oracle = MeanAveragePrecision(**exact)
    oracle.update(found, targets)
    expected, task = oracle.compute(), made("detection")
    result = tasks.metrics(task, scores(task, {"output_0": found}, targets))
    assert result["map50_95"].value == pytest.approx(100 * float(expected["map"]), abs=1e-3)
    assert result["map50"].value == pytest.approx(100 * float(expected["map_50"]), abs=1e-3)


def test_box_iou_equals_torchvision():
    from torchvision.ops import box_iou

    one, two = (a_box_target(n)["boxes"] for n in (5, 7))
    expected = box_iou(one, two).numpy()
    assert detection.box_iou(one.numpy(), two.numpy()) == pytest.approx(expected, abs=1e-6)


def test_a_yolo_head_is_decoded_and_its_duplicates_removed():
    head = np.zeros((1, 7, 4), np.float32)
    head[0, :4, 0] = [10, 10, 8, 4]
    head[0, 4:, 0] = [0.1, 0.9, 0]
    head[0, :, 1] = head[0, :, 0] * np.array([1, 1, 1, 1, 0, 0.5, 0])  # the same, less sure
    head[0, :4, 2], head[0, 6, 2] = [30, 30, 2, 2], 0.6
    (found,) = made("detection").predict({"output0": head})
    assert found["labels"].tolist() == [1, 2]
    assert found["boxes"].tolist() == [[6, 8, 14, 12], [29, 29, 31, 31]]
    assert found["scores"] == pytest.approx([0.9, 0.6])


def test_boxes_that_are_still_offsets_in_a_grid_are_refused():
    """As YOLOX's exporter leaves them unless it is told to decode."""
    draw = np.random.default_rng(0)
    rows = np.concatenate([draw.normal(size=(1, 84, 4)), draw.random((1, 84, 6))], 2)
    task = load_task("detection", classes="abcde")
    with pytest.raises(EngineError, match=r"cells of a grid.*--decode_in_inference"):
        task.predict({"output": rows})
    cells = np.concatenate([np.indices((s, s)).reshape(2, -1).T * 64 / s for s in (8, 4, 2)])
    rows[0, :, :2] += cells
    rows[0, :, 2:4] = np.exp(rows[0, :, 2:4])
    assert len(task.predict({"output": rows})[0]["scores"])


@pytest.mark.parametrize("classes", [("a", "b", "c"), ("a",), ()])
def test_rows_with_objectness_are_read_as_the_head_they_stand_for(classes):
    """As YOLOv5 and YOLOX give them: centre, size, objectness and the score of each class."""
    draw = np.random.default_rng(0)
    rows = draw.uniform(0, 1, (2, 100, 5 + (len(classes) or 80)))
    rows[..., :4] = draw.uniform(4, 60, (2, 100, 4))
    head = np.concatenate([rows[..., :4], rows[..., 4:5] * rows[..., 5:]], 2).transpose(0, 2, 1)
    task = load_task("detection", classes=classes)
    both = (task.predict({"x": each}) for each in (rows, head))
    for found, expected in zip(*both, strict=True):
        for name, value in expected.items():
            assert np.array_equal(found[name], value)


@pytest.mark.parametrize("classes", [("a",), ()])
def test_rows_after_nms_and_heads_of_few_places_stay_what_they_are(classes):
    rows = np.zeros((1, 40, 6))
    rows[0, 0] = [2, 3, 9, 8, 0.7, 0]  # not a score of 0 times 0.7
    (found,) = load_task("detection", classes=classes).predict({"x": rows})
    assert found["scores"] == pytest.approx([0.7])
    assert found["boxes"].tolist() == [[2, 3, 9, 8]]
    head = np.full((1, 84, 21), 0.5)
    head[:, :4] = 30
    (found,) = load_task("detection").predict({"x": head})
    assert found["scores"] == pytest.approx([0.5]) and found["boxes"].tolist() == [[15, 15, 45, 45]]


def test_networks_with_a_background_class_count_from_one():
    task = load_task({"detection": {"background": True}}, classes=("a", "b", "c"))
    shifted = [{**d, "labels": d["labels"] + 1} for d in case("detection").right["output_0"]]
    found = tasks.metrics(task, scores(task, {"output_0": shifted}, BOXES))
    assert found["map50_95"].value == pytest.approx(100)


def test_recall_at_one_by_hand():
    task = made("embedding")
    vectors = np.array([[1, 0.1], [1, 0], [0, 1], [1, 0.2]])
    found = tasks.metrics(task, scores(task, {"embedding": vectors}, [0, 0, 1, 1]))
    assert found["recall_at_k"].value == pytest.approx(50)  # both of class 1 are next to class 0


# --- own tasks

OWN = '''
from compress.tasks import Kind, Task, numeric

class Brightness(Task):
    """How far the mean brightness is off."""

    kinds = {"error": Kind("levels", higher_is_better=False)}
    primary = "error"

    def loss(self, model, images, targets):
        return (model(images).mean((1, 2, 3)) - targets).abs().mean()

    def predict(self, outputs):
        return [{"mean": numeric(each).mean()} for each in next(iter(outputs.values()))]

    def score(self, prediction, target):
        return {"error": abs(float(prediction["mean"]) - float(target))}
'''


def test_an_own_task_from_a_path(tmp_path):
    file = tmp_path / "bright.py"
    file.write_text(OWN)
    task = load_task(f"{file}:Brightness", classes=("a", "b"))
    outputs = {"image": np.ones((2, 1, 2, 2))}
    before = scores(task, outputs, [1.0, 3.0])
    assert tasks.metrics(task, before)["error"].value == pytest.approx(1.0)
    after = scores(task, outputs, [1.0, 1.0])
    change = tasks.compare_metrics(task, before, after)["error"]
    assert change.value == pytest.approx(-1.0) and change.drop == pytest.approx(-1.0)


def test_an_own_task_that_returns_nan_is_refused(tmp_path):
    file = tmp_path / "nan.py"
    file.write_text(OWN.replace('"error": abs', '"error": float("nan") * abs'))
    task = load_task(f"{file}:Brightness")
    with pytest.raises(DataError, match="metric error is nan over 2 images"):
        tasks.metrics(task, scores(task, {"x": np.ones((2, 1, 2, 2))}, [1.0, 3.0]))


RETURNED = 'return {"error": abs(float(prediction["mean"]) - float(target))}'
SUMMARY = RETURNED + "\n\n    def summarize(self, scores, counts):\n        "


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("return {'error': float('nan')}", "score gives error as NaN for each of 2 images"),
        (
            "return {'error': np.random.rand()}",
            r"Brightness: score of image 0 gives error as .* and then",
        ),
        ("return [][3]", "Brightness: score fails for image 0 of a batch: list index out"),
        ("return {'error': 'low'}", "score gives error as 'low'. Expected a number"),
        ("return {'error': None}", "score gives error as None. Expected a number"),
        ("return 3.0", r"score gives 3.0. Expected a dictionary: \{'error': \.\.\.\}"),
        ("return {}", "summarize fails: KeyError 'error'"),
        ("return {'fault': 1.0}", "summarize fails: KeyError 'error'"),
        (SUMMARY + "return {}", "summarize fails: KeyError 'error'"),
        (SUMMARY + "return {'error': np.zeros(7)}", r"summarize gives error of shape \(7,\)"),
        (SUMMARY + "return {'error': np.random.rand(2)}", "summarize gives error as .* and then"),
    ],
)
def test_a_metric_that_is_no_number_is_found_before_a_run(tmp_path, returned, message):
    file = tmp_path / "own.py"
    file.write_text("import numpy as np\n" + OWN.replace(RETURNED, returned))
    task = load_task(f"{file}:Brightness")
    with pytest.raises(UsageError, match=message):
        tasks.scored(task, {"x": np.ones((2, 1, 2, 2))}, [1.0, 3.0])


LOSS = "def loss(self, model, images, targets):"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("raise ValueError('no such layer')", "loss fails: no such layer"),
        ("return model(images).mean((0, 2, 3))", r"loss gives a tensor of shape \(2,\)"),
        ("return model(images).mean().detach()", "loss gives a tensor without gradients"),
        ("return 0.5", "loss gives 0.5. Expected the mean loss of the batch: a tensor"),
        ("return None", "loss gives None"),
    ],
)
def test_a_loss_that_cannot_be_trained_on_is_refused_with_the_name_of_its_task(
    tmp_path, returned, message
):
    file = tmp_path / "own.py"
    file.write_text(OWN.replace(LOSS, f"{LOSS}\n        {returned}\n"))
    loss = TaskLoss(load_task(f"{file}:Brightness"))
    with pytest.raises(TrainingError, match=f"^Brightness: {message}"):
        loss(nn.Conv2d(3, 2, 1), torch.rand(2, 3, 4, 4), [0, 1])


def test_a_loss_that_runs_out_of_memory_says_just_that(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN.replace(LOSS, f"{LOSS}\n        raise MemoryError\n"))
    with pytest.raises(MemoryError):
        TaskLoss(load_task(f"{file}:Brightness"))(nn.Conv2d(3, 2, 1), torch.rand(2, 3, 4, 4), [])


def test_too_few_predictions_are_found_before_a_run(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    task = load_task(f"{file}:Brightness")
    with pytest.raises(EngineError, match="Brightness: 2 predictions for 3 images"):
        tasks.scored(task, {"x": np.ones((2, 1, 2, 2))}, [1.0, 3.0, 2.0])


def test_a_score_that_becomes_random_after_many_images_is_found(tmp_path):
    file = tmp_path / "own.py"
    count = "self.calls = getattr(self, 'calls', 0) + 1"
    random = f"{count}\n        return {{'error': float(self.calls > 20) * np.random.rand()}}"
    file.write_text("import numpy as np\n" + OWN.replace(RETURNED, random))
    dataset = load_data(DataSettings(name="digits"))
    with pytest.raises(UsageError, match=r"score of image 0 gives error as 0\.0 and then as"):
        evaluate.of_task(lambda images: images, dataset, f"{file}:Brightness", limit=40)


def test_a_score_that_fails_for_a_later_image_names_the_task(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN.replace('"error": abs', '"error": [0.0][int(target) // 2] + abs'))
    task = load_task(f"{file}:Brightness")
    with pytest.raises(UsageError, match="Brightness: score fails for image 1 of a batch: list"):
        tasks.contributions(task, task.predict({"x": np.ones((2, 1, 2, 2))}), [1.0, 3.0])


@pytest.mark.parametrize("name", NAMES)
def test_tasks_are_repeatable(name):
    given = case(name)
    assert len(tasks.scored(made(name), given.outputs, given.targets)) == IMAGES


def test_class_metrics_are_those_of_torchmetrics_with_intervals():
    random = np.random.default_rng(0)
    logits = random.normal(size=(6, 3, 8, 8))
    masks = random.integers(0, 3, (6, 8, 8))
    found = tasks.class_metrics(
        made("segmentation"), scores(made("segmentation"), {"out": logits}, masks)
    )
    from torchmetrics.functional.classification import multiclass_jaccard_index

    wanted = multiclass_jaccard_index(
        torch.from_numpy(logits.argmax(1)), torch.from_numpy(masks), 3, average=None
    )
    for each, value in zip(found.values(), wanted.tolist(), strict=True):
        assert each.value == pytest.approx(100 * value, abs=1e-4)
        assert each.ci95[0] < each.value < each.ci95[1]


@pytest.mark.parametrize("features", [2, 3, 7])
def test_the_loss_of_segmentation_trains_heads_and_no_features(features):
    class Heads(nn.Module):
        def forward(self, images):
            maps = images[:, :1].expand(-1, features, -1, -1) * images.mean()
            if features == 3:  # deep supervision at half the size
                return {"logits": images, "aux": 2 * maps[:, :, ::2, ::2], "loss": None}
            return {"features": maps, "logits": images, "loss": None}

    images, masks = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
    expected = nn.functional.cross_entropy(images, masks)
    if features == 3:
        half = Heads()(images)["aux"]
        full = nn.functional.interpolate(half, (8, 8), mode="bilinear")
        expected = expected + 0.5 * nn.functional.cross_entropy(full, masks)
    task = load_task("segmentation", classes=("a", "b", "c"))
    torch.testing.assert_close(task.loss(Heads(), images, masks), expected)


def test_the_loss_of_segmentation_needs_an_output_with_places():
    with pytest.raises(UsageError, match=r"segmentation does not fit an output of shape \(2, 3\)"):
        made("segmentation").loss(nn.Flatten(1), torch.randn(2, 3), torch.zeros(2, 1, 1))


def test_a_segmentation_network_of_too_few_classes_is_refused():
    task = load_task("segmentation", classes=("a", "b", "c", "d", "e"))
    with pytest.raises(EngineError, match=r"has 3 classes for each pixel, the data has 5"):
        task.predict({"out": np.zeros((2, 3, 4, 7))})


def test_without_labels_the_predictions_of_a_task_are_compared():
    task = load_task({"fidelity": {"of": "segmentation"}})
    one, two = np.zeros((2, 1, 2, 2, 2))
    two[0, 1] = 1.0
    pair = [task.predict({"out": each})[0] for each in (one, two)]
    assert task.agreement(pair[0], pair[0]) == 100.0 and task.agreement(*pair) == 0.0
    assert task.answers == "classes" and "kd" in task.losses and not task.kinds


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("{}/none.py:Thing", "no such file"),
        ("{}/own.py:Brigthness", "no such task 'Brigthness'. Did you mean 'Brightness'"),
        ("{}/broken.py:Thing", "importing it fails"),
        ("{}/other.py:Other", "is no task"),
        ("{}/primary.py:Brightness", "primary 'eror' is none of its metrics"),
    ],
)
def test_own_tasks_that_cannot_be_used_say_why(tmp_path, reference, message):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "other.py").write_text("class Other:\n    pass\n")
    (tmp_path / "primary.py").write_text(OWN.replace('primary = "error"', 'primary = "eror"'))
    with pytest.raises(UsageError, match=message):
        load_task(reference.format(tmp_path))


def test_what_a_detector_lost_and_what_appeared_is_drawn():
    task = load_task("detection", classes=("cell", "plate"))
    image = np.full((80, 80, 3), 255, np.uint8)
    boxes = np.array([[5, 30, 25, 50], [40, 30, 60, 50]], np.float32)

    def found(*kept: int, label: int = 0) -> dict[str, np.ndarray]:
        rows = list(kept)
        return {
            "boxes": boxes[rows],
            "scores": np.full(len(rows), 0.9, np.float32),
            "labels": np.full(len(rows), label, np.int64),
        }

    def edges(picture: np.ndarray) -> list[list[int]]:
        """Colour of the lower edge of each box; white where none is drawn."""
        return [picture[50, x].tolist() for x in (15, 50)]

    white = [255] * 3
    assert np.array_equal(task.draw_change(image, found(0, 1), found(0, 1)), image)
    lost = edges(task.draw_change(image, found(0, 1), found(0)))
    new = edges(task.draw_change(image, found(0), found(0, 1)))
    assert lost[0] == new[0] == white and white not in (lost[1], new[1]) and lost[1] != new[1]
    both = task.draw_change(image, found(0), found(0, label=1))  # another class: lost, and new
    assert edges(both)[0] != white and edges(both)[1] == white
    truth = task.truth({"boxes": torch.tensor(boxes), "labels": torch.tensor([0, 1]),
                        "ignored": torch.tensor([False, True])})  # fmt: skip
    assert truth["labels"].tolist() == [0] and truth["boxes"].tolist() == boxes[:1].tolist()
    wanted, predicted = (
        task.draw(image, truth | each) for each in ({}, {"scores": np.ones(1, np.float32)})
    )
    assert (wanted != predicted).any()  # what is wanted has no score
    assert (wanted == predicted)[50].all()  # and the same box


def test_the_wanted_classes_are_drawn_without_probabilities():
    task, image = load_task("multilabel", classes=("a", "b")), np.full((64, 64, 3), 200, np.uint8)
    sure = task.predict({"logits": np.array([[9.0, -9.0]])})[0]
    wanted = task.draw(image, task.truth(np.array([1, 0])))
    assert (wanted != image).any() and (wanted != task.draw(image, sure)).any()
    assert (task.draw(image, task.truth(np.array([0, 0]))) != image).any()  # "none"


def test_detectors_that_find_nothing_agree_on_nothing():
    task = load_task("detection", classes=("a",))
    boxes = np.array([[5, 5, 9, 9]], np.float32)
    one = {"boxes": boxes, "scores": np.full(1, 0.9), "labels": np.zeros(1, int)}
    empty = {name: each[:0] for name, each in one.items()}
    truth = {"boxes": boxes, "labels": one["labels"]}

    def evaluated(*predictions):
        return Evaluation(task, predictions, [task.score(each, truth) for each in predictions])

    alike = evaluated(empty, empty).change_row(evaluated(empty, empty))
    assert "agreement_pct" not in alike
    assert alike["skipped"] == {"agreement_pct": "neither network finds anything in any image"}
    assert evaluated(one, empty).change_row(evaluated(one, empty))["agreement_pct"] == 100
    assert evaluated(one, one).change_row(evaluated(one, empty))["agreement_pct"] == 50


def test_unlabelled_detectors_that_find_nothing_agree_on_nothing():
    task = load_task({"fidelity": {"of": "detection"}}, classes=("a",))
    boxes = np.array([[32.0, 32, 20, 20, 0.9], [9, 9, 6, 6, 0.1]], np.float32).T  # (4 + 1, 2)
    one, empty = {"output": boxes}, {"output": boxes * [[1], [1], [1], [1], [0.2]]}

    def evaluated(*predictions):
        return Evaluation(task, predictions, [{} for _ in predictions])

    alike = evaluated(empty, empty).change_row(evaluated(empty, empty))
    assert "agreement_pct" not in alike
    assert alike["skipped"] == {"agreement_pct": "neither network finds anything in any image"}
    assert evaluated(one, empty).change_row(evaluated(one, empty))["agreement_pct"] == 100
    assert evaluated(one, one).change_row(evaluated(one, empty))["agreement_pct"] == 50


def test_outputs_without_a_task_always_have_something_to_agree_on():
    assert load_task("fidelity").finds({"output": np.zeros(3)})


def test_a_detector_agrees_with_itself_where_a_box_has_no_area():
    task = load_task("detection", classes=("a",))
    boxes = np.array([[5, 30, 25, 50], [40, 30, 40, 50]], np.float32)
    found = {"boxes": boxes, "scores": np.full(2, 0.9), "labels": np.zeros(2, np.int64)}
    assert task.agreement(found, found) == 100.0
    picture = np.zeros((60, 60, 3), np.uint8)
    assert np.array_equal(task.draw_change(picture, found, found), picture)


def test_a_name_that_no_box_has_room_for_stands_in_the_corner():
    task = load_task("detection", classes=("a platelet of some length", "b"))
    image = np.full((80, 120, 3), 255, np.uint8)
    boxes = np.array([[60, 40, 72, 60], [60, 62, 119, 78]], np.float32)

    def drawn(*kept: int) -> np.ndarray:
        found = {"boxes": boxes, "scores": np.array([0.9, 0.8], np.float32), "labels": np.arange(2)}
        return task.draw(image, {name: value[list(kept)] for name, value in found.items()})

    assert (drawn(0)[:13, :60] != 255).any() and (drawn(0)[15:26, :50] == 255).all()
    assert (drawn(1)[:27, :50] == 255).all()  # its name fits, beside its box
    assert (drawn(1)[50:62, 60:110] != 255).any()


def test_a_detector_without_losses_is_refused():
    with pytest.raises(UsageError, match="returns no losses in training mode"):
        made("detection").loss(Two(), normal(2, 3, 8, 8), BOXES[:2])


class Two(nn.Module):
    def forward(self, images: Tensor, targets: object) -> Tensor:
        return images.mean((2, 3))


def test_outputs_without_labels_are_kept_as_they_are():
    task = load_task("fidelity")
    outputs = {"maps": np.ones((3, 2, 4)), "boxes": [np.zeros((n, 4)) for n in (0, 2, 5)]}
    found = task.predict(outputs)
    assert [each["boxes"].shape for each in found] == [(0, 4), (2, 4), (5, 4)]
    assert all(each["maps"].shape == (2, 4) for each in found)
    with pytest.raises(EngineError, match="different numbers of rows"):
        task.predict({"a": np.ones((3, 2)), "b": np.ones((7, 4))})
    with pytest.raises(DataError, match="no labels"):
        task.loss(conv(3, dense=False), normal(2, 3, 8, 8), None)


def test_a_change_over_few_images_says_what_they_cannot_rule_out():
    said, error = "30 images cannot rule out a loss of 9.0 points", Kind(higher_is_better=False)
    assert change_of(-3.0, (-9.0, 2.0), Kind(), 30).verdict == said
    assert change_of(3.0, (-2.0, 9.0), error, 30).verdict == said
    assert change_of(-3.0, (-9.0, -1.0), Kind(), 30).verdict == "worse"
    assert change_of(0.1, (-0.5, 0.6), Kind(), 30).verdict == "no significant difference"
    assert change_of(-1.0, (-9.0, 2.0), Kind("dB"), 30).verdict == "no significant difference"


@pytest.mark.parametrize("images", [1, 20, 200])
def test_an_interval_has_a_width_where_all_images_agree(images: int) -> None:
    task = load_task("classification", classes=("a", "b"))
    scores = [{"top1": 100.0, "top5": 100.0}] * images
    low, high = tasks.metrics(task, scores)["top1"].ci95 or (0.0, 0.0)
    assert (low, high) == pytest.approx(
        [100 * end for end in statistics.wilson_interval(images, images)], abs=0.01
    )
    change = tasks.compare_metrics(task, scores, scores)["top1"]
    assert change.value == 0 and change.ci95[0] < 0 < change.ci95[1]
    assert not change.differs
    same = [{"label": np.int64(1)}] * images
    agreed = tasks.agreement(task, same, same)
    assert agreed.value == 100 and agreed.ci95 is not None and agreed.ci95[0] < 100


def test_an_interval_in_decibels_has_a_width_where_nothing_changed() -> None:
    task = load_task("restoration")
    scores = [{"psnr": 30.0 + n, "ssim": 0.9} for n in range(12)]
    change = tasks.compare_metrics(task, scores, scores)["psnr"]
    assert change.ci95[0] < -0.1 and change.ci95[1] > 0.1
    assert all(low < high for low, high in (m.ci95 for m in tasks.metrics(task, scores).values()))


def test_an_embedding_does_not_learn_from_mixed_classes():
    with pytest.raises(UsageError, match="mixup and cutmix mix them"):
        made("embedding").loss(nn.Identity(), torch.rand(4, 3), torch.rand(4, 2))


def test_labels_of_boxes_do_not_cover_one_another_and_contrast_with_their_ground():
    image = np.full((200, 200, 3), 200, np.uint8)
    boxes = np.array([[20.0, 40, 180, 90], [26, 42, 180, 90]])
    one, both = (
        boxed(image, boxes[:n], np.ones(n, int), ["b"] * n, np.array([0.9, 0.8])[:n])
        for n in (1, 2)
    )
    assert (one[26:40, 20:] == both[26:40, 20:]).all()  # above the boxes: the label of the first
    for label, is_light in ((0, True), (1, True), (2, False)):  # red, blue, green
        drawn = boxed(image, boxes[:1], np.array([label]), ["b"], np.array([0.9]))
        least = drawn[28:40, 22:50].min(-1)
        assert (least.max() > 200, least.min() < 20) == (is_light, not is_light), label


def test_small_things_keep_their_colours_in_pictures_of_few():
    random = np.random.default_rng(0)
    image = np.kron(random.integers(90, 220, (16, 16, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    image[4:8, 4:60], image[40:44, 4:40] = (178, 35, 35), 0
    shown = thumbnail(image, 128, 64).partition(",")[2]
    with Image.open(io.BytesIO(base64.b64decode(shown))) as picture:
        found = np.asarray(picture.convert("RGB")).astype(int)
    assert abs(found[5, 20] - (178, 35, 35)).max() < 20
    assert found[41, 20].max() < 20
