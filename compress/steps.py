"""What each verb of a recipe does: stage modules composed, everything they make left on disk.

A step reads the stage before it from disk and writes its own folder, so a run that was killed goes
on from its last finished step, and every process of a torchrun sees the same networks.
"""

from __future__ import annotations

import inspect
import itertools
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress import artifact, constructors, distill, evaluate, models, prune
from compress.data import Dataset
from compress.errors import ModelError
from compress.export import export_onnx
from compress.run_folder import RunFolder
from compress.settings import (
    DistillSettings,
    PruneSettings,
    QuantizeSettings,
    Recipe,
    Settings,
    TrainSettings,
)
from compress.surgery import PrunePlan, apply_pruning, prove
from compress.train import CrossEntropy, TrainResult, train

ONNX_FILE = "model.onnx"
INT8_FORM = {"tensorrt-rtx": "tensorrt"}  # runtime -> kind of Q/DQ graph, where names differ
CHECK_IMAGES = 8  # real images that an exported graph is compared with torch on


@dataclass(frozen=True)
class Variant:
    """One network of a run: a file that a runtime can take, and where it came from."""

    name: str  # original, pruned, ..., int8-onnxruntime
    path: str  # its ONNX file, relative to the run folder
    stage: str  # folder of its stage
    parent: str | None = None  # name of the variant it was made from
    precision: str = "fp32"
    target: str | None = None  # the runtime an int8 graph is written for
    params: int | None = None
    macs: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What a step leaves behind: variants, and facts about how they were made."""

    variants: tuple[Variant, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able data."""
        return {"variants": [asdict(each) for each in self.variants], "facts": dict(self.facts)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        """Return what ``to_json`` wrote."""
        return cls(tuple(Variant(**each) for each in data["variants"]), data["facts"])


@dataclass(frozen=True)
class Job:
    """What every step works on."""

    recipe: Recipe
    run: RunFolder
    dataset: Dataset
    is_main: bool = True  # whether this process writes; the others of a torchrun only train

    def path(self, variant: Variant) -> Path:
        """Return the ONNX file of ``variant``."""
        return self.run.root / variant.path

    def network(self, variant: Variant) -> nn.Module:
        """Return the torch network of ``variant``, in eval mode."""
        return models.load_model(self.run.root / variant.stage)


Step = Callable[[Job, Any, Path, tuple[Variant, ...]], Outcome]


def original(job: Job, settings: None, stage: Path, before: tuple[Variant, ...]) -> Outcome:
    """Load the network of the recipe."""
    reference = job.recipe.model.name
    if models.is_onnx(reference):
        return _original_onnx(job, Path(reference), stage)
    model = build_original(job)
    return _leave(job, model, stage, "original")


def train_original(
    job: Job, settings: TrainSettings, stage: Path, before: tuple[Variant, ...]
) -> Outcome:
    """Train the network of the recipe; the result is what everything is compared with."""
    model = build_original(job)
    result = _train(job, model, settings, stage)
    facts = _training_facts(result)
    return _leave(job, model, stage, "original", facts=facts)


def finetune(
    job: Job, settings: TrainSettings, stage: Path, before: tuple[Variant, ...]
) -> Outcome:
    """Train on the labels alone."""
    parent = before[-1]
    model = job.network(parent)
    facts = _training_facts(_train(job, model, settings, stage))
    return _leave(job, model, stage, "finetuned", parent=parent, facts=facts)


def distill_student(
    job: Job, settings: DistillSettings, stage: Path, before: tuple[Variant, ...]
) -> Outcome:
    """Train towards the recipe's original, or the teacher that the stage names."""
    parent = before[-1]
    student = job.network(parent)
    teacher = _teacher(job, settings, before[0])
    objective = distill.build_objective(student, teacher, job.dataset, settings)
    facts = _training_facts(_train(job, student, settings, stage, objective))
    return _leave(job, student, stage, "distilled", parent=parent, facts=facts)


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
    return _leave(job, small, stage, "pruned", parent=parent, plan=plan, facts=facts)


def build_original(job: Job) -> nn.Module:
    """Return the network that the recipe names, checked against its data."""
    settings = job.recipe.model
    classes = settings.num_classes or len(job.dataset.classes)
    accepts = constructors.accepts(settings.name, "num_classes")
    model = models.load_model(
        settings.name,
        settings.weights,
        classes if accepts else settings.num_classes,
        options=settings.options,
        new_head=settings.replace_head,
    )
    models.check_classes(model, job.dataset.example, len(job.dataset.classes))
    return model


def _original_onnx(job: Job, source: Path, stage: Path) -> Outcome:
    from compress import measure

    if not source.is_file():
        raise ModelError("no such file", where=str(source))
    target = stage / ONNX_FILE
    with artifact.replacing(target) as temporary:
        shutil.copyfile(source, temporary)
    count = measure.count_onnx(target)
    variant = Variant(
        "original", _relative(job, target), stage.name, params=count.params, macs=count.macs
    )
    return Outcome((variant,))


def _prune_in_rounds(
    job: Job, model: nn.Module, settings: PruneSettings, stage: Path
) -> tuple[PrunePlan, dict[str, Any]]:
    """Return the joined plan of all rounds; the pruned network is the fact "model"."""
    example, total = job.dataset.example, None
    differences, validation = [], {"before": _validation_pct(job, model)}
    for number in range(1, settings.rounds + 1):
        budget = _budget(settings, number, total)
        batches = list(job.dataset.batches("calibration"))
        plan = prune.plan_pruning(
            model, example, **budget, **_plan_options(settings), batches=batches,
            seed=job.recipe.seed,
        )  # fmt: skip
        differences.append(prove(model, plan, example))
        model = apply_pruning(model, plan)
        total = plan if total is None else total.then(plan)
        validation["cut"] = _validation_pct(job, model)
        if settings.recalibrate_batches:
            images = job.dataset.batches("train")
            limited = itertools.islice(images, settings.recalibrate_batches)
            prune.recalibrate_batchnorm(model, limited)
        if settings.round_training is not None and number < settings.rounds:
            _train(job, model, settings.round_training, stage / f"round-{number}")
    validation["recalibrated"] = _validation_pct(job, model)
    facts = {
        "model": model,
        "proof_relative_difference": max(differences),
        "validation_top1_pct": validation,
    }
    return _required(total), facts


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
    if isinstance(settings.keep_channels, float) and settings.rounds > 1:
        wanted = prune.keep_in_round(settings.keep_channels, number, settings.rounds)
        earlier = 1.0
        if number > 1:
            earlier = prune.keep_in_round(settings.keep_channels, number - 1, settings.rounds)
        return {"keep_channels": wanted / earlier}
    if settings.latency_ms is not None:
        return {"latency_ms": settings.latency_ms, "runtime": settings.runtime}
    return {"keep_channels": settings.keep_channels}


def _plan_options(settings: PruneSettings) -> dict[str, Any]:
    accepted = inspect.signature(prune.plan_pruning).parameters
    budget = {"keep_macs", "keep_params", "keep_channels", "latency_ms", "runtime"}
    return {
        name: getattr(settings, name)
        for name in type(settings).model_fields
        if name in accepted and name not in budget
    }


def _train_sparse(job: Job, model: nn.Module, settings: PruneSettings, stage: Path) -> None:
    from compress.groups import trace

    training = settings.sparsity_training or TrainSettings()
    objective = prune.WithGroupLasso(
        CrossEntropy(training.label_smoothing),
        prune.GroupLasso(trace(model, job.dataset.example)),
        settings.sparsity_strength,
    )
    _train(job, model, training, stage / "sparsity", objective)


def _train(
    job: Job, model: nn.Module, settings: TrainSettings, folder: Path, objective: Any = None
) -> TrainResult:
    return train(
        model,
        job.dataset,
        settings,
        objective=objective,
        folder=folder / "training",
        seed=job.recipe.seed,
    )


def _teacher(job: Job, settings: DistillSettings, first: Variant) -> Any:
    if settings.teacher is None:
        return job.network(first)
    if models.is_onnx(settings.teacher):
        return settings.teacher
    classes = settings.teacher_num_classes or len(job.dataset.classes)
    accepts = constructors.accepts(settings.teacher, "num_classes")
    return models.load_model(
        settings.teacher, settings.teacher_weights, classes if accepts else None
    )


def _leave(
    job: Job,
    model: nn.Module,
    stage: Path,
    name: str,
    *,
    parent: Variant | None = None,
    plan: PrunePlan | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Outcome:
    """Save ``model`` and its ONNX graph in the folder of its stage."""
    from compress import measure

    if not job.is_main:
        return Outcome(())
    model.eval()
    settings = job.recipe.model
    models.save_model(
        model,
        stage,
        reference=settings.name if parent is None else job.run.root / parent.stage,
        plan=plan,
        options=settings.options if parent is None else None,
    )
    export_onnx(
        model,
        job.dataset.example,
        stage / ONNX_FILE,
        metadata=_metadata(job),
        check_images=job.dataset.normalize(
            job.dataset.splits["calibration"].take(range(CHECK_IMAGES))
        ),
    )
    count = measure.count(model, job.dataset.example)
    variant = Variant(
        name,
        _relative(job, stage / ONNX_FILE),
        stage.name,
        parent=parent.name if parent is not None else None,
        params=count.params,
        macs=count.macs,
    )
    return Outcome((variant,), facts or {})


def _metadata(job: Job) -> dict[str, Any]:
    return {
        "labels": list(job.dataset.classes),
        "mean": list(job.dataset.mean),
        "std": list(job.dataset.std),
        "input_range": [0.0, 1.0],
    }


def _validation_pct(job: Job, model: nn.Module) -> float | None:
    if not len(job.dataset.splits["validation"]):
        return None
    predictions = evaluate.predict(model, job.dataset.batches("validation"))
    return float(100 * predictions.correct.mean())


def _training_facts(result: TrainResult) -> dict[str, Any]:
    facts = asdict(result)
    facts["history"] = list(facts["history"])
    return {"training": facts}


def _relative(job: Job, path: Path) -> str:
    return path.relative_to(job.run.root).as_posix()


def seeded(step: Step, seed: int) -> Step:
    """Return ``step`` with its own random state, so that a resumed run equals an uninterrupted."""

    def run(
        job: Job, settings: Settings | None, stage: Path, before: tuple[Variant, ...]
    ) -> Outcome:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return step(job, settings, stage, before)

    return run


def quantize_graphs(
    job: Job, settings: QuantizeSettings, stage: Path, before: tuple[Variant, ...]
) -> Outcome:
    """Write one int8 graph for each kind of runtime among the recipe's targets."""
    from compress.quantize import quantize_onnx

    parent = before[-1]
    variants, facts = [], {}
    for form in int8_forms(job.recipe):
        out = stage / f"model.{form}.onnx"
        plan = quantize_onnx(
            job.path(parent),
            [
                images.numpy()
                for images, _ in job.dataset.batches("calibration", 32, settings.samples)
            ],
            out,
            target=form,
            method=settings.method,
            observer=settings.observer,
            exclude=settings.exclude,
        )
        plan.save(stage / f"plan.{form}.json")
        facts[form] = plan.to_json()
        variants.append(
            Variant(
                f"int8-{form}",
                _relative(job, out),
                stage.name,
                parent.name,
                "int8",
                form,
                parent.params,
                parent.macs,
            )
        )
    return Outcome(tuple(variants), {"plans": facts})


def int8_forms(recipe: Recipe) -> list[str]:
    """Return the kinds of Q/DQ graph that the int8 targets of ``recipe`` need, without repeats."""
    runtimes = [each.runtime for each in recipe.targets if each.precision == "int8"]
    forms = [INT8_FORM.get(name, name) for name in runtimes or ["onnxruntime"]]
    return list(dict.fromkeys(forms))
