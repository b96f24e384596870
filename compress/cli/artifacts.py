"""Commands about files: write, build, measure, compare, mend, check and pack them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compress.artifact import scratch
from compress.cli.options import (
    INPUT_SIZE,
    Given,
    data_settings,
    integers,
    load_dataset,
    write_numbers,
)
from compress.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

BATCH_RANGE = "3 whole numbers, the smallest, usual and largest batch: 1,1,8"


def export(given: Given) -> str:
    """Write a network as ONNX and say what was written."""
    import torch

    from compress.evaluate.feeding import carried
    from compress.export import export_onnx
    from compress.graph.nms import Nms
    from compress.measure import count, count_onnx, size_mib
    from compress.models import check_forward, load_model, model_folder

    options = {"trust": True} if given["trust"] else {}
    model = load_model(given["model"], given["weights"], given["num_classes"], options=options)
    size = integers(given["input_size"], "--input-size", count=3, like=INPUT_SIZE)
    example = torch.zeros(1, *size)
    check_forward(model, example)
    folder = model_folder(Path(given["model"]))
    path = export_onnx(
        model,
        example,
        given["out"],
        opset=given["opset"],
        softmax=given["softmax"],
        nms=Nms() if given["nms"] else None,
        dynamic_batch=not given["fixed_batch"],
        dynamic_size=given["dynamic_size"],
        outputs=given["outputs"].split(",") if given["outputs"] else None,
        metadata=carried(folder) if folder is not None else None,
    )
    work = count(model, example) if given["dynamic_size"] else count_onnx(path)
    return (
        f"{path}: {work.params:,} parameters, {work.macs:,} MACs, {size_mib(path):.2f} MiB; "
        f"equal to torch"
    )


def build(given: Given) -> str:
    """Build an engine and say what was built."""
    from compress import plugins
    from compress.measure import size_mib
    from compress.report.run_folder import one_artifact
    from compress.runtimes import build_engine

    smallest, usual, largest = integers(given["batch"], "--batch", count=3, like=BATCH_RANGE)
    with _fixed(one_artifact(given["file"]), _sizes(given)) as source:
        path = build_engine(
            source,
            given["out"],
            runtime=plugins.reference(given["runtime"]),
            batch=(smallest, usual, largest),
            precision=given["precision"],
        )
    return f"{path}: engine for {given['runtime']}, {size_mib(path):.2f} MiB"


def split(given: Given) -> RenderableType:
    """Split an ONNX file in two and return what each cut costs."""
    from compress.pipeline.split import split_onnx
    from compress.pipeline.split.chart import split_table
    from compress.report.run_folder import one_artifact

    options = ("at", "link_mbps", "edge_slowdown", "int8", "runtime", "threads")
    with _fixed(one_artifact(given["file"]), _sizes(given)) as source:
        found = split_onnx(source, given["out"], **{name: given[name] for name in options})
    write_numbers(given["json"], found.to_json())
    return split_table(found)


def _sizes(given: Given) -> list[int] | None:
    """Return the channels, height and width of ``--input-size``, if it is given."""
    text = given["input_size"]
    return text and integers(text, "--input-size", count=3, like=INPUT_SIZE)


@contextlib.contextmanager
def _fixed(source: Path, sizes: list[int] | None) -> Iterator[Path]:
    """Yield the file, or a copy whose free sizes are fixed."""
    from compress.graph import files

    if not sizes:
        yield source
        return
    with scratch() as folder:
        copied = folder / source.name
        files.copy(source, copied, facts={}, sizes=(sizes[0], sizes[1], sizes[2]))
        yield copied


def bench(given: Given) -> RenderableType:
    """Measure artifacts side by side."""
    from compress import plugins
    from compress.measure.benchmark import bench_artifacts

    found = bench_artifacts(
        given["artifacts"],
        runtimes=[plugins.reference(each) for each in given["runtime"] or ()],
        batches=integers(given["batch"], "--batch", like="batch sizes: 1,8"),
        threads=given["threads"],
        dataset=load_dataset(given, given["artifacts"], labelled=False) if given["data"] else None,
    )
    write_numbers(given["json"], found.to_json())
    return found.table()


def compare(given: Given) -> RenderableType:
    """Compare two artifacts on real images."""
    from compress.measure.compare import compare_artifacts

    old, new = Path(given["reference"]), Path(given["candidate"])
    found = compare_artifacts(
        old,
        new,
        load_dataset(given, [old, new], labelled=False),
        bisect=given["bisect"],
    )
    write_numbers(given["json"], found.to_json())
    return found.table()


def predict(given: Given) -> RenderableType:
    """Answer pictures and return what was answered."""
    from compress.pipeline.predict import predict_pictures

    found = predict_pictures(
        given["artifact"],
        given["images"],
        data_settings({**given, "data": "images"}),
        task=given["task"],
        runtime=given["runtime"],
        threads=given["threads"],
        out=given["out"],
    )
    write_numbers(given["json"], found.to_json())
    return found.table()


def lint(given: Given) -> tuple[RenderableType, bool]:
    """Return what an int8 graph suffers from, and whether anything is left that it does.

    With ``--fix`` the mended file is written and what is left in it is returned.
    """
    from compress.qdq.lint import fix_onnx, lint_onnx
    from compress.report.run_folder import one_artifact
    from compress.terminal import table

    file = one_artifact(given["file"])
    findings = lint_onnx(file, given["target"])
    if given["fix"]:
        if given["out"] is None:
            raise UsageError("--fix needs a file to write", fix="Give --out FILE")
        findings = fix_onnx(file, given["out"], given["target"])
    elif given["out"] is not None:
        raise UsageError("--out without --fix would write nothing", fix="Give --fix as well")
    write_numbers(given["json"], [finding.to_json() for finding in findings])
    title = f"{len(findings)} findings for {given['target']}"
    if given["fix"]:
        title += f" left in {given['out']}"
    rows = [(f.rule, f.node, f.message, "yes" if f.fixable else "") for f in findings]
    headers = ("rule", "node", "what it costs", "fixable")
    return table(headers, rows, title=title), bool(findings)


def report(
    runs: Sequence[Path], out: Path | None, *, force: bool, track: str | None
) -> RenderableType:
    """Write the report of one run again, or one comparison of several; log each run if asked."""
    from rich.console import Group
    from rich.text import Text

    from compress import report as reports
    from compress.report.tracking import tracker

    log = tracker(track) if track else None
    if len(runs) == 1:
        folder = out or runs[0]
        shown = reports.summary(reports.write(reports.read_run(runs[0]), folder), folder)
    elif out is None:
        raise UsageError("several runs need a folder for their comparison", fix="Give --out DIR")
    else:
        shown = reports.compare_runs(runs, out, force=force)
    if log is None:
        return shown
    return Group(shown, *(Text(log(reports.read_run(run), run)) for run in runs))


def verify(run: Path, json: Path | None, *, measure: bool) -> tuple[RenderableType, bool]:
    """Return whether a run is what its record says, as text and as a claim.

    With ``measure`` its figures are taken again, unless its files are no longer those measured.
    """
    from rich.console import Group
    from rich.text import Text

    from compress.pipeline.verify import verify as verified

    found = verified(run)
    numbers, holds = found.to_json(), found.intact
    lines = [str(finding) for finding in found.findings]
    problems = f"{len(lines)} problem{'' if len(lines) == 1 else 's'}"
    lines.append(f"{len(found.files)} files checked, {problems}")
    parts: list[RenderableType] = [Text("\n".join(lines))]
    if measure and found.intact:
        from compress.pipeline.remeasure import measure_again

        again = measure_again(run)
        numbers["measured_again"] = again.to_json()
        parts.append(again.table())
        holds = again.holds
    elif measure:
        parts.append(Text("not measured again: these are no longer the files of the report"))
    write_numbers(json, numbers)
    return Group(*parts), holds


def bundle(run: Path, out: Path) -> str:
    """Pack a run for a device and say what was written."""
    from compress.pipeline.bundle import write_bundle

    return f"{write_bundle(run, out)}: unpack it on the device and run python3 run.py"
