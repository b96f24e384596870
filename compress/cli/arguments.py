"""Options and arguments that several commands share: types, help texts and shell completion."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from compress import plugins
from compress.artifact import check_no_folder
from compress.trust import allow_all

RECIPES, STAGES = "recipes", "stages"  # shown as plug-ins are, though they are none
SHOWN = (*plugins.KINDS, RECIPES, STAGES)

MODELS = "FILE.py:NAME (a class or function), torchvision:NAME, timm:NAME, run folder"
Model = Annotated[str, typer.Argument(help=f"Network: {MODELS}, ...")]
AnyModel = Annotated[str, typer.Argument(help=f"Network: {MODELS} or FILE.onnx")]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="Images, KIND:PLACE: imagefolder:FOLDER, images:FOLDER (no labels), "
        "voc:root=FOLDER,OPTION=VALUE, ...; see compress list data",
    ),
]
Weights = Annotated[
    str | None, typer.Option(help="Weight file, or name of published weights; random if absent")
]
Classes = Annotated[
    int | None,
    typer.Option("--num-classes", help="Outputs of the classifier; the data's classes if absent"),
]
ImageSize = Annotated[
    str | None,
    typer.Option(help="Network's input, pixels: SIDE or H,W; the file's or the data's if absent"),
]
FixedSize = Annotated[
    str | None,
    typer.Option(help="Fix the file's dynamic input sizes: C,H,W; they stay dynamic if absent"),
]
Epochs = Annotated[int | None, typer.Option(help="Epochs of training")]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", help="Folder of the run; runs/NAME if absent, or NAME-2 where it is taken"
    ),
]


def no_folder(path: Path | None) -> Path | None:
    """Return the file that is going to be written; a folder is refused before any work is done."""
    if path is not None:
        check_no_folder(path)
    return path


Json = Annotated[
    Path | None,
    typer.Option(
        "--json", callback=no_folder, help="Also write the numbers to this file; none if absent"
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh/--resume", help="Start over, or continue a run")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key of the recipe: KEY.PATH=VALUE")
]
Track = Annotated[
    str | None, typer.Option(help="Also log trainings: tensorboard or mlflow; neither if absent")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Also print what was tried and what was not measured")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; all cores if absent")]
TaskName = Annotated[
    str | None, typer.Option("--task", help="See: compress list tasks; that of the data if absent")
]
Outputs = Annotated[
    str | None,
    typer.Option(help="Outputs to keep, by index or name: 0,1.boxes; the others may lose channels"),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        callback=lambda given: _trust(given),
        help="Allow code in recipes, run folders and .pt files, and engines built by others",
    ),
]
Precision = Annotated[
    str | None, typer.Option(help="fp32, fp16 or int8 (of a Q/DQ file); the file's own if absent")
]


class Pixels:
    """How pictures become the network's input."""

    image_size: ImageSize = None
    mean: Annotated[
        str | None,
        typer.Option(
            help="Mean of each channel, for normalization: 0.5,0.5,0.5; the file's or data's if "
            "absent"
        ),
    ] = None
    std: Annotated[
        str | None,
        typer.Option(
            help="Standard deviation of each channel: 0.2,0.2,0.2; the file's or data's if absent"
        ),
    ] = None


class FileInput:
    """What the input of an ONNX file or an engine needs besides."""

    input_range: Annotated[
        str | None,
        typer.Option(
            help="Values of black and white pixels before normalization: 0,255; 0,1 if absent"
        ),
    ] = None
    color: Annotated[
        str | None, typer.Option(help="Channel order that the network expects: BGR; RGB if absent")
    ] = None
    layout: Annotated[
        str | None,
        typer.Option(help="Dimension order of an ONNX file's input: NHWC; by its shape if absent"),
    ] = None
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="Value of an additional input: NAME=0.5 or NAME=FILE.npy; none if absent",
        ),
    ] = None


class Experiment:
    """Keys of a recipe besides its stages."""

    batch_size: Annotated[
        int | None, typer.Option(help="Images in a batch, of training as well; 128 if absent")
    ] = None
    task: TaskName = None
    overrides: Set = None
    seed: Annotated[int, typer.Option(help="Random seed")] = 0
    trust: Trust = False


class Running:
    """How a recipe is carried out."""

    out: Out = None
    fresh: Fresh = False
    track: Track = None
    workers: Annotated[
        int | None, typer.Option(help="Threads that decode image files; 0 if absent")
    ] = None
    verbose: Verbose = False


class FineTuning:
    """Training after a stage."""

    epochs: Annotated[
        int | None, typer.Option(help="Epochs of fine-tuning afterwards; none if absent")
    ] = None
    teacher: Annotated[str | None, typer.Option(help="Network to distill from, with --epochs")] = (
        None
    )


def with_options(*groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of ``groups`` after its own; it reads them in ``ctx.params``."""
    shared = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=vars(group)[name], annotation=annotation
        )
        for group in groups
        for name, annotation in inspect.get_annotations(group, eval_str=True).items()
    ]

    def extended(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters

        @functools.wraps(command)
        def called(**given: Any) -> None:
            command(**{name: given[name] for name in own})

        called.__signature__ = inspect.Signature([*own.values(), *shared])  # type: ignore[attr-defined]
        return called

    return extended


def names_of(kind: str) -> list[str]:
    """Return the names of all plug-ins of a kind, or of recipes or stages."""
    from compress.recipe.loading import packaged_recipes, stage_settings

    if kind == RECIPES:
        return sorted(packaged_recipes())
    return sorted(stage_settings()) if kind == STAGES else plugins.names(kind)


def completion(kind: str) -> Callable[[str], list[str]]:
    """Return the shell completion for names of a kind of plug-in, or of recipes."""

    def completed(incomplete: str) -> list[str]:
        return [name for name in names_of(kind) if name.startswith(incomplete)]

    return completed


def chosen_from(kind: str, help_text: str) -> Any:
    """Return an option for the name of a plug-in of a kind, which the shell completes."""
    return typer.Option(help=help_text, autocompletion=completion(kind))


def complete_reference(incomplete: str) -> list[str]:
    """Complete KIND/NAME."""
    kind, slash, name = incomplete.partition("/")
    if not slash:
        return [f"{each}/" for each in SHOWN if each.startswith(kind)]
    known = names_of(kind) if kind in SHOWN else []
    return [f"{kind}/{each}" for each in known if each.startswith(name)]


def kinds(incomplete: str) -> list[str]:
    """Complete KIND."""
    return [each for each in SHOWN if each.startswith(incomplete)]


def _trust(given: bool) -> bool:
    """Let everything run, if asked to; nothing but the command line can ask."""
    if given:
        allow_all()
    return given
