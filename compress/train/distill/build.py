"""Build the distillation objective from settings, a student and a teacher; does it help?"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress import evaluate, plugins
from compress.data import Dataset, targets_of
from compress.data._augment import is_random
from compress.errors import CompressError, TrainingError, UsageError
from compress.evaluate import device_of
from compress.modules import evaluating, full_copy, set_mode
from compress.modules.objective import CrossEntropy, TaskLoss
from compress.modules.outputs import logits_of
from compress.recipe.settings import DistillSettings, Plugin
from compress.tasks import Task, primary_of
from compress.train import train
from compress.train.batches import on_device
from compress.train.distill.features import survey
from compress.train.distill.objective import (
    DistillObjective,
    Term,
    last_output,
    losses_with,
    main_answer,
    prepare_losses,
    term_of,
)
from compress.train.distill.teachers import (
    CachedTeacher,
    SessionTeacher,
    Teacher,
    TorchTeacher,
    class_order,
)

logger = logging.getLogger(__name__)

CHECKED_IMAGES = 2000  # validation images that teacher and student are compared on


def build_objective(
    student: nn.Module,
    teacher: Any,
    dataset: Dataset,
    settings: DistillSettings,
    *,
    folder: Path | None = None,
    seed: int = 0,
    task: Task | None = None,
) -> DistillObjective:
    """Return the objective that pulls ``student`` towards ``teacher``.

    Both networks run once on an example, to pair layers and create adapters, and are left as found.
    The objective tells the pairs (``pairing()``), and in ``notes`` whether the teacher is worse.

    Args:
        student: The network that will be trained.
        teacher: A network; or an open session, or a path to an ONNX file, for losses on logits.
        dataset: Says what images look like, and their classes.
        settings: Losses and weights.
        folder: Where the teacher's answers are kept, if they are to be.
        seed: Of the training; part of the name of the cache.
        task: What the networks are for, where that is not one class an image: its loss is the one
            with the labels.

    Raises:
        TrainingError: class counts differ without a mapping, a loss on features meets a teacher
            without features, or layers cannot be paired.
        UnknownNameError: no such loss or layer.
        UsageError: a loss refuses an option.
    """
    if teacher is student:
        raise UsageError("the student cannot be its own teacher", where="distill.teacher")
    if task is not None and task.tells_classes:
        task = None
    answering = _teacher(teacher, dataset.example, settings)
    try:
        order, terms = _matched(student, answering, dataset, settings, task)
        if settings.cache_teacher:
            answering = _cached(answering, terms, dataset, settings, folder, seed)
    except CompressError:
        answering.close()
        raise
    objective = DistillObjective(
        terms,
        answering,
        order,
        hard=CrossEntropy(settings.label_smoothing) if task is None else TaskLoss(task),
        hard_weight=_hard_weight(settings, task),
        warmup_epochs=settings.loss_warmup_epochs,
    )
    for line in objective.pairing():
        logger.info(line)
    if len(dataset.splits.get("validation", ())) and (task is None or task.kinds):
        _compare(objective, student, dataset, task)
    return objective


def check_objective(
    student: nn.Module, teacher: Any, dataset: Dataset, settings: DistillSettings, task: Task
) -> None:
    """Raise what :func:`build_objective` would, before there is anything to train."""
    answering = _teacher(teacher, dataset.example, settings)
    try:
        _matched(student, answering, dataset, settings, None if task.tells_classes else task)
    finally:
        answering.close()


def _matched(
    student: nn.Module,
    answering: Teacher,
    dataset: Dataset,
    settings: DistillSettings,
    task: Task | None,
) -> tuple[Tensor | None, list[Term]]:
    """Return the order of the teacher's classes, and the losses with the layers they compare."""
    order = None
    if task is None:
        order = class_order(dataset.classes, settings.teacher_classes, answering.classes)
    device = device_of(student)
    mine = survey(student, dataset.example.to(device))
    if task is None and mine.classes != len(dataset.classes):
        raise TrainingError(
            f"the student has {mine.classes} class outputs, the data has {len(dataset.classes)}",
            where="distill",
            fix=f"Build the student with num_classes={len(dataset.classes)}",
        )
    losses = losses_of(settings, task)
    terms = [term_of(each, mine, answering, compiled=settings.compile) for each in losses]
    if task is not None:
        _check_terms(terms, task, student, dataset, settings)
    given: Any = dataset.splits["train"].labels
    labels = torch.from_numpy(given) if isinstance(given, np.ndarray) else torch.zeros(0)
    prepare_losses(terms, student, answering, dataset.example, labels)
    return order, terms


DEFAULT_LOSSES = ("dkd",)  # of one class for each image


