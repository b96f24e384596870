"""An embedding for each image: near those of the same class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from compress.errors import UsageError
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
from compress.tasks._plain_answers import arrays_told, nearest_told


@dataclass(frozen=True)
class Embedding(OutputTask):
    """A vector for each image, near those of its own class: recall at k, verification accuracy.

    Recall: images whose ``k`` nearest others by cosine hold one of their own class; images alone
    in their class do not count. Verification: pairs of neighbouring test images told right as same
    or different, at the threshold that suits them best. Trained by the multi-similarity of a
    batch: cross-entropy over cosines, ``temperature`` apart.

    Source: Khosla et al., Supervised Contrastive Learning, NeurIPS 2020,
    https://arxiv.org/abs/2004.11362 (the loss).
    """

    k: int = 1
    temperature: float = 0.1
    classes: Sequence[str] = ()

    kinds: ClassVar[Mapping[str, Kind]] = {
        "recall_at_k": Kind(title="recall at k"),
        "verification": Kind(title="verification accuracy"),
    }
    primary: ClassVar[str] = "recall_at_k"
    target: ClassVar[str] = "class"
    form: ClassVar[Form] = "embedding"

    def __post_init__(self) -> None:
        kinds = {**self.kinds, "recall_at_k": Kind(title=f"recall at {self.k}")}
        object.__setattr__(self, "kinds", kinds)

    def output_loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the supervised contrastive loss of a batch, a scalar; targets (B,) classes.

        Raises:
            UsageError: the classes of images are mixed.
        """
        if targets.ndim > 1:
            raise UsageError(
                "an embedding learns which images are of one class, and mixup and cutmix mix them",
                fix="Leave augment.mixup and augment.cutmix out",
            )
        vectors = F.normalize(logits_of(outputs).float(), dim=1)
        cosines = vectors @ vectors.T / self.temperature
        itself = torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
        logs = cosines.masked_fill(itself, float("-inf")).log_softmax(1).masked_fill(itself, 0.0)
        alike = (targets[:, None] == targets[None]) & ~itself
        paired = alike.any(1)
        if not paired.any():
            return 0.0 * cosines.sum()
        each: Tensor = (logs * alike).sum(1)[paired] / alike.sum(1)[paired]
        return -each.mean()

    def predict(self, outputs: Mapping[str, Any]) -> list[Prediction]:
        """Return "embedding" (D,) of length 1 for each image, from (B, D)."""
        vectors = main_output(outputs, 2, "embedding", "embedding").astype(np.float32)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return [{"embedding": row} for row in vectors / np.maximum(lengths, 1e-12)]

    def score(self, prediction: Prediction, target: Target) -> Contribution:
        """Return the vector and its class."""
        return {"embedding": prediction["embedding"], "label": int(target)}

    def summarize(self, scores: Sequence[Contribution], counts: Array) -> dict[str, Array]:
        """Return recall at k and verification accuracy, percent, of R samples of the queries.

        All images stay in the gallery; samples are of the images that are looked for.
        """
        vectors = np.stack([each["embedding"] for each in scores])
        labels = np.array([each["label"] for each in scores])
        cosines = vectors @ vectors.T
        np.fill_diagonal(cosines, -np.inf)
        nearest = np.argsort(-cosines, axis=1, kind="stable")[:, : self.k]
        found = (labels[nearest] == labels[:, None]).any(1)
        alone = np.bincount(labels)[labels] < 2
        recall = _share(found, counts * ~alone)
        partner = _partners(labels)
        pairs = np.einsum("nd,nd->n", vectors, vectors[partner])
        right = _verified(pairs, labels == labels[partner])
        return {"recall_at_k": recall, "verification": _share(right, counts)}

    def agreement(self, reference: Prediction, candidate: Prediction) -> float:
        """Return the cosine of two vectors in percent."""
        return 100.0 * min(1.0, float(reference["embedding"] @ candidate["embedding"] + 1e-9))

    def describe(self, predictions: Sequence[Prediction], images: Sequence[str]) -> list[list[Row]]:
        """Return the nearest five of the other images by cosine; of an image alone, its vector."""
        if len(predictions) == 1:
            return [arrays_told(predictions[0])]
        return nearest_told(np.stack([each["embedding"] for each in predictions]), images)


def _share(right: Array, counts: Array) -> Array:
    total = counts.sum(1)
    found = counts @ right.astype(np.float64)
    share: Array = np.divide(found, total, out=np.full(len(total), np.nan), where=total > 0)
    return 100 * share


def _partners(labels: Array) -> Array:
    """Return for each image one of its own class (even positions) or of another, (N,)."""
    order = np.argsort(labels, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    following = order[(place + 1) % len(order)]  # of the same class except for the last of it
    far = order[(place + len(order) // 2) % len(order)]
    even = np.arange(len(labels)) % 2 == 0
    partners: Array = np.where(even, following, far)
    return partners


def _verified(cosines: Array, same: Array) -> Array:
    """Return which pairs are told right at the threshold that tells most of them right, (N,)."""
    thresholds = np.concatenate([[-np.inf], np.unique(cosines)])
    rights = [((cosines > each) == same).sum() for each in thresholds]
    best = thresholds[int(np.argmax(rights))]
    verified: Array = (cosines > best) == same
    return verified
