"""YAML to a frozen, validated Recipe; every problem is reported at once, with its key path."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from compress import plugins
from compress.errors import (
    RecipeError,
    UnknownNameError,
    UsageError,
    absence,
    boundary,
    did_you_mean,
)
from compress.packages import require
from compress.recipe.settings import Recipe, Settings, Stage, TrainSettings

MOST_BRACKETS = 2000
MOST_VALUES = 100_000  # of a recipe with its aliases written out
TRACKERS = ("tensorboard", "mlflow")
TYPE_NAMES = {"str", "int", "float", "bool", "constrained-int", "constrained-float"}
FORMS = {  # by how pydantic's names of errors begin
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list, [VALUE, ...]",
    "tuple": "a list, [VALUE, ...]",
    "dict": "a mapping, {KEY: VALUE}",
}
PLUGIN_KEYS = {
    "criterion": "criteria",
    "losses": "losses",
    "observer": "observers",
    "runtime": "runtimes",
}
PATHS = (  # may be paths
    *(".model.name", ".weights", ".root", ".teacher", ".teacher_weights"),
    *(f".data.options.{option}" for option in ("folder", "images", "test", "validation")),
)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in a YAML file.

    Args:
        path: The file, or the name of a recipe that comes with the package: ``quickstart``.
        overrides: ``key.path=value`` each, the value as YAML; items of lists by their number:
            ``stages.0.prune.keep_macs=0.4``.

    Raises:
        RecipeError: it cannot be read, is no YAML, or does not validate; all problems are listed.
    """
    path = find_recipe(path)
    content = _read(path)
    for override in overrides:
        apply_override(content, override)
    content.setdefault("name", path.stem)
    return validate_recipe(content, where=str(path))


def packaged_recipes() -> dict[str, Path]:
    """Return the recipes that come with the package, name -> file, sorted by name."""
    package = Path(__file__).parents[1]
    folders = (package / "recipes", package.parent / "recipes")  # in a wheel, in a checkout
    files = next((f for f in (sorted(each.glob("*.yaml")) for each in folders) if f), [])
    return {file.stem: file for file in files}


def find_recipe(reference: str | Path) -> Path:
    """Return the file that ``reference`` stands for: a path, or the name of a packaged recipe.

    A folder of that name does not hide the recipe: ``photos`` is both.

    Raises:
        RecipeError: it looks like a name, and no packaged recipe has it.
    """
    path = Path(reference)
    if path.is_file() or path.suffix or len(path.parts) != 1:
        return path
    known = packaged_recipes()
    if path.name not in known and path.is_dir():
        return path  # which is refused as what it is
    if path.name not in known:
        raise UnknownNameError("recipe", path.name, known)
    return known[path.name]


def validate_recipe(content: Any, *, where: str) -> Recipe:
    """Return ``content`` as a Recipe.

    Raises:
        RecipeError: it is none; every problem is one line of the message.
    """
    problems = list(unknown_plugins(content))
    try:
        recipe = Recipe.model_validate(content)
        problems += _without_value(recipe.model_dump())
    except ValidationError as error:
        problems = [*explained_problems(error.errors()), *problems]
    if problems:
        raise RecipeError("\n".join(f"{where}: {problem}" for problem in problems))
    return recipe


def _without_value(part: Any, place: str = "") -> Iterator[str]:
    """Yield what is wrong with options of plug-ins that are infinite or no number."""
    if isinstance(part, float) and not math.isfinite(part):
        yield f"{place.lstrip('.')}: {part} is no finite number"
    elif isinstance(part, dict):
        for key, value in part.items():
            yield from _without_value(value, f"{place}.{key}")
    elif isinstance(part, (list, tuple)):
        for number, value in enumerate(part):
            yield from _without_value(value, f"{place}[{number}]")


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set one value in ``content`` in place, as ``--set`` does.

    Raises:
        UsageError: it is not ``key.path=value``, or a list has no such item.
    """
    path, equals, text = override.partition("=")
    keys = path.replace("[", ".").replace("]", "").split(".")
    if not equals or not all(keys):
        raise UsageError(f"--set {override}: is not an assignment", expected="KEY.PATH=VALUE")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    place: Any = content
    for key in keys[:-1]:
        place = _step(place, key, override)
    if isinstance(place, list):
        place[_index(place, keys[-1], override)] = value
    else:
        place[keys[-1]] = value


def tracked(recipe: Recipe, tracker: str | None) -> Recipe:
    """Return ``recipe`` with every training logged by ``tracker`` as well, as ``--track`` does.

    None changes nothing.

    Raises:
        UnknownNameError: there is no such tracker.
        MissingPackageError: it is not installed.
        UsageError: the recipe trains nothing.
    """
    if tracker is None:
        return recipe
    if tracker not in TRACKERS:
        raise UnknownNameError("tracker", tracker, TRACKERS, where="--track")
    trainings = [place for place, part in recipe.parts() if isinstance(part, TrainSettings)]
    if not trainings:
        raise UsageError(
            "no stage trains a network, so there is nothing to log",
            where="--track",
            fix="Give --epochs",
        )
    require(tracker, extra="tracking", purpose=f"--track {tracker}")
    content = to_json(recipe)
    for place in trainings:
        apply_override(content, f"{place}.track={tracker}")
    return Recipe.model_validate(content)


def from_anywhere(recipe: Recipe) -> Recipe:
    """Return ``recipe`` with absolute paths, so that its run can be used from any directory.

    Files and folders that do not exist stay as they are written: names of published weights,
    patterns of shards.
    """
    return Recipe.model_validate(_absolute(to_json(recipe)))


def _absolute(part: Any, place: str = "") -> Any:
    if isinstance(part, dict):
        return {key: _absolute(value, f"{place}.{key}") for key, value in part.items()}
    if isinstance(part, list):
        return [_absolute(value, place) for value in part]
    if not isinstance(part, str) or not part:
        return part
    file, colon, factory = part.rpartition(":")
    if colon and file.endswith(".py"):
        return f"{Path(file).resolve()}:{factory}" if Path(file).is_file() else part
    is_path = (place.endswith(PATHS) or ".data.inputs." in place) and Path(part).exists()
    return str(Path(part).resolve()) if is_path else part


def stage_settings() -> dict[str, type[Settings]]:
    """Return the settings of every stage that a recipe can name: verb -> class."""
    found = {verb: model_in(field.annotation) for verb, field in Stage.model_fields.items()}
    return {verb: model for verb, model in found.items() if model and issubclass(model, Settings)}


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe, for editors."""
    return Recipe.model_json_schema()


