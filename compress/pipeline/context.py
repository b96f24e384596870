"""What stages of a run share and return: the run, its variants and their predictions."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from compress import artifact, measure, models, plugins
from compress.data import Dataset
from compress.errors import ExportError, RunError, boundary
from compress.evaluate import Accuracy, ClassEvaluation, Evaluation, Predictions, primary_value
from compress.export import export_onnx
from compress.groups.plan import PrunePlan
from compress.models.references import count_of, is_torchvision_detector
from compress.modules.outputs import returned
from compress.prune.sparsity import keeping_zeros
from compress.recipe.settings import Recipe, TrainSettings
from compress.report.run_folder import DONE_FILE, RunFolder
from compress.tasks import Task, default_task
from compress.train import TrainResult, train

ONNX_FILE = "model.onnx"
CHECK_IMAGES = 8  # real images that an exported graph is compared with torch on


@dataclass(frozen=True)
class RunVariant:
    """One network of a run: a file that a runtime can take, and where it came from."""

    name: str  # original, pruned, ..., int8-onnxruntime
    path: str  # its ONNX file, relative to the run folder
    stage: str  # folder of its stage
    parent: str | None = None  # name of the variant it was made from
    precision: str = "fp32"
    target: str | None = None  # the runtime an int8 graph is written for
    params: int | None = None
    macs: int | None = None
    sparsity: str | None = None  # pattern in which single weights are zero: unstructured, 2:4


@dataclass(frozen=True)
class StageResult:
    """What a stage returns: variants, and facts about how they were made."""

    variants: tuple[RunVariant, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)  # JSON-able, as its record has them

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able data."""
        return {"variants": [asdict(each) for each in self.variants], "facts": dict(self.facts)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StageResult:
        """Return what ``to_json`` wrote.

        Raises:
            RunError: it is no record of a stage.
        """
        with boundary(RunError, "is no record of a stage", where=DONE_FILE):
            return cls(tuple(RunVariant(**each) for each in data["variants"]), dict(data["facts"]))


@dataclass(frozen=True)
class RunContext:
    """What every stage works on: recipe, run folder, data, task."""

    recipe: Recipe
    run: RunFolder
    dataset: Dataset
    task: Task
    is_main: bool = True  # whether this process writes; the others of a torchrun only train

    def path(self, variant: RunVariant) -> Path:
        """Return the ONNX file of ``variant``."""
        return artifact.inside(self.run.root, variant.path)

    def network(self, variant: RunVariant) -> nn.Module:
        """Return the torch network of ``variant``, in eval mode."""
        return models.load_model(self.run.root / variant.stage)

    def relative(self, path: Path) -> str:
        """Return ``path`` as the run records it."""
        return path.relative_to(self.run.root).as_posix()

    def train(
        self,
        model: nn.Module,
        settings: TrainSettings,
        folder: Path,
        objective: Any = None,
        *,
        sparse: bool = False,
    ) -> TrainResult:
        """Train ``model`` in place, with checkpoints in ``folder``/training.

        With ``sparse``, weights that are zero stay so.
        """
        with keeping_zeros(model) if sparse else nullcontext():
            return train(
                model,
                self.dataset,
                settings,
                objective=objective,
                folder=folder / "training",
                seed=self.recipe.seed,
                task=self.task,
            )

    def validation_pct(self, model: nn.Module) -> float | None:
        """Return the primary metric of ``model`` on the validation images, if there are any."""
        return primary_value(model, self.dataset, self.task)


def save_stage(
    context: RunContext,
    model: nn.Module,
    stage: Path,
    name: str,
    *,
    parent: RunVariant | None = None,
    plan: PrunePlan | None = None,
    facts: Mapping[str, Any] | None = None,
) -> StageResult:
    """Save ``model`` and its ONNX graph in the folder of its stage."""
    if not context.is_main:
        return StageResult(())
    model.eval()
    settings, calibration = context.recipe.model, context.dataset.splits["calibration"]
    models.save_model(
        model,
        stage,
        reference=settings.name if parent is None else context.run.root / parent.stage,
        plan=plan,
        options=settings.options if parent is None else None,
        num_classes=_classes_given(context) if parent is None else None,
    )
    fixed = export_network(
        model,
        context.dataset,
        context.task,
        stage / ONNX_FILE,
        metadata=run_facts(context),
        check_images=context.dataset.normalize(
            calibration.take(range(min(CHECK_IMAGES, len(calibration))))
        ),
    )
    count = measure.count_module(model, context.dataset.example)
    facts = dict(facts or {}) | ({"fixed_batch": fixed} if fixed else {})
    inherited = parent.sparsity if parent is not None else None
    variant = RunVariant(
        name,
        context.relative(stage / ONNX_FILE),
        stage.name,
        parent=parent.name if parent is not None else None,
        params=count.params,
        macs=count.macs,
        sparsity=facts.get("sparsity", {}).get("pattern", inherited),
    )
    return StageResult((variant,), facts)


def export_network(
    model: nn.Module, dataset: Dataset, task: Task, path: Path, **options: Any
) -> str | None:
    """Export ``model`` for any batch; where its code does not let it, for that of the example.

    Returns:
        Why the batch is fixed; None where it is free.
    """
    example = dataset.example
    outputs = None if task.tells_classes else task.read_outputs(returned(model, example))
    write = partial(
        export_onnx, model, example, path, nms=task.ending(), outputs=outputs, **options
    )
    try:
        write()
    except ExportError as error:
        with suppress(ExportError):
            write(dynamic_batch=False)
            return error.what
        raise
    return None


def _classes_given(context: RunContext) -> int | None:
    """Return the number of classes that the network was built for; None: its weights tell."""
    given, name = context.recipe.model.num_classes, context.recipe.model.name
    classes = len(context.dataset.classes)
    if given is None and classes and is_torchvision_detector(name):
        return count_of(name, classes)
    return given


def training_facts(result: TrainResult) -> dict[str, Any]:
    """Return what a stage records of its training."""
    facts = asdict(result)
    facts["history"] = list(facts["history"])
    return {"training": facts}


def run_facts(context: RunContext) -> dict[str, Any]:
    """Return what every file of the run says of its input and its task."""
    task = context.recipe.task or default_task(context.dataset.target)
    is_ours = plugins.parse("tasks", task)[0] in plugins.names("tasks")
    return context.dataset.facts() | ({"task": task} if is_ours else {})


@dataclass(frozen=True)
class JudgedPredictions:
    """Files with the logits of variants that name classes, and their accuracy."""

    folder: Path
    dataset: Dataset
    task: Task
    _accuracies: dict[Path, Accuracy] = field(default_factory=dict, init=False, repr=False)

    def path(self, variant: str, runtime: str, precision: str) -> Path:
        """Return where the logits of a variant on a runtime are kept."""
        return self.folder / f"{variant}.{runtime}.{precision}.npz"

    def evaluation(self, path: Path) -> ClassEvaluation:
        """Return the evaluation whose logits are in ``path``."""
        logits, named = Predictions.load(path), self.dataset.test_groups
        groups = None if named is None else [str(g) for g in named[: len(logits.labels)]]
        return ClassEvaluation(self.task, logits, self.dataset.classes, groups)

    def keep(self, path: Path, found: Evaluation) -> None:
        """Keep an evaluation in ``path``, if it is one of classes."""
        if isinstance(found, ClassEvaluation):
            if not path.is_file():
                found.logits.save(path)
            self._accuracies[path] = found.accuracy

    def accuracy(self, path: Path) -> Accuracy:
        """Return how right the answers in ``path`` are, for each subgroup as well."""
        if path not in self._accuracies:
            self._accuracies[path] = self.evaluation(path).accuracy
        return self._accuracies[path]
