"""The network, the images and the task of a recipe, and which settings they allow."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from onnx import TensorProto
from torch import nn

from compress import evaluate, models, plugins
from compress.data import GREY_MEAN, IMAGENET_MEAN, Dataset, load_data
from compress.errors import CompressError, ModelError, RecipeError
from compress.evaluate import UNLABELLED_IMAGES
from compress.evaluate.feeding import completed, shapes_answered
from compress.graph.preprocess import prepare, read_onnx
from compress.models.references import takes_unit_range
from compress.quantize.qat.network import OnnxNetwork
from compress.recipe.settings import (
    FEWEST_CALIBRATION,
    DataSettings,
    DistillSettings,
    ModelSettings,
    Recipe,
)
from compress.tasks import Task, default_task, load_task, primary_of
from compress.train.distill.build import check_loss, losses_of

logger = logging.getLogger(__name__)


def load_original(recipe: Recipe, dataset: Dataset) -> nn.Module:
    """Return the network that ``recipe`` names, with its weights."""
    settings = recipe.model
    return models.load_for(
        len(dataset.classes),
        settings.name,
        settings.weights,
        settings.num_classes,
        options=settings.options,
        new_head=settings.replace_head,
    )


def as_torch(reference: str | Path, settings: ModelSettings | None = None) -> nn.Module:
    """Return a network to make images from, whatever holds it; of ONNX with its BatchNorm.

    Args:
        reference: As ``model.name`` of a recipe, or a folder of a stage.
        settings: Weights and options of the network, unless a folder or an ONNX file has them.

    Raises:
        QuantizationError: an ONNX file has an operator that torch is not told how to run.
        ModelError: an ONNX file takes more than one float input.
    """
    if not models.is_onnx(str(reference)):
        known = settings or ModelSettings(name=str(reference))
        return models.load_for(
            0, known.name, known.weights, known.num_classes, options=known.options
        )
    model = prepare(read_onnx(reference), str(reference), fold=False)
    kinds = [value.type.tensor_type.elem_type for value in model.graph.input]
    if kinds != [TensorProto.FLOAT]:
        shown = ", ".join(TensorProto.DataType.Name(kind).lower() for kind in kinds)
        raise ModelError(
            f"takes {len(kinds)} inputs ({shown}); synthetic images are made for one of floats",
            where=str(reference),
            fix="Calibrate on images: --data images:FOLDER",
        )
    return OnnxNetwork(model)


def build_original(recipe: Recipe, dataset: Dataset, task: Task) -> nn.Module:
    """Return the network that ``recipe`` names, tried on one image.

    Raises:
        ModelError: it does not take the images, or does not answer as the task needs.
    """
    model = load_original(recipe, dataset)
    shape = models.check_forward(model, dataset.example)
    if task.tells_classes and len(shape) == 2 and shape[0] == len(dataset.example):
        models.check_classes(model, dataset.example, len(dataset.classes))
    else:
        evaluate.check_task(model, task, dataset)
    return model


def load_teacher(settings: DistillSettings, dataset: Dataset) -> nn.Module | str | None:
    """Return the teacher that is named, a network or the path of an ONNX file; None if none is."""
    if settings.teacher is None or models.is_onnx(settings.teacher):
        return settings.teacher
    return models.load_for(
        len(dataset.classes),
        settings.teacher,
        settings.teacher_weights,
        settings.teacher_num_classes,
    )


def prepared(recipe: Recipe) -> tuple[Dataset, Task]:
    """Return the images of ``recipe`` as its network takes them, and what the network is for.

    Of the test images those stay that the recipe asks for, from all over the set: it may be sorted
    by class, or by where the pictures were taken.

    Raises:
        CompressError: the images cannot be read, or the recipe contradicts them or the file.
    """
    dataset, task = _prepared(recipe)
    count = recipe.measure.test_images or len(dataset.splits["test"])
    if dataset.target == "none":
        count = min(count, UNLABELLED_IMAGES)
    return dataset.with_fewer("test", count), task


def _prepared(recipe: Recipe) -> tuple[Dataset, Task]:
    """Return the images with all those of the test, and what the network is for.

    What the recipe leaves open of an ONNX file's or a stage's input, the file says. An ONNX file
    that does not name one of the data's classes is compared by its outputs.
    """
    reference = recipe.model.name
    source = Path(reference) if models.is_onnx(reference) else models.model_folder(Path(reference))
    settings = recipe.data if source is None else completed(recipe.data, [source])
    size, readable = recipe.model.input_size, plugins.options("data", settings.name)
    if size is not None and settings.image_size is None and "image_size" in readable:
        settings = settings.model_copy(update={"image_size": size[1:]})
    is_told = settings.mean or settings.std or settings.input_range is not None
    if source is None and takes_unit_range(reference) and not is_told:
        settings = settings.model_copy(update={"mean": (0.0,), "std": (1.0,)})  # left in [0, 1]
    dataset = load_data(settings, recipe.seed, partial(as_torch, reference, recipe.model))
    if source is not None or dataset.target == "none":
        dataset = dataclasses.replace(dataset, assumed=_assumed(settings, dataset))
    if source is None or source.is_dir():
        return dataset, task_of(recipe, dataset)
    shapes = shapes_answered(source, dataset)
    has_scores = len(shapes[0]) == 2
    if dataset.target != "class" or recipe.task is not None or has_scores:
        return dataset, task_of(recipe, dataset)
    reason = f"the network answers an image with {_shown(shapes)}, and not with scores of classes"
    logger.warning("%s: outputs are compared with those of the original", reason)
    dataset = dataclasses.replace(dataset, target="none", classes=())
    return dataset, task_of(recipe, dataset, reason)


def _assumed(settings: DataSettings, dataset: Dataset) -> str:
    """Return which common habits are taken for the network's; empty where all was said."""
    if not dataset.fit or dataset.prepared or dataset.note:
        return ""
    found = []
    is_told = settings.mean is not None or settings.input_range is not None
    if dataset.mean in (IMAGENET_MEAN, GREY_MEAN) and not is_told:
        mean, std = (", ".join(f"{v:g}" for v in each) for each in (dataset.mean, dataset.std))
        color = dataset.color if len(dataset.mean) > 1 else "grey"
        how = _settable("mean", "std", "input_range", "color")
        found.append(f"{color} in 0..1 less {mean}, over {std} ({how})")
    if settings.image_size is None:
        height, width = dataset.example.shape[2:]
        found.append(f"{height} x {width} pixels ({_settable('image_size')})")
    return " and ".join(found)


