"""The recipe that the options of a command stand for, and how the command line runs it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from compress.cli.output import GATE_FAILED, print_result
from compress.errors import QuantizationError, UsageError

if TYPE_CHECKING:
    from compress.data import Dataset
    from compress.recipe.settings import DataSettings, Recipe

logger = logging.getLogger(__name__)

Given = Mapping[str, Any]  # the options of a command, as parsed
INPUT_SIZE = "3 whole numbers, channels, height and width: 3,224,224"
NOT: tuple[Any, ...] = (None, [], ())  # what an option is that was not given
DROP_PCT = 1.0  # of the metric that one group may cost alone, where a sensitivity is the budget
FILES = {  # how data in a file is written, by the file's ending
    ".csv": "csv:{}",
    ".json": "coco:{}",
    ".npz": "npz:{}",
    ".npy": "npz:{}",
    ".py": "{}:NAME",
    ".tar": "webdataset:{}",
    ".yaml": "yolo:{}",
}
TRAINING = ("epochs", "batch_size")  # options of every training
DEFAULT_RUNTIME = "onnxruntime"  # written out: runtimes are not imported to parse options
DEFAULT_TARGETS = ({"runtime": DEFAULT_RUNTIME, "precision": "fp32"},)


def present(given: Given, *same: str, **names: str) -> dict[str, Any]:
    """Return the options that were given, by their name in a recipe: the same, or another one."""
    names = {option: option for option in same} | names
    return {key: given[option] for option, key in names.items() if given.get(option) not in NOT}


def chosen_plugins(given: Given, *same: str, **names: str) -> dict[str, Any]:
    """Return the plug-ins that were given, by their name in a recipe: NAME or NAME:OPTION=VALUE."""
    from compress import plugins

    found = present(given, *same, **names)
    return {
        key: [plugins.reference(each) for each in value]
        if isinstance(value, list)
        else plugins.reference(value)
        for key, value in found.items()
    }


def model_options(reference: str, *, trust: bool) -> dict[str, Any]:
    """Return what ``--trust`` is to a network's constructor: Ultralytics' alone opens pickles."""
    return {"trust": True} if trust and reference.startswith("ultralytics:") else {}


def data_part(given: Given) -> dict[str, Any]:
    """Return the data part of a recipe from ``--data`` and the options beside it."""
    from compress import plugins
    from compress.recipe.settings import data_reference

    text = given["data"]
    if ":" not in text and os.path.exists(text):
        raise _no_kind(text)
    part = data_reference(plugins.reference(text) if ":root=" in text else text)
    part |= present(given, "batch_size", "workers", "color", "layout")
    if given.get("image_size") is not None:
        part["image_size"] = _sides(given["image_size"])
    for option in ("mean", "std", "input_range"):
        if given.get(option) is not None:
            part[option] = floats(given[option], f"--{option.replace('_', '-')}")
    if len(part.get("input_range", "01")) != 2:
        raise UsageError(
            f"--input-range {given['input_range']!r}",
            expected="2 numbers, black and white pixels as the network takes them: 0,255",
        )
    if fitting := present(given, "resize", "interpolation", "crop"):
        part["options"] = part.get("options", {}) | fitting
    if given.get("inputs"):
        part["inputs"] = dict(_named_value(text) for text in given["inputs"])
    return part


def _no_kind(place: str) -> UsageError:
    """Return what to write for files or folders that were given without their kind."""
    from compress.cli.contents import data_in

    path = Path(place)
    written = FILES.get(path.suffix, "")
    lying = list(data_in(path)) if path.is_dir() else [written.format(place)] if written else []
    return UsageError(
        f"--data {place}: is a {'folder' if path.is_dir() else 'file'}, and its kind is not said",
        expected="KIND:PLACE",
        fix=f"Did you mean --data {lying[0]}?" if lying else "See: compress list data",
    )


def _named_value(text: str) -> tuple[str, float | list[float] | str]:
    """Return the name and the value of ``--input NAME=VALUE``: numbers, or a file."""
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise UsageError(f"--input {text!r}", expected="NAME=0.5, NAME=1,2,3 or NAME=FILE.npy")
    try:
        numbers = [float(part) for part in value.split(",")]
    except ValueError:
        return name, value
    return name, numbers[0] if len(numbers) == 1 else numbers


def data_settings(given: Given) -> DataSettings:
    """Return the settings of the images that ``--data`` and the options beside it name.

    Raises:
        UsageError: an option is wrong.
    """
    from pydantic import ValidationError

    from compress.recipe.settings import DataSettings

    try:
        return DataSettings(**data_part(given))
    except ValidationError as error:
        nearest = max(error.errors(), key=lambda each: len(each["loc"]))  # of the forms allowed
        option = str(nearest["loc"][0]).replace("_", "-")
        raise UsageError(f"--{option} {nearest['input']!r}: {nearest['msg']}") from None


def pictures_to_time(given: Given, artifacts: Sequence[Path]) -> Dataset | None:
    """Return random pictures as the options beside ``--data`` describe them; None without any.

    Raises:
        UsageError: an option is wrong, or neither they nor the files say a size.
    """
    from compress.data import random_pictures
    from compress.evaluate.feeding import completed
    from compress.report.run_folder import artifacts_in

    if not present(given, "image_size", "mean", "std", "input_range", "color", "layout", "inputs"):
        return None
    files = [file for path in artifacts for file in artifacts_in(path)]
    settings = completed(data_settings({**given, "data": "images"}), files)
    try:
        return random_pictures(settings)
    except UsageError as error:
        raise error.within(str(files[0])) from None


def load_dataset(
    given: Given, artifacts: Sequence[Path] = (), *, any_labels: bool = False
) -> Dataset:
    """Return the images that ``--data`` and the options beside it name.

    Args:
        given: The options.
        artifacts: What is fed with the images, folders as well: what the files say of their input
            counts where the options are silent.
        any_labels: Whether labels may be of any form; else images have one class each, or none.

    Raises:
        UsageError: an option is wrong, or the labels are of another form.
    """
    from compress.data import load_data
    from compress.evaluate.feeding import completed
    from compress.report.run_folder import artifacts_in

    files = (file for path in artifacts for file in artifacts_in(path))
    dataset = load_data(completed(data_settings(given), files), given.get("seed", 0))
    if dataset.target not in ("class", "none") and not any_labels:
        raise UsageError(
            f"--data {given['data']}: has labels of the form {dataset.target!r}",
            expected="one class for each image, which is what this command measures",
            fix="Judge two files by any labels with compress compare, or a network with a recipe "
            "(compress run); or leave labels out: --data images:FOLDER",
        )
    return dataset


def integers(text: str, option: str, *, like: str, count: int | None = None) -> list[int]:
    """Return whole numbers above 0 written with commas, ``count`` of them or any number.

    For the message, ``option`` is its name and ``like`` what is wanted, with an example.
    """
    parts = [part.strip() for part in text.split(",")]
    wrong = count is not None and len(parts) != count
    if wrong or not all(part.isdigit() and int(part) for part in parts):
        raise UsageError(f"{option} {text!r}", expected=like)
    return [int(part) for part in parts]


def _sides(text: str) -> int | list[int]:
    parts = text.split(",")
    if len(parts) not in (1, 2) or not all(part.strip().isdigit() for part in parts):
        raise UsageError(
            f"--image-size {text!r}", expected="pixels: 224, or height and width: 240,320"
        )
    sides = [int(part) for part in parts]
    return sides[0] if len(sides) == 1 else sides


def floats(text: str, option: str) -> list[float]:
    """Return numbers written with commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(
            f"{option} {text!r}", expected="a number for each channel: 0.5,0.5,0.5"
        ) from None


