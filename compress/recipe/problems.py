"""What is wrong with a recipe, one line for each key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from compress import plugins
from compress.errors import UsageError, did_you_mean
from compress.recipe.settings import Recipe

TYPE_NAMES = {"str", "int", "float", "bool", "constrained-int", "constrained-float"}
PLUGIN_KEYS = {
    "criterion": "criteria",
    "losses": "losses",
    "observer": "observers",
    "runtime": "runtimes",
}


def explained_problems(errors: Sequence[ErrorDetails]) -> Iterator[str]:
    """Yield one line for each wrong key; of a key with several forms, the form that came nearest.

    Pydantic reports every form that a value might have had, each below the name of its type.
    """
    found: dict[str, list[ErrorDetails]] = {}
    for details in errors:
        found.setdefault(_key_path(_keys(details["loc"])), []).append(details)
    for path, forms in found.items():
        right_type = [each for each in forms if not each["type"].endswith(("_type", "_parsing"))]
        if not right_type and any(other.startswith((f"{path}[", f"{path}.")) for other in found):
            continue  # another form fits, but for a part of it
        if right_type or len(forms) == 1:
            yield _explain(path, (right_type or forms)[0])
        else:
            expected = _description(_keys(forms[0]["loc"]))
            yield f"{path}: {forms[0]['input']!r} is not of a form that is known here. {expected}"


def _keys(location: Iterable[int | str]) -> list[int | str]:
    """Return ``location`` without the names of types that pydantic adds to it."""
    model: type[BaseModel] | None = Recipe
    kept: list[int | str] = []
    for part in location:
        if isinstance(part, int):
            kept.append(part)
        elif model is None:  # below a plain value: the name of a type, or a key of a dictionary
            kept += [] if "[" in part or part in TYPE_NAMES else [part]
        else:
            kept.append(part)
            field = model.model_fields.get(part)
            model = model_in(field.annotation) if field is not None else None
    return kept


def _description(location: Sequence[int | str]) -> str:
    """Return what the key at ``location`` is for, as a sentence."""
    model: type[BaseModel] | None = Recipe
    text = ""
    for part in location:
        if isinstance(part, str) and model is not None:
            field = model.model_fields.get(part)
            text = (field.description if field is not None else None) or text
            model = model_in(field.annotation) if field is not None else None
    return f"Expected: {text}." if text else ""


def _explain(path: str, details: ErrorDetails) -> str:
    value = details["input"]
    if details["type"] == "extra_forbidden":
        known = _known_keys(details["loc"][:-1])
        name = str(details["loc"][-1])
        hint = did_you_mean(name, known) or "."
        return f"{path}: no such key{hint} Known: {', '.join(known)}."
    if details["type"] == "missing":
        return f"{path}: this key is required."
    if details["type"] == "literal_error":
        told: str = details["ctx"]["expected"]
        choices = [part.strip(" '") for part in told.replace(" or ", ", ").split(",")]
        hint = did_you_mean(str(value), choices) or "."
        return f"{path}: {value!r} is none of the choices{hint} Known: {told}."
    message = details["msg"].removeprefix("Value error, ")
    for pythons, ours in (("tuple", "list"), ("dictionary", "mapping")):
        message = message.replace(f"a valid {pythons}", f"a {ours}")
    shown = "" if isinstance(value, (dict, list)) or details["type"] == "value_error" else value
    return f"{path}: {f'{shown!r}: ' if shown != '' else ''}{message}."


def _key_path(location: Iterable[int | str]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".") or "(the whole recipe)"


def _known_keys(location: Iterable[int | str]) -> list[str]:
    """Return the keys that may stand at ``location``, following the classes of the recipe."""
    model: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            inner = model_in(model.model_fields[part].annotation)
            model = inner or model
    return sorted(model.model_fields)


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
    """Return whether ``reference`` is a name with its options; another form is told elsewhere."""
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
