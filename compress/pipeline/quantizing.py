"""The step that writes int8 graphs, one for each kind of runtime, after training if asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from numpy.typing import NDArray

from compress import artifact
from compress.pipeline.job import INT8_FORM, Job, Outcome, Variant, training_facts
from compress.settings import QuantizeSettings, Recipe

if TYPE_CHECKING:
    from compress.qat import Trained
    from compress.qdq import QuantPlan

CALIBRATION_BATCH = 32


def quantize_graphs(
    job: Job, settings: QuantizeSettings, stage: Path, before: tuple[Variant, ...]
) -> Outcome:
    """Write one int8 graph for each kind of runtime among the recipe's targets."""
    from compress.quantize import quantize_onnx

    parent = before[-1]
    variants, facts, training = [], {}, {}
    for form in int8_forms(job.recipe):
        out = stage / f"model.{form}.onnx"
        plan = quantize_onnx(
            job.path(parent),
            _calibration_batches(job, settings.samples),
            out,
            target=form,
            method=settings.method,
            observer=settings.observer,
            exclude=settings.exclude,
        )
        if settings.qat is not None:
            trained = _train_quantized(job, settings, plan, parent, stage / f"qat-{form}")
            plan = trained.plan
            with artifact.replacing(out) as temporary:
                onnx.save(trained.written, str(temporary))
            training[form] = training_facts(trained.result)["training"]
        plan.save(stage / f"plan.{form}.json")
        facts[form] = plan.to_json()
        variants.append(
            Variant(
                f"int8-{form}",
                job.relative(out),
                stage.name,
                parent.name,
                "int8",
                form,
                parent.params,
                parent.macs,
            )
        )
    return Outcome(tuple(variants), {"plans": facts, "qat": training})


def int8_forms(recipe: Recipe) -> list[str]:
    """Return the kinds of Q/DQ graph that the int8 targets of ``recipe`` need, without repeats."""
    runtimes = [each.runtime for each in recipe.targets if each.precision == "int8"]
    forms = [INT8_FORM.get(name, name) for name in runtimes or ["onnxruntime"]]
    return list(dict.fromkeys(forms))


def _calibration_batches(job: Job, samples: int) -> list[NDArray[np.float32]]:
    batches = job.dataset.batches("calibration", CALIBRATION_BATCH, samples)
    return [images.numpy() for images, _ in batches]


def _train_quantized(
    job: Job, settings: QuantizeSettings, plan: QuantPlan, parent: Variant, folder: Path
) -> Trained:
    from compress.qat import train_quantized
    from compress.qdq import read_onnx

    return train_quantized(
        read_onnx(job.path(parent)),
        plan,
        job.dataset,
        settings,
        folder=folder,
        seed=job.recipe.seed,
    )
