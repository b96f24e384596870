"""Options of commands as parts of recipes: data, numbers, what was given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError

if TYPE_CHECKING:
    from compress.data import Dataset

Given = Mapping[str, Any]  # the options of a command, as parsed
NOT: tuple[Any, ...] = (None, [], ())  # what an option is that was not given
DATA_OPTIONS = ("batch_size", "workers")


def present(given: Given, **names: str) -> dict[str, Any]:
    """Return the options that were given, by their name in a recipe."""
    return {key: given[option] for option, key in names.items() if given.get(option) not in NOT}


def data_part(given: Given) -> dict[str, Any]:
    """Return the data part of a recipe from ``--data`` and the options beside it."""
    from compress.settings import data_reference

    part: dict[str, Any] = data_reference(given["data"])
    part |= present(given, **{option: option for option in DATA_OPTIONS})
    if given.get("image_size") is not None:
        part["image_size"] = _sides(given["image_size"])
    for option in ("mean", "std"):
        if given.get(option) is not None:
            part[option] = floats(given[option], f"--{option}")
    return part


def load_dataset(given: Given) -> Dataset:
    """Return the images that ``--data`` and the options beside it name, one class for each.

    Raises:
        UsageError: an option is wrong, or the labels are of another form.
    """
    from pydantic import ValidationError

    from compress.data import load_data
    from compress.settings import DataSettings

    try:
        settings = DataSettings(**data_part(given))
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise UsageError(f"--{option} {first['input']!r}: {first['msg']}") from None
    dataset = load_data(settings, given.get("seed", 0))
    if dataset.target != "class":
        raise UsageError(
            f"--data {given['data']}: has labels of the form {dataset.target!r}",
            expected="one class for each image, which is what this command compares",
            fix="Measure with a recipe that names the task: compress run RECIPE",
        )
    return dataset


def integers(text: str, option: str, *, like: str, count: int | None = None) -> list[int]:
    """Return whole numbers above 0 written with commas, ``count`` of them or any number.

    Args:
        text: What was given.
        option: Its name, for the message.
        like: What is wanted, with an example, for the message.
        count: How many.
    """
    parts = [part.strip() for part in text.split(",")]
    wrong = count is not None and len(parts) != count
    if wrong or not all(part.isdigit() and int(part) for part in parts):
        raise UsageError(f"{option} {text!r}", expected=like)
    return [int(part) for part in parts]


def _sides(text: str) -> int | list[int]:
    """Return one side of a square, or height and width."""
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


def write_numbers(path: Path | None, numbers: Any) -> None:
    """Write ``numbers`` to the file of ``--json``, if there is one."""
    from compress.artifact import write_json

    if path is not None:
        write_json(path, numbers)
