"""Losses between student and teacher: as an objective of our loop, or in the user's own loop."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress import plugins
from compress.data import Dataset
from compress.errors import TrainingError, UsageError
from compress.evaluate import device_of
from compress.modules import evaluating
from compress.modules.inputs import copied
from compress.modules.objective import CrossEntropy, Objective, TaskLoss, TrainingProgress
from compress.modules.outputs import logits_of, tensors_of
from compress.recipe.settings import Plugin
from compress.train.distill.features import LayerPair, Survey, Tap, pair_layers, survey, tapped
from compress.train.distill.teachers import (
    Teacher,
    TorchTeacher,
)
from compress.train.losses import Needs, Taps

MOST_DB = 120.0  # of outputs that are equal, as far as single precision tells

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


def term_of(reference: Plugin, student: Survey, teacher: Teacher, *, compiled: bool) -> Term:
    """Return a loss with its weight and the layers it compares.

    Raises:
        TrainingError: it compares features, and there are none to be had or to be paired.
        UsageError: its weight is no number of at least 0, or it refuses an option.
    """
    name, loss, weight = loss_of(reference)
    needs: Needs = getattr(loss, "needs", "logits")
    if needs == "logits":
        return Term(name, loss, weight)
    if compiled:
        raise TrainingError(
            "it compares features, and hooks do not reach into a compiled network",
            where=f"loss {name!r}",
            fix="Leave compile out, or use losses on logits",
        )
    if teacher.survey is None:
        raise TrainingError(
            "it compares features, and a teacher from a file shows only its logits",
            where=f"loss {name!r}",
            expected=f"one of: {', '.join(losses_with('needs', 'logits'))}",
            fix="Or give the teacher as a network: --teacher MODEL with --weights",
        )
    pairs = pair_layers(student, teacher.survey, loss.layers, needs, name)
    return Term(name, loss, weight, pairs)


def loss_of(reference: Plugin) -> tuple[str, Any, float]:
    """Return the name of a loss, the loss, and its weight in the sum.

    Raises:
        UsageError: its weight is no number of at least 0, or it refuses an option.
    """
    name, options = plugins.parse("losses", reference)
    weight = options.pop("weight", None)
    loss = plugins.create("losses", {name: options})
    weight = type(loss).weight if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not weight >= 0:
        raise UsageError(
            f"weight {weight!r}", where=f"loss {name!r}", expected="a number of at least 0"
        )
    return name, loss, float(weight)


def losses_with(attribute: str, usual: str | None) -> list[str]:
    """Return the losses that have an attribute of the usual value, or none that says otherwise."""
    classes = {name: plugins.plugin_class("losses", name) for name in plugins.names("losses")}
    return [name for name, each in classes.items() if getattr(each, attribute, usual) == usual]


def prepare_losses(
    terms: Sequence[Term], student: nn.Module, teacher: Teacher, example: Tensor, labels: Tensor
) -> None:
    """Let losses create their adapters from what both networks compute for one image, (1, C, H, W).

    ``labels`` are the classes of all training images, (N,), for losses that remember images.
    """
    device = device_of(student)
    example = example.to(device)
    pairs = [pair for term in terms for pair in term.pairs]
    with evaluating(student), torch.no_grad(), tapped(student, {p.student for p in pairs}) as mine:
        logits = logits_of(student(copied(example)))
    answer, theirs = teacher(example, None, [p.teacher for p in pairs])
    for term in terms:
        if hasattr(term.loss, "prepare"):
            try:
                term.loss.prepare(*term.taps((logits, mine), (answer, theirs)), labels)
            except ValueError as error:
                raise TrainingError(str(error), where=f"loss {term.name!r}") from None


class LayerComparison:
    """Losses between a student and a teacher, and the layers that they compare."""

    terms: Sequence[Term] = ()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the weights of all adapters."""
        for module in self.adapters:
            yield from module.parameters()

    def pairing(self) -> list[str]:
        """Return which layers each loss compares, one line each."""
        return [f"{term.name}: {pair}" for term in self.terms for pair in term.pairs]

    @property
    def adapters(self) -> list[nn.Module]:
        """The losses that are trained themselves."""
        return [term.loss for term in self.terms if isinstance(term.loss, nn.Module)]

    @property
    def taps(self) -> tuple[tuple[Tap, ...], tuple[Tap, ...]]:
        """Where the losses look at the student, and at the teacher."""
        pairs = [pair for term in self.terms for pair in term.pairs]
        return (
            tuple(dict.fromkeys(pair.student for pair in pairs)),
            tuple(dict.fromkeys(pair.teacher for pair in pairs)),
        )


