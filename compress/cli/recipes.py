"""The recipe that the options of a command stand for, and how the command line runs a recipe."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from compress.cli.exits import GATE_FAILED
from compress.cli.options import INPUT_SIZE, Given, data_part, integers, model_options, present
from compress.cli.output import print_result
from compress.errors import UsageError

if TYPE_CHECKING:
    from compress.recipe.settings import Recipe

logger = logging.getLogger(__name__)

DROP_PCT = 1.0  # of the metric that one group may cost alone, where a sensitivity is the budget
TRAINING = {"epochs": "epochs", "batch_size": "batch_size"}  # options of every training
DEFAULT_RUNTIME = "onnxruntime"  # written out: runtimes are not imported to parse options
DEFAULT_TARGETS = ({"runtime": DEFAULT_RUNTIME, "precision": "fp32"},)


def run_stages(
    name: str,
    given: Given,
    stages: Sequence[Given],
    targets: Sequence[Given] = DEFAULT_TARGETS,
) -> None:
    """Run the recipe that the options of a command stand for, as any other recipe."""
    recipe = recipe_of(name, given, stages, targets)
    recipe = with_tracker(recipe, given["track"])
    finish(recipe, given["out"], fresh=given["fresh"], verbose=given["verbose"])


def recipe_of(
    name: str, given: Given, stages: Sequence[Given], targets: Sequence[Given] = DEFAULT_TARGETS
) -> Recipe:
    """Return the recipe that the options of a command stand for."""
    from compress.recipe.loading import apply_override, validate_recipe

    written = _content(name, given, stages, targets)
    for override in given["overrides"] or []:
        apply_override(written, override)
    return validate_recipe(written, where=f"compress {name}")


def _content(
    name: str, given: Given, stages: Sequence[Given], targets: Sequence[Given]
) -> dict[str, Any]:
    """Return the recipe as it would be in YAML."""
    model = {"name": given["model"]}
    model |= present(given, weights="weights", num_classes="num_classes")
    if given.get("input_size") is not None:
        model["input_size"] = integers(
            given["input_size"], "--input-size", count=3, like=INPUT_SIZE
        )
    if options := model_options(given["model"], trust=bool(given.get("trust"))):
        model["options"] = options
    return present(given, task="task") | {
        "name": name,
        "model": model,
        "data": data_part(given),
        "seed": given["seed"],
        "stages": list(stages),
        "targets": list(targets),
    }


def training_after(given: Given) -> list[dict[str, Any]]:
    """Return the stage that ``--epochs`` and ``--teacher`` ask for, if they do."""
    after = present(given, teacher="teacher", **TRAINING)
    if after.get("epochs"):
        return [{"distill" if "teacher" in after else "finetune": after}]
    if "teacher" in after:
        raise UsageError("--teacher without training", fix="Say how long: --epochs N")
    return []


def kept_channels(text: str, max_drop: float | None) -> float | dict[str, float]:
    """Return a share, or the share of each group that a sensitivity file allows."""
    from compress.artifact import read_json
    from compress.prune.sensitivity import PruneSensitivity

    try:
        return float(text)
    except ValueError:
        pass
    if not Path(text).is_file():
        raise UsageError(
            f"--keep-channels {text!r}: is no number and no file",
            expected="a share such as 0.5, or what compress sensitivity --prune --json wrote",
        )
    found = PruneSensitivity.from_json(read_json(Path(text)))
    shares = found.keep_channels(DROP_PCT if max_drop is None else max_drop)
    if all(share == 1 for share in shares.values()):
        raise UsageError(
            f"--keep-channels {text}: no group can be cut without losing more",
            where=f"--max-drop {DROP_PCT if max_drop is None else max_drop:g}",
            fix="Allow more: --max-drop",
        )
    return shares


def loaded(path: Path, overrides: Sequence[str] | None) -> Recipe:
    """Return a recipe whose code the user agreed to run; it is listed before any of it runs.

    Raises:
        UsageError: there is code in it that nobody agreed to.
    """
    from compress import trust
    from compress.recipe.loading import load_recipe, to_json

    recipe = load_recipe(path, overrides or [])
    try:
        told = trust.check_recipe(to_json(recipe))
    except UsageError as error:
        raise error.within(str(path)) from None
    if told:
        logger.warning("%s: %s", path, told)
    return recipe


def with_tracker(recipe: Recipe, tracker: str | None) -> Recipe:
    """Return a recipe whose trainings are logged to ``tracker`` as well, if it is given."""
    from compress.recipe import loading

    return recipe if tracker is None else loading.tracked(recipe, tracker)


def finish(
    recipe: Recipe, out: Path | None, *, fresh: bool, verbose: bool, where: str = ""
) -> None:
    """Run a recipe, which came from the file ``where`` or from options, and print its summary.

    Raises:
        Exit: one of its gates failed.
        UsageError: a limit leaves too little address space.
    """
    from compress import pipeline
    from compress.environment import check_address_space
    from compress.report import summary
    from compress.report.run_folder import default_folder

    check_address_space()
    folder = out or default_folder(recipe)
    report = pipeline.run(recipe, folder, fresh=fresh, where=where)
    if report is None:  # another process of the same torchrun reports
        return
    print_result(summary(report, folder, verbose=verbose))
    if any(not gate.passed for gate in report.gates):
        raise typer.Exit(GATE_FAILED)


def int8_target(name: str) -> dict[str, Any]:
    """Return a target for int8 graphs of ``name``: an installed runtime that opens them."""
    from compress import plugins
    from compress.packages import is_installed
    from compress.runtimes import runtime_class

    known = plugins.names("runtimes")
    if name not in known or is_installed(runtime_class(name).package):
        return {"runtime": name, "precision": "int8"}
    others = [each for each in known if each != name and runtime_class(each).int8_form == name]
    return {
        "runtime": next(iter(others), name),
        "precision": "int8",
        "when_installed": bool(others),
    }
