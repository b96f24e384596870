"""From settings, a student and a teacher to an objective."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress import plugins
from compress.augment import is_random
from compress.data import Dataset
from compress.distill.objective import DistillObjective, Term
from compress.distill.pairing import pair_layers
from compress.distill.taps import Survey, survey, tapped
from compress.distill.teachers import (
    CachedTeacher,
    SessionTeacher,
    Teacher,
    TorchTeacher,
    class_order,
)
from compress.errors import CompressError, TrainingError, UsageError
from compress.images import Subset
from compress.losses import Needs, Taps
from compress.modules import evaluating
from compress.objective import CrossEntropy
from compress.outputs import logits_of
from compress.settings import DistillSettings, Plugin

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
) -> DistillObjective:
    """Return the objective that pulls ``student`` towards ``teacher``.

    Both networks are run once on an example image to find layers and create adapters; they are left
    as found. The objective says which layers it paired (``pairing()``) and warns in its ``notes``
    where the teacher is worse than the student.

    Args:
        student: The network that will be trained.
        teacher: A network; or an open session, or a path to an ONNX file, for losses on logits.
        dataset: Says what images look like, and their classes.
        settings: Losses and weights.
        folder: Where the teacher's answers are kept, if they are to be.
        seed: Of the training; part of the name of the cache.

    Raises:
        TrainingError: class counts differ without a mapping, a loss on features meets a teacher
            without features, or layers cannot be paired.
        UnknownNameError: no such loss or layer.
        UsageError: a loss refuses an option.
    """
    if teacher is student:
        raise UsageError("the student cannot be its own teacher", where="distill.teacher")
    example = dataset.example
    answering = _teacher(teacher, example, settings)
    try:
        names = settings.teacher_classes
        order = class_order(dataset.classes, names, answering.classes)
        device = next((p.device for p in student.parameters()), torch.device("cpu"))
        mine = survey(student, example.to(device))
        _check_student(mine, dataset)
        terms = [_term(each, mine, answering, settings.compile) for each in settings.losses]
        _prepare(terms, student, answering, dataset)
        if settings.cache_teacher:
            answering = _cached(answering, terms, dataset, settings, folder, seed)
    except CompressError:
        answering.close()
        raise
    objective = DistillObjective(
        terms,
        answering,
        None if order is None else torch.from_numpy(order),
        hard=CrossEntropy(settings.label_smoothing),
        hard_weight=settings.hard,
        warmup_epochs=settings.loss_warmup_epochs,
    )
    for line in objective.pairing():
        logger.info(line)
    _compare(objective, student, dataset)
    return objective


def _teacher(teacher: Any, example: Tensor, settings: DistillSettings) -> Teacher:
    size, device = settings.teacher_image_size, settings.teacher_device
    if isinstance(teacher, nn.Module):
        return TorchTeacher(teacher, example, size, device)
    if isinstance(teacher, (str, Path)):
        from compress.runtimes import open_session

        session = open_session(Path(teacher), device=device or "auto")
        return SessionTeacher(session, example, size, str(teacher), owned=True)
    return SessionTeacher(teacher, example, size, type(teacher).__name__, owned=False)


def _check_student(seen: Survey, dataset: Dataset) -> None:
    if seen.classes != len(dataset.classes):
        raise TrainingError(
            f"the student tells {seen.classes} classes apart, the data has {len(dataset.classes)}",
            where="distill",
            fix=f"Build the student with num_classes={len(dataset.classes)}",
        )


def _term(reference: Plugin, student: Survey, teacher: Teacher, compiled: bool) -> Term:
    name, options = plugins.parse("losses", reference)
    weight = options.pop("weight", None)
    loss = plugins.create("losses", {name: options})
    weight = type(loss).weight if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not weight >= 0:
        raise UsageError(
            f"weight {weight!r}", where=f"loss {name!r}", expected="a number of at least 0"
        )
    needs: Needs = getattr(loss, "needs", "logits")
    if needs == "logits":
        return Term(name, loss, float(weight))
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
            expected=f"one of: {', '.join(_logit_losses())}",
            fix="Or give the teacher as a network: --teacher MODEL with --weights",
        )
    pairs = pair_layers(student, teacher.survey, loss.layers, needs, name)
    return Term(name, loss, float(weight), pairs)


def _logit_losses() -> list[str]:
    names = plugins.names("losses")
    return [n for n in names if getattr(plugins.load("losses", n), "needs", "logits") == "logits"]


def _prepare(terms: list[Term], student: nn.Module, teacher: Teacher, dataset: Dataset) -> None:
    """Let losses create their adapters from what both networks compute for one image."""
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    example = dataset.example.to(device)
    labels = torch.from_numpy(np.asarray(dataset.splits["train"].labels))
    pairs = [pair for term in terms for pair in term.pairs]
    with evaluating(student), torch.no_grad(), tapped(student, {p.student for p in pairs}) as mine:
        logits = logits_of(student(example))
    answer, theirs = teacher(example, None, [p.teacher for p in pairs])
    for term in terms:
        if hasattr(term.loss, "prepare"):
            taps = Taps(logits, tuple(mine[p.student] for p in term.pairs))
            others = Taps(answer, tuple(theirs[p.teacher] for p in term.pairs))
            try:
                term.loss.prepare(taps, others, labels)
            except ValueError as error:
                raise TrainingError(str(error), where=f"loss {term.name!r}") from None


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
            "images change from epoch to epoch, so the teacher's answers cannot be kept",
            where="cache_teacher",
            fix="Set augment.fixed: true without mixup and cutmix, or leave cache_teacher out",
        )
    features = [term.name for term in terms if term.pairs]
    if features or folder is None:
        raise TrainingError(
            f"{features[0]!r} compares features, which are not kept on disk"
            if features
            else "there is no folder to keep the teacher's answers in",
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


@torch.no_grad()
def _compare(objective: DistillObjective, student: nn.Module, dataset: Dataset) -> None:
    """Note how good teacher and student are on validation images before training."""
    images = dataset.splits.get("validation")
    if images is None or not len(images):
        return
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    spread = np.linspace(0, len(images) - 1, min(len(images), CHECKED_IMAGES)).astype(np.int64)
    some = replace(dataset, splits={"validation": Subset(images, spread)})  # may be sorted by class
    right = np.zeros(2)
    count = 0
    with evaluating(student):
        for batch, target in some.batches("validation"):
            batch, target = batch.to(device), target.to(device)
            answers = (objective.answer(batch), logits_of(student(batch)))
            right += [int((answer.argmax(1) == target).sum()) for answer in answers]
            count += len(target)
    teacher_pct, student_pct = 100 * right / count
    objective.teacher_top1_pct, objective.student_top1_pct = float(teacher_pct), float(student_pct)
    if teacher_pct < student_pct:
        note = (
            f"the teacher ({teacher_pct:.2f} % of {count} validation images) is worse than the "
            f"student before training ({student_pct:.2f} %)"
        )
        logger.warning(note)
        objective.notes.append(note)