def _settable(*keys: str) -> str:
    """Return how settings of the images are called in a recipe, and on the command line."""
    own = (f"data.{key}" for key in keys), (f"--{key.replace('_', '-')}" for key in keys)
    recipe, command = (" and ".join(", ".join(names).rsplit(", ", 1)) for names in own)
    return f"{recipe} of a recipe; {command}"


def _shown(shapes: Sequence[tuple[int, ...]]) -> str:
    texts = ["x".join(map(str, shape)) or "a number" for shape in shapes]
    return f"{len(texts)} outputs ({', '.join(texts[:4])})" if len(texts) > 1 else texts[0]


def task_of(recipe: Recipe, dataset: Dataset, unlabelled: str | None = None) -> Task:
    """Return the task that ``recipe`` names, or the one that its data is made for.

    Raises:
        RecipeError: the data has other labels than the task needs, or the recipe asks for what only
            classifiers have; every problem is one line of the message.
    """
    default = default_task(dataset.target)
    reference = recipe.task or default
    task = load_task(reference, classes=dataset.classes)
    if unlabelled is not None:
        task = load_task({default: {"reason": unlabelled}}, classes=dataset.classes)
    elif dataset.target == "none" and task.kinds:  # its predictions are compared all the same
        task = load_task({default: {"of": reference}}, classes=dataset.classes)
    problems = list(_problems(recipe, dataset, task))
    if problems:
        raise RecipeError("\n".join(problems))
    return task


