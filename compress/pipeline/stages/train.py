"""Stages that load or train a network: original, train, finetune, distill."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from compress import measure, models
from compress.errors import CompressError, ModelError, absence
from compress.evaluate.feeding import Fed
from compress.graph import files
from compress.pipeline import cautions
from compress.pipeline.context import (
    ONNX_FILE,
    RunContext,
    RunVariant,
    StageResult,
    run_facts,
    save_stage,
    training_facts,
)
from compress.pipeline.task import build_original, load_original, load_teacher
from compress.recipe.settings import DistillSettings, TrainSettings
from compress.runtimes import open_session
from compress.train import distill


def original(
    context: RunContext, settings: None, stage: Path, before: tuple[RunVariant, ...]
) -> StageResult:
    """Load the network of the recipe."""
    reference = context.recipe.model.name
    if models.is_onnx(reference):
        return _original_onnx(context, Path(reference), stage)
    model = build_original(context.recipe, context.dataset, context.task)
    rebuild = None
    if models.model_folder(Path(reference)) is None:
        rebuild = partial(load_original, context.recipe, context.dataset)
    return save_stage(
        context,
        model,
        stage,
        "original",
        facts=cautions.of_original(context, model, rebuild=rebuild),
    )


def train_original(
    context: RunContext, settings: TrainSettings, stage: Path, before: tuple[RunVariant, ...]
) -> StageResult:
    """Train the network of the recipe; the result is what everything is compared with."""
    model = build_original(context.recipe, context.dataset, context.task)
    result = context.train(model, settings, stage)
    facts = training_facts(result) | cautions.of_original(context, model)
    return save_stage(context, model, stage, "original", facts=facts)


def finetune(
    context: RunContext, settings: TrainSettings, stage: Path, before: tuple[RunVariant, ...]
) -> StageResult:
    """Train on the labels alone."""
    parent = before[-1]
    model = context.network(parent)
    sparse = parent.sparsity is not None
    facts = training_facts(context.train(model, settings, stage, sparse=sparse))
    return save_stage(context, model, stage, "finetuned", parent=parent, facts=facts)


def distill_student(
    context: RunContext, settings: DistillSettings, stage: Path, before: tuple[RunVariant, ...]
) -> StageResult:
    """Train towards the recipe's original, or the teacher that the stage names."""
    parent = before[-1]
    student = context.network(parent)
    teacher = load_teacher(settings, context.dataset) or context.network(before[0])
    facts: dict[str, Any] = {}
    if settings.control:
        control = distill.does_teacher_help(
            student, teacher, context.dataset, settings, seed=context.recipe.seed
        )
        facts["control"] = control.to_json()
    objective = distill.build_objective(
        student,
        teacher,
        context.dataset,
        settings,
        folder=stage,
        seed=context.recipe.seed,
        task=context.task,
    )
    sparse = parent.sparsity is not None
    facts |= training_facts(context.train(student, settings, stage, objective, sparse=sparse))
    key = "teacher_top1_pct" if context.task.tells_classes else f"teacher_{context.task.primary}"
    facts |= {"pairing": objective.pairing(), key: objective.teacher_value}
    return save_stage(context, student, stage, "distilled", parent=parent, facts=facts)


def _original_onnx(context: RunContext, source: Path, stage: Path) -> StageResult:
    if not source.is_file():
        raise ModelError(absence(source), where=str(source))
    target = stage / ONNX_FILE
    files.copy(source, target, facts=run_facts(context), sizes=context.recipe.model.input_size)
    facts: dict[str, Any] = {}
    model, macs = files.load(target), None
    height, width = context.dataset.image_size
    try:
        files.fix_sizes(model, (context.dataset.channels, height, width), where="")
        macs = sum(measure.node_macs(model).values())
    except CompressError as error:
        facts = {"skipped": {"macs": str(error)}}
    params = measure.onnx_params(model.graph)
    variant = RunVariant("original", context.relative(target), stage.name, params=params, macs=macs)
    with open_session(target) as session:
        return StageResult(
            (variant,), facts | cautions.of_original(context, Fed(session, context.dataset))
        )
