"""Try each stage on the network of a recipe, for seconds: what would fail after hours fails now."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from compress import artifact, prune
from compress.data import Dataset
from compress.graph.model import GraphIndex
from compress.graph.preprocess import prepare, read_onnx
from compress.pipeline.context import ONNX_FILE, export_network
from compress.pipeline.stages.prune import outputs_read
from compress.pipeline.task import load_teacher
from compress.quantize.api import excluded_nodes
from compress.recipe.settings import DistillSettings, PruneSettings, QuantizeSettings, Stage
from compress.tasks import Task
from compress.train.distill.build import check_objective

CHEAP = "l1"  # a criterion that looks at weights alone
WHOLE = {"keep_channels": 1.0}  # the budget in place of a latency, which would take minutes


def try_stage(stage: Stage, model: nn.Module, dataset: Dataset, task: Task) -> None:
    """Try a stage on the network that the recipe begins with, which is left as found.

    Raises:
        CompressError: the stage would refuse the network or its settings.
    """
    if stage.prune is not None:
        _try_cut(stage.prune, model, dataset, task)
    elif stage.distill is not None:
        _try_teacher(stage.distill, model, dataset, task)
    elif stage.quantize is not None and stage.quantize.exclude:
        with artifact.scratch() as folder:
            export_network(model, dataset, task, folder / ONNX_FILE)
            try_nodes(folder / ONNX_FILE, stage.quantize)


def try_nodes(path: Path, settings: QuantizeSettings) -> None:
    """Prepare an ONNX file for int8, and find the nodes that are to stay in float.

    Raises:
        CompressError: it cannot be quantized, or has no such node.
    """
    excluded_nodes(GraphIndex(prepare(read_onnx(path), str(path))), settings.exclude)


def _try_cut(settings: PruneSettings, model: nn.Module, dataset: Dataset, task: Task) -> None:
    """Plan the first cut by a cheap criterion: whether there is a plan depends on no score."""
    example = dataset.example
    budget = prune.one_budget(**{name: getattr(settings, name) for name in prune.BUDGETS})
    is_timed = budget.kind in ("latency", "latency_ms")
    prune.plan_pruning(
        model,
        example,
        **WHOLE if is_timed else budget.in_round(1, settings.rounds, None).to_json(),
        criterion=CHEAP,
        round_to=settings.round_to,
        min_channels=settings.min_channels,
        max_cut=settings.max_cut,
        exclude=settings.exclude,
        outputs=outputs_read(task, model, example, settings)["outputs"],
    )
    if settings.refit_steps:
        prune.check_blocks(model, example)


def _try_teacher(settings: DistillSettings, model: nn.Module, dataset: Dataset, task: Task) -> None:
    check_objective(model, load_teacher(settings, dataset) or model, dataset, settings, task)