def losses_of(settings: DistillSettings, task: Task | None) -> tuple[Plugin, ...]:
    """Return the losses that a recipe names, else those that suit the task."""
    if settings.losses is not None:
        return settings.losses
    return DEFAULT_LOSSES if task is None else task.losses


def _hard_weight(settings: DistillSettings, task: Task | None) -> float:
    """Return the weight of the loss with the labels: none where there are no labels."""
    return settings.hard if task is None or task.kinds else 0.0


def losses_on_outputs(task: Task) -> tuple[str, ...]:
    """Return those of the task's losses that compare outputs, else the one for any outputs."""
    known = losses_with("needs", "logits")
    return tuple(name for name in task.losses if name in known) or ("mse",)


def check_loss(reference: Plugin, task: Task) -> None:
    """Raise TrainingError where a loss reads other outputs than those of ``task``."""
    name, _ = plugins.parse("losses", reference)
    if _reads_outputs_of(name, task):
        return
    known = (each for each in plugins.names("losses") if _reads_outputs_of(each, task))
    wanted = plugins.plugin_class("losses", name).of_classes
    raise TrainingError(
        f"it compares the probabilities of one class for each {wanted}",
        where=f"loss {name!r}",
        expected=f"for this task one of: {', '.join(known)}",
    )


def _reads_outputs_of(name: str, task: Task) -> bool:
    wanted = getattr(plugins.plugin_class("losses", name), "of_classes", None)
    is_pixel = wanted == "pixel" and task.answers == "classes"
    return wanted is None or task.tells_classes or is_pixel


def _teacher(teacher: Any, example: Tensor, settings: DistillSettings) -> Teacher:
    size, device = settings.teacher_image_size, settings.teacher_device
    if isinstance(teacher, nn.Module):
        return TorchTeacher(teacher, example, size, device, compiled=settings.compile)
    if isinstance(teacher, (str, Path)):
        from compress.runtimes import open_session

        session = open_session(Path(teacher), device=device or "auto")
        return SessionTeacher(session, example, size, str(teacher), owned=True)
    return SessionTeacher(teacher, example, size, type(teacher).__name__, owned=False)


def _check_terms(
    terms: Sequence[Term],
    task: Task,
    student: nn.Module,
    dataset: Dataset,
    settings: DistillSettings,
) -> None:
    """Refuse losses on outputs where the network returns its losses in training instead.

    A copy of the network is asked for the loss of two images.
    """
    for term in terms:
        check_loss(term.name, task)
    on_outputs = [term.name for term in terms if not term.pairs]
    if not on_outputs:
        return
    model, images = full_copy(student), dataset.splits["train"]
    some = np.arange(min(2, len(images)))
    set_mode(model, training=True)
    device = device_of(student)
    with last_output(model) as seen:
        shown = dataset.normalize(images.take(some).to(device))
        if _hard_weight(settings, task):
            TaskLoss(task)(model, shown, on_device(targets_of(images, some), device))
        else:
            model(shown)
    if main_answer(seen) is None:
        raise TrainingError(
            "it compares outputs, and in training this network returns its losses instead",
            where=f"loss {on_outputs[0]!r}",
            expected="losses on features, such as cwd, mgd or attention",
        )


def _cached(  # everything that the answers depend on
    teacher: Teacher,
    terms: list[Term],
    dataset: Dataset,
    settings: DistillSettings,
    folder: Path | None,
    seed: int,
) -> Teacher:
    if is_random(settings.augment):
        raise TrainingError(
            "images change from epoch to epoch, so the teacher's logits cannot be kept",
            where="cache_teacher",
            fix="Set augment.fixed: true without mixup and cutmix, or leave cache_teacher out",
        )
    features = [term.name for term in terms if term.pairs]
    if features or folder is None:
        raise TrainingError(
            f"{features[0]!r} compares features, which are not kept on disk"
            if features
            else "there is no folder to keep the teacher's logits in",
            where="cache_teacher",
            fix="Leave cache_teacher out",
        )
    about = [
        teacher.fingerprint(),  # type: ignore[attr-defined]  # both kinds that get here have one
        dataset.fingerprint,
        settings.augment.model_dump_json(),
        str(settings.teacher_image_size),
        str(seed if settings.augment.fixed else ""),
    ]
    key = hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]
    return CachedTeacher(teacher, folder / f"teacher-{key}.npy", len(dataset.splits["train"]))


