"""What training minimizes: the contract of every objective, and plain cross-entropy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import CompressError, TrainingError, boundary, is_out_of_memory
from compress.modules.outputs import heads_of

if TYPE_CHECKING:
    from compress.data import Dataset
    from compress.tasks import Task

AUXILIARY_WEIGHT = 0.3  # of the heads that GoogLeNet and Inception train beside the last one


@dataclass(frozen=True)
class TrainingProgress:
    """Where training stands when an objective is called."""

    epoch: float  # epochs done, with the fraction of the current one
    index: Tensor  # (B,) int64: positions of the images in the train split
    training: nn.Module  # the network that is trained, as the caller gave it


class Objective(ABC):
    """Maps a batch to the scalar that training minimizes; all but the call has a default."""

    notes: Sequence[str] = ()  # sentences for the result of the training

    @abstractmethod
    def __call__(self, model: nn.Module, images: Tensor, target: Any) -> Tensor:
        """Return the mean loss of a batch, a scalar.

        Args:
            model: The network; in training mode, perhaps compiled.
            images: (B, C, H, W) float32, augmented and normalized.
            target: (B,) int64, or (B, K) probabilities where images are mixed.
        """

    @property
    def meets_in(self) -> str | None:
        """The loss in which processes exchange what they computed, if there is one."""
        return None

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what is trained beside the network and thrown away afterwards."""
        return iter(())

    def to(self, device: torch.device) -> None:
        """Move tensors that must be beside the images to ``device``."""

    def before(self, moment: TrainingProgress) -> None:
        """Take note of the batch that the next call is about."""

    def state_dict(self) -> dict[str, Any]:
        """Return what belongs into checkpoints: tensors and plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""

    def fidelity_db(self, model: nn.Module, dataset: Dataset) -> float | None:
        """Return the SQNR of validation outputs to a teacher's, dB; None where there is none."""
        return None

    def close(self) -> None:
        """Leave everything as it was found; called once, also after an error."""


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Cross-entropy with the labels; heads beside the main one count a little."""

    label_smoothing: float = 0.0

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross-entropy of a batch, a scalar."""
        logits, *auxiliary = heads_of(model(images))
        loss = self.of(logits, target)
        for extra in auxiliary:
            loss = loss + AUXILIARY_WEIGHT * self.of(extra, target)
        return loss

    def of(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross-entropy of ``logits``, (B, K), a scalar."""
        return F.cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class TaskLoss(Objective):
    """The loss of a task."""

    task: Task

    def __call__(self, model: nn.Module, images: Tensor, target: Any) -> Tensor:
        """Return the mean loss of a batch, a scalar.

        Raises:
            TrainingError: the loss fails, or gives something that nothing can be learnt from.
        """
        name = type(self.task).__name__
        try:
            loss = self.task.loss(model, images, target)
        except Exception as error:
            if isinstance(error, CompressError) or is_out_of_memory(error):
                raise
            with boundary(TrainingError, "loss fails", where=name):
                raise
        is_scalar = isinstance(loss, Tensor) and loss.numel() == 1
        if is_scalar and (loss.requires_grad or not torch.is_grad_enabled()):
            return loss.reshape(())
        raise TrainingError(
            f"loss gives {_shown(loss)}",
            where=name,
            expected="the mean loss of the batch: a tensor () that depends on the weights",
            fix="Return it as PyTorch computed it, not detached and not as a number",
        )


def _shown(loss: Any) -> str:
    """Return what a loss is, in words."""
    if not isinstance(loss, Tensor):
        return f"{loss!r}"[:200]
    if loss.numel() != 1:
        return f"a tensor of shape {tuple(loss.shape)}"
    return "a tensor without gradients"
