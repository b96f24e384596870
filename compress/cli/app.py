"""The command line: parse, call one function, print what it returns."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress import progress
from compress.cli import commands
from compress.cli.arguments import (
    After,
    BatchSize,
    Classes,
    Color,
    Data,
    Epochs,
    FixedSize,
    Fresh,
    ImageSize,
    Inputs,
    Json,
    Layout,
    Mean,
    Model,
    Out,
    Outputs,
    Precision,
    Range,
    Seed,
    Set,
    Std,
    TaskName,
    Threads,
    Track,
    Trust,
    Weights,
    Workers,
    kinds,
    names,
    shown,
)
from compress.cli.exits import GATE_FAILED, exit_code
from compress.errors import UsageError, printable
from compress.trust import allow, allow_all

if TYPE_CHECKING:
    from compress.cli.stages import Done

app = typer.Typer(
    help="Prune, distill and quantize trained CNNs, export them to engines, and prove it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def example(arguments: str) -> str:
    """Return what --help ends with: one command line, not wrapped."""
    return f"Example:\n\n\b\n  compress {arguments}"


def _version(asked: bool) -> None:
    """Print the version and stop, if asked to."""
    if asked:
        from compress import __version__

        _print(f"compress {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version")
    ] = False,
) -> None:
    """Prune, distill and quantize trained CNNs, export them to engines, and prove it."""


@app.command(epilog=example("run quickstart --out runs/first"))
def run(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="Recipe: a YAML file, or a name of compress list", autocompletion=names("recipes")
        ),
    ],
    out: Out = None,
    overrides: Set = None,
    fresh: Fresh = False,
    track: Track = None,
    dry_run: Annotated[bool, typer.Option(help="Print the resolved recipe and stop")] = False,
    trust: Trust = False,
) -> None:
    """Carry out a recipe: prune, distill, quantize, build, measure, report."""
    if dry_run:
        _print(commands.dry_run(recipe, overrides or [], track))
    else:
        _finish(commands.run(recipe, out, overrides or [], fresh=fresh, track=track))


@app.command(
    epilog=example(
        "train torchvision:resnet18 --num-classes 2 --data imagefolder:photos --batch-size 16"
    )
)
def train(
    ctx: typer.Context,
    model: Model,
    data: Data,
    weights: Weights = None,
    num_classes: Classes = None,
    epochs: Epochs = 10,
    out: Out = None,
    overrides: Set = None,
    track: Track = None,
    fresh: Fresh = False,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    task: TaskName = None,
    trust: Trust = False,
    seed: Seed = 0,
) -> None:
    """Train a network on labelled images."""
    _finish(commands.train(ctx.params))


@app.command(
    epilog=example(
        "prune net.py:Net --weights net.pt --data imagefolder:photos --keep-macs 0.5 --epochs 5"
    )
)
def prune(
    ctx: typer.Context,
    model: Model,
    data: Data,
    weights: Weights = None,
    num_classes: Classes = None,
    criterion: Annotated[
        str | None,
        typer.Option(
            help="See: compress list criteria; obs if absent", autocompletion=names("criteria")
        ),
    ] = None,
    keep_macs: Annotated[
        float | None, typer.Option(help="Share of the MACs to keep; 0.5 if no budget is given")
    ] = None,
    keep_params: Annotated[
        float | None, typer.Option(help="Share of the parameters to keep")
    ] = None,
    keep_channels: Annotated[
        str | None,
        typer.Option(help="Share of the channels to keep, or FILE of compress sensitivity"),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="With FILE: loss of the metric that one group may cost, in its unit; 1 if absent"
        ),
    ] = None,
    keep_latency: Annotated[
        float | None, typer.Option(help="Share of the latency on --runtime to keep")
    ] = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="Latency to reach on --runtime, ms")
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            help="Runtime that latency is measured on; onnxruntime if absent",
            autocompletion=names("runtimes"),
        ),
    ] = None,
    round_to: Annotated[
        int | None, typer.Option(help="Channels in multiples of this; 1 if absent")
    ] = None,
    epochs: After = None,
    teacher: Annotated[str | None, typer.Option(help="MODEL to learn from afterwards")] = None,
    out: Out = None,
    overrides: Set = None,
    track: Track = None,
    fresh: Fresh = False,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    task: TaskName = None,
    outputs: Outputs = None,
    trust: Trust = False,
    seed: Seed = 0,
) -> None:
    """Cut channels of a network to a budget, then train it a little if asked."""
    _finish(commands.prune(ctx.params))


@app.command(
    epilog=example("sparsify net.py:Net --weights net.pt --data imagefolder:photos --pattern 2:4")
)
def sparsify(
    ctx: typer.Context,
    model: Model,
    data: Data,
    weights: Weights = None,
    num_classes: Classes = None,
    keep_weights: Annotated[
        float | None,
        typer.Option(help="Share of the weights to keep; not with --pattern 2:4, which keeps half"),
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="unstructured or 2:4; unstructured if absent")
    ] = None,
    criterion: Annotated[
        str | None, typer.Option(help="l1, l2, lamp, taylor or random; l1 if absent")
    ] = None,
    epochs: After = None,
    teacher: Annotated[str | None, typer.Option(help="MODEL to learn from afterwards")] = None,
    out: Out = None,
    overrides: Set = None,
    track: Track = None,
    fresh: Fresh = False,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    task: TaskName = None,
    trust: Trust = False,
    seed: Seed = 0,
) -> None:
    """Zero single weights of a network, then train it a little if asked."""
    _finish(commands.sparsify(ctx.params))


@app.command(
    epilog=example("distill runs/prune --teacher runs/train --data imagefolder:photos --epochs 20")
)
def distill(
    ctx: typer.Context,
    student: Model,
    teacher: Annotated[str, typer.Option(help="MODEL to learn from")],
    data: Data,
    weights: Weights = None,
    teacher_weights: Weights = None,
    num_classes: Classes = None,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            help="See: compress list losses; the task's if absent", autocompletion=names("losses")
        ),
    ] = None,
    epochs: Epochs = 10,
    out: Out = None,
    overrides: Set = None,
    track: Track = None,
    fresh: Fresh = False,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    task: TaskName = None,
    trust: Trust = False,
    seed: Seed = 0,
) -> None:
    """Train a network towards the answers and features of a better one."""
    _finish(commands.distill(ctx.params))


@app.command(
    epilog=example(
        "quantize net.onnx --data imagefolder:photos --target onnxruntime --target openvino"
    )
)
def quantize(
    ctx: typer.Context,
    model: Model,
    data: Data,
    weights: Weights = None,
    num_classes: Classes = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="onnxruntime, openvino or tensorrt; several allowed; onnxruntime if absent"
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="auto, or one of its passes; auto if absent")
    ] = None,
    observer: Annotated[
        str | None,
        typer.Option(help="See: compress list observers; the method's own choice if absent"),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration images; 512 if absent")] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(help="Largest loss of the primary metric, in its unit; no limit if absent"),
    ] = None,
    qat_epochs: Annotated[
        int | None, typer.Option(help="Epochs of quantization-aware training; none if absent")
    ] = None,
    out: Out = None,
    overrides: Set = None,
    track: Track = None,
    fresh: Fresh = False,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    batch_size: BatchSize = None,
    input_range: Range = None,
    color: Color = None,
    layout: Layout = None,
    inputs: Inputs = None,
    input_size: FixedSize = None,
    workers: Workers = None,
    task: TaskName = None,
    trust: Trust = False,
    seed: Seed = 0,
) -> None:
    """Write int8 graphs, one for each runtime they must be fast on."""
    _finish(commands.quantize(ctx.params))


@app.command(
    epilog=example(
        "export torchvision:resnet18 --weights DEFAULT --input-size 3,224,224 --out net.onnx"
    )
)
def export(
    ctx: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="ONNX file to write")],
    weights: Weights = None,
    num_classes: Annotated[
        int | None,
        typer.Option("--num-classes", help="Outputs of the classifier; its own if absent"),
    ] = None,
    input_size: Annotated[str, typer.Option(help="C,H,W")] = "3,224,224",
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
        str | None, typer.Option(help="Outputs of the file, by place: 0,1.boxes; all if absent")
    ] = None,
    trust: Trust = False,
) -> None:
    """Write a network as ONNX, checked against torch."""
    _print(commands.export(ctx.params))


@app.command(epilog=example("build net.onnx --runtime openvino --batch 1,1,8 --out net.xml"))
def build(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help="ONNX file, or the stage folder or run of one")],
    runtime: Annotated[
        str, typer.Option(help="See: compress list runtimes", autocompletion=names("runtimes"))
    ],
    out: Annotated[Path, typer.Option("--out", help="Engine to write")],
    batch: Annotated[str, typer.Option(help="Smallest, best and largest batch")] = "1,1,8",
    input_size: FixedSize = None,
    precision: Precision = None,
) -> None:
    """Build an engine from an ONNX file."""
    _print(commands.build(ctx.params))


@app.command(epilog=example("bench net.onnx net.int8.onnx --runtime onnxruntime --batch 1,8"))
def bench(
    ctx: typer.Context,
    artifacts: Annotated[
        list[Path], typer.Argument(help="ONNX files, engines, stage folders, runs")
    ],
    runtime: Annotated[
        list[str] | None, typer.Option(help="Where ONNX files run; onnxruntime if absent")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes: 1,8")] = "1",
    data: Annotated[
        str | None, typer.Option(help="DATA, to measure accuracy as well; latency alone if absent")
    ] = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    input_range: Range = None,
    color: Color = None,
    layout: Layout = None,
    inputs: Inputs = None,
    threads: Threads = None,
    json: Json = None,
    trust: Trust = False,
) -> None:
    """Measure artifacts side by side, in interleaved rounds."""
    _print(commands.bench(ctx.params))


@app.command(
    epilog=example("compare net.onnx net.int8.onnx --data imagefolder:photos --image-size 224")
)
def compare(
    ctx: typer.Context,
    reference: Annotated[str, typer.Argument(help="ONNX file, engine, stage folder or run")],
    candidate: Annotated[str, typer.Argument(help="ONNX file, engine, stage folder or run")],
    data: Data,
    bisect: Annotated[bool, typer.Option(help="Find the first tensor that differs")] = False,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    input_range: Range = None,
    color: Color = None,
    layout: Layout = None,
    inputs: Inputs = None,
    json: Json = None,
    trust: Trust = False,
) -> None:
    """Show where two artifacts answer differently on real images."""
    _print(commands.compare(ctx.params))


@app.command(epilog=example("predict runs/first photo.jpg more-photos --out drawn"))
def predict(
    ctx: typer.Context,
    artifact: Annotated[
        Path, typer.Argument(help="ONNX file, engine, stage folder, run or saved network")
    ],
    images: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the pictures with what was found; none if absent"),
    ] = None,
    json: Json = None,
    task: Annotated[
        str | None,
        typer.Option("--task", help="See: compress list tasks; the artifact's if absent"),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            help="Where it runs; the engine's own, or onnxruntime, if absent",
            autocompletion=names("runtimes"),
        ),
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(help="SIDE or H,W, pixels; as the artifact says if absent")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="0.5,0.5,0.5; as the artifact says if absent")
    ] = None,
    std: Annotated[
        str | None, typer.Option(help="0.2,0.2,0.2; as the artifact says if absent")
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
    input_range: Range = None,
    color: Color = None,
    layout: Layout = None,
    inputs: Inputs = None,
    threads: Threads = None,
    trust: Trust = False,
) -> None:
    """Show what an artifact answers to pictures, with the preprocessing that it carries."""
    _print(commands.predict(ctx.params))


@app.command(epilog=example("lint net.int8.onnx --target tensorrt --fix --out mended.onnx"))
def lint(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help="Q/DQ ONNX file, or the stage folder of one")],
    target: Annotated[str, typer.Option(help="onnxruntime, openvino or tensorrt")],
    fix: Annotated[bool, typer.Option(help="Mend what can be mended mechanically")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where the mended file goes; needed with --fix")
    ] = None,
    json: Json = None,
) -> None:
    """Check a Q/DQ file against a runtime's rules: what costs accuracy or speed, and mend it."""
    table, findings = commands.lint(ctx.params)
    _print(table)
    raise typer.Exit(GATE_FAILED if findings else 0)