def _compare(
    objective: DistillObjective, student: nn.Module, dataset: Dataset, task: Task | None
) -> None:
    """Note how good teacher and student are on validation images before training."""
    some, primary = dataset.with_fewer("validation", CHECKED_IMAGES), primary_of(task)
    count, unit = len(some.splits["validation"]), f" {primary.unit}".rstrip()
    if task is None:
        teacher, own = _top1_pct(objective, student, some)
        told = f"{teacher:.2f}{unit} of"
    else:
        network = getattr(objective.teacher, "model", None)
        if network is None:
            return
        teacher, own = (
            evaluate.of_task(each, some, task, split="validation").metrics[task.primary].value
            for each in (network, student)
        )
        told = f"{primary.called} {teacher:.2f}{unit} on"
    objective.teacher_value, objective.student_value = teacher, own
    if primary.drop(own, teacher) > 0:
        note = (
            f"the teacher ({told} {count} validation images) is worse than the student before "
            f"training ({own:.2f}{unit})"
        )
        logger.warning(note)
        objective.notes.append(note)


@torch.no_grad()
def _top1_pct(
    objective: DistillObjective, student: nn.Module, dataset: Dataset
) -> tuple[float, float]:
    """Return the top-1 of teacher and student on the validation images."""
    device, right = device_of(student), np.zeros(2)
    with evaluating(student):
        for batch, target in dataset.batches("validation"):
            batch, target = batch.to(device), target.to(device)
            answers = (objective.answer(batch), logits_of(student(batch)))
            right += [int((answer.argmax(1) == target).sum()) for answer in answers]
    teacher, own = (100 * right / len(dataset.splits["validation"])).tolist()
    return teacher, own


CONTROL_SHARE = 0.2  # of the epochs, for each of the two trainings
CONFIDENCE_Z = 1.96  # 95 %


@dataclass(frozen=True)
class Control:
    """What two short trainings, alike but for the teacher, reached on validation images."""

    with_teacher_top1_pct: float
    without_teacher_top1_pct: float
    images: int  # validation images
    epochs: int  # of each training

    @property
    def difference_ci95(self) -> tuple[float, float]:
        """Interval of what the teacher gains, in points of top-1; unpaired, so rather wide."""
        shares = (self.with_teacher_top1_pct / 100, self.without_teacher_top1_pct / 100)
        error = math.sqrt(sum(p * (1 - p) for p in shares) / self.images)
        gain = 100 * (shares[0] - shares[1])
        return gain - 100 * CONFIDENCE_Z * error, gain + 100 * CONFIDENCE_Z * error

    @property
    def verdict(self) -> str:
        """One of "helps", "hurts" and "no difference seen"."""
        low, high = self.difference_ci95
        if low > 0:
            return "helps"
        return "hurts" if high < 0 else "no difference seen"

    def __str__(self) -> str:
        return (
            f"control of {self.epochs} epochs: {self.with_teacher_top1_pct:.2f} % with the "
            f"teacher, {self.without_teacher_top1_pct:.2f} % without, on {self.images} images: "
            f"{self.verdict}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return this finding as JSON-able data."""
        return {
            **asdict(self),
            "difference_ci95": list(self.difference_ci95),
            "verdict": self.verdict,
        }


def shortened(settings: DistillSettings, epochs: int) -> DistillSettings:
    """Return ``settings`` with their whole schedule squeezed into so many epochs."""
    ratio = epochs / max(1, settings.epochs)
    return settings.model_copy(
        update={
            "epochs": epochs,
            "warmup_epochs": settings.warmup_epochs * ratio,
            "loss_warmup_epochs": settings.loss_warmup_epochs * ratio,
            "step_epochs": tuple(epoch * ratio for epoch in settings.step_epochs),
            "cache_teacher": False,
            "track": None,
        }
    )


def does_teacher_help(
    student: nn.Module, teacher: Any, dataset: Dataset, settings: DistillSettings, *, seed: int = 0
) -> Control:
    """Train a copy of the student briefly with the teacher, another without, and compare them.

    They are compared on validation images; the schedule of ``settings`` is squeezed. The teacher is
    what ``build_objective`` takes.

    Raises:
        TrainingError: there are no validation images to compare them on.
    """
    images = len(dataset.splits.get("validation", ()))
    if not images:
        raise TrainingError(
            "without validation images, nothing tells whether the teacher helps",
            where="distill.control",
            fix="Hold some back: data.validation: 0.1",
        )
    short = shortened(settings, max(1, round(CONTROL_SHARE * settings.epochs)))

    def top1_pct(*, with_teacher: bool) -> float:
        model = copy.deepcopy(student)
        objective = build_objective(model, teacher, dataset, short) if with_teacher else None
        result = train(model, dataset, short, objective=objective, seed=seed)
        return float(result.last_top1_pct or 0.0)

    found = top1_pct(with_teacher=True), top1_pct(with_teacher=False)
    return Control(*found, images, short.epochs)
