"""The command line: parse, call one function, print what it returns."""

from __future__ import annotations

import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from compress import commands, progress
from compress.errors import CompressError, UsageError

if TYPE_CHECKING:
    from compress.commands.verbs import Done

# Of whichever click this typer carries: the class with show(), which has no public name there.
ClickException: Any = next(c for c in reversed(typer.BadParameter.__mro__) if hasattr(c, "show"))
GATE_FAILED, USER_ERROR, OUR_FAULT, INTERRUPTED = 1, 2, 70, 130  # 70: EX_SOFTWARE of sysexits

app = typer.Typer(
    help="Prune, distill and quantize trained CNNs, export them to engines, and prove it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Argument(help="torchvision:NAME, timm:NAME, FILE.py:FACTORY, ...")]
Data = Annotated[str, typer.Option("--data", help="digits, npz:FILE, imagefolder:ROOT, ...")]
Weights = Annotated[str | None, typer.Option(help="Weight file, or name of published weights")]
Classes = Annotated[int | None, typer.Option("--num-classes", help="Outputs of the classifier")]
ImageSize = Annotated[str | None, typer.Option(help="Network's input, pixels: SIDE or H,W")]
Mean = Annotated[str | None, typer.Option(help="Per channel, of images in [0, 1]: 0.5,0.5,0.5")]
Std = Annotated[str | None, typer.Option(help="Per channel, of images in [0, 1]: 0.2,0.2,0.2")]
BatchSize = Annotated[int | None, typer.Option(help="Images in a batch")]
Workers = Annotated[int | None, typer.Option(help="Threads that decode image files")]
Epochs = Annotated[int | None, typer.Option(help="Epochs of training")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run; runs/NAME if absent")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file")]
Fresh = Annotated[bool, typer.Option("--fresh/--resume", help="Start over, or continue a run")]
Set = Annotated[list[str] | None, typer.Option("--set", help="KEY.PATH=VALUE of the recipe")]
Track = Annotated[str | None, typer.Option(help="Also log trainings: tensorboard or mlflow")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; all cores if absent")]
Seed = Annotated[int, typer.Option(help="Seed of everything random")]
Precision = Annotated[str | None, typer.Option(help="fp32, fp16 or int8")]


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


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="Recipe: a YAML file, or a name of compress list")],
    out: Out = None,
    overrides: Set = None,
    fresh: Fresh = False,
    track: Track = None,
    dry_run: Annotated[bool, typer.Option(help="Print the resolved recipe and stop")] = False,
) -> None:
    """Carry out a recipe: prune, distill, quantize, build, measure, report."""
    if dry_run:
        _print(commands.dry_run(recipe, overrides or [], track))
    else:
        _finish(commands.run(recipe, out, overrides or [], fresh=fresh, track=track))


@app.command()
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
    seed: Seed = 0,
) -> None:
    """Train a network on labelled images."""
    _finish(commands.train(ctx.params))


@app.command()
def prune(
    ctx: typer.Context,
    model: Model,
    data: Data,
    weights: Weights = None,
    num_classes: Classes = None,
    criterion: Annotated[str | None, typer.Option(help="See: compress list criteria")] = None,
    keep_macs: Annotated[float | None, typer.Option(help="Share of the MACs to keep")] = None,
    keep_params: Annotated[float | None, typer.Option(help="Share of the parameters")] = None,
    keep_channels: Annotated[
        str | None, typer.Option(help="Share of the channels, or FILE of compress sensitivity")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="With FILE: top-1 that one group may cost, points")
    ] = None,
    keep_latency: Annotated[float | None, typer.Option(help="Share of the latency")] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Latency to reach")] = None,
    runtime: Annotated[str | None, typer.Option(help="Where latency counts")] = None,
    round_to: Annotated[int | None, typer.Option(help="Channels in multiples of this")] = None,
    epochs: Epochs = None,
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
    seed: Seed = 0,
) -> None:
    """Cut channels of a network to a budget, then train it a little if asked."""
    _finish(commands.prune(ctx.params))


@app.command()
def sparsify(
    ctx: typer.Context,
    model: Model,
    data: Data,
    weights: Weights = None,
    num_classes: Classes = None,
    keep_weights: Annotated[float | None, typer.Option(help="Share of the weights to keep")] = None,
    pattern: Annotated[str | None, typer.Option(help="unstructured or 2:4")] = None,
    criterion: Annotated[str | None, typer.Option(help="l1, l2, lamp, taylor or random")] = None,
    epochs: Epochs = None,
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
    seed: Seed = 0,
) -> None:
    """Zero single weights of a network, then train it a little if asked."""
    _finish(commands.sparsify(ctx.params))