@app.command(
    epilog=example("split net.onnx --at auto --link-mbps 10 --edge-slowdown 5 --out parts")
)
def split(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help="ONNX file")],
    at: Annotated[str, typer.Option(help="Tensor to cut at, or auto: the fastest of a front")],
    link_mbps: Annotated[float, typer.Option(help="Speed of the link, megabits a second")] = 10.0,
    edge_slowdown: Annotated[
        float, typer.Option(help="How many times slower than this machine the edge is")
    ] = 1.0,
    int8: Annotated[bool, typer.Option("--int8", help="Send float tensors as int8")] = False,
    runtime: Annotated[str, typer.Option(help="Where both parts are timed")] = "onnxruntime",
    threads: Threads = None,
    input_size: FixedSize = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of both parts")] = Path("runs/split"),
    json: Json = None,
) -> None:
    """Split an ONNX file into a head for the edge and a tail for the server, and time both."""
    _print(commands.split(ctx.params))


@app.command(
    epilog=example(
        "sensitivity net.py:Net --weights net.pt --data imagefolder:photos --prune --json s.json"
    )
)
def sensitivity(
    ctx: typer.Context,
    model: Model,
    data: Data,
    prune: Annotated[bool, typer.Option("--prune", help="Accuracy against kept channels")] = False,
    quantize: Annotated[bool, typer.Option("--quantize", help="One layer in int8")] = False,
    target: Annotated[str, typer.Option(help="Runtime that int8 is for")] = "onnxruntime",
    weights: Weights = None,
    num_classes: Classes = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Plot to write, .png or .svg; none if absent")
    ] = None,
    json: Json = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    batch_size: BatchSize = None,
    task: TaskName = None,
    overrides: Set = None,
    seed: Seed = 0,
    trust: Trust = False,
) -> None:
    """Measure how much accuracy each layer loses when pruned or quantized."""
    if prune == quantize:
        raise UsageError("say what for", expected="one of --prune and --quantize")
    _print(commands.sensitivity(ctx.params))


