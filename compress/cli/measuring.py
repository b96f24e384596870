"""Commands that measure: bench, compare, sensitivity, report and verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.artifact import scratch
from compress.cli.arguments import (
    Classes,
    Data,
    Experiment,
    FileInput,
    Json,
    Model,
    Pixels,
    TaskName,
    Threads,
    Trust,
    Verbose,
    Weights,
    no_folder,
    with_options,
)
from compress.cli.options import Given, integers, load_dataset, pictures_to_time, recipe_of
from compress.cli.output import GATE_FAILED, print_result, write_numbers
from compress.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from compress.data import Dataset
    from compress.recipe.settings import Recipe
    from compress.tasks import Task

SENSITIVITY_IMAGES = 1000


@with_options(Pixels, FileInput)
def bench(
    ctx: typer.Context,
    artifacts: Annotated[
        list[Path], typer.Argument(help="ONNX files, engines, stage folders, runs")
    ],
    runtime: Annotated[
        list[str] | None, typer.Option(help="Runtime of ONNX files; onnxruntime if absent")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes: 1,8")] = "1",
    data: Annotated[
        str | None,
        typer.Option(help="Images (KIND:PLACE) to measure accuracy on; latency alone if absent"),
    ] = None,
    threads: Threads = None,
    json: Json = None,
    trust: Trust = False,
) -> None:
    """Benchmark artifacts side by side, in interleaved rounds."""
    from compress import plugins
    from compress.measure.benchmark import bench_artifacts

    given = ctx.params
    found = bench_artifacts(
        artifacts,
        runtimes=[plugins.reference(each) for each in runtime or ()],
        batches=integers(batch, "--batch", like="batch sizes: 1,8"),
        threads=threads,
        dataset=load_dataset(given, artifacts) if data else pictures_to_time(given, artifacts),
        judged=data is not None,
    )
    write_numbers(json, found.to_json())
    print_result(found.table())


@with_options(Pixels, FileInput)
def compare(
    ctx: typer.Context,
    reference: Annotated[str, typer.Argument(help="ONNX file, engine, stage folder or run")],
    candidate: Annotated[str, typer.Argument(help="ONNX file, engine, stage folder or run")],
    data: Data,
    task: TaskName = None,
    bisect: Annotated[bool, typer.Option(help="Find the first tensor that differs")] = False,
    json: Json = None,
    trust: Trust = False,
) -> None:
    """Compare the predictions of two artifacts on real images."""
    from compress.measure.compare import compare_artifacts

    given = ctx.params
    old, new = Path(reference), Path(candidate)
    found = compare_artifacts(
        old, new, load_dataset(given, [old, new], any_labels=True), task=task, bisect=bisect
    )
    write_numbers(json, found.to_json())
    print_result(found.table())


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
        Path | None,
        typer.Option(
            "--out", callback=no_folder, help="Plot to write, .png or .svg; none if absent"
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Measure how much accuracy each layer loses when pruned or quantized."""
    from compress.pipeline.task import prepared

    if out is not None and out.suffix not in (".png", ".svg"):
        raise UsageError(f"--out {out}", expected="a name that ends in .png or .svg")

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
    from compress.pipeline.measure import cut_alone
    from compress.pipeline.task import build_original
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
    from compress.pipeline.task import build_original

    if is_onnx(recipe.model.name):
        return Path(recipe.model.name)
    model = build_original(recipe, dataset, task)
    read = None if task.tells_classes else task.read_outputs(returned(model, dataset.example))
    return export_onnx(model, dataset.example, folder / "model.onnx", outputs=read)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the comparison; one run's own folder if absent"),
    ] = None,
    force: Annotated[
        bool, typer.Option(help="Compare runs of different data or devices as well")
    ] = False,
    track: Annotated[
        str | None, typer.Option(help="Log each run to tensorboard or mlflow as well")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Write the report of a run again, or one comparison of several runs."""
    from rich.console import Group
    from rich.text import Text

    from compress import report as reports
    from compress.report.tracking import tracker

    log = tracker(track) if track else None
    if len(runs) == 1:
        folder = out or runs[0]
        written = reports.write(reports.read_run(runs[0]), folder)
        shown = reports.summary(written, folder, verbose=verbose, run=runs[0])
    elif out is None:
        raise UsageError("several runs need a folder for their comparison", fix="Give --out DIR")
    else:
        shown = reports.compare_runs(runs, out, force=force)
    logged = [Text(log(reports.read_run(run), run)) for run in runs] if log is not None else []
    print_result(Group(shown, *logged))


def verify(
    run: Annotated[Path, typer.Argument(help="Run folder")],
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure accuracy and latency again as well")
    ] = False,
    json: Json = None,
    trust: Trust = False,
) -> None:
    """Check every file of a run against its recorded hash."""
    from rich.console import Group
    from rich.text import Text

    from compress.pipeline.verify import verify_files

    found = verify_files(run)
    numbers, holds = found.to_json(), found.intact
    lines = [str(finding) for finding in found.findings]
    problems = f"{len(lines)} problem{'' if len(lines) == 1 else 's'}"
    lines.append(f"{len(found.files)} files checked, {problems}")
    parts: list[RenderableType] = [Text("\n".join(lines))]
    if measure and found.intact:
        from compress.pipeline.verify import measure_again

        again = measure_again(run)
        numbers["measured_again"] = again.to_json()
        parts.append(again.table())
        holds = again.holds
    elif measure:
        parts.append(Text("not measured again: these are no longer the files of the report"))
    write_numbers(json, numbers)
    print_result(Group(*parts))
    raise typer.Exit(0 if holds else GATE_FAILED)
