"""Commands about files: export, build, predict, lint, split and pack them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from compress.artifact import scratch
from compress.cli.arguments import (
    FileInput,
    FixedSize,
    Json,
    Model,
    Pixels,
    Precision,
    Threads,
    Trust,
    Weights,
    chosen_from,
    with_options,
)
from compress.cli.options import INPUT_SIZE, data_settings, integers, model_options
from compress.cli.output import GATE_FAILED, print_result, write_numbers
from compress.errors import UsageError

BATCH_RANGE = "3 whole numbers, the smallest, usual and largest batch: 1,1,8"


def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="ONNX file to write")],
    weights: Weights = None,
    num_classes: Annotated[
        int | None,
        typer.Option("--num-classes", help="Outputs of the classifier; its own if absent"),
    ] = None,
    input_size: Annotated[
        str | None, typer.Option(help="C,H,W; a run's own, else 3,224,224, if absent")
    ] = None,
    opset: Annotated[
        int | None, typer.Option(help="ONNX operator set; 20 if absent, which every runtime reads")
    ] = None,
    softmax: Annotated[bool, typer.Option(help="Return probabilities")] = False,
    nms: Annotated[bool, typer.Option("--nms", help="Return a detector's boxes after NMS")] = False,
    fixed_batch: Annotated[
        bool, typer.Option("--fixed-batch/--dynamic-batch", help="Batch of 1, or any")
    ] = False,
    dynamic_size: Annotated[
        bool,
        typer.Option("--dynamic-size/--fixed-size", help="Any height and width, or --input-size"),
    ] = False,
    outputs: Annotated[
        str | None,
        typer.Option(help="Outputs of the file, by index or name: 0,1.boxes; all if absent"),
    ] = None,
    trust: Trust = False,
) -> None:
    """Export a network to ONNX, checked against PyTorch."""
    import torch

    from compress.evaluate.feeding import carried
    from compress.export import export_onnx
    from compress.graph.ends import Nms
    from compress.measure import count_module, count_onnx, size_mib
    from compress.models import check_forward, load_model, model_folder

    options = model_options(model, trust=trust)
    network = load_model(model, weights, num_classes, options=options)
    folder = model_folder(Path(model))
    example = torch.zeros(1, *_input_size(input_size, folder))
    if out.suffix != ".onnx":
        raise UsageError(f"--out {out}", expected="a name that ends in .onnx")
    check_forward(network, example)
    path = export_onnx(
        network,
        example,
        out,
        opset=opset,
        softmax=softmax,
        nms=Nms() if nms else None,
        dynamic_batch=not fixed_batch,
        dynamic_size=dynamic_size,
        outputs=outputs.split(",") if outputs else None,
        metadata=carried(folder) if folder is not None else None,
    )
    work = count_module(network, example) if dynamic_size else count_onnx(path)
    print_result(
        f"{path}: {work.params:,} parameters, {work.macs:,} MACs, {size_mib(path):.2f} MiB; "
        f"equal to torch"
    )


def _input_size(given: str | None, folder: Path | None) -> list[int]:
    """Return channels, height and width: as given, or those of the run the network is from."""
    from compress.evaluate.feeding import artifact_facts

    if given is not None:
        return integers(given, "--input-size", count=3, like=INPUT_SIZE)
    facts = artifact_facts(folder) if folder is not None else {}
    return [facts.get("channels", 3), *facts.get("image_size", (224, 224))]


def build(
    file: Annotated[Path, typer.Argument(help="ONNX file, or the stage folder or run of one")],
    runtime: Annotated[str, chosen_from("runtimes", "See: compress list runtimes")],
    out: Annotated[Path, typer.Option("--out", help="Engine to write")],
    batch: Annotated[str, typer.Option(help="Smallest, usual and largest batch size")] = "1,1,8",
    input_size: FixedSize = None,
    precision: Precision = None,
) -> None:
    """Build an engine from an ONNX file."""
    from compress import plugins
    from compress.measure import size_mib
    from compress.report.run_folder import one_graph
    from compress.runtimes import build_engine

    smallest, usual, largest = integers(batch, "--batch", count=3, like=BATCH_RANGE)
    with _fixed(one_graph(file), input_size) as source:
        path = build_engine(
            source,
            out,
            runtime=plugins.reference(runtime),
            batch=(smallest, usual, largest),
            precision=precision,
        )
    print_result(f"{path}: engine for {runtime}, {size_mib(path):.2f} MiB")


@with_options(Pixels, FileInput)
def predict(
    ctx: typer.Context,
    artifact: Annotated[
        Path, typer.Argument(help="ONNX file, engine, stage folder, run or saved network")
    ],
    images: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder for pictures with the predictions drawn; none if absent"
        ),
    ] = None,
    json: Json = None,
    task: Annotated[
        str | None,
        typer.Option("--task", help="See: compress list tasks; the artifact's if absent"),
    ] = None,
    runtime: Annotated[
        str | None,
        chosen_from("runtimes", "Where it runs; the engine's own, or onnxruntime, if absent"),
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(help="short side, squash or letterbox; as the artifact says if absent"),
    ] = None,
    interpolation: Annotated[
        str | None, typer.Option(help="bilinear, bicubic, ...; as the artifact says if absent")
    ] = None,
    crop: Annotated[
        float | None,
        typer.Option(help="Share of the resized picture; as the artifact says if absent"),
    ] = None,
    threads: Threads = None,
    trust: Trust = False,
) -> None:
    """Run pictures through an artifact, with its own preprocessing, and show the predictions."""
    from compress.pipeline.predict import predict_pictures

    given = ctx.params
    found = predict_pictures(
        artifact,
        images,
        data_settings({**given, "data": "images"}),
        task=task,
        runtime=runtime,
        threads=threads,
        out=out,
    )
    write_numbers(json, found.to_json())
    print_result(found.table())


def lint(
    file: Annotated[
        Path, typer.Argument(help="Int8 ONNX file (Q/DQ form), or the stage folder of one")
    ],
    target: Annotated[str, typer.Option(help="onnxruntime, openvino or tensorrt")],
    fix: Annotated[bool, typer.Option(help="Fix what can be fixed automatically")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Fixed file to write; needed with --fix")
    ] = None,
    json: Json = None,
) -> None:
    """Check an int8 ONNX file by a runtime's rules: what costs accuracy or speed; fix it."""
    from compress.qdq.lint import fix_onnx, lint_onnx
    from compress.report.run_folder import one_graph
    from compress.terminal import table

    source = one_graph(file)
    findings = lint_onnx(source, target)
    if fix:
        if out is None:
            raise UsageError("--fix needs a file to write", fix="Give --out FILE")
        findings = fix_onnx(source, out, target)
    elif out is not None:
        raise UsageError("--out without --fix would write nothing", fix="Give --fix as well")
    write_numbers(json, [finding.to_json() for finding in findings])
    title = f"{len(findings)} finding{'s' * (len(findings) != 1)} for {target}"
    if fix:
        title += f" left in {out}"
    rows = [(f.rule, f.node, f.message, "yes" if f.fixable else "") for f in findings]
    headers = ("rule", "node", "what it costs", "fixable")
    print_result(table(headers, rows, title=title))
    raise typer.Exit(GATE_FAILED if findings else 0)