@app.command(epilog=example("report runs/half runs/quarter --out runs/both"))
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the comparison; of one run its own if absent"),
    ] = None,
    force: Annotated[bool, typer.Option(help="Compare what is not comparable")] = False,
    track: Annotated[
        str | None, typer.Option(help="Log each run to tensorboard or mlflow as well")
    ] = None,
) -> None:
    """Write the report of a run again, or one comparison of several runs."""
    _print(commands.report(runs, out, force=force, track=track))


@app.command(epilog=example("verify runs/first --measure"))
def verify(
    run: Annotated[Path, typer.Argument(help="Run folder")],
    measure: Annotated[bool, typer.Option("--measure", help="Take its figures again")] = False,
    json: Json = None,
    trust: Trust = False,
) -> None:
    """Check every file of a run against its recorded hash."""
    table, intact = commands.verify(run, json, measure=measure)
    _print(table)
    raise typer.Exit(0 if intact else GATE_FAILED)


@app.command(epilog=example("bundle runs/first --out first.tar.gz"))
def bundle(
    run: Annotated[Path, typer.Argument(help="Run folder")],
    out: Annotated[Path, typer.Option("--out", help="FILE.tar.gz")],
) -> None:
    """Pack what a device needs to build, check and measure engines, and to answer pictures."""
    _print(commands.bundle(run, out))


