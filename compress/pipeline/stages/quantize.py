"""The stage quantize: one int8 graph for each kind of runtime, after training if asked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray

from compress import artifact, models
from compress.data import Dataset, load_data
from compress.evaluate.feeding import arrays_for, completed
from compress.pipeline.context import RunContext, RunVariant, StageResult, training_facts
from compress.pipeline.task import as_torch
from compress.qdq import QuantPlan, read_onnx
from compress.quantize import quantize_targets
from compress.quantize.accuracy_budget import meet_budget
from compress.quantize.qat import Trained, train_quantized
from compress.recipe.settings import QuantizeSettings, Recipe
from compress.report import schema
from compress.runtimes import DEFAULT, open_session, runtime_class
from compress.train.distributed import join_processes

CALIBRATION_BATCH = 32


def quantize_graphs(
    context: RunContext, settings: QuantizeSettings, stage: Path, before: tuple[RunVariant, ...]
) -> StageResult:
    """Write one int8 graph for each kind of runtime among the recipe's targets."""
    parent = before[-1]
    forms = f"{context.relative(stage)}/forms"  # what is trained, which the first process tells
    if not context.is_main:
        if settings.qat is not None:
            for form in json.loads(join_processes().first_tells(forms, None)):
                _train_quantized(context, settings, None, parent, stage / f"qat-{form}")
        return StageResult(())
    calibration = calibration_data(context, settings, parent)
    refused: dict[str, str] = {}
    outs = {form: stage / f"model.{form}.onnx" for form in int8_forms(context.recipe)}
    plans = quantize_targets(
        context.path(parent),
        calibration_batches(context.path(parent), calibration, settings.samples),
        outs,
        settings.method,
        settings.observer,
        exclude=settings.exclude,
        on_refusal=lambda form, error: refused.update({form: str(error)}),
    )
    if settings.qat is not None:
        join_processes().first_tells(forms, json.dumps(list(plans)))
    variants: list[RunVariant] = []
    facts: dict[str, Any] = {"plans": {}, "qat": {}, "gates": [], "refused": refused}
    for form, plan in plans.items():
        if calibration.note:
            plan = plan.changed(notes=(*plan.notes, f"calibrated on {calibration.note}"))
        variant, plan, training, gate = _finished(context, settings, plan, parent, stage, form)
        variants.append(variant)
        facts["plans"][form] = plan.to_json()
        if training is not None:
            facts["qat"][form] = training
        if gate is not None:
            facts["gates"].append(gate.model_dump(exclude_unset=True))
    digest = hashlib.sha256()  # of every pixel that ranges were taken from
    for images, _ in calibration.pictures("calibration", CALIBRATION_BATCH, settings.samples):
        digest.update(images.numpy().tobytes())
    told = {"data": calibration.name, "note": calibration.note, "sha256": digest.hexdigest()}
    facts["calibration"] = told
    return StageResult(tuple(variants), facts)


def _finished(
    context: RunContext,
    settings: QuantizeSettings,
    plan: QuantPlan,
    parent: RunVariant,
    stage: Path,
    form: str,
) -> tuple[RunVariant, QuantPlan, dict[str, Any] | None, schema.Gate | None]:
    """Train a graph and hold it to its limit of loss, where the stage asks for it."""
    out, source = stage / f"model.{form}.onnx", None
    training = gate = None
    if settings.qat is not None:
        trained = _train_quantized(context, settings, plan, parent, stage / f"qat-{form}")
        source, plan = trained.model, trained.plan
        with artifact.replacing(out) as temporary:
            onnx.save(trained.written, str(temporary))
        training = training_facts(trained.result)["training"]
    if settings.drop_limit is not None:
        source = read_onnx(context.path(parent)) if source is None else source
        budget = meet_budget(
            source,
            plan,
            context.dataset.batches("validation"),
            max_drop=settings.drop_limit,
            folder=stage,
            task=context.task,
        )
        plan = budget.plan
        gate = schema.Gate(
            name="max_drop_pct" if context.task.tells_classes else "max_drop",
            limit=budget.max_drop,
            measured=budget.best.drop,
            passed=budget.met,
            variant=f"int8-{form}",
            **({} if context.task.tells_classes else {
                "metric": context.task.primary,
                "title": context.task.kinds[context.task.primary].title or None,
                "unit": context.task.kinds[context.task.primary].unit,
            }),
        )  # fmt: skip
    plan.save(stage / f"plan.{form}.json")
    variant = replace(
        parent,
        name=f"int8-{form}",
        path=context.relative(out),
        stage=stage.name,
        parent=parent.name,
        precision="int8",
        target=form,
    )
    return variant, plan, training, gate


def int8_forms(recipe: Recipe) -> list[str]:
    """Return the kinds of Q/DQ graph that the int8 targets of ``recipe`` need, without repeats."""
    runtimes = [each.runtime for each in recipe.targets if each.precision == "int8"]
    forms = [runtime_class(name).int8_form for name in runtimes]
    wanted = dict.fromkeys(form for form in forms if form is not None)
    return list(wanted) or [str(runtime_class(DEFAULT).int8_form)]


def calibration_data(
    context: RunContext, settings: QuantizeSettings, parent: RunVariant
) -> Dataset:
    """Return the data that ranges come from: that of the recipe, or where the stage says.

    Images from elsewhere are prepared as those of the recipe, unless the stage says how.
    """
    if settings.data is None:
        return context.dataset
    own = settings.data.model_dump(exclude_unset=True)
    given = context.recipe.data.model_copy(update={"root": None, "options": {}} | own)
    path = context.path(parent)
    is_onnx = models.is_onnx(context.recipe.model.name)
    source = path if is_onnx else context.run.root / parent.stage
    return load_data(completed(given, [path]), context.recipe.seed, partial(as_torch, source))


def calibration_batches(
    path: Path, dataset: Dataset, samples: int | None = None
) -> list[dict[str, NDArray[Any]]]:
    """Return calibration images as the inputs of an ONNX file take them, by name."""
    with open_session(path) as session:
        specs = [
            replace(spec, shape=("batch", *spec.shape[1:]))  # of pictures: they are split later
            if spec.shape is not None and len(spec.shape) == 4
            else spec
            for spec in session.inputs
        ]
    return [
        dict(zip((s.name for s in specs), arrays_for(specs, images, dataset), strict=True))
        for images, _ in dataset.pictures("calibration", CALIBRATION_BATCH, samples)
    ]


def _train_quantized(
    context: RunContext,
    settings: QuantizeSettings,
    plan: QuantPlan | None,
    parent: RunVariant,
    folder: Path,
) -> Trained:
    """Train with the rounding of ``plan``, or with that of the first process."""
    text = None if plan is None else json.dumps(plan.to_json())
    told = join_processes().first_tells(context.relative(folder), text)
    return train_quantized(
        read_onnx(context.path(parent)),
        QuantPlan.from_json(json.loads(told)),
        context.dataset,
        settings,
        folder=folder,
        seed=context.recipe.seed,
        task=context.task,
    )
