"""What the network of a recipe is for, and what of a recipe that purpose allows."""

from __future__ import annotations

from collections.abc import Iterator

from compress.data import Dataset
from compress.distill.build import check_loss, losses_of
from compress.errors import CompressError, RecipeError
from compress.settings import DistillSettings, Recipe
from compress.tasks import Task, default_task, load_task


def task_of(recipe: Recipe, dataset: Dataset) -> Task:
    """Return the task that ``recipe`` names, or the one that its data is made for.

    Raises:
        RecipeError: the data has other labels than the task needs, or the recipe asks for what only
            networks that tell classes apart have; every problem is one line of the message.
    """
    task = load_task(recipe.task or default_task(dataset.target), classes=dataset.classes)
    problems = list(_problems(recipe, dataset, task))
    if problems:
        raise RecipeError("\n".join(problems))
    return task


def _problems(recipe: Recipe, dataset: Dataset, task: Task) -> Iterator[str]:
    if dataset.target != task.target:
        yield (
            f"task: needs labels of the form {task.target!r}; data {dataset.name!r} has "
            f"{dataset.target!r}."
        )
    if not task.tells_classes:
        yield from _only_for_classes(recipe, task)


def _only_for_classes(recipe: Recipe, task: Task) -> Iterator[str]:
    """Yield what the recipe asks for that only networks which tell classes apart have."""
    drop = f"Use gates.metric_drop, in the unit of {task.primary}."
    for name in ("top1_drop_pct", "worst_class_drop_pct"):
        if getattr(recipe.gates, name) is not None:
            yield f"gates.{name}: this task does not name one class an image. {drop}"
    for number, stage in enumerate(recipe.stages):
        place = f"stages[{number}].{stage.verb}"
        if stage.distill is not None and stage.distill.control:
            yield f"{place}.control: needs one class an image."
        if stage.distill is not None:
            yield from _losses(stage.distill, task, place)
        settings = stage.quantize
        for name in ("qat", "max_drop_pct"):
            if settings is not None and getattr(settings, name) is not None:
                yield f"{place}.{name}: needs one class an image. {drop}"
    for name in ("explain_images", "sensitivity"):
        if getattr(recipe.measure, name):
            yield f"measure.{name}: needs one class an image."


def _losses(settings: DistillSettings, task: Task, place: str) -> Iterator[str]:
    for each in losses_of(settings, task):
        try:
            check_loss(each, task)
        except CompressError as error:
            yield f"{place}.losses: {error}"