@app.command(epilog=example("init --model net.py:Net --weights net.pt --data imagefolder:photos"))
def init(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Where network, weights and images lie")] = Path(),
    model: Annotated[str | None, typer.Option(help="MODEL; looked for if absent")] = None,
    weights: Annotated[str | None, typer.Option(help="Weights; looked for if absent")] = None,
    data: Annotated[str | None, typer.Option(help="DATA; looked for if absent")] = None,
    image_size: ImageSize = None,
    task: Annotated[str | None, typer.Option(help="Task; that of the data if absent")] = None,
    keep_macs: Annotated[
        float | None, typer.Option(help="Share of the MACs to keep; 0.5 if absent")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Runtimes; the installed ones if absent")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Recipe to write; DIR/compress.yaml if absent")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a recipe")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Take every proposal, ask nothing")] = False,
) -> None:
    """Look at a folder and write a commented recipe for it."""
    allow_all()  # it looks for networks in the folder that it is called in

    def ask(what: str, found: str) -> str:
        answer = str(typer.prompt(what, default=found or None, err=True))
        allow(answer)
        return answer

    _print(commands.init(ctx.params, None if yes or not sys.stdin.isatty() else ask))


@app.command(epilog=example("check mine.yaml --set data.root=photos"))
def check(
    recipes: Annotated[list[Path], typer.Argument(help="Recipes, YAML")],
    overrides: Set = None,
    trust: Trust = False,
) -> None:
    """Check recipes: everything short of running them."""
    _print(commands.check(recipes, overrides or []))


