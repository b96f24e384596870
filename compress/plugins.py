"""One file in a plug-in folder is one plug-in, named after the file.

A plug-in is the class that a file ``compress/<kind>/<name>.py`` is there for: ``bn_scale.py`` holds
``BnScale``, ``tensorrt_rtx.py`` holds ``TensorrtRtx`` and is called ``tensorrt-rtx`` or
``tensorrt_rtx``. Its dataclass fields are its YAML options, its docstring is its documentation.
Files whose name starts with an underscore are shared by their neighbours and are no plug-ins.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import UnknownNameError, UsageError, did_you_mean

KINDS = {
    "criteria": "criterion",
    "losses": "loss",
    "observers": "observer",
    "runtimes": "runtime",
    "data": "kind of data",
}
_HYPHENATED = {"runtimes", "data"}  # tensorrt-rtx, fashion-mnist: as their makers write them

_PACKAGE = Path(__file__).parent


def names(kind: str) -> list[str]:
    """Return the names of all plug-ins of a folder, sorted, without importing any."""
    if kind not in KINDS:
        raise UnknownNameError("kind of plug-in", kind, KINDS)
    files = (_PACKAGE / kind).glob("[!_]*.py")
    return sorted(_spoken(kind, file.stem) for file in files)


def documentation(kind: str, name: str) -> str:
    """Return the docstring of a plug-in, read from its source, so that listing imports nothing."""
    stem = _stem(kind, name)
    tree = ast.parse((_PACKAGE / kind / f"{stem}.py").read_text(encoding="utf-8"))
    wanted = _class_name(stem)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == wanted:
            return inspect.cleandoc(ast.get_docstring(node) or "")
    return inspect.cleandoc(ast.get_docstring(tree) or "")


def load(kind: str, name: str) -> type[Any]:
    """Import the plug-in ``name`` of ``kind`` and return its class.

    Raises:
        UnknownNameError: there is no such plug-in; the message lists the known ones.
    """
    stem = _stem(kind, name)
    module = importlib.import_module(f"compress.{kind}.{stem}")
    plugin: type[Any] = getattr(module, _class_name(stem))
    return plugin


def options(kind: str, name: str) -> dict[str, Any]:
    """Return the options of a plug-in with their defaults (``dataclasses.MISSING`` = required)."""
    plugin = load(kind, name)
    fields = dataclasses.fields(plugin) if dataclasses.is_dataclass(plugin) else ()
    return {
        f.name: f.default_factory() if callable(f.default_factory) else f.default
        for f in fields
        if f.init
    }


def create(kind: str, reference: str | Mapping[str, Any], **supplied: Any) -> Any:
    """Return an instance of the plug-in that ``reference`` names.

    Args:
        kind: Folder of the plug-in: "criteria", "losses", "observers", "runtimes", "data".
        reference: A name, or one name with its options: ``{"kd": {"temperature": 4.0}}``.
        supplied: Options that the caller fills in; ``reference`` wins over them.

    Raises:
        UnknownNameError: there is no such plug-in.
        UsageError: it has no such option, or refuses the value of one.
    """
    name, given = parse(kind, reference)
    known = options(kind, name)
    for key in given:
        if key not in known:
            raise UsageError(
                f"{KINDS[kind]} {name!r} has no option {key!r}{did_you_mean(key, known)}",
                expected=f"one of: {', '.join(sorted(known)) or 'none'}",
            )
    values = {key: value for key, value in supplied.items() if key in known} | given
    try:
        return load(kind, name)(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{KINDS[kind]} {name!r}: {error}") from None


def parse(kind: str, reference: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Split ``reference`` into a name and its options.

    Raises:
        UsageError: it is neither a name nor a mapping with one key.
    """
    if isinstance(reference, str):
        return reference, {}
    if len(reference) != 1:
        raise UsageError(
            f"{KINDS[kind]} {dict(reference)!r} does not name one plug-in",
            expected="a name, or one name with its options, as in {kd: {temperature: 4.0}}",
        )
    name, given = next(iter(reference.items()))
    return name, dict(given or {})


def _stem(kind: str, name: str) -> str:
    known = names(kind)
    stem = name.replace("-", "_")
    if _spoken(kind, stem) not in known:
        raise UnknownNameError(KINDS[kind], name, known)
    return stem


def _spoken(kind: str, stem: str) -> str:
    return stem.replace("_", "-") if kind in _HYPHENATED else stem


def _class_name(stem: str) -> str:
    return "".join(part.capitalize() for part in stem.split("_"))