def split(
    file: Annotated[Path, typer.Argument(help="ONNX file")],
    at: Annotated[str, typer.Option(help="Tensor to cut at, or auto: the fastest cut")],
    link_mbps: Annotated[float, typer.Option(help="Speed of the link, megabits a second")] = 10.0,
    edge_slowdown: Annotated[
        float, typer.Option(help="How many times slower than this machine the edge is")
    ] = 1.0,
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantize float tensors at the cut to 8 bits")
    ] = False,
    runtime: Annotated[
        str, typer.Option(help="Runtime that both parts are timed on")
    ] = "onnxruntime",
    threads: Threads = None,
    input_size: FixedSize = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of both parts")] = Path("runs/split"),
    json: Json = None,
) -> None:
    """Split an ONNX file into a head for the edge and a tail for the server, and time both."""
    from compress.pipeline.split import split_onnx, split_table
    from compress.report.run_folder import one_graph

    with _fixed(one_graph(file), input_size) as source:
        found = split_onnx(
            source,
            out,
            at=at,
            link_mbps=link_mbps,
            edge_slowdown=edge_slowdown,
            int8=int8,
            runtime=runtime,
            threads=threads,
        )
    write_numbers(json, found.to_json())
    print_result(split_table(found))


@contextlib.contextmanager
def _fixed(source: Path, input_size: str | None) -> Iterator[Path]:
    """Yield the file, or a copy whose free sizes are fixed."""
    from compress.graph import files

    if not input_size:
        yield source
        return
    sizes = integers(input_size, "--input-size", count=3, like=INPUT_SIZE)
    with scratch() as folder:
        copied = folder / source.name
        files.copy(source, copied, facts={}, sizes=(sizes[0], sizes[1], sizes[2]))
        yield copied


def bundle(
    run: Annotated[Path, typer.Argument(help="Run folder")],
    out: Annotated[Path, typer.Option("--out", help="Archive to write, FILE.tar.gz")],
) -> None:
    """Pack what a device needs to build, check and measure engines, and to predict."""
    from compress.pipeline.bundle import write_bundle

    print_result(f"{write_bundle(run, out)}: unpack it on the device and run python3 run.py")
