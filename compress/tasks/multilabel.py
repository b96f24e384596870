"""Several classes for each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from compress.errors import EngineError
from compress.modules.outputs import logits_of
from compress.tasks import (
    Array,
    Contribution,
    Form,
    Kind,
    OutputTask,
    Prediction,
    Row,
    Target,
    main_output,
)
from compress.tasks._drawing import captioned
from compress.tasks._metrics import average_precision, mean_over
from compress.tasks._plain_answers import classes_told


@dataclass(frozen=True)
class Multilabel(OutputTask):
    """Several classes for each image: mean average precision over classes, micro F1.

    Targets are rows of zeros and ones, (B, K); a class counts as present above ``threshold``.
    """

    threshold: float = 0.5
    classes: Sequence[str] = ()

    kinds: ClassVar[Mapping[str, Kind]] = {"map": Kind(title="mAP"), "f1": Kind(title="F1")}
    primary: ClassVar[str] = "map"
    class_metric: ClassVar[str] = "AP"
    target: ClassVar[str] = "classes"
    form: ClassVar[Form] = "several classes"

    def output_loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the mean binary cross-entropy of logits (B, K), a scalar."""
        logits = logits_of(outputs).float()
        return F.binary_cross_entropy_with_logits(logits, targets.float())

    def predict(self, outputs: Mapping[str, Any]) -> list[Prediction]:
        """Return "probabilities" (K,) and "present" (K,) for each image, from logits (B, K)."""
        logits = main_output(outputs, 2, "logits", "multilabel").astype(np.float64)
        if self.classes and logits.shape[1] != len(self.classes):
            raise EngineError(
                f"has {logits.shape[1]} outputs, the data {len(self.classes)} classes",
                expected=f"logits ({len(logits)}, {len(self.classes)})",
                fix="Set num_classes, or use the data that the network was trained for",
            )
        chances = 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
        return [{"probabilities": row, "present": row > self.threshold} for row in chances]

    def score(self, prediction: Prediction, target: Target) -> Contribution:
        """Return the probabilities and the truth of each class, and the counts of F1."""
        truth, present = np.asarray(target) > 0, prediction["present"]
        return {
            "probabilities": prediction["probabilities"],
            "truth": truth,
            "both": float((truth & present).sum()),
            "either": float(truth.sum() + present.sum()),
        }

    def summarize(self, scores: Sequence[Contribution], counts: Array) -> dict[str, Array]:
        """Return mAP and micro F1, percent, of R samples of the images."""
        both = counts @ np.array([each["both"] for each in scores])
        either = counts @ np.array([each["either"] for each in scores])
        f1 = np.divide(200 * both, either, out=np.full(len(both), 100.0), where=either > 0)
        return {"map": mean_over(self.class_values(scores, counts)), "f1": f1}

    def class_values(self, scores: Sequence[Contribution], counts: Array) -> Array:
        """Return the average precision of each class, (R, K) in percent, NaN without positives."""
        chances = np.stack([each["probabilities"] for each in scores])
        truth = np.stack([each["truth"] for each in scores])
        per_class = np.empty((len(counts), truth.shape[1]))
        for k in range(truth.shape[1]):
            order = np.argsort(-chances[:, k], kind="stable")
            ranked = (chances[order, k], truth[order, k])
            for r, drawn in enumerate(counts[:, order]):
                per_class[r, k] = average_precision(*ranked, drawn)
        return 100 * per_class

    def agreement(self, reference: Prediction, candidate: Prediction) -> float:
        """Return the percentage of classes that both call present or both absent."""
        return 100.0 * float((reference["present"] == candidate["present"]).mean())

    def describe(self, predictions: Sequence[Prediction], images: Sequence[str]) -> list[list[Row]]:
        """Return the classes of each image, likeliest first: those present, else the likeliest."""
        return [
            classes_told(each["probabilities"], each["present"], self.name_of)
            for each in predictions
        ]

    def draw(self, image: Any, prediction: Prediction) -> Any:
        """Return the image with the classes that are present, each with its probability if told."""
        if "probabilities" not in prediction:
            names = [self.name_of(int(k)) for k in np.flatnonzero(prediction["present"])]
            return captioned(image, names or ["none"])
        rows = self.describe([prediction], [""])[0]
        return captioned(
            image, [f"{row['class']} {100 * row['probability']:.0f} %" for row in rows]
        )

    def truth(self, target: Target) -> Prediction:
        """Return the classes that are there, without probabilities."""
        return {"present": np.asarray(target) > 0}