@app.command()
def distill(
    ctx: typer.Context,
    student: Model,
    teacher: Annotated[str, typer.Option(help="MODEL to learn from")],
    data: Data,
    weights: Weights = None,
    teacher_weights: Weights = None,
    num_classes: Classes = None,
    loss: Annotated[list[str] | None, typer.Option(help="See: compress list losses")] = None,
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
    seed: Seed = 0,
) -> None:
    """Train a network towards the answers and features of a better one."""
    _finish(commands.distill(ctx.params))


@app.command()
def quantize(
    ctx: typer.Context,
    model: Model,
    data: Data,
    weights: Weights = None,
    num_classes: Classes = None,
    target: Annotated[
        list[str] | None, typer.Option(help="onnxruntime, openvino or tensorrt; several allowed")
    ] = None,
    method: Annotated[str | None, typer.Option(help="auto, or one of its passes")] = None,
    observer: Annotated[str | None, typer.Option(help="See: compress list observers")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration images")] = None,
    max_drop: Annotated[float | None, typer.Option(help="Largest loss of top-1, points")] = None,
    qat_epochs: Annotated[int | None, typer.Option(help="Quantization-aware training")] = None,
    out: Out = None,
    overrides: Set = None,
    track: Track = None,
    fresh: Fresh = False,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    seed: Seed = 0,
) -> None:
    """Write int8 graphs, one for each runtime they must be fast on."""
    _finish(commands.quantize(ctx.params))


@app.command()
def export(
    ctx: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="ONNX file to write")],
    weights: Weights = None,
    num_classes: Classes = None,
    input_size: Annotated[str, typer.Option(help="C,H,W")] = "3,224,224",
    opset: Annotated[int | None, typer.Option(help="ONNX operator set")] = None,
    softmax: Annotated[bool, typer.Option(help="Return probabilities")] = False,
    fixed_batch: Annotated[
        bool, typer.Option("--fixed-batch/--dynamic-batch", help="Batch of 1, or any")
    ] = False,
    dynamic_size: Annotated[
        bool,
        typer.Option("--dynamic-size/--fixed-size", help="Any height and width, or --input-size"),
    ] = False,
) -> None:
    """Write a network as ONNX, checked against torch."""
    _print(commands.export(ctx.params))


@app.command()
def build(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help="ONNX file")],
    runtime: Annotated[str, typer.Option(help="See: compress list runtimes")],
    out: Annotated[Path, typer.Option("--out", help="Engine to write")],
    batch: Annotated[str, typer.Option(help="Smallest, best and largest batch")] = "1,1,8",
    precision: Precision = None,
) -> None:
    """Build an engine from an ONNX file."""
    _print(commands.build(ctx.params))


@app.command()
def bench(
    ctx: typer.Context,
    artifacts: Annotated[list[Path], typer.Argument(help="ONNX files, engines, stage folders")],
    runtime: Annotated[list[str] | None, typer.Option(help="Where ONNX files run")] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes: 1,8")] = "1",
    data: Annotated[str | None, typer.Option(help="DATA, to measure accuracy as well")] = None,
    threads: Threads = None,
    json: Json = None,
) -> None:
    """Measure artifacts side by side, in interleaved rounds."""
    _print(commands.bench(ctx.params))


@app.command()
def compare(
    ctx: typer.Context,
    reference: Annotated[str, typer.Argument(help="ONNX file, engine or stage folder")],
    candidate: Annotated[str, typer.Argument(help="ONNX file, engine or stage folder")],
    data: Data,
    bisect: Annotated[bool, typer.Option(help="Find the first tensor that differs")] = False,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    json: Json = None,
) -> None:
    """Show where two artifacts answer differently on real images."""
    _print(commands.compare(ctx.params))


@app.command()
def lint(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help="Q/DQ ONNX file")],
    target: Annotated[str, typer.Option(help="onnxruntime, openvino or tensorrt")],
    fix: Annotated[bool, typer.Option(help="Mend what can be mended mechanically")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Where the mended file goes")] = None,
    json: Json = None,
) -> None:
    """Find what costs accuracy or speed in anybody's int8 graph."""
    table, findings = commands.lint(ctx.params)
    _print(table)
    raise typer.Exit(GATE_FAILED if findings else 0)


@app.command()
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
    out: Annotated[Path, typer.Option("--out", help="Folder of both parts")] = Path("runs/split"),
    json: Json = None,
) -> None:
    """Split an ONNX file: a head for the edge, a tail for the server, what crosses, both times."""
    _print(commands.split(ctx.params))


