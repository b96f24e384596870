"""Commands that show what there is: plug-ins, the schema of recipes, this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compress import plugins
from compress.commands.options import write_numbers
from compress.errors import UnknownNameError

if TYPE_CHECKING:
    from rich.console import RenderableType


def list_plugins(kind: str | None) -> RenderableType:
    """Return a table of plug-ins with the first lines of their documentation."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for header in ("kind", "name", "what it is"):
        table.add_column(header, no_wrap=header != "what it is")
    for each in plugins.KINDS if kind is None else [kind]:
        for name in plugins.names(each):
            first, *_ = plugins.documentation(each, name).splitlines() or [""]
            table.add_row(each, name, first)
    return table


def show(plugin: str) -> str:
    """Return the documentation and the options of one plug-in."""
    import dataclasses

    kind, _, name = plugin.partition("/")
    if kind not in plugins.KINDS or not name:
        raise UnknownNameError("kind of plug-in", kind, plugins.KINDS)
    lines = [plugins.documentation(kind, name), "", "Options:"]
    for option, default in plugins.options(kind, name).items():
        required = default is dataclasses.MISSING
        lines.append(f"  {option}: {'required' if required else repr(default)}")
    return "\n".join(lines if len(lines) > 3 else [*lines[:-1], "No options."])


def schema(out: Path | None) -> str:
    """Return the JSON Schema of recipes, or write it to ``out``."""
    import json

    from compress import recipe
    from compress.artifact import write_json

    if out is None:
        return json.dumps(recipe.schema(), indent=2)
    write_json(out, recipe.schema())
    return f"{out}: JSON Schema of recipes"


def doctor(json: Path | None, *, selftest: bool) -> RenderableType:
    """Show what is installed, and what each missing piece would enable."""
    from compress import doctor as examined

    found = examined.examine(selftest=selftest)
    write_numbers(json, found.to_json())
    return found.table()