def run_stages(
    name: str, given: Given, stages: Sequence[Given], targets: Sequence[Given] = DEFAULT_TARGETS
) -> None:
    """Run the recipe that the options of a command stand for, as any other recipe."""
    from compress.recipe.loading import tracked

    recipe = tracked(recipe_of(name, given, stages, targets), given["track"])
    finish(recipe, given["out"], fresh=given["fresh"], verbose=given["verbose"])


def recipe_of(
    name: str, given: Given, stages: Sequence[Given], targets: Sequence[Given] = DEFAULT_TARGETS
) -> Recipe:
    """Return the recipe that the options of a command stand for."""
    from compress.recipe.loading import apply_override, validate_recipe

    model = {"name": given["model"]} | present(given, "weights", "num_classes")
    if given.get("input_size") is not None:
        model["input_size"] = integers(
            given["input_size"], "--input-size", count=3, like=INPUT_SIZE
        )
    if options := model_options(given["model"], trust=bool(given.get("trust"))):
        model["options"] = options
    written = present(given, "task") | {
        "name": name,
        "model": model,
        "data": data_part(given),
        "seed": given["seed"],
        "stages": list(stages),
        "targets": list(targets),
    }
    for override in given["overrides"] or []:
        apply_override(written, override)
    return validate_recipe(written, where=name)


def training_after(given: Given) -> list[dict[str, Any]]:
    """Return the stage that ``--epochs`` and ``--teacher`` ask for, if they do."""
    after = present(given, "teacher", *TRAINING)
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


def finish(
    recipe: Recipe, out: Path | None, *, fresh: bool, verbose: bool, where: str = ""
) -> None:
    """Run a recipe, which came from the file ``where`` or from options, and print its summary.

    Raises:
        Exit: one of its gates failed.
        QuantizationError: a target got no int8 file; what is there for others was printed.
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
    if report.refused:
        raise QuantizationError(
            f"no int8 file was written for {' and '.join(report.refused)}",
            where=str(folder),
            expected="one for each target",
            fix="Do what the warning above says, or leave the target out; the others are finished",
        )
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
