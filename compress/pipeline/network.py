"""The network that a recipe names: built, with its weights, and tried on one image of its data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from onnx import TensorProto
from torch import nn

from compress import evaluate, models, progress
from compress.data import Dataset
from compress.errors import CompressError, ModelError
from compress.evaluate.feeding import Fed
from compress.graph.preprocess import prepare, read_onnx
from compress.modules.detectors import size_inside
from compress.pipeline import cautions
from compress.quantize.qat.network import OnnxNetwork
from compress.recipe.settings import ModelSettings, Recipe
from compress.runtimes import open_session
from compress.tasks import Task
from compress.train.optimizers import check_layer

LAYER_KEYS = ("freeze_until", "layer_lr", "exclude")  # settings that name layers of the network


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


def problems(recipe: Recipe, dataset: Dataset, task: Task) -> Iterator[str]:
    """Yield what is wrong with the network of ``recipe``, tried on one image of its data."""
    try:
        if models.is_onnx(recipe.model.name):
            _try_onnx(recipe, dataset, task)
            return
        model = build_original(recipe, dataset, task)
    except CompressError as error:
        yield f"model: {error}"
        return
    for line in cautions.of_size(dataset, size_inside(model, dataset.example)):
        progress.warn(line)  # before anything that takes long
    for key, name in _layers_named(recipe):
        try:
            check_layer(model, name, key)
        except CompressError as error:
            yield str(error)


def _layers_named(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield the keys that name layers of the network, with each name."""
    for place, part in recipe.parts():
        for key in () if hasattr(part, "observer") else LAYER_KEYS:  # whose names are ONNX nodes
            value = getattr(part, key, None)
            for name in [value] if isinstance(value, str) else value or ():
                yield f"{place}.{key}", name


def _try_onnx(recipe: Recipe, dataset: Dataset, task: Task) -> None:
    """Run an ONNX file on one image, as the stages after it would."""
    with open_session(Path(recipe.model.name)) as session:
        fed, one = Fed(session, dataset), dataset.pictures("test", 1, 1)
        if not task.tells_classes:
            evaluate.check_task(fed, task, dataset, images=1)
            return
        found = evaluate.predict(fed, one).logits.shape[1]
    if found != len(dataset.classes):
        raise ModelError(
            f"has {found} class outputs, the data has {len(dataset.classes)}",
            where=recipe.model.name,
            expected="a network that was trained for the classes of the data",
        )
