"""One class for each pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from compress.data._pictures import Fit
from compress.errors import EngineError, UsageError
from compress.modules.outputs import named_tensors
from compress.tasks import (
    Array,
    Contribution,
    Form,
    Kind,
    OutputTask,
    Prediction,
    Row,
    Target,
    channels_first,
    main_output,
)
from compress.tasks._drawing import captioned, outlined, overlaid, palette
from compress.tasks._metrics import mean_over
from compress.tasks._plain_answers import UNSEEN, map_in_picture, map_told, sized

LEGEND = 12  # classes that are named in a drawing
AUXILIARY_WEIGHT = 0.5  # of the second head that torchvision's segmentation networks train


@dataclass(frozen=True)
class Segmentation(OutputTask):
    """One class for each pixel: mean intersection over union, pixel accuracy.

    Intersections and unions are summed over all images before they are divided, then averaged over
    the classes that occur. Pixels with the class number ``ignore`` (void) count nowhere.
    """

    ignore: int | None = 255
    classes: Sequence[str] = ()

    kinds: ClassVar[Mapping[str, Kind]] = {
        "miou": Kind(title="mIoU"),
        "pixel_accuracy": Kind(title="pixel accuracy"),
    }
    primary: ClassVar[str] = "miou"
    answers: ClassVar[Literal["classes", "numbers"]] = "classes"
    losses: ClassVar[tuple[str, ...]] = ("kd", "cwd")
    class_metric: ClassVar[str] = "IoU"
    legend: ClassVar[str] = "The difference shows the new class where it changed, grey elsewhere."
    target: ClassVar[str] = "mask"
    form: ClassVar[Form] = "class map"

    def output_loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the mean cross-entropy over pixels, a scalar; targets (B, H, W) classes.

        Every head is trained: outputs with as many channels as the main one, like "out" and "aux"
        of a dictionary. Other outputs are features.

        Raises:
            UsageError: no output has four dimensions.
        """
        found = named_tensors(outputs)
        maps = {place: t for place, t in found if t.ndim == 4 and t.is_floating_point()}
        if not maps:
            shapes = ", ".join(str(tuple(tensor.shape)) for _, tensor in found)
            raise UsageError(
                f"task segmentation does not fit an output of shape {shapes or 'none'}",
                expected="logits (B, K, H, W)",
            )
        fitting = [each for each in maps.values() if each.shape[1] == len(self.classes)]
        main = maps.get("out", (fitting or list(maps.values()))[0])
        others = (e for e in maps.values() if e is not main and e.shape[1] == main.shape[1])
        auxiliary = [AUXILIARY_WEIGHT * self._pixel_loss(head, targets) for head in others]
        return self._pixel_loss(main, targets) + sum(auxiliary)

    def predict(self, outputs: Mapping[str, Any]) -> list[Prediction]:
        """Return "class_map" (H, W) for each image, from logits (B, K, H, W) or (B, H, W, K).

        Without names of classes the two sides of a square map tell which of them it is.
        """
        logits = main_output(outputs, 4, "out", "segmentation", len(self.classes))
        _, rows, columns, last = logits.shape
        logits = channels_first(logits, len(self.classes) or (last if rows == columns else rows))
        if logits.shape[1] < len(self.classes):
            raise EngineError(
                f"has {logits.shape[1]} classes for each pixel, the data has "
                f"{len(self.classes)}: output {logits.shape}",
                expected=f"logits ({len(logits)}, {len(self.classes)}, H, W)",
                fix="Set num_classes, or use the data that the network was trained for",
            )
        kind = np.uint8 if logits.shape[1] <= 256 else np.uint16
        return [{"class_map": row.argmax(0).astype(kind)} for row in logits]

    def score(self, prediction: Prediction, target: Target) -> Contribution:
        """Return pixels of each class: predicted and true, predicted, and true, (3, K)."""
        truth, found = np.asarray(target), sized(prediction["class_map"], np.shape(target))
        counted = np.ones(truth.shape, bool) if self.ignore is None else truth != self.ignore
        truth, found = truth[counted].astype(np.int64), found[counted].astype(np.int64)
        size = max(len(self.classes), int(truth.max(initial=0)) + 1, int(found.max(initial=0)) + 1)
        areas = [truth[truth == found], found, truth]
        return {"areas": np.stack([np.bincount(each, minlength=size) for each in areas])}

    def summarize(self, scores: Sequence[Contribution], counts: Array) -> dict[str, Array]:
        """Return mIoU and pixel accuracy, percent, of R samples of the images."""
        both, _, truth = np.moveaxis(self._areas(scores, counts), 1, 0)
        total = truth.sum(1)
        accuracy = np.divide(both.sum(1), total, out=np.full(len(total), np.nan), where=total > 0)
        iou = self.class_values(scores, counts)
        return {"miou": mean_over(iou), "pixel_accuracy": 100 * accuracy}

    def class_values(self, scores: Sequence[Contribution], counts: Array) -> Array:
        """Return the IoU of each class, (R, K) in percent, NaN where it never occurs."""
        both, found, truth = np.moveaxis(self._areas(scores, counts), 1, 0)
        union = found + truth - both
        iou: Array = np.divide(both, union, out=np.full(union.shape, np.nan), where=union > 0)
        return 100 * iou

    def agreement(self, reference: Prediction, candidate: Prediction) -> float:
        """Return the mIoU between two class maps, percent, over the classes in either."""
        one, two = reference["class_map"], candidate["class_map"]
        union = [
            float(((one == k) & (two == k)).sum() / ((one == k) | (two == k)).sum())
            for k in np.union1d(one, two)
        ]
        return 100.0 * float(np.mean(union))

    def in_picture(self, prediction: Prediction, fit: Fit, size: tuple[int, int]) -> Prediction:
        """Return the class of each pixel of the picture; UNSEEN where the input was cropped."""
        place = fit.place(*size)
        return {"class_map": map_in_picture(prediction["class_map"], fit.size, place, size)}

    def describe(self, predictions: Sequence[Prediction], images: Sequence[str]) -> list[list[Row]]:
        """Return the classes in each image with their share of the pixels, the largest first."""
        return [map_told(each["class_map"], self.name_of) for each in predictions]

    def draw(self, image: Any, prediction: Prediction) -> Any:
        """Return the image with the classes as colours over it, and their names."""
        class_map = sized(prediction["class_map"], image.shape[:2])
        found, pixels = np.unique(class_map[class_map != UNSEEN], return_counts=True)
        order = found[np.argsort(-pixels, kind="stable")][:LEGEND]
        return captioned(
            overlaid(image, class_map),
            [self.name_of(int(k)) for k in order],
            palette(int(found.max(initial=0)) + 1)[order],
        )

    def draw_change(
        self, image: Any, reference: Prediction, candidate: Prediction
    ) -> NDArray[np.uint8] | None:
        """Return the grey image with the new class where it changed, and a line around it."""
        size = image.shape[:2]
        old, new = (sized(each["class_map"], size) for each in (reference, candidate))
        return outlined(image, new, old != new)

    def truth(self, target: Target) -> Prediction:
        """Return the mask as a class map, UNSEEN where nothing counts."""
        mask = np.asarray(target).astype(np.int32)
        return {"class_map": np.where(mask == self.ignore, UNSEEN, mask)}

    def _pixel_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if logits.shape[2:] != targets.shape[1:]:
            size = targets.shape[1:]
            logits = F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)
        void = -100 if self.ignore is None else self.ignore
        return F.cross_entropy(logits.float(), targets.long(), ignore_index=void)

    def _areas(self, scores: Sequence[Contribution], counts: Array) -> Array:
        size = max(each["areas"].shape[1] for each in scores)
        areas = np.stack(
            [np.pad(e["areas"], ((0, 0), (0, size - e["areas"].shape[1]))) for e in scores]
        )
        summed: Array = np.tensordot(counts, areas, 1)  # (R, 3, K)
        return summed
