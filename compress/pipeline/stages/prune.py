"""The step that cuts channels: in rounds if asked, every cut proved, refitted or recalibrated."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compress import prune
from compress.groups import trace
from compress.groups.plan import PrunePlan
from compress.groups.proof import apply_pruning, prove
from compress.modules.objective import TaskLoss
from compress.modules.outputs import returned
from compress.pipeline.context import Job, Outcome, Variant, leave
from compress.recipe.settings import PruneSettings, TrainSettings
from compress.train import CrossEntropy, shown_batches


def prune_channels(
    job: Job, settings: PruneSettings, stage: Path, before: tuple[Variant, ...]
) -> Outcome:
    """Cut channels to the budget, in rounds if asked, and prove every cut."""
    parent = before[-1]
    model = job.network(parent)
    if settings.sparsity_training is not None:
        _train_sparse(job, model, settings, stage)
    plan, rounds = _prune_in_rounds(job, model, settings, stage)
    small = rounds.pop("model")
    facts = rounds | {
        "macs": [plan.macs_before, plan.macs_after],
        "params": [plan.params_before, plan.params_after],
        "frozen": dict(plan.frozen),
    }
    if settings.latency_ms is not None or settings.keep_latency is not None:
        promise = prune.check_promise(small, job.network(parent), plan, job.dataset.example)
        facts["gates"] = [
            {
                "name": "latency_ms",
                "limit": promise.promised_ms,
                "measured": promise.measured_ms,
                "passed": promise.broken is None,
                "variant": "pruned",
                "runtime": promise.runtime,
                "reason": promise.broken,
            }
        ]
    return leave(job, small, stage, "pruned", parent=parent, plan=plan, facts=facts)


def _prune_in_rounds(
    job: Job, model: nn.Module, settings: PruneSettings, stage: Path
) -> tuple[PrunePlan, dict[str, Any]]:
    """Return the joined plan of all rounds; the pruned network is the fact "model"."""
    example, total = job.dataset.example, None
    differences, validation = [], {"before": job.validation_pct(model)}
    for number in range(1, settings.rounds + 1):
        budget = _budget(settings, number, total)
        batches = list(job.dataset.batches("calibration"))
        plan = prune.plan_pruning(
            model, example, **budget, **_plan_options(settings), batches=batches,
            seed=job.recipe.seed, **_reading(job, model, settings),
        )  # fmt: skip
        differences.append(prove(model, plan, example))
        small = apply_pruning(model, plan)
        shown = _shown_batches(job, settings, number)
        total = plan if total is None else total.then(plan)
        validation["cut"] = job.validation_pct(small)
        if settings.refit:
            model = prune.refit(small, model, plan, batches, training_batches=shown)
            validation["refitted"] = job.validation_pct(model)
        else:
            plain = itertools.islice(job.dataset.batches("train"), settings.recalibrate_batches)
            model = prune.recalibrate_batchnorm(small, shown or plain)
            validation["recalibrated"] = job.validation_pct(model)
        if settings.round_training is not None and number < settings.rounds:
            job.train(model, settings.round_training, stage / f"round-{number}")
    facts = {
        "model": model,
        "proof_relative_difference": max(differences),
        "validation_top1_pct": validation,
    }
    return _required(total), facts


def _shown_batches(
    job: Job, settings: PruneSettings, number: int
) -> Iterator[tuple[Tensor, Tensor]] | None:
    """Yield images as training after round ``number`` will show them; None if none follows."""
    is_last = number == settings.rounds
    training = _training_after(job, settings) if is_last else settings.round_training
    if training is None:
        return None
    return shown_batches(job.dataset, training, settings.recalibrate_batches, job.recipe.seed)


def _training_after(job: Job, settings: PruneSettings) -> TrainSettings | None:
    """Return what the recipe trains by once the cut is made, if it does."""
    stages = itertools.dropwhile(lambda stage: stage.prune is not settings, job.recipe.stages)
    trainings = (stage.distill or stage.finetune for stage in stages)
    return next((each for each in trainings if each is not None), None)


def _required(plan: PrunePlan | None) -> PrunePlan:
    if plan is None:
        raise ValueError("pruning in no rounds")
    return plan


def _budget(settings: PruneSettings, number: int, done: PrunePlan | None) -> dict[str, Any]:
    """Return the budget of a round, as a share of what the round before it left."""
    for name, before, after in (
        ("keep_macs", "macs_before", "macs_after"),
        ("keep_params", "params_before", "params_after"),
    ):
        keep = getattr(settings, name)
        if keep is not None:
            wanted = prune.keep_in_round(keep, number, settings.rounds)
            left = 1.0 if done is None else getattr(done, after) / getattr(done, before)
            return {name: min(1.0, wanted / left)}
    if isinstance(settings.keep_channels, float):
        return {"keep_channels": settings.keep_channels ** (1 / settings.rounds)}
    if settings.keep_latency is not None:
        wanted = prune.keep_in_round(settings.keep_latency, number, settings.rounds)
        left = 1.0 if done is None else prune.latency_left(done)
        return {"keep_latency": min(1.0, wanted / left), "runtime": settings.runtime}
    if settings.latency_ms is not None:
        return {"latency_ms": settings.latency_ms, "runtime": settings.runtime}
    return {"keep_channels": settings.keep_channels}


def _plan_options(settings: PruneSettings) -> dict[str, Any]:
    accepted = inspect.signature(prune.plan_pruning).parameters
    budget = {*prune.BUDGETS, "runtime", "outputs"}
    return {
        name: getattr(settings, name)
        for name in type(settings).model_fields
        if name in accepted and name not in budget
    }


def _reading(job: Job, model: nn.Module, settings: PruneSettings) -> dict[str, Any]:
    """Return which outputs count and what they are, as the recipe or its task says."""
    if job.task.tells_classes:
        return {"outputs": settings.outputs}
    outputs = settings.outputs
    if outputs is None:
        outputs = job.task.counted_outputs(returned(model, job.dataset.example))
    return {"outputs": outputs, "answers": job.task.answers}


def _train_sparse(job: Job, model: nn.Module, settings: PruneSettings, stage: Path) -> None:
    training = settings.sparsity_training or TrainSettings()
    plain = CrossEntropy(training.label_smoothing)
    objective = prune.WithGroupLasso(
        plain if job.task.tells_classes else TaskLoss(job.task),
        prune.GroupLasso(trace(model, job.dataset.example)),
        settings.sparsity_strength,
    )
    job.train(model, training, stage / "sparsity", objective)
