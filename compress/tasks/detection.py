"""Boxes around objects, each with a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from compress.data._pictures import Fit
from compress.errors import EngineError, UsageError
from compress.graph.ends import Nms
from compress.modules.detectors import has_background
from compress.tasks import (
    Array,
    Contribution,
    Form,
    Kind,
    Prediction,
    Row,
    Target,
    Task,
    nearest_task,
    numeric,
    shapes_told,
)
from compress.tasks._drawing import boxed
from compress.tasks._metrics import coco_average_precision, mean_over
from compress.tasks._plain_answers import (
    CONFIDENT,
    best_boxes,
    boxes_in_picture,
    boxes_told,
    confident,
)

IOUS = np.linspace(0.5, 0.95, 10)
QUERIES = (
    "Boxes and scores in outputs of their own, as SSD heads, face detectors and DETR give them, "
    "are not read: join them in the network to centre and size in pixels, then scores, or give an "
    "own task: task: path/file.py:Class"
)
OTHER_ROWS = (
    "Build the network for the classes of the data. Instance masks, key points and rotated boxes, "
    "which other heads of YOLO give beside the boxes, are not read: use their detector"
)
CORNER = 8.0  # pixels; the last cell of the smallest image, 32 x 32, has its centre at 16 and more


@dataclass(frozen=True)
class Detection(Task):
    """Boxes around objects: mAP 50-95 and mAP 50, as COCO counts them.

    Reads what torchvision's detectors return (a list of boxes, scores and labels for each image),
    arrays of these names, boxes after NMS (B, M, 6) as x1, y1, x2, y2, score, class, and YOLO heads
    before NMS, which get it here: (B, 4 + K, A), centre, size and class scores, or (B, A, 5 + K)
    with objectness before the scores, as YOLOv5 and YOLOX have it. Of a place the best class
    counts, or with ``multi_label`` all of them. ``background`` says that class 0 of a network
    that returns boxes after NMS is none of the data's. With ``nms_in_graph`` exported files end in
    NMS and give (B, max_boxes, 6). Targets are dictionaries of "boxes"
    (M, 4) as x1, y1, x2, y2 in pixels of the input, "labels" (M,), and optionally "ignored" (M,):
    objects that need not be found.

    Source: Lin et al., Microsoft COCO, ECCV 2014, https://arxiv.org/abs/1405.0312.
    """

    background: bool = False
    multi_label: bool = False
    nms_in_graph: bool = False
    score_threshold: float = 0.001
    nms_iou: float = 0.7
    max_boxes: int = 100
    classes: Sequence[str] = ()

    kinds: ClassVar[Mapping[str, Kind]] = {
        "map50_95": Kind(title="mAP50-95"),
        "map50": Kind(title="mAP50"),
    }
    primary: ClassVar[str] = "map50_95"
    losses: ClassVar[tuple[str, ...]] = ("cwd",)
    class_metric: ClassVar[str] = "AP 50-95"
    legend: ClassVar[str] = (
        f"Boxes of a score of {CONFIDENT:g} or more; the difference shows those that were lost "
        "and those that are new."
    )
    loss_reads_outputs: ClassVar[bool] = False
    target: ClassVar[str] = "boxes"
    form: ClassVar[Form] = "boxes"

    def loss(self, model: nn.Module, images: Tensor, targets: Any) -> Tensor:
        """Return the sum of the losses that the network itself gives in training, a scalar.

        The network is called as ``model(images, targets)`` with torchvision's targets: a list of
        dictionaries of "boxes" and "labels". One of Ultralytics' has a loss of its own, which is
        given what it returns.

        Raises:
            UsageError: it returns no losses.
        """
        if hasattr(model, "init_criterion"):
            return _ultralytics_loss(model, images, targets)
        shift = int(self.background or has_background(model))
        told = [{"boxes": each["boxes"], "labels": each["labels"] + shift} for each in targets]
        losses = model(images, told)
        if isinstance(losses, Mapping):
            losses = list(losses.values())
        parts = [losses] if isinstance(losses, Tensor) else list(losses)
        if not parts or any(not isinstance(each, Tensor) or each.ndim for each in parts):
            raise UsageError(
                f"{type(model).__name__} returns no losses in training mode",
                expected="a scalar, or a dictionary of scalars, from model(images, targets)",
                fix="Give an own task whose loss fits the network: task: path/file.py:Class",
            )
        return torch.stack(parts).sum()

    def predict(self, outputs: Mapping[str, Any]) -> list[Prediction]:
        """Return "boxes" (M, 4), "scores" (M,) and "labels" (M,), best first, for each image."""
        return [self._best(*each) for each in self._images(outputs)]

    def score(self, prediction: Prediction, target: Target) -> Contribution:
        """Return each box's class, score and whether it is right at each of ten IoUs."""
        boxes, labels = numeric(target["boxes"]).reshape(-1, 4), numeric(target["labels"])
        ignored = _ignored(target)
        hits = np.zeros((len(IOUS), len(prediction["scores"])), np.int8)  # -1: matches an ignored
        for label in np.unique(prediction["labels"]):
            mine, theirs = prediction["labels"] == label, labels == label
            hits[:, mine] = _matched(
                box_iou(prediction["boxes"][mine], boxes[theirs]), ignored[theirs]
            )
        return {
            "labels": prediction["labels"],
            "scores": prediction["scores"],
            "hits": hits,
            "objects": labels[~ignored],
        }

    def summarize(self, scores: Sequence[Contribution], counts: Array) -> dict[str, Array]:
        """Return mAP 50-95 and mAP 50, percent, of R samples of the images."""
        found = 100 * self._precisions(scores, counts)  # (R, K, 10)
        return {"map50_95": mean_over(mean_over(found)), "map50": mean_over(found[..., 0])}

    def class_values(self, scores: Sequence[Contribution], counts: Array) -> Array:
        """Return the AP 50-95 of each class, (R, K) in percent, NaN where it has no objects."""
        values: Array = 100 * self._precisions(scores, counts).mean(2)
        return values

    def agreement(self, reference: Prediction, candidate: Prediction) -> float:
        """Return the F1 of boxes of equal class that overlap by half, percent."""
        one, two = (confident(each) for each in (reference, candidate))
        total = len(one["labels"]) + len(two["labels"])
        if not total:
            return 100.0
        return 200.0 * (len(two["labels"]) - len(_without(two, one)["labels"])) / total

    def finds(self, prediction: Prediction) -> bool:
        """Return whether there is a box with a score of 0.3 or more."""
        return len(confident(prediction)["labels"]) > 0

    def in_picture(self, prediction: Prediction, fit: Fit, size: tuple[int, int]) -> Prediction:
        """Return the boxes in pixels of the picture."""
        return prediction | {"boxes": boxes_in_picture(prediction["boxes"], fit.place(*size), size)}

    def describe(self, predictions: Sequence[Prediction], images: Sequence[str]) -> list[list[Row]]:
        """Return the boxes of each image that have a score of 0.3 or more, best first."""
        return [boxes_told(confident(each), self.name_of) for each in predictions]

    def draw(self, image: Any, prediction: Prediction) -> Any:
        """Return the image with the boxes that have a score of 0.3 or more, or no score."""
        seen = confident(prediction) if "scores" in prediction else prediction
        names = [self.name_of(int(k)) for k in seen["labels"]]
        return boxed(image, seen["boxes"], seen["labels"], names, seen.get("scores"))

    def truth(self, target: Target) -> Prediction:
        """Return the objects that are to be found, as boxes without scores."""
        counted = ~_ignored(target)
        boxes, labels = numeric(target["boxes"]).reshape(-1, 4), numeric(target["labels"])
        return {"boxes": boxes[counted], "labels": labels[counted]}

    def draw_change(self, image: Any, reference: Prediction, candidate: Prediction) -> Any:
        """Return the image with the boxes that the candidate lost, and those that appeared."""
        before, after = confident(reference), confident(candidate)
        parts = [("lost", _without(before, after)), ("new", _without(after, before))]
        boxes = np.concatenate([seen["boxes"] for _, seen in parts])
        kinds = np.repeat([0, 1], [len(seen["boxes"]) for _, seen in parts])
        names = [f"{word} {self.name_of(int(k))}" for word, seen in parts for k in seen["labels"]]
        scores = np.concatenate([seen["scores"] for _, seen in parts])
        return boxed(image, boxes, kinds, names, scores)

    def read_outputs(self, outputs: Mapping[str, Any]) -> tuple[str, ...] | None:
        """Return the first of several (B, rows, places): the others are what it is made of."""
        rows = self.counted_outputs(outputs)
        return rows[:1] if rows else None

    def ending(self) -> Nms | None:
        """Return the NMS that exported files end in, if they do."""
        return self._nms if self.nms_in_graph else None

    def counted_outputs(self, outputs: Mapping[str, Any]) -> tuple[str, ...] | None:
        """Return boxes and scores; feature maps beside several of them may change."""
        rows = [name for name, value in outputs.items() if getattr(value, "ndim", 0) == 3]
        maps = [name for name, value in outputs.items() if getattr(value, "ndim", 0) == 4]
        return tuple(rows) if len(rows) > 1 and maps else None

    def _images(self, outputs: Mapping[str, Any]) -> list[tuple[Array, Array, Array]]:
        """Return boxes, scores and labels of each image, whatever form the outputs have."""
        arrays = {
            name: numeric(value)
            for name, value in outputs.items()
            if isinstance(value, Tensor | np.ndarray)
        }
        shift = int(self.background)
        if {"boxes", "scores", "labels"} <= set(arrays):
            boxes, scores, labels = (arrays[name] for name in ("boxes", "scores", "labels"))
            if boxes.ndim == 2:  # of one image
                boxes, scores, labels = boxes[None], scores[None], labels[None]
            return [(b, s, k - shift) for b, s, k in zip(boxes, scores, labels, strict=True)]
        first = next(iter(outputs.values()), None)
        if isinstance(first, list | tuple) and all(isinstance(each, Mapping) for each in first):
            return [
                (numeric(e["boxes"]), numeric(e["scores"]), numeric(e["labels"]) - shift)
                for e in first
            ]
        heads = [array for array in arrays.values() if array.ndim == 3]
        fix = OTHER_ROWS if heads else f"{nearest_task(arrays.values())}, or check the network"
        if any(each.shape[1:] == (heads[0].shape[1], 4) for each in heads[1:]):
            heads, fix = [], QUERIES  # their scores may have the shape of boxes
        if heads and _is_after_nms(heads[0]):
            return [(r[:, :4], r[:, 4], r[:, 5].astype(np.int64) - shift) for r in heads[0]]
        head = _by_rows(heads[0], len(self.classes)) if heads else np.zeros((0, 0, 0))
        if heads and head is not heads[0]:
            _check_decoded(head)
        count = head.shape[1] - 4
        if count > 0 and len(self.classes) in (0, count):
            return [self._decoded(each) for each in head]
        raise EngineError(
            f"task detection does not fit the network's outputs: {shapes_told(arrays)}",
            expected=f"boxes, scores and labels; (B, M, 6); (B, {4 + len(self.classes)}, A), "
            f"centre and size of boxes and scores of {len(self.classes)} classes; or "
            f"(B, A, {5 + len(self.classes)}), with objectness between them",
            fix=fix,
        )

    def _decoded(self, head: Array) -> tuple[Array, Array, Array]:
        if self.multi_label:
            labels, places = np.nonzero(head[4:] > self.score_threshold)
            return self._nms.suppressed(head, labels, places)
        return self._nms.of(head)

    @property
    def _nms(self) -> Nms:
        return Nms(self.nms_iou, self.score_threshold, self.max_boxes)

    def _best(self, boxes: Array, scores: Array, labels: Array) -> Prediction:
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise EngineError(
                "boxes or scores are not finite numbers",
                fix="An fp16 network may have overflowed: keep its widest layers in fp32",
            )
        return best_boxes(boxes, scores, labels, self.score_threshold, self.max_boxes)

    def _precisions(self, scores: Sequence[Contribution], counts: Array) -> Array:
        """Return the average precision of each sample, class and IoU, (R, K, 10)."""
        image = np.repeat(np.arange(len(scores)), [len(each["scores"]) for each in scores])
        labels = np.concatenate([each["labels"] for each in scores])
        values = np.concatenate([each["scores"] for each in scores])
        hits = np.concatenate([each["hits"] for each in scores], axis=1)
        objects = np.concatenate([each["objects"] for each in scores])
        where = np.repeat(np.arange(len(scores)), [len(each["objects"]) for each in scores])
        known = max(
            len(self.classes), int(max(labels.max(initial=-1), objects.max(initial=-1))) + 1
        )
        out = np.full((len(counts), known, len(IOUS)), np.nan)
        for k in np.unique(objects):
            mine = np.flatnonzero(labels == k)
            mine = mine[np.argsort(-values[mine], kind="stable")]
            of_images = np.bincount(where[objects == k], minlength=len(scores))
            for r, drawn in enumerate(counts):
                weights, positives = drawn[image[mine]], float(drawn @ of_images)
                for t, row in enumerate(hits[:, mine]):
                    out[r, k, t] = coco_average_precision(row == 1, weights * (row >= 0), positives)
        return out


