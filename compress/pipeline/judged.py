"""Predictions of the variants on the test images: kept in files, each evaluated once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from compress import evaluate
from compress.data import Dataset
from compress.evaluate import Accuracy, Predictions


@dataclass(frozen=True)
class JudgedPredictions:
    """Files with the predictions of variants, and their accuracy."""

    folder: Path
    dataset: Dataset
    _accuracies: dict[Path, Accuracy] = field(default_factory=dict, init=False, repr=False)

    def path(self, variant: str, runtime: str, precision: str) -> Path:
        """Return where the predictions of a variant on a runtime are kept."""
        return self.folder / f"{variant}.{runtime}.{precision}.npz"

    def accuracy(self, path: Path) -> Accuracy:
        """Return how right the predictions in ``path`` are, for each subgroup as well."""
        if path not in self._accuracies:
            predictions, named = Predictions.load(path), self.dataset.test_groups
            groups = None if named is None else [str(g) for g in named[: len(predictions.labels)]]
            judged = evaluate.accuracy(predictions, self.dataset.classes, groups)
            self._accuracies[path] = judged
        return self._accuracies[path]
