"""The command line: parse, call one function, print what it returns."""

from __future__ import annotations

import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from errno import EACCES, EIO, EMFILE, ENFILE, ENOMEM, EPERM, EROFS
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from compress import progress
from compress.artifact import FULL
from compress.cli import commands
from compress.errors import CompressError, UsageError, printable
from compress.interruption import MESSAGE, ending_on_signals
from compress.trust import allow, allow_all, limited

if TYPE_CHECKING:
    from compress.cli.stages import Done

# Of whichever click this typer carries: the class with show(), which has no public name there.
ClickException: Any = next(c for c in reversed(typer.BadParameter.__mro__) if hasattr(c, "show"))
GATE_FAILED, USER_ERROR, OUR_FAULT, INTERRUPTED = 1, 2, 70, 130  # 70: EX_SOFTWARE of sysexits
OF_THE_MACHINE = {*FULL, EACCES, EIO, EMFILE, ENFILE, ENOMEM, EPERM, EROFS}

app = typer.Typer(
    help="Prune, distill and quantize trained CNNs, export them to engines, and prove it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Argument(help="torchvision:NAME, timm:NAME, FILE.py:FACTORY, ...")]
Data = Annotated[str, typer.Option("--data", help="digits, npz:FILE, imagefolder:ROOT, ...")]
Weights = Annotated[
    str | None,
    typer.Option(help="Weight file, or name of published weights; random if absent"),
]
Classes = Annotated[
    int | None,
    typer.Option("--num-classes", help="Outputs of the classifier; the data's classes if absent"),
]
ImageSize = Annotated[
    str | None,
    typer.Option(help="Network's input, pixels: SIDE or H,W; the data's if absent"),
]
Mean = Annotated[
    str | None,
    typer.Option(help="Of images in --input-range: 0.5,0.5,0.5; the data's if absent"),
]
Std = Annotated[
    str | None,
    typer.Option(help="Of images in --input-range: 0.2,0.2,0.2; the data's if absent"),
]
Range = Annotated[
    str | None,
    typer.Option(help="Black and white of the input before mean and std: 0,255; 0,1 if absent"),
]
Color = Annotated[
    str | None, typer.Option(help="Order of the network's channels: BGR; RGB if absent")
]
Layout = Annotated[
    str | None, typer.Option(help="Of an ONNX file's input: NHWC; by its shape if absent")
]
Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", help="Of a further input: NAME=0.5 or NAME=FILE.npy; none if absent"),
]
FixedSize = Annotated[
    str | None, typer.Option(help="C,H,W that free sizes of the file get; they stay if absent")
]
BatchSize = Annotated[
    int | None, typer.Option(help="Images in a batch, of training as well; 128 if absent")
]
Workers = Annotated[int | None, typer.Option(help="Threads that decode image files; 0 if absent")]
Epochs = Annotated[int | None, typer.Option(help="Epochs of training")]
After = Annotated[int | None, typer.Option(help="Epochs of training after it; none if absent")]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", help="Folder of the run; runs/NAME if absent, or NAME-2 where it is taken"
    ),
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file")]
Fresh = Annotated[bool, typer.Option("--fresh/--resume", help="Start over, or continue a run")]
Set = Annotated[list[str] | None, typer.Option("--set", help="KEY.PATH=VALUE of the recipe")]
Track = Annotated[str | None, typer.Option(help="Also log trainings: tensorboard or mlflow")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; all cores if absent")]
TaskName = Annotated[str | None, typer.Option("--task", help="See: compress list tasks")]
Outputs = Annotated[
    str | None, typer.Option(help="Outputs that count, by place: 0,1.boxes; the others may change")
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        callback=lambda given: _trust(given),
        help="Run code that recipes, run folders and .pt files hold or name; engines of others",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of everything random")]
Precision = Annotated[str | None, typer.Option(help="fp32, fp16 or int8")]


def names(kind: str) -> Callable[[str], list[str]]:
    """Return what completes names of a kind of plug-in, or of recipes, in a shell."""

    def completed(incomplete: str) -> list[str]:
        return [name for name in commands.names_of(kind) if name.startswith(incomplete)]

    return completed


def _shown(incomplete: str) -> list[str]:
    """Complete KIND/NAME."""
    kind, slash, name = incomplete.partition("/")
    if not slash:
        return [f"{each}/" for each in commands.SHOWN if each.startswith(kind)]
    known = commands.names_of(kind) if kind in commands.SHOWN else []
    return [f"{kind}/{each}" for each in known if each.startswith(name)]


def _kinds(incomplete: str) -> list[str]:
    return [each for each in commands.SHOWN if each.startswith(incomplete)]


def example(arguments: str) -> str:
    """Return what --help ends with: one command line, not wrapped."""
    return f"Example:\n\n\b\n  compress {arguments}"


def _trust(given: bool) -> bool:
    """Let everything run, if asked to; nothing but the command line can ask."""
    if given:
        allow_all()
    return given


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
        typer.Option(help="With FILE: top-1 that one group may cost, points; 1 if absent"),
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
        float | None, typer.Option(help="Largest loss of top-1, points; no limit if absent")
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
    num_classes: Classes = None,
    input_size: Annotated[str, typer.Option(help="C,H,W")] = "3,224,224",
    opset: Annotated[
        int | None, typer.Option(help="ONNX operator set; torch's own if absent")
    ] = None,
    softmax: Annotated[bool, typer.Option(help="Return probabilities")] = False,
    fixed_batch: Annotated[
        bool, typer.Option("--fixed-batch/--dynamic-batch", help="Batch of 1, or any")
    ] = False,
    dynamic_size: Annotated[
        bool,
        typer.Option("--dynamic-size/--fixed-size", help="Any height and width, or --input-size"),
    ] = False,
    outputs: Outputs = None,
    trust: Trust = False,
) -> None:
    """Write a network as ONNX, checked against torch."""
    _print(commands.export(ctx.params))


@app.command(epilog=example("build net.onnx --runtime openvino --batch 1,1,8 --out net.xml"))
def build(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help="ONNX file")],
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
    artifacts: Annotated[list[Path], typer.Argument(help="ONNX files, engines, stage folders")],
    runtime: Annotated[
        list[str] | None, typer.Option(help="Where ONNX files run; onnxruntime if absent")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes: 1,8")] = "1",
    data: Annotated[str | None, typer.Option(help="DATA, to measure accuracy as well")] = None,
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
    reference: Annotated[str, typer.Argument(help="ONNX file, engine or stage folder")],
    candidate: Annotated[str, typer.Argument(help="ONNX file, engine or stage folder")],
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


@app.command(epilog=example("lint net.int8.onnx --target tensorrt --fix --out mended.onnx"))
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
    out: Annotated[Path, typer.Option("--out", help="Folder of both parts")] = Path("runs/split"),
    json: Json = None,
) -> None:
    """Split an ONNX file: a head for the edge, a tail for the server, what crosses, both times."""
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
    out: Annotated[Path | None, typer.Option("--out", help="Plot to write, .png or .svg")] = None,
    json: Json = None,
    image_size: ImageSize = None,
    mean: Mean = None,
    std: Std = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    trust: Trust = False,
) -> None:
    """Show which layers cannot bear to be pruned or quantized."""
    if prune == quantize:
        raise UsageError("say what for", expected="one of --prune and --quantize")
    _print(commands.sensitivity(ctx.params))


@app.command(epilog=example("report runs/half runs/quarter --out runs/both"))
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
    """Pack what a device needs to build, check and measure the engines itself."""
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
        typer.Argument(help="criteria, losses, data, tasks, recipes, ...", autocompletion=_kinds),
    ] = None,
) -> None:
    """List what there is, one line each."""
    _print(commands.list_plugins(kind))


@app.command(epilog=example("show stages/prune"))
def show(
    plugin: Annotated[
        str, typer.Argument(help="KIND/NAME: criteria/l1, stages/prune, ...", autocompletion=_shown)
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
    """Run the command line; the only place where errors become messages and exit codes."""
    try:
        with (
            ending_on_signals() as signals,
            progress.shown(),
            warnings.catch_warnings(),
            limited(sys.argv[1:]),
        ):
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
        code = signals.exit_code or INTERRUPTED
        sys.stderr.write(MESSAGE)
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
    if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
        place = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(
            printable(
                f"compress: {place}{error.strerror}. Make room or change the permissions; a run "
                "keeps what is done, and the same command goes on.\n"
            )
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
    if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parents[1]):
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
        sys.stdout.write(printable(content if content.endswith("\n") else content + "\n"))
        return
    from compress.terminal import plain_console

    plain_console().print(content)