@app.command()
def sensitivity(
    ctx: typer.Context,
    model: Model,
    data: Data,
    prune: Annotated[bool, typer.Option("--prune", help="Accuracy against kept channels")] = False,
    quantize: Annotated[bool, typer.Option("--quantize", help="One layer in int8")] = False,
    target: Annotated[str, typer.Option(help="Runtime that int8 is for")] = "onnxruntime",
    weights: Weights = None,
    num_classes: Classes = None,
    out: Annotated[Path | None, typer.Option("--out", help="Plot to write, .png or .svg")] = None,
    json: Json = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
) -> None:
    """Show which layers cannot bear to be pruned or quantized."""
    if prune == quantize:
        raise UsageError("say what for", expected="one of --prune and --quantize")
    _print(commands.sensitivity(ctx.params))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the comparison")] = None,
    force: Annotated[bool, typer.Option(help="Compare what is not comparable")] = False,
    track: Annotated[
        str | None, typer.Option(help="Log each run to tensorboard or mlflow as well")
    ] = None,
) -> None:
    """Write the report of a run again, or one comparison of several runs."""
    _print(commands.report(runs, out, force=force, track=track))


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(help="Run folder")],
    measure: Annotated[bool, typer.Option("--measure", help="Take its figures again")] = False,
    json: Json = None,
) -> None:
    """Check every file of a run against its recorded hash."""
    table, intact = commands.verify(run, json, measure=measure)
    _print(table)
    raise typer.Exit(0 if intact else GATE_FAILED)


@app.command()
def bundle(
    run: Annotated[Path, typer.Argument(help="Run folder")],
    out: Annotated[Path, typer.Option("--out", help="FILE.tar.gz")],
) -> None:
    """Pack what a device needs to build, check and measure the engines itself."""
    _print(commands.bundle(run, out))


@app.command()
def check(
    recipes: Annotated[list[Path], typer.Argument(help="Recipes, YAML")],
    overrides: Set = None,
) -> None:
    """Check recipes: everything short of running them."""
    _print(commands.check(recipes, overrides or []))


@app.command(name="list")
def list_(
    kind: Annotated[
        str | None,
        typer.Argument(help="criteria, losses, data, tasks, recipes, ..."),
    ] = None,
) -> None:
    """List what there is, one line each."""
    _print(commands.list_plugins(kind))


@app.command()
def show(
    plugin: Annotated[str, typer.Argument(help="KIND/NAME: criteria/l1, stages/prune, ...")],
) -> None:
    """Show the documentation and options of a plug-in or a stage, or a recipe of the package."""
    _print(commands.show(plugin))


@app.command()
def schema(
    out: Annotated[Path | None, typer.Option("--out", help="File; printed if absent")] = None,
) -> None:
    """Write the JSON Schema of recipes, with which editors complete and check them."""
    _print(commands.schema(out))


@app.command()
def doctor(
    selftest: Annotated[bool, typer.Option(help="Build and run on every runtime")] = False,
    json: Json = None,
) -> None:
    """Show what is installed, and what each missing piece would enable."""
    _print(commands.doctor(json, selftest=selftest))


def main() -> None:
    """Run the command line; the only place where errors become messages and exit codes."""
    try:
        with progress.shown(), warnings.catch_warnings():
            warnings.showwarning = _warn
            code = app(standalone_mode=False)
    except CompressError as error:
        sys.stderr.write(f"compress: {error}\n")
        code = USER_ERROR
    except ClickException as error:
        error.show()
        code = USER_ERROR
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except SystemExit as ended:  # what typer makes of Ctrl-C
        code = ended.code
    except Exception as error:  # noqa: BLE001 - the last net: 1 would read as a failed gate
        code = _unexpected(error)
    if code == INTERRUPTED:
        sys.stderr.write("compress: interrupted; the same command continues where it stopped\n")
    sys.exit(code if isinstance(code, int) else 0)


def _unexpected(error: Exception) -> int:
    """Say in a sentence what nobody foresaw, and where its traceback is; return the exit code."""
    from compress.train.memory import is_out_of_memory

    if isinstance(error, (RuntimeError, MemoryError)) and is_out_of_memory(error):
        sys.stderr.write(
            "compress: out of memory. Make room, or work on less at once: a smaller --batch-size "
            "or --image-size, fewer images; a run keeps what is done, and the same command goes "
            "on.\n"
        )
        return USER_ERROR
    first = (str(error).splitlines() or [""])[0]
    sys.stderr.write(
        f"compress: this should not happen: {type(error).__name__}: {first}. "
        f"Please report it with the traceback, which is {_traceback_file(error)}\n"
    )
    return OUR_FAULT


def _traceback_file(error: Exception) -> str:
    """Write the traceback of ``error`` to a file and return where it is, or the traceback."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", prefix="compress-", suffix="-traceback.txt", delete=False
        ) as file:
            file.write(text)
    except OSError:  # no place to write
        return f"this:\n{text}"
    return f"in {file.name}"


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning of ours as one sentence; one of another package as Python does."""
    if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parent):
        text = f"compress: warning: {message}\n"
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(text)


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
        sys.stdout.write(content if content.endswith("\n") else content + "\n")
        return
    from rich.console import Console

    console = Console(soft_wrap=False)
    if not console.is_terminal:  # a log or a pipe: wide enough that nothing is cut
        console = Console(width=160)
    console.print(content)