@app.command(name="list", epilog=example("list criteria"))
def list_(
    kind: Annotated[
        str | None,
        typer.Argument(help="criteria, losses, data, tasks, recipes, ...", autocompletion=kinds),
    ] = None,
) -> None:
    """List what there is, one line each."""
    _print(commands.list_plugins(kind))


@app.command(epilog=example("show stages/prune"))
def show(
    plugin: Annotated[
        str,
        typer.Argument(help="KIND/NAME: criteria/l1, stages/prune, ...", autocompletion=shown),
    ],
) -> None:
    """Show the documentation and options of a plug-in or a stage, or a recipe of the package."""
    _print(commands.show(plugin))


@app.command(epilog=example("schema --out schema.json"))
def schema(
    out: Annotated[Path | None, typer.Option("--out", help="File; printed if absent")] = None,
) -> None:
    """Write the JSON Schema of recipes, with which editors complete and check them."""
    _print(commands.schema(out))


@app.command(epilog=example("doctor --selftest"))
def doctor(
    selftest: Annotated[bool, typer.Option(help="Build and run on every runtime")] = False,
    json: Json = None,
) -> None:
    """Show what is installed, and what each missing piece would enable."""
    _print(commands.doctor(json, selftest=selftest))


def main() -> None:
    """Run the command line."""
    sys.exit(exit_code(lambda: app(standalone_mode=False)))


def _finish(done: Done | None) -> None:
    """Print the summary of a run; exit with 1 if one of its gates failed."""
    if done is None:  # another process of the same torchrun reports
        return
    _print(commands.summary(done))
    if any(not gate.passed for gate in done[0].gates):
        raise typer.Exit(GATE_FAILED)


def _print(content: Any) -> None:
    """Print text as it is and tables by rich, on stdout."""
    progress.stop()
    if isinstance(content, str):
        sys.stdout.write(printable(content if content.endswith("\n") else content + "\n"))
        return
    from compress.terminal import plain_console

    plain_console().print(content)
