"""The command ``sensitivity``: which layers cannot bear to be pruned or quantized."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compress.artifact import scratch
from compress.cli.options import Given, load_dataset, write_numbers

if TYPE_CHECKING:
    from rich.console import RenderableType

    from compress.data import Dataset

RECALIBRATION_BATCHES = 8  # of BatchNorm, after each cut that is judged
SENSITIVITY_IMAGES = 1000


def sensitivity(given: Given) -> RenderableType:
    """Show which layers cannot bear to be pruned or quantized."""
    dataset = load_dataset(given)
    if given["quantize"]:
        return _quantize_sensitivity(given, dataset)
    return _prune_sensitivity(given, dataset)


def _prune_sensitivity(given: Given, dataset: Dataset) -> RenderableType:
    import itertools

    from rich import box
    from rich.table import Table

    from compress.evaluate import predict
    from compress.models import check_classes, load_for
    from compress.prune.sensitivity import plot_sensitivity, prune_sensitivity

    classes = len(dataset.classes)
    model = load_for(classes, given["model"], given["weights"], given["num_classes"])
    check_classes(model, dataset.example, classes)
    found = prune_sensitivity(
        model,
        dataset.example,
        lambda cut: float(100 * predict(cut, dataset.batches("validation")).correct.mean()),
        recalibrate=list(itertools.islice(dataset.batches("train"), RECALIBRATION_BATCHES)),
    )
    write_numbers(given["json"], found.to_json())
    if given["out"] is not None:
        plot_sensitivity(found, given["out"])
    title = f"top-1 on validation images, %, of {found.baseline_top1_pct:.2f} uncut"
    shares = [point.keep_channels for point in found.curves[0].points]
    table = Table(
        "layer", *(f"keep {share:g}" for share in shares), title=title, box=box.SIMPLE_HEAD
    )
    for curve in found.curves:
        table.add_row(curve.group, *(f"{point.top1_pct:.2f}" for point in curve.points))
    return table


def _quantize_sensitivity(given: Given, dataset: Dataset) -> RenderableType:

    from rich import box
    from rich.table import Table

    from compress.qdq import read_onnx
    from compress.quantize import quantize_onnx
    from compress.quantize.sensitivity import plot_quantize_sensitivity, quantize_sensitivity

    with scratch() as folder:
        path = _float_graph(given, dataset, folder)
        images = [x.numpy() for x, _ in dataset.batches("calibration", 32)]
        plan = quantize_onnx(path, images, folder / "int8.onnx", given["target"])
        labelled = dataset.batches("validation", 64, SENSITIVITY_IMAGES)
        found = quantize_sensitivity(read_onnx(path), plan, labelled)
    write_numbers(given["json"], found.to_json())
    if given["out"] is not None:
        plot_quantize_sensitivity(found, given["out"])
    title = (
        f"one layer in int8 at a time, worst first; all of them: {found.int8_sqnr_db:.1f} dB, "
        f"top-1 {found.int8_top1_pct:.2f} % of {found.float_top1_pct:.2f} %"
    )
    columns = ("layer", "SQNR dB", "weight", "input", "top-1 lost", "clipped %", "diagnosis")
    table = Table(*columns, title=title, box=box.SIMPLE_HEAD)
    for layer in found.worst_first():
        decibels = (layer.sqnr_db, layer.sqnr_weight_db, layer.sqnr_activation_db)
        table.add_row(
            layer.node,
            *(f"{value:.1f}" for value in decibels),
            f"{layer.top1_drop_pct:.2f}",
            f"{layer.saturation_pct:.2f}",
            layer.diagnosis,
        )
    return table


def _float_graph(given: Given, dataset: Dataset, folder: Path) -> Path:
    """Return the fp32 ONNX file of MODEL: itself, or its export in ``folder``."""
    from compress.export import export_onnx
    from compress.models import check_classes, is_onnx, load_for

    if is_onnx(given["model"]):
        return Path(given["model"])
    classes = len(dataset.classes)
    model = load_for(classes, given["model"], given["weights"], given["num_classes"])
    check_classes(model, dataset.example, classes)
    return export_onnx(model, dataset.example, folder / "model.onnx")
