"""Commands that measure: bench, compare, report and verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli.arguments import (
    Data,
    FileInput,
    Json,
    Pixels,
    TaskName,
    Threads,
    Trust,
    Verbose,
    with_options,
)
from compress.cli.exits import GATE_FAILED
from compress.cli.options import integers, load_dataset
from compress.cli.output import print_result, write_numbers
from compress.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType


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
        str | None, typer.Option(help="DATA, to measure accuracy as well; latency alone if absent")
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
        dataset=load_dataset(given, artifacts) if data else None,
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
        old,
        new,
        load_dataset(given, [old, new], any_labels=True),
        task=task,
        bisect=bisect,
    )
    write_numbers(json, found.to_json())
    print_result(found.table())


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
