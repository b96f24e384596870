"""Stages that load or train a network: original, train, finetune, distill."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from onnx import ModelProto

from compress import measure, models
from compress.errors import CompressError, ModelError
from compress.evaluate.feeding import Fed
from compress.graph import files
from compress.pipeline import cautions, network
from compress.pipeline.context import (
    ONNX_FILE,
    Job,
    Outcome,
    Variant,
    facts_of,
    leave,
    training_facts,
)
from compress.recipe.settings import DistillSettings, TrainSettings
from compress.runtimes import open_session
from compress.train import distill


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
        control = distill.does_teacher_help(
            student, teacher, job.dataset, settings, seed=job.recipe.seed
        )
        facts["control"] = control.to_json()
    objective = distill.build_objective(
        student, teacher, job.dataset, settings, folder=stage, seed=job.recipe.seed, task=job.task
    )
    sparse = parent.sparsity is not None
    facts |= training_facts(job.train(student, settings, stage, objective, sparse=sparse))
    key = "teacher_top1_pct" if job.task.tells_classes else f"teacher_{job.task.primary}"
    facts |= {"pairing": objective.pairing(), key: objective.teacher_value}
    return leave(job, student, stage, "distilled", parent=parent, facts=facts)


def _original_onnx(job: Job, source: Path, stage: Path) -> Outcome:
    if not source.is_file():
        raise ModelError("no such file", where=str(source))
    target = stage / ONNX_FILE
    files.copy(source, target, facts=facts_of(job), sizes=job.recipe.model.input_size)
    facts: dict[str, Any] = {}
    model, macs = files.load(target), None
    try:
        macs = sum(measure.node_macs(_sized(model, job)).values())
    except CompressError as error:
        facts = {"skipped": {"macs": str(error)}}
    params = measure.onnx_params(model.graph)
    variant = Variant("original", job.relative(target), stage.name, params=params, macs=macs)
    with open_session(target) as session:
        return Outcome((variant,), facts | cautions.of_original(job, Fed(session, job.dataset)))


def _sized(model: ModelProto, job: Job) -> ModelProto:
    """Return a graph with the sizes of the data's images, where it leaves them free."""
    fixed = ModelProto()
    fixed.CopyFrom(model)
    channels, (height, width) = job.dataset.channels, job.dataset.image_size
    files.fix_sizes(fixed, (channels, height, width), where="")
    return fixed


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