def _problems(recipe: Recipe, dataset: Dataset, task: Task) -> Iterator[str]:
    if dataset.target != task.target:
        yield (
            f"task: needs labels of the form {task.target!r}; data {dataset.name!r} has "
            f"{dataset.target!r}. Use data with {task.target!r}, or set task: "
            f"{default_task(dataset.target)}."
        )
    if not task.tells_classes:
        yield from _only_for_classes(recipe, task)
    if not task.kinds:
        yield from _only_with_labels(recipe, task)
    if recipe.gates.agreement_pct is not None and task.agreement_unit != "pct":
        yield (
            f"gates.agreement_pct: this task tells how alike predictions are in "
            f"{task.agreement_unit}, not in percent. {_limit(task)}"
        )
    yield from _too_few_images(recipe, dataset)


def _too_few_images(recipe: Recipe, dataset: Dataset) -> Iterator[str]:
    """Yield each quantization that the data has too few calibration images for."""
    count = len(dataset.splits.get("calibration", ()))
    for place, stage in recipe.placed_stages():
        own = stage.quantize is not None and stage.quantize.data is None
        if own and count < FEWEST_CALIBRATION:
            yield (
                f"{place}: data {dataset.name!r} has {count} calibration images. "
                f"Expected at least {FEWEST_CALIBRATION}; some hundreds are better. Give more "
                "images, or others to calibrate on: quantize: {data: images:FOLDER}."
            )


def _only_for_classes(recipe: Recipe, task: Task) -> Iterator[str]:
    """Yield what the recipe asks for that only classifiers have."""
    drop = _limit(task)
    if not task.kinds:
        drop = "It would be measured on labels: the images have no labels."
    for name in ("top1_drop_pct", "worst_class_drop_pct"):
        if getattr(recipe.gates, name) is not None:
            yield f"gates.{name}: this task does not name one class an image. {drop}"
    for place, stage in recipe.placed_stages():
        if stage.distill is not None:
            yield from _distillation(stage.distill, task, place)
        if stage.quantize is not None and stage.quantize.max_drop_pct is not None:
            yield (
                f"{place}.max_drop_pct: this task does not name one class an image. "
                f"{drop.replace('gates.metric_drop', 'max_drop')}"
            )
    if recipe.measure.explain_images:
        yield "measure.explain_images: needs one class an image."


def _limit(task: Task) -> str:
    """Return which gate fits a task, in words."""
    if task.kinds:
        return f"Use gates.metric_drop, in the unit of {primary_of(task).called}."
    if task.agreement_unit == "pct":
        return "Use gates.agreement_pct."
    return "Leave it out: the report tells it."


def _only_with_labels(recipe: Recipe, task: Task) -> Iterator[str]:
    """Yield what the recipe asks for that nothing but labels can tell."""
    if any(
        settings is not None and (settings.augment.mixup or settings.augment.cutmix)
        for settings in (stage.distill for stage in recipe.stages)
    ):
        yield "augment: mixup and cutmix mix labels, and the images have none."
    if recipe.gates.metric_drop is not None:
        yield f"gates.metric_drop: the images have no labels. {_limit(task)}"
    for place, stage in recipe.placed_stages():
        if stage.verb in ("train", "finetune"):
            yield f"{place}: the images have no labels to learn. Learn from a teacher: distill."
        if stage.quantize is not None and stage.quantize.max_drop is not None:
            yield f"{place}.max_drop: the images have no labels to measure it on."
    if recipe.measure.sensitivity:
        yield "measure.sensitivity: the images have no labels to judge cuts by."


def _distillation(settings: DistillSettings, task: Task, place: str) -> Iterator[str]:
    if settings.control:
        yield f"{place}.control: needs one class an image."
    for each in losses_of(settings, task):
        try:
            check_loss(each, task)
        except CompressError as error:
            yield f"{place}.losses: {error}"