class DistillObjective(LayerComparison, Objective):
    """The loss with the labels plus a weighted sum of losses towards a teacher.

    Args:
        order: Teacher's output of each class of the student, (K,); None where they agree.
        hard: The loss with the labels: cross-entropy, or that of a task.
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

    def __call__(self, model: nn.Module, images: Tensor, target: Any) -> Tensor:
        """Return the weighted sum, a scalar."""
        index = self._moment.index if self._moment is not None else None
        of_student, of_teacher = self.taps
        answer, theirs = self.teacher(images, index, of_teacher)
        answer = self._ordered(answer)
        with tapped(getattr(model, "_orig_mod", model), of_student) as mine:
            logits, hard = self._answered(model, images, target)
        loss = self.hard_weight * hard
        labels = target
        if isinstance(target, Tensor) and target.ndim == 2 and isinstance(self.hard, CrossEntropy):
            labels = target.argmax(1)
        shown = answer if logits is None else logits  # then no loss looks at it
        fade = 1.0
        if self.warmup_epochs and self._moment is not None:
            fade = min(1.0, self._moment.epoch / self.warmup_epochs)
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

    @torch.no_grad()
    def fidelity_db(self, model: nn.Module, dataset: Dataset) -> float | None:
        """Return how near the main outputs for validation images are to the teacher's, SQNR in dB.

        None where there are no images, or outputs have no places in common.
        """
        if not len(dataset.splits.get("validation", ())):
            return None
        device, signal, noise = device_of(model), 0.0, 0.0
        with evaluating(model):
            for batch, _ in dataset.batches("validation"):
                images = batch.to(device)
                theirs, mine = self.answer(images).double(), logits_of(model(copied(images)))
                if mine.shape != theirs.shape:
                    return None
                signal += float(theirs.square().sum())
                noise += float((mine.double() - theirs).square().sum())
        if not signal:
            return None
        ratio = 10 * math.log10(signal / noise) if 0 < noise < math.inf else MOST_DB
        return min(MOST_DB, ratio) if math.isfinite(noise) else -MOST_DB

    def before(self, moment: TrainingProgress) -> None:
        """Take note of which images come next, and how far training is."""
        self._moment = moment

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all adapters, tensors only."""
        return {str(i): module.state_dict() for i, module in enumerate(self.adapters)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state of all adapters."""
        for i, module in enumerate(self.adapters):
            module.load_state_dict(state[str(i)])

    def close(self) -> None:
        """Leave the teacher as it was found."""
        self._moment = None
        self.teacher.close()

    @property
    def meets_in(self) -> str | None:
        """The loss in which processes exchange what they computed, if there is one."""
        return next((t.name for t in self.terms if getattr(t.loss, "meets", False)), None)

    def to(self, device: torch.device) -> None:
        """Move adapters and their memories to ``device``."""
        for module in self.adapters:
            module.to(device)

    def _ordered(self, answer: Tensor) -> Tensor:
        return answer if self._order is None else answer[:, self._order.to(answer.device)]


class Distiller(LayerComparison):
    """Distillation losses for a training loop that is not ours: ``compress.distiller``.

    Use it as a context manager. While it is open, hooks see what the student computes; after it
    both networks are as they were. A forward pass that the trainer makes itself is used again:
    ``loss`` runs the student only where it has not just run on as many images. Outside ``with``
    nothing is watched between calls, and ``loss`` always runs the student.

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
        if not losses or isinstance(losses, str | Mapping):
            raise UsageError(
                f"losses is {losses!r}",
                where="distiller",
                expected='a list of losses: ["cwd"], or [{"kd": {}}]',
            )
        self.student, self._model, self._losses = student, teacher, tuple(losses)
        self._teacher: TorchTeacher | None = None
        self._open = contextlib.ExitStack()
        self._features: dict[Tap, Tensor] = {}
        self._outputs: list[Any] = []
        self._is_open = False
        if example is not None:
            self._teacher = self._build(example[:1])

    def __enter__(self) -> Distiller:
        """Begin to watch the student."""
        self._is_open = True
        if self._teacher is not None:
            self._watch()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove every hook, and leave the teacher as it was found."""
        self._is_open = False
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
        if not isinstance(images, Tensor):
            raise UsageError(
                f"images is of type {type(images).__name__}", expected="a tensor (B, C, H, W)"
            )
        if not self._is_open:
            with self:
                return self.loss(images)
        if self._teacher is None:
            self._teacher = self._build(images[:1])
            self._watch()
        if not self._has_seen(images):
            self._outputs.clear()
            self.student(images)
        answer, theirs = self._teacher(images, None, self.taps[1])
        logits = main_answer(self._outputs)
        total = torch.zeros((), device=images.device)
        for term in self.terms:
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
        return super().parameters()

    def _build(self, example: Tensor) -> TorchTeacher:
        device = device_of(self.student)
        example = example.detach().to(device)
        teacher = TorchTeacher(self._model, example)
        mine = survey(self.student, example)
        self.terms = [term_of(each, mine, teacher, compiled=False) for each in self._losses]
        prepare_losses(self.terms, self.student, teacher, example, torch.zeros(0))
        return teacher

    def _watch(self) -> None:
        """Keep what the student computes from now on, until the end."""
        self._features = self._open.enter_context(tapped(self.student, self.taps[0]))
        self._open.enter_context(self.student.register_forward_hook(self._note))

    def _note(self, _module: nn.Module, _given: Any, output: Any) -> None:
        self._outputs[:] = [output]

    def _has_seen(self, images: Tensor) -> bool:
        """Say whether the student has just run on as many images, with gradients."""
        seen = list(self._features.values())
        if not self._outputs:
            return False
        if any(not term.pairs for term in self.terms):
            answer = main_answer(self._outputs)
            if answer is None:
                return False
            seen.append(answer)
        return all(len(each) == len(images) and each.requires_grad for each in seen)


distiller = Distiller  # as a function is called


@contextlib.contextmanager
def last_output(model: nn.Module) -> Iterator[list[Any]]:
    """Collect what ``model`` returns while the block runs."""
    seen: list[Any] = []
    with model.register_forward_hook(lambda _module, _given, output: seen.append(output)):
        yield seen


def main_answer(seen: Sequence[Any]) -> Tensor | None:
    """Return the main tensor of the last output; None where a network returned its losses."""
    found = tensors_of(seen[-1]) if seen else []
    return found[0] if found and found[0].ndim and found[0].is_floating_point() else None
