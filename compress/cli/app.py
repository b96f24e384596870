"""The command line: every command, with the example at the end of its --help."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from compress.cli import artifacts, init, inspect, measuring, stages
from compress.cli.output import exit_code, print_result

COMMANDS: dict[Callable[..., None], str] = {
    stages.run: "quickstart --out runs/first",
    stages.train: "torchvision:resnet18 --num-classes 2 --data imagefolder:photos --batch-size 16",
    stages.prune: "net.py:Net --weights net.pt --data imagefolder:photos --keep-macs 0.5 "
    "--epochs 5",
    stages.sparsify: "net.py:Net --weights net.pt --data imagefolder:photos --pattern 2:4",
    stages.distill: "runs/prune --teacher runs/train --data imagefolder:photos --epochs 20",
    stages.quantize: "net.onnx --data imagefolder:photos --target onnxruntime --target openvino",
    artifacts.export: "torchvision:resnet18 --weights DEFAULT --input-size 3,224,224 "
    "--out net.onnx",
    artifacts.build: "net.onnx --runtime openvino --batch 1,1,8 --out net.xml",
    measuring.bench: "net.onnx net.int8.onnx --runtime onnxruntime --batch 1,8",
    measuring.compare: "net.onnx net.int8.onnx --data imagefolder:photos --image-size 224",
    artifacts.predict: "runs/first photo.jpg more-photos --out drawn",
    artifacts.lint: "net.int8.onnx --target tensorrt --fix --out fixed.onnx",
    artifacts.split: "net.onnx --at auto --link-mbps 10 --edge-slowdown 5 --out parts",
    measuring.sensitivity: "net.py:Net --weights net.pt --data imagefolder:photos --prune "
    "--json s.json",
    measuring.report: "runs/half runs/quarter --out runs/both",
    measuring.verify: "runs/first --measure",
    artifacts.bundle: "runs/first --out first.tar.gz",
    init.init: "--model net.py:Net --weights net.pt --data imagefolder:photos",
    stages.check: "mine.yaml --set data.root=photos",
    inspect.list_: "criteria",
    inspect.show: "stages/prune",
    inspect.schema: "--out schema.json",
    inspect.doctor: "--selftest",
}

app = typer.Typer(
    help="Prune, distill and quantize trained CNNs, export them to engines, and prove it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command, example in COMMANDS.items():
    name = command.__name__.rstrip("_")
    epilog = f"Example:\n\n\b\n  compress {name} {example}"  # \b: it is not wrapped
    app.command(name, epilog=epilog)(command)


def _version(asked: bool) -> None:
    """Print the version and stop, if asked to."""
    if asked:
        from compress import __version__

        print_result(f"compress {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version")
    ] = False,
) -> None:
    """Prune, distill and quantize trained CNNs, export them to engines, and prove it."""


def main() -> None:
    """Run the command line."""
    sys.exit(exit_code(lambda: app(standalone_mode=False)))