def _is_after_nms(head: Array) -> bool:
    """Say whether rows of six end in a class: those before NMS end in the score of the only one."""
    return head.shape[2] == 6 and bool((head[..., 5] % 1 == 0).all())


def _by_rows(head: Array, classes: int) -> Array:
    """Return boxes and scores as (B, 4 + K, A), where they are (B, A, 5 + K) with objectness."""
    _, places, columns = head.shape
    fits = columns == 5 + classes and places != 4 + classes if classes else places > columns > 5
    scores = head[..., 4:5] * head[..., 5:]
    if not fits or head[..., 4:].min(initial=0) < 0 or head[..., 4:].max(initial=0) > 1:
        return head
    return np.concatenate([head[..., :4], scores], 2).transpose(0, 2, 1)


def _check_decoded(head: Array) -> None:
    """Refuse rows, (B, 4 + K, A), whose boxes are offsets in a grid or shares of the image."""
    reach = float(np.abs(head[:, :2]).max(initial=0))
    if head.size and reach < CORNER:
        raise EngineError(
            f"no box has its centre further than {reach:.1f} from the corner: these are offsets in "
            "cells of a grid, or shares of the image",
            expected="centre and size in pixels of the input",
            fix="Export the network so that it decodes them itself (YOLOX: export_onnx.py "
            "--decode_in_inference), or give an own task: task: path/file.py:Class",
        )


