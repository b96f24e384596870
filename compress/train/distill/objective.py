"""The distillation objective: losses on features and logits of a teacher, and labels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.modules.objective import CrossEntropy, Objective, TaskLoss, TrainingProgress
from compress.modules.outputs import logits_of, tensors_of
from compress.train.distill.features import LayerPair, Tap, tapped
from compress.train.distill.teachers import Teacher
from compress.train.losses import Taps

Computed = tuple[Tensor, dict[Tap, Tensor]]  # main output and features of a network


@dataclass(frozen=True)
class Term:
    """One distillation loss of a weighted sum, and the layers that it compares."""

    name: str
    loss: Any  # see compress.train.losses
    weight: float
    pairs: tuple[LayerPair, ...] = ()

    def taps(
        self, student: Computed, teacher: Computed, index: Tensor | None = None
    ) -> tuple[Taps, Taps]:
        """Return what the loss sees of both networks."""
        mine = tuple(student[1][pair.student] for pair in self.pairs)
        theirs = tuple(teacher[1][pair.teacher] for pair in self.pairs)
        return Taps(student[0], mine, index), Taps(teacher[0], theirs, index)


class DistillObjective(Objective):
    """The loss with the labels plus a weighted sum of losses towards a teacher.

    Args:
        terms: The losses.
        teacher: Whoever answers.
        order: Teacher's output of each class of the student, (K,); None where they agree.
        hard: The loss with the labels: cross-entropy, or that of a task.
        hard_weight: Its weight.
        warmup_epochs: Epochs over which the losses fade in.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        teacher: Teacher,
        order: Tensor | None,
        *,
        hard: CrossEntropy | TaskLoss,
        hard_weight: float,
        warmup_epochs: float,
    ) -> None:
        self.terms, self.teacher, self.hard = tuple(terms), teacher, hard
        self.hard_weight, self.warmup_epochs = hard_weight, warmup_epochs
        self.teacher_value: float | None = None  # of the metric on validation images
        self.student_value: float | None = None  # before training
        self.notes: list[str] = []
        self._order = order
        self._moment: TrainingProgress | None = None
        pairs = [pair for term in terms for pair in term.pairs]
        self._student_taps = tuple(dict.fromkeys(pair.student for pair in pairs))
        self._teacher_taps = tuple(dict.fromkeys(pair.teacher for pair in pairs))

    def __call__(self, model: nn.Module, images: Tensor, target: Any) -> Tensor:
        """Return the weighted sum, a scalar."""
        index = self._moment.index if self._moment is not None else None
        answer, theirs = self.teacher(images, index, self._teacher_taps)
        answer = self._ordered(answer)
        with tapped(getattr(model, "_orig_mod", model), self._student_taps) as mine:
            logits, hard = self._answered(model, images, target)
        loss = self.hard_weight * hard
        labels = target
        if isinstance(target, Tensor) and target.ndim == 2 and isinstance(self.hard, CrossEntropy):
            labels = target.argmax(1)
        shown = answer if logits is None else logits  # then no loss looks at it
        fade = self._fade()
        for term in self.terms:
            taps = term.taps((shown, mine), (answer, theirs), index)
            loss = loss + fade * term.weight * term.loss(*taps, labels)
        return loss

    def _answered(
        self, model: nn.Module, images: Tensor, target: Any
    ) -> tuple[Tensor | None, Tensor]:
        """Return the student's main output, if it returns one in training, and the hard loss."""
        if isinstance(self.hard, CrossEntropy):
            logits = logits_of(model(images))
            return logits, self.hard.of(logits, target)
        with last_output(model) as seen:
            if self.hard_weight:
                return main_answer(seen), self.hard(model, images, target)
            model(images)
        return main_answer(seen), images.new_zeros(())

    def answer(self, images: Tensor) -> Tensor:
        """Return the teacher's logits in the student's class order, (B, K)."""
        return self._ordered(self.teacher(images, None, ())[0])

    def before(self, moment: TrainingProgress) -> None:
        """Take note of which images come next, and how far training is."""
        self._moment = moment

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the weights of all adapters."""
        for module in self._adapters():
            yield from module.parameters()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all adapters, tensors only."""
        return {str(i): module.state_dict() for i, module in enumerate(self._adapters())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state of all adapters."""
        for i, module in enumerate(self._adapters()):
            module.load_state_dict(state[str(i)])

    def close(self) -> None:
        """Leave the teacher as it was found."""
        self._moment = None
        self.teacher.close()

    @property
    def meets_in(self) -> str | None:
        """The loss in which processes exchange what they computed, if there is one."""
        return next((t.name for t in self.terms if getattr(t.loss, "meets", False)), None)

    def pairing(self) -> list[str]:
        """Return which layers each loss compares, one line each."""
        return [f"{term.name}: {pair}" for term in self.terms for pair in term.pairs]

    def to(self, device: torch.device) -> None:
        """Move adapters and their memories to ``device``."""
        for module in self._adapters():
            module.to(device)

    def _ordered(self, answer: Tensor) -> Tensor:
        return answer if self._order is None else answer[:, self._order.to(answer.device)]

    def _adapters(self) -> list[nn.Module]:
        return [term.loss for term in self.terms if isinstance(term.loss, nn.Module)]

    def _fade(self) -> float:
        if not self.warmup_epochs or self._moment is None:
            return 1.0
        return min(1.0, self._moment.epoch / self.warmup_epochs)


@contextlib.contextmanager
def last_output(model: nn.Module) -> Iterator[list[Any]]:
    """Collect what ``model`` returns while the block runs."""
    seen: list[Any] = []
    handle = model.register_forward_hook(lambda _module, _given, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


def main_answer(seen: Sequence[Any]) -> Tensor | None:
    """Return the main tensor of the last output; None where a network returned its losses."""
    found = tensors_of(seen[-1]) if seen else []
    return found[0] if found and found[0].ndim and found[0].is_floating_point() else None
