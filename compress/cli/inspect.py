"""Commands that show what there is: plug-ins, the schema of recipes, this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from compress import plugins
from compress.cli.options import write_numbers
from compress.errors import UnknownNameError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType


RECIPES, STAGES = "recipes", "stages"  # shown as plug-ins are, though they are none
SHOWN = (*plugins.KINDS, RECIPES, STAGES)


def list_plugins(kind: str | None) -> RenderableType:
    """Return a table of plug-ins and packaged recipes, each with its first line of documentation.

    Raises:
        UnknownNameError: there is no such kind.
    """
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
    return table(("kind", "name", "what it is"), rows, whole={"kind", "name"})


def _recipes() -> Iterator[tuple[str, str]]:
    """Yield each packaged recipe with the first comment of its file."""
    from compress.recipe.loading import packaged_recipes

    for name, path in packaged_recipes().items():
        lines = path.read_text(encoding="utf-8").splitlines()
        comments = (line.lstrip("# ") for line in lines if line.startswith("# "))
        yield name, next((text for text in comments if not text.startswith("yaml-language")), "")


def names_of(kind: str) -> list[str]:
    """Return what there is of a kind, by name."""
    from compress.recipe.loading import packaged_recipes, stage_settings

    if kind == RECIPES:
        return sorted(packaged_recipes())
    return sorted(stage_settings()) if kind == STAGES else plugins.names(kind)


def _recipe(name: str) -> str:
    """Return the text of a recipe that comes with the package."""
    from compress.recipe.loading import packaged_recipes

    known = packaged_recipes()
    if name not in known:
        raise UnknownNameError("recipe", name, known)
    return known[name].read_text(encoding="utf-8")


def show(plugin: str) -> str:
    """Return the documentation and the options of a plug-in or a stage, or a packaged recipe.

    Raises:
        UnknownNameError: there is no such kind, or no such plug-in.
        UsageError: a kind without a name.
    """
    import dataclasses

    kind, _, name = plugin.partition("/")
    if kind not in SHOWN:
        raise UnknownNameError("kind", kind, SHOWN)
    if not name:
        known = ", ".join(names_of(kind))
        raise UsageError(f"{kind!r} says no name", expected=f"{kind}/NAME, NAME one of: {known}")
    if kind == RECIPES:
        return _recipe(name)
    if kind == STAGES:
        return _stage(name)
    lines = [plugins.documentation(kind, name), "", "Options:"]
    for option, default in plugins.options(kind, name).items():
        required = default is dataclasses.MISSING
        lines.append(f"  {option}: {'required' if required else repr(default)}")
    return "\n".join(lines if len(lines) > 3 else [*lines[:-1], "No options."])


def _stage(name: str) -> str:
    """Return the options of one stage of a recipe, each with its default and what it means."""
    from compress.recipe.loading import stage_settings

    known = stage_settings()
    if name not in known:
        raise UnknownNameError("stage", name, known)
    settings = known[name]
    lines = [f"Stage {name} of a recipe. {settings.__doc__ or ''}".strip(), "", "Options:"]
    for option, field in settings.model_fields.items():
        default = (
            "required"
            if field.is_required()
            else f"default {field.get_default(call_default_factory=True)!r}"
        )
        lines.append(f"  {option} ({default}): {field.description or ''}".rstrip(": "))
    return "\n".join(lines)


def schema(out: Path | None) -> str:
    """Return the JSON Schema of recipes, or write it to ``out``."""
    import json

    from compress.artifact import write_json
    from compress.recipe import loading

    if out is None:
        return json.dumps(loading.schema(), indent=2)
    write_json(out, loading.schema())
    return f"{out}: JSON Schema of recipes"


def doctor(json: Path | None, *, selftest: bool) -> RenderableType:
    """Show what is installed, and what each missing piece would enable."""
    from compress.cli import doctor as examined

    found = examined.examine(selftest=selftest)
    write_numbers(json, found.to_json())
    return found.table()
