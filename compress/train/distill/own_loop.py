"""Distillation in the user's own training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import TrainingError, UsageError
from compress.evaluate import device_of
from compress.recipe.settings import Plugin
from compress.train.distill.build import prepare_losses, term_of
from compress.train.distill.features import Tap, survey, tapped
from compress.train.distill.objective import Term, main_answer
from compress.train.distill.teachers import TorchTeacher


class Distiller:
    """Distillation losses for a training loop that is not ours: ``compress.distiller``.

    Use it as a context manager. While it is open, hooks see what the student computes; after it
    both networks are as they were. A forward pass that the trainer makes itself is used again:
    ``loss`` runs the student only where it has not just run on as many images.

    Args:
        student: The network that is trained, by whoever trains it.
        teacher: Another network; runs in eval mode, without gradients.
        losses: Names, or ``{name: options}``; ``weight`` among the options.
        example: One image, (1, C, H, W); where absent, the first images that ``loss`` is given.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        losses: Sequence[Plugin],
        example: Tensor | None = None,
    ) -> None:
        if student is teacher:
            raise UsageError("the student cannot be its own teacher", where="distiller")
        if not losses:
            raise UsageError("no losses are given", fix='losses=["cwd"], or [{"kd": {}}]')
        self.student, self._model, self._losses = student, teacher, tuple(losses)
        self._terms: list[Term] = []
        self._teacher: TorchTeacher | None = None
        self._open = contextlib.ExitStack()
        self._features: dict[Tap, Tensor] = {}
        self._outputs: list[Any] = []
        if example is not None:
            self._teacher = self._build(example[:1])

    def __enter__(self) -> Distiller:
        """Begin to watch the student."""
        if self._teacher is not None:
            self._watch()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove every hook, and leave the teacher as it was found."""
        self._open.close()
        if self._teacher is not None:
            self._teacher.close()

    def loss(self, images: Tensor) -> Tensor:
        """Return the weighted sum of the losses on a batch, a scalar that carries gradients.

        Args:
            images: (B, C, H, W) as both networks take them.

        Raises:
            TrainingError: layers cannot be paired, or a loss needs what the student does not
                return in training.
        """
        if self._teacher is None:
            self._teacher = self._build(images[:1])
            self._watch()
        if not self._has_seen(images):
            self._outputs.clear()
            self.student(images)
        taps = tuple(dict.fromkeys(p.teacher for term in self._terms for p in term.pairs))
        answer, theirs = self._teacher(images, None, taps)
        logits = main_answer(self._outputs)
        total = torch.zeros((), device=images.device)
        for term in self._terms:
            if logits is None and not term.pairs:
                raise TrainingError(
                    "it compares outputs, and in training this network returns its losses",
                    where=f"loss {term.name!r}",
                    expected="losses on features, such as cwd, mgd or attention",
                )
            shown = answer if logits is None else logits
            both = term.taps((shown, self._features), (answer, theirs))
            total = total + term.weight * term.loss(*both, answer.argmax(1))
        self._outputs.clear()
        self._features.clear()
        return total

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the weights of all adapters: give them to the optimizer beside the student's.

        Raises:
            UsageError: no image has been seen yet, so that there are no adapters.
        """
        if self._teacher is None:
            raise UsageError(
                "the adapters have no shapes until images have been through both networks",
                fix="Give distiller(..., example=images), or call loss(images) once before",
            )
        for term in self._terms:
            if isinstance(term.loss, nn.Module):
                yield from term.loss.parameters()

    def pairing(self) -> list[str]:
        """Return which layers each loss compares, one line each."""
        return [f"{term.name}: {pair}" for term in self._terms for pair in term.pairs]

    def _build(self, example: Tensor) -> TorchTeacher:
        device = device_of(self.student)
        example = example.detach().to(device)
        teacher = TorchTeacher(self._model, example)
        mine = survey(self.student, example)
        self._terms = [term_of(each, mine, teacher, compiled=False) for each in self._losses]
        prepare_losses(self._terms, self.student, teacher, example, torch.zeros(0))
        return teacher

    def _watch(self) -> None:
        """Keep what the student computes from now on, until the end."""
        taps = {pair.student for term in self._terms for pair in term.pairs}
        self._features = self._open.enter_context(tapped(self.student, taps))
        handle = self.student.register_forward_hook(self._note)
        self._open.callback(handle.remove)

    def _note(self, _module: nn.Module, _given: Any, output: Any) -> None:
        self._outputs[:] = [output]

    def _has_seen(self, images: Tensor) -> bool:
        """Say whether the student has just run on as many images, with gradients."""
        seen = list(self._features.values())
        if not self._outputs:
            return False
        if any(not term.pairs for term in self._terms):
            answer = main_answer(self._outputs)
            if answer is None:
                return False
            seen.append(answer)
        return all(len(each) == len(images) and each.requires_grad for each in seen)


distiller = Distiller  # as a function is called
