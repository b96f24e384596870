"""Commands that run a recipe: one from a file, or one of a single stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli.arguments import (
    AnyModel,
    Classes,
    Data,
    Epochs,
    Experiment,
    FileInput,
    FineTuning,
    FixedSize,
    Fresh,
    Model,
    Out,
    Outputs,
    Pixels,
    Running,
    Set,
    Track,
    Trust,
    Verbose,
    Weights,
    chosen_from,
    completion,
    with_options,
)
from compress.cli.options import (
    DEFAULT_RUNTIME,
    TRAINING,
    Given,
    chosen_plugins,
    finish,
    int8_target,
    kept_channels,
    loaded,
    present,
    run_stages,
    training_after,
)
from compress.cli.output import print_result
from compress.errors import RecipeError, UsageError


def run(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="Recipe: a YAML file, or a name of compress list",
            autocompletion=completion("recipes"),
        ),
    ],
    out: Out = None,
    overrides: Set = None,
    fresh: Fresh = False,
    track: Track = None,
    dry_run: Annotated[
        bool, typer.Option(help="Print the recipe with all defaults and stop")
    ] = False,
    trust: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Carry out a recipe: prune, distill, quantize, build, measure, report."""
    from compress.recipe.loading import dump, tracked

    resolved = tracked(loaded(recipe, overrides), track)
    if dry_run:
        from compress.pipeline.check import preflight

        preflight(resolved, where=str(recipe))
        print_result(dump(resolved))
    else:
        finish(resolved, out, fresh=fresh, verbose=verbose, where=str(recipe))


@with_options(Running, Pixels, Experiment)
def train(
    ctx: typer.Context,
    model: Model,
    data: Data,
    weights: Weights = None,
    num_classes: Classes = None,
    epochs: Epochs = 10,
) -> None:
    """Train a network on labelled images."""
    given = ctx.params
    run_stages("train", given, [{"train": present(given, *TRAINING)}])


@with_options(FineTuning, Running, Pixels, Experiment)
def prune(
    ctx: typer.Context,
    model: Model,
    data: Data,
    weights: Weights = None,
    num_classes: Classes = None,
    criterion: Annotated[
        str | None, chosen_from("criteria", "See: compress list criteria; obs if absent")
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
            help="With FILE: allowed loss of the primary metric for each group; 1 if absent"
        ),
    ] = None,
    keep_latency: Annotated[
        float | None, typer.Option(help="Share of the latency on --runtime to keep")
    ] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Latency limit on --runtime, ms")] = None,
    runtime: Annotated[
        str | None,
        chosen_from("runtimes", "Runtime that latency is measured on; onnxruntime if absent"),
    ] = None,
    round_to: Annotated[
        str | None,
        typer.Option(
            metavar="<int>",
            help="Keep channels in multiples of this, or auto: of 16, less where narrow; auto if "
            "absent",
        ),
    ] = None,
    outputs: Outputs = None,
) -> None:
    """Prune channels of a network to a budget; fine-tune it if --epochs is given."""
    given = ctx.params
    cut = _budget(given) | present(given, "runtime", "round_to")
    cut |= chosen_plugins(given, "criterion")
    if outputs is not None:
        cut["outputs"] = outputs.split(",")
    targets = [{"runtime": runtime or DEFAULT_RUNTIME, "precision": "fp32"}]
    run_stages("prune", given, [{"prune": cut}, *training_after(given)], targets)


def _budget(given: Given) -> dict[str, Any]:
    """Return the budget that was given, half the MACs if none was."""
    budget = present(given, "keep_macs", "keep_params", "keep_latency", "latency_ms")
    if given["keep_channels"] is not None:
        budget["keep_channels"] = kept_channels(given["keep_channels"], given["max_drop"])
    elif given["max_drop"] is not None:
        raise UsageError(
            "--max-drop says how to read a sensitivity, and none is given",
            fix="Add --keep-channels FILE, made by compress sensitivity --prune --json",
        )
    return budget or {"keep_macs": 0.5}


@with_options(FineTuning, Running, Pixels, Experiment)
def sparsify(
    ctx: typer.Context,
    model: Model,
    data: Data,
    weights: Weights = None,
    num_classes: Classes = None,
    keep_weights: Annotated[
        float | None,
        typer.Option(
            help="Share of the weights to keep; 0.5 if absent; not with --pattern 2:4, which keeps "
            "half"
        ),
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="unstructured or 2:4; unstructured if absent")
    ] = None,
    criterion: Annotated[
        str | None, typer.Option(help="l1, l2, lamp, taylor or random; l1 if absent")
    ] = None,
) -> None:
    """Set single weights to zero (sparsity); fine-tune if --epochs is given."""
    given = ctx.params
    zero = present(given, "keep_weights", "pattern", "criterion")
    if pattern in (None, "unstructured"):
        zero = {"keep_weights": 0.5} | zero
    run_stages("sparsify", given, [{"sparsify": zero}, *training_after(given)])


@with_options(Running, Pixels, Experiment)
def distill(
    ctx: typer.Context,
    student: Model,
    teacher: Annotated[str, typer.Option(help="Network to distill from, written as the first is")],
    data: Data,
    weights: Weights = None,
    teacher_weights: Weights = None,
    num_classes: Classes = None,
    loss: Annotated[
        list[str] | None, chosen_from("losses", "See: compress list losses; the task's if absent")
    ] = None,
    epochs: Epochs = 10,
) -> None:
    """Train a network on the outputs and features of a teacher."""
    given = ctx.params
    learn = present(given, "teacher", "teacher_weights", *TRAINING)
    learn |= chosen_plugins(given, loss="losses")
    run_stages("distill", {**given, "model": student}, [{"distill": learn}])


@with_options(Running, Pixels, FileInput, Experiment)
def quantize(
    ctx: typer.Context,
    model: AnyModel,
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
        str | None,
        typer.Option(
            help="auto, plain, bias-correction, equalization, rounding or nncf; auto if absent"
        ),
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
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="ONNX node that stays in float; several allowed; none if absent"),
    ] = None,
    qat_epochs: Annotated[
        int | None, typer.Option(help="Epochs of quantization-aware training; none if absent")
    ] = None,
    input_size: FixedSize = None,
) -> None:
    """Quantize to int8: write one ONNX file (in Q/DQ form) for each target runtime."""
    given = ctx.params
    settings = present(given, "method", "samples", "max_drop", "exclude")
    settings |= chosen_plugins(given, "observer")
    if qat_epochs:
        settings["qat"] = {"epochs": qat_epochs} | present(given, "batch_size")
    targets = [int8_target(name) for name in target or [DEFAULT_RUNTIME]]
    run_stages("quantize", given, [{"quantize": settings}], targets)


def check(
    recipes: Annotated[
        list[Path], typer.Argument(help="Recipes: YAML files, or names of compress list")
    ],
    overrides: Set = None,
    trust: Trust = False,
) -> None:
    """Check recipes without running them."""
    from compress.pipeline.check import preflight

    problems = []
    for path in recipes:
        try:
            preflight(loaded(path, overrides), where=str(path))
        except (RecipeError, UsageError) as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(problems))
    print_result("\n".join(f"{path}: can be run" for path in recipes))