def to_json(recipe: Recipe) -> dict[str, Any]:
    """Return ``recipe`` with every default filled in, as JSON-able data that validates again."""
    content: dict[str, Any] = json.loads(recipe.model_dump_json())
    content["stages"] = [
        {verb: given for verb, given in stage.items() if given is not None}
        for stage in content["stages"]
    ]
    return content


def dump(recipe: Recipe) -> str:
    """Return ``recipe`` as YAML with every default filled in."""
    text: str = yaml.safe_dump(to_json(recipe), sort_keys=False, allow_unicode=True)
    return text


class _UniqueKeyLoader(yaml.SafeLoader):
    """A YAML loader that refuses a key given twice; the second would win in silence."""


def _mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.MarkedYAMLError(
                problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _content(text: str) -> Any:
    if text.count("[") + text.count("{") > MOST_BRACKETS:  # they take the square in time
        raise yaml.YAMLError(f"it opens more than {MOST_BRACKETS:,} brackets")
    loader = _UniqueKeyLoader(text)
    try:
        node = loader.get_single_node()
        if node is not None and _values_in(node, {}) > MOST_VALUES:
            raise yaml.MarkedYAMLError(
                problem=f"its aliases stand for over {MOST_VALUES:,} values, or for themselves",
                problem_mark=node.start_mark,
            )
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _values_in(node: yaml.Node, counted: dict[int, float]) -> float:
    """Return how many values a node stands for once its aliases are written out."""
    if id(node) not in counted:
        counted[id(node)] = math.inf  # of one that holds itself
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = (part for each in inner for part in (each if isinstance(each, tuple) else (each,)))
        counted[id(node)] = 1 + sum(_values_in(part, counted) for part in parts)
    return counted[id(node)]


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file() and not path.is_fifo():
        raise RecipeError(
            absence(path),
            where=str(path),
            expected="a recipe, YAML",
            fix="Those of the package go by name: compress list recipes",
        )
    with boundary(RecipeError, "the recipe cannot be read", where=str(path)):
        text = path.read_text(encoding="utf-8")
    try:
        content = _content(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise RecipeError(f"is no valid YAML: {_fault(error)}", where=str(path)) from None
    if not isinstance(content, dict):
        raise RecipeError(
            f"holds {type(content).__name__}, not a recipe",
            where=str(path),
            expected="the keys model, data and stages",
        )
    return content


def _fault(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(error)
    return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', '')}"


def _step(place: Any, key: str, override: str) -> Any:
    if isinstance(place, list):
        number = _index(place, key, override)
        if isinstance(place[number], str):  # a stage without options: - quantize
            place[number] = {place[number]: {}}
        return place[number]
    if not isinstance(place, dict):
        raise UsageError(f"--set {override}: {key!r} is asked of a plain value, which has no keys")
    if place.get(key) is None:
        place[key] = {}
    return place[key]


def _index(place: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(place):
        raise UsageError(
            f"--set {override}: the list has no item {key!r}",
            expected=f"a number from 0 to {len(place) - 1}",
        )
    return int(key)


def explained_problems(errors: Sequence[ErrorDetails]) -> Iterator[str]:
    """Yield one line for each wrong key; of a key with several forms, the form that came nearest.

    Pydantic reports every form that a value might have had, each below the name of its type.
    """
    found: dict[str, list[ErrorDetails]] = {}
    for details in errors:
        if details["type"] != "default_factory_not_called":  # what that needs is reported itself
            found.setdefault(_key_path(_followed(details["loc"])[0]), []).append(details)
    for path, forms in found.items():
        right_type = [each for each in forms if not each["type"].endswith(("_type", "_parsing"))]
        if not right_type and any(other.startswith((f"{path}[", f"{path}.")) for other in found):
            continue  # another form fits, but for a part of it
        if right_type or len(forms) == 1:
            nearest = min(right_type or forms, key=lambda each: each["type"] == "literal_error")
            yield _explain(path, nearest, [each["type"] for each in forms])
        else:
            text = _followed(forms[0]["loc"])[1]
            expected = f"Expected: {text}." if text else ""
            yield f"{path}: {forms[0]['input']!r} is not of a form that is known here. {expected}"


def _followed(location: Iterable[int | str]) -> tuple[list[int | str], str, type[BaseModel] | None]:
    """Return what a location of pydantic leads to in a recipe.

    These are its keys, without the names of types that pydantic adds; what the last one is for;
    and the class of settings there.
    """
    model: type[BaseModel] | None = Recipe
    kept: list[int | str] = []
    text = ""
    for part in location:
        if isinstance(part, int):
            kept.append(part)
        elif model is None:  # below a plain value: the name of a type, or a key of a dictionary
            kept += [] if "[" in part or part in TYPE_NAMES else [part]
        else:
            kept.append(part)
            field = model.model_fields.get(part)
            text = (field.description if field is not None else None) or text
            model = model_in(field.annotation) if field is not None else None
    return kept, text, model


def _explain(path: str, details: ErrorDetails, forms: Iterable[str]) -> str:
    """Return what is wrong with a value, which may have ``forms``, of which it has none."""
    value = details["input"]
    if details["type"] == "extra_forbidden":
        known = sorted((_followed(details["loc"][:-1])[2] or Recipe).model_fields)
        name = str(details["loc"][-1])
        hint = did_you_mean(name, known) or "."
        return f"{path}: no such key{hint} Known: {', '.join(known)}."
    if details["type"] == "missing":
        return f"{path}: this key is required."
    if details["type"] == "literal_error":
        told: str = details["ctx"]["expected"]
        choices = [part.strip(" '") for part in told.replace(" or ", ", ").split(",")]
        hint = did_you_mean(str(value), choices) or "."
        others = (FORMS.get(form.partition("_")[0]) for form in forms)
        told = " or ".join(dict.fromkeys((told, *filter(None, others))))
        return f"{path}: {value!r} is none of the choices{hint} Known: {told}."
    message = details["msg"].removeprefix("Value error, ")
    message = re.sub(r"a valid dictionary or instance of \w+", "a mapping, {KEY: VALUE}", message)
    for pythons, ours in (("tuple", "list, [VALUE, ...]"), ("dictionary", "mapping")):
        message = message.replace(f"a valid {pythons}", f"a {ours}")
    shown = "" if isinstance(value, (dict, list)) or details["type"] == "value_error" else value
    return f"{path}: {f'{shown!r}: ' if shown != '' else ''}{message}."


def _key_path(location: Iterable[int | str]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".") or "(the whole recipe)"


def model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the class of settings in a type such as ``X | None``; None: there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (model_in(argument) for argument in getattr(annotation, "__args__", ()))
    return next((model for model in found if model is not None), None)


def unknown_plugins(content: dict[str, Any]) -> Iterable[str]:
    """Yield what is wrong with the names of plug-ins; content of a wrong form is passed over."""
    for path, kind, reference in _plugin_references(content):
        try:
            name, _ = plugins.parse(kind, reference)
            plugins.documentation(kind, name)
        except UsageError as error:
            yield f"{path}: {error}"


def _has_options(reference: Any) -> bool:
    return isinstance(reference, dict) and all(
        isinstance(options, dict | None) for options in reference.values()
    )


def _plugin_references(content: dict[str, Any]) -> Iterable[tuple[str, str, Any]]:
    data = content.get("data")
    if isinstance(data, dict) and isinstance(data.get("name"), str):
        yield "data.name", "data", data["name"]
    if isinstance(content.get("task"), str | dict):
        yield "task", "tasks", content["task"]
    targets = content.get("targets")
    for number, target in enumerate(targets if isinstance(targets, list) else []):
        if isinstance(target, dict) and isinstance(target.get("runtime"), str | dict):
            yield f"targets[{number}].runtime", "runtimes", target["runtime"]
    stages = content.get("stages")
    for number, stage in enumerate(stages if isinstance(stages, list) else []):
        for verb, given in stage.items() if isinstance(stage, dict) else []:
            for key, kind in PLUGIN_KEYS.items():
                value = given.get(key) if isinstance(given, dict) else None
                for each in value if isinstance(value, list) else [value]:
                    if isinstance(each, str) or _has_options(each):
                        yield f"stages[{number}].{verb}.{key}", kind, each
