"""Steps that load or train a network: original, train, finetune, distill."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from compress import artifact, distill, measure, models
from compress.errors import ModelError
from compress.pipeline import cautions, network
from compress.pipeline.job import (
    ONNX_FILE,
    Job,
    Outcome,
    Variant,
    leave,
    training_facts,
)
from compress.pipeline.teaching import does_teacher_help
from compress.runtimes import open_session
from compress.settings import DistillSettings, TrainSettings


def original(job: Job, settings: None, stage: Path, before: tuple[Variant, ...]) -> Outcome:
    """Load the network of the recipe."""
    reference = job.recipe.model.name
    if models.is_onnx(reference):
        return _original_onnx(job, Path(reference), stage)
    model = network.build_original(job.recipe, job.dataset, job.task)
    rebuild = None
    if models.model_folder(Path(reference)) is None:
        rebuild = partial(network.load_original, job.recipe, job.dataset)
    return leave(
        job, model, stage, "original", facts=cautions.of_original(job, model, rebuild=rebuild)
    )


def train_original(
    job: Job, settings: TrainSettings, stage: Path, before: tuple[Variant, ...]
) -> Outcome:
    """Train the network of the recipe; the result is what everything is compared with."""
    model = network.build_original(job.recipe, job.dataset, job.task)
    result = job.train(model, settings, stage)
    facts = training_facts(result) | cautions.of_original(job, model)
    return leave(job, model, stage, "original", facts=facts)


def finetune(
    job: Job, settings: TrainSettings, stage: Path, before: tuple[Variant, ...]
) -> Outcome:
    """Train on the labels alone."""
    parent = before[-1]
    model = job.network(parent)
    sparse = parent.sparsity is not None
    facts = training_facts(job.train(model, settings, stage, sparse=sparse))
    return leave(job, model, stage, "finetuned", parent=parent, facts=facts)


def distill_student(
    job: Job, settings: DistillSettings, stage: Path, before: tuple[Variant, ...]
) -> Outcome:
    """Train towards the recipe's original, or the teacher that the stage names."""
    parent = before[-1]
    student = job.network(parent)
    teacher = _teacher(job, settings, before[0])
    facts: dict[str, Any] = {}
    if settings.control:
        facts["control"] = does_teacher_help(job, student, teacher, settings).to_json()
    objective = distill.build_objective(
        student, teacher, job.dataset, settings, folder=stage, seed=job.recipe.seed
    )
    sparse = parent.sparsity is not None
    facts |= training_facts(job.train(student, settings, stage, objective, sparse=sparse))
    facts |= {"pairing": objective.pairing(), "teacher_top1_pct": objective.teacher_top1_pct}
    return leave(job, student, stage, "distilled", parent=parent, facts=facts)


def _original_onnx(job: Job, source: Path, stage: Path) -> Outcome:
    if not source.is_file():
        raise ModelError("no such file", where=str(source))
    target = stage / ONNX_FILE
    with artifact.replacing(target) as temporary:
        shutil.copyfile(source, temporary)
    count = measure.count_onnx(target)
    variant = Variant(
        "original", job.relative(target), stage.name, params=count.params, macs=count.macs
    )
    with open_session(target, network.ORT) as session:
        return Outcome((variant,), cautions.of_original(job, session))


def _teacher(job: Job, settings: DistillSettings, first: Variant) -> Any:
    if settings.teacher is None:
        return job.network(first)
    if models.is_onnx(settings.teacher):
        return settings.teacher
    return models.load_for(
        len(job.dataset.classes),
        settings.teacher,
        settings.teacher_weights,
        settings.teacher_num_classes,
    )
