"""Commands that list and explain: plug-ins, the schema of recipes, this machine."""

from __future__ import annotations

import dataclasses
import json as json_text
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from compress import plugins
from compress.cli.arguments import RECIPES, SHOWN, STAGES, Json, complete_reference, kinds, names_of
from compress.cli.output import print_result, write_numbers
from compress.errors import UnknownNameError, UsageError


def list_(
    kind: Annotated[
        str | None,
        typer.Argument(help="criteria, losses, data, tasks, recipes, ...", autocompletion=kinds),
    ] = None,
) -> None:
    """List plug-ins and recipes, one line each."""
    from compress.terminal import table

    if kind not in {None, RECIPES, *plugins.KINDS}:
        raise UnknownNameError("kind", str(kind), [*plugins.KINDS, RECIPES])
    rows = [
        (each, name, next(iter(plugins.documentation(each, name).splitlines()), ""))
        for each in (plugins.KINDS if kind is None else {kind} - {RECIPES})
        for name in plugins.names(each)
    ]
    if kind in {None, RECIPES}:
        rows += [(RECIPES, name, first) for name, first in _recipes()]
    print_result(table(("kind", "name", "what it is"), rows, whole={"kind", "name"}))


def _recipes() -> Iterator[tuple[str, str]]:
    """Yield each packaged recipe with the first comment of its file."""
    from compress.recipe.loading import packaged_recipes

    for name, path in packaged_recipes().items():
        lines = path.read_text(encoding="utf-8").splitlines()
        comments = (line.lstrip("# ") for line in lines if line.startswith("# "))
        yield name, next((text for text in comments if not text.startswith("yaml-language")), "")


def show(
    plugin: Annotated[
        str,
        typer.Argument(
            help="KIND/NAME: criteria/l1, stages/prune, ...", autocompletion=complete_reference
        ),
    ],
) -> None:
    """Show the documentation and options of a plug-in or a stage, or a recipe of the package."""
    kind, _, name = plugin.partition("/")
    if kind not in SHOWN:
        full = [f"{each}/{plugin}" for each in SHOWN if plugin in names_of(each)]
        if full:
            raise UsageError(f"no such kind {kind!r}", fix=f"Did you mean {' or '.join(full)}?")
        raise UnknownNameError("kind", kind, SHOWN)
    if not name:
        all_names = ", ".join(names_of(kind))
        raise UsageError(
            f"{kind!r} alone is no plug-in", expected=f"{kind}/NAME, NAME one of: {all_names}"
        )
    if kind == RECIPES:
        from compress.recipe.loading import packaged_recipes

        known = packaged_recipes()
        if name not in known:
            raise UnknownNameError("recipe", name, known)
        print_result(known[name].read_text(encoding="utf-8"))
    else:
        print_result(_stage(name) if kind == STAGES else _plugin(kind, name))


def _plugin(kind: str, name: str) -> str:
    text, told = plugins.documented(kind, name)
    if kind == "data":
        told = _of_all_data() | told
    lines = [text, "", "Options:"]
    types = plugins.spelled_types(kind, name)
    for option, default in plugins.options(kind, name).items():
        given = "required" if default is dataclasses.MISSING else _as_in_yaml(default)
        line = f"  {option}: {given} ({types[option]}) {told.get(option, '')}"
        lines.append(line.rstrip())
    return "\n".join(lines if len(lines) > 3 else [*lines[:-1], "No options."])


def _of_all_data() -> dict[str, str]:
    """Return what the options mean that most kinds of data have."""
    from compress.recipe.settings import DataSettings

    return {name: field.description or "" for name, field in DataSettings.model_fields.items()}


def _stage(name: str) -> str:
    """Return the options of one stage of a recipe, each with its default and what it means."""
    from compress.recipe.loading import stage_settings

    known = stage_settings()
    if name not in known:
        raise UnknownNameError("stage", name, known)
    settings = known[name]
    lines = [f"Stage {name} of a recipe. {settings.__doc__ or ''}".strip(), "", "Options:"]
    values: dict[str, Any] = {}  # some defaults follow from those before them
    for option, field in settings.model_fields.items():
        default = "required"
        if not field.is_required():
            values[option] = field.get_default(call_default_factory=True, validated_data=values)
            default = f"default {_as_in_yaml(values[option])}"
        lines.append(f"  {option} ({default}): {field.description or ''}".rstrip(": "))
    return "\n".join(lines)


def _as_in_yaml(value: Any) -> str:
    import yaml

    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json")
    elif isinstance(value, tuple):
        value = list(value)
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1000, sort_keys=False)
    return text.removesuffix("...\n").strip()


def schema(
    out: Annotated[Path | None, typer.Option("--out", help="File; printed if absent")] = None,
) -> None:
    """Write the JSON Schema of recipes, with which editors complete and check them."""
    from compress.artifact import write_json
    from compress.recipe import loading

    if out is None:
        print_result(json_text.dumps(loading.recipe_schema(), indent=2))
    else:
        write_json(out, loading.recipe_schema())
        print_result(f"{out}: JSON Schema of recipes")


def doctor(
    selftest: Annotated[
        bool, typer.Option(help="Build and run a small network on every runtime")
    ] = False,
    json: Json = None,
) -> None:
    """Show what is installed, and what each missing piece would enable."""
    from compress.cli import doctor as examined

    found = examined.examine(selftest=selftest)
    write_numbers(json, found.to_json())
    print_result(found.table())