def box_iou(one: Array, two: Array) -> Array:
    """Return the intersection over union of boxes (M, 4) and (N, 4) as x1, y1, x2, y2: (M, N)."""
    low = np.maximum(one[:, None, :2], two[None, :, :2])
    high = np.minimum(one[:, None, 2:], two[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(2)
    areas = [np.clip(each[:, 2:] - each[:, :2], 0, None).prod(1) for each in (one, two)]
    union = areas[0][:, None] + areas[1][None] - both
    iou: Array = np.divide(both, union, out=np.zeros(both.shape), where=union > 0)
    return iou


def _matched(iou: Array, ignored: Array) -> Array:
    """Return 1 (right), 0 (wrong) or -1 (on an ignored object) for boxes at each IoU, (10, M).

    Boxes come best first; each takes the free object it overlaps most, counted ones first.
    """
    out = np.zeros((len(IOUS), len(iou)), np.int8)
    if not iou.shape[1]:
        return out
    for t, least in enumerate(IOUS):
        free = np.ones(iou.shape[1], bool)
        for m, row in enumerate(iou):
            for group in (~ignored, ignored):
                overlap = np.where(free & group, row, -1.0)
                best = int(overlap.argmax())
                if overlap[best] >= least - 1e-10:
                    free[best] = bool(ignored[best])
                    out[t, m] = -1 if ignored[best] else 1
                    break
    return out


def _ignored(target: Target) -> Array:
    return numeric(target.get("ignored", np.zeros(len(target["labels"]), bool))).astype(bool)


def _without(one: Prediction, two: Prediction) -> Prediction:
    """Return the boxes of ``one`` that no box of ``two`` of their class overlaps by half."""
    alone = np.ones(len(one["labels"]), bool)
    for label in np.intersect1d(one["labels"], two["labels"]):
        mine, theirs = one["labels"] == label, two["labels"] == label
        iou = box_iou(one["boxes"][mine], two["boxes"][theirs])
        alone[mine] = _matched(iou, np.zeros(iou.shape[1], bool))[0] == 0
    return {name: value[alone] for name, value in one.items()}


def _ultralytics_loss(
    model: nn.Module, images: Tensor, targets: Sequence[Mapping[str, Tensor]]
) -> Tensor:
    """Return the loss of one of Ultralytics' networks, called as its authors do, a scalar."""
    height, width = images.shape[2:]
    boxes = torch.cat([each["boxes"] for each in targets]).to(images)
    low, high = boxes[:, :2], boxes[:, 2:]
    sides = torch.tensor([width, height]).to(boxes)
    counts = torch.tensor([len(each["boxes"]) for each in targets])
    batch = {
        "img": images,
        "bboxes": torch.cat([(low + high) / 2 / sides, (high - low) / sides], 1),
        "cls": torch.cat([each["labels"] for each in targets]).to(boxes)[:, None],
        "batch_idx": torch.arange(len(targets)).repeat_interleave(counts).to(boxes),
    }
    network: Any = model
    parts, _ = network.init_criterion()(model(images), batch)
    total: Tensor = parts.sum() / len(images)
    return total
