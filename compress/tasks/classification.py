"""One class for each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from compress.modules.objective import CrossEntropy
from compress.tasks import Form, Kind, Prediction, Row, Target, Task, main_output
from compress.tasks._drawing import captioned


@dataclass(frozen=True)
class Classification(Task):
    """One class for each image: top-1 and top-5 accuracy."""

    label_smoothing: float = 0.0
    classes: Sequence[str] = ()

    kinds: ClassVar[Mapping[str, Kind]] = {"top1": Kind(), "top5": Kind()}
    primary: ClassVar[str] = "top1"
    tells_classes: ClassVar[bool] = True
    answers: ClassVar[Literal["classes", "numbers"]] = "classes"
    losses: ClassVar[tuple[str, ...]] = ("dkd",)
    target: ClassVar[str] = "class"
    form: ClassVar[Form] = "classes"

    def loss(self, model: nn.Module, images: Tensor, targets: Any) -> Tensor:
        """Return the mean cross-entropy of a batch, a scalar; targets (B,) or (B, K)."""
        return CrossEntropy(self.label_smoothing)(model, images, targets)

    def predict(self, outputs: Mapping[str, Any]) -> list[Prediction]:
        """Return "label" and "probabilities" (K,) for each image, from logits (B, K).

        Rows that are probabilities already, of a file that ends in a softmax, stay what they are.
        """
        logits = main_output(outputs, 2, "logits", "classification")
        probabilities = torch.from_numpy(logits.astype(np.float64)).softmax(1).numpy()
        are_done = (logits >= 0).all(1) & np.isclose(logits.sum(1), 1, rtol=0, atol=1e-3)
        probabilities = np.where(are_done[:, None], logits, probabilities)
        order = np.argsort(-logits, axis=1, kind="stable")
        return [
            {"label": row[0], "probabilities": chances, "ranked": row[:5]}
            for row, chances in zip(order, probabilities, strict=True)
        ]

    def score(self, prediction: Prediction, target: Target) -> dict[str, float]:
        """Return 100 where the class is right, and where it is among the first five."""
        label = int(target)
        return {
            "top1": 100.0 * (int(prediction["label"]) == label),
            "top5": 100.0 * bool((prediction["ranked"] == label).any()),
        }

    def agreement(self, reference: Prediction, candidate: Prediction) -> float:
        """Return 100 where both name the same class, else 0."""
        return 100.0 * (int(reference["label"]) == int(candidate["label"]))

    def describe(self, predictions: Sequence[Prediction], images: Sequence[str]) -> list[list[Row]]:
        """Return the five likeliest classes of each image with their probabilities."""
        return [
            [
                {"class": self.name_of(int(k)), "probability": float(each["probabilities"][k])}
                for k in each["ranked"]
            ]
            for each in predictions
        ]

    def draw(self, image: Any, prediction: Prediction) -> Any:
        """Return the image with its likeliest classes and their probabilities."""
        rows = self.describe([prediction], [""])[0]
        return captioned(
            image, [f"{row['class']} {100 * row['probability']:.1f} %" for row in rows]
        )
