"""The command ``sensitivity``: how much accuracy each layer loses when pruned or quantized."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.artifact import scratch
from compress.cli.arguments import (
    Classes,
    Data,
    Experiment,
    Json,
    Model,
    Pixels,
    Weights,
    with_options,
)
from compress.cli.options import Given
from compress.cli.output import print_result, write_numbers
from compress.cli.recipes import recipe_of
from compress.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from compress.data import Dataset
    from compress.recipe.settings import Recipe
    from compress.tasks import Task

SENSITIVITY_IMAGES = 1000


@with_options(Pixels, Experiment)
def sensitivity(
    ctx: typer.Context,
    model: Model,
    data: Data,
    prune: Annotated[
        bool, typer.Option("--prune", help="Prune one group of layers at a time")
    ] = False,
    quantize: Annotated[
        bool, typer.Option("--quantize", help="Quantize one layer at a time")
    ] = False,
    target: Annotated[str, typer.Option(help="Target runtime of --quantize")] = "onnxruntime",
    weights: Weights = None,
    num_classes: Classes = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Plot to write, .png or .svg; none if absent")
    ] = None,
    json: Json = None,
) -> None:
    """Measure how much accuracy each layer loses when pruned or quantized."""
    from compress.pipeline.task import prepared

    if prune == quantize:
        raise UsageError("nothing says what to measure", expected="one of --prune and --quantize")
    given = ctx.params
    recipe = recipe_of("sensitivity", given, [])
    dataset, judge = prepared(recipe)
    if not judge.kinds or not len(dataset.splits["validation"]):
        raise UsageError(
            f"--data {data}: the images have no labels to judge by"
            if not judge.kinds
            else f"--data {data}: holds no validation images",
            expected="labelled images, some of them held back: data.validation",
        )
    print_result((_quantized if quantize else _pruned)(given, recipe, dataset, judge))


def _pruned(given: Given, recipe: Recipe, dataset: Dataset, task: Task) -> RenderableType:
    from compress.pipeline.network import build_original
    from compress.pipeline.sensitivity_chart import cut_alone
    from compress.prune.sensitivity import plot_sensitivity
    from compress.terminal import table

    found = cut_alone(build_original(recipe, dataset, task), dataset, task)
    write_numbers(given["json"], found.to_json())
    if given["out"] is not None:
        plot_sensitivity(found, given["out"])
    title = f"{found.metric.title} on validation images, of {found.baseline:.2f} uncut"
    shares = [f"keep {point.keep_channels:g}" for point in found.curves[0].points]
    rows = [(c.group, *(f"{point.value:.2f}" for point in c.points)) for c in found.curves]
    return table(("layer", *shares), rows, title=title, numbers=shares)


def _quantized(given: Given, recipe: Recipe, dataset: Dataset, task: Task) -> RenderableType:

    from compress.pipeline.stages.quantize import calibration_batches
    from compress.qdq import read_onnx
    from compress.quantize import quantize_onnx
    from compress.quantize.sensitivity import plot_quantize_sensitivity, quantize_sensitivity
    from compress.terminal import table

    with scratch() as folder:
        path = _float_graph(recipe, dataset, task, folder)
        images = calibration_batches(path, dataset)
        plan = quantize_onnx(path, images, folder / "int8.onnx", given["target"])
        labelled = dataset.with_fewer("validation", SENSITIVITY_IMAGES).batches("validation", 64)
        found = quantize_sensitivity(read_onnx(path), plan, labelled, task=task)
    write_numbers(given["json"], found.to_json())
    if given["out"] is not None:
        plot_quantize_sensitivity(found, given["out"])
    title = (
        f"one layer in int8 at a time, worst first; all of them: {found.int8_sqnr_db:.1f} dB, "
        f"{found.metric.title}: {found.int8_value:.2f} of {found.float_value:.2f}"
    )
    lost = f"{found.metric.title.partition(',')[0]} lost"
    numbers = ("SQNR dB", "weight", "input", lost, "clipped %")
    rows = [
        (
            layer.node,
            f"{layer.sqnr_db:.1f}",
            f"{layer.sqnr_weight_db:.1f}",
            f"{layer.sqnr_activation_db:.1f}",
            f"{layer.drop:.2f}",
            f"{layer.saturation_pct:.2f}",
            layer.diagnosis,
        )
        for layer in found.worst_first()
    ]
    return table(("layer", *numbers, "diagnosis"), rows, title=title, numbers=numbers)


def _float_graph(recipe: Recipe, dataset: Dataset, task: Task, folder: Path) -> Path:
    """Return the fp32 ONNX file of the model: itself, or its export in ``folder``."""
    from compress.export import export_onnx
    from compress.models import is_onnx
    from compress.modules.outputs import returned
    from compress.pipeline.network import build_original

    if is_onnx(recipe.model.name):
        return Path(recipe.model.name)
    model = build_original(recipe, dataset, task)
    read = None if task.tells_classes else task.read_outputs(returned(model, dataset.example))
    return export_onnx(model, dataset.example, folder / "model.onnx", outputs=read)
