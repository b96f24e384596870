"""One file in a plug-in folder is one plug-in, named after the file.

A plug-in is the class that a file ``compress/<kind>/<name>.py`` is there for: ``bn_scale.py`` holds
``BnScale``, ``tensorrt_rtx.py`` holds ``TensorrtRtx`` and is called ``tensorrt-rtx`` or
``tensorrt_rtx``. Its dataclass fields are its YAML options, its docstring is its documentation.
Files whose name starts with an underscore are shared by their neighbours and are no plug-ins.

A user's own plug-in is named by its file and its class: ``path/file.py:Class``.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from compress.errors import UnknownNameError, UsageError, absence, did_you_mean
from compress.trust import check_code

KINDS = {
    "criteria": "criterion",
    "losses": "loss",
    "observers": "observer",
    "runtimes": "runtime",
    "data": "kind of data",
    "tasks": "task",
}
PACKAGES = {  # where the files of each kind lie
    "criteria": "compress.prune.criteria",
    "losses": "compress.train.losses",
    "observers": "compress.quantize.observers",
    "runtimes": "compress.runtimes",
    "data": "compress.data",
    "tasks": "compress.tasks",
}
_SPELLED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
    tuple: "a list",
    Sequence: "a list",
    Mapping: "a mapping",
}
_ARGS = re.compile(r"^Args:\n((?: {4}.*\n?)+)\n*", re.M)  # a section of a docstring
_OPTIONS = re.compile(r":(?=[^:/]*=)")  # the colon before the options of a reference
_COMMA = re.compile(r",(?![^\[{]*[\]}])")  # between options, not in a list or a mapping
_HYPHENATED = {"runtimes", "data"}  # tensorrt-rtx, fashion-mnist: as their makers write them

_ROOT = Path(__file__).parents[1]  # of the package "compress"


def names(kind: str) -> list[str]:
    """Return the names of all plug-ins of a folder, sorted, without importing any."""
    if kind not in KINDS:
        raise UnknownNameError("kind of plug-in", kind, KINDS)
    files = _folder(kind).glob("[!_]*.py")
    return sorted(_spoken(kind, file.stem) for file in files)


def documentation(kind: str, name: str) -> str:
    """Return the docstring of a plug-in, read from its source, so that listing imports nothing."""
    own = _own(kind, name)
    if own is None:
        stem = _stem(kind, name)
        file, wanted = _folder(kind) / f"{stem}.py", _class_name(stem)
    else:
        file, wanted = own
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == wanted:
            return inspect.cleandoc(ast.get_docstring(node) or "")
    return inspect.cleandoc(ast.get_docstring(tree) or "")


def plugin_class(kind: str, name: str) -> type[Any]:
    """Import the plug-in ``name`` of ``kind`` and return its class.

    Raises:
        UnknownNameError: there is no such plug-in; the message lists the known ones.
        UsageError: it is a file of the user's own that cannot be imported.
    """
    own = _own(kind, name)
    if own is None:
        stem = _stem(kind, name)
        module = importlib.import_module(f"{PACKAGES[kind]}.{stem}")
        found: type[Any] = getattr(module, _class_name(stem))
        return found
    file, wanted = own
    module = import_file(file, f"a {KINDS[kind]}")
    plugin = getattr(module, wanted, None)
    if not isinstance(plugin, type):
        known = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise UnknownNameError(KINDS[kind], wanted, known, where=str(file))
    return plugin


def options(kind: str, name: str) -> dict[str, Any]:
    """Return the options of a plug-in with their defaults (``dataclasses.MISSING`` = required)."""
    plugin = plugin_class(kind, name)
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
    name, given = read_reference(kind, reference)
    known = options(kind, name)
    values = {key: value for key, value in supplied.items() if key in known} | given
    try:
        return plugin_class(kind, name)(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{KINDS[kind]} {name!r}: {error}") from None


def read_reference(kind: str, reference: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return a name and its options as the types that the plug-in declares: a list as a tuple.

    Raises:
        UnknownNameError: there is no such plug-in.
        UsageError: it has no such option, or one is of another type.
    """
    name, given = parse(kind, reference)
    known = options(kind, name)
    for key in given:
        if key not in known:
            raise UsageError(
                f"{KINDS[kind]} {name!r} has no option {key!r}{did_you_mean(key, known)}",
                expected=f"one of: {', '.join(sorted(known)) or 'none'}",
            )
    return name, _typed(kind, name, given)


def _typed(kind: str, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

    config = ConfigDict(arbitrary_types_allowed=True, coerce_numbers_to_str=True)
    typed = {key: os.fspath(v) if isinstance(v, os.PathLike) else v for key, v in given.items()}
    try:
        hints = get_type_hints(plugin_class(kind, name)) if given else {}
    except (NameError, AttributeError, TypeError):  # of names that only a type checker imports
        return typed
    for key, value in typed.items():
        try:
            typed[key] = TypeAdapter(hints[key], config=config).validate_python(value)
        except PydanticUserError:  # a user's own type
            continue
        except ValidationError:
            raise UsageError(
                f"{KINDS[kind]} {name!r}: {key} is {value!r}", expected=_spelled(hints[key])
            ) from None
    return typed


def documented(kind: str, name: str) -> tuple[str, dict[str, str]]:
    """Return a plug-in's docstring but for its section "Args", and what each option means.

    What its class does not say of an option, a class says that it is derived from.
    """
    told: dict[str, str] = {}
    for each in reversed(plugin_class(kind, name).__mro__):
        for section in _ARGS.findall(inspect.cleandoc(vars(each).get("__doc__") or "")):
            entries = re.split(r"\n    (?=\w+: )", f"\n{section}")[1:]
            parts = (re.sub(r"\s+", " ", entry).strip().partition(": ") for entry in entries)
            told |= {option: text for option, _, text in parts}
    return _ARGS.sub("", documentation(kind, name)).strip(), told


def spelled_types(kind: str, name: str) -> dict[str, str]:
    """Return what each option of a plug-in may be, in the words of YAML."""
    plugin = plugin_class(kind, name)
    try:
        return {option: _spelled(hint) for option, hint in get_type_hints(plugin).items()}
    except (NameError, AttributeError, TypeError):  # of names that only a type checker imports
        fields = dataclasses.fields(plugin) if dataclasses.is_dataclass(plugin) else ()
        return {each.name: str(each.type) for each in fields}


def _spelled(hint: Any) -> str:
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin is Literal:
        return ", ".join(map(str, inner))
    if origin in (Union, UnionType):
        return " or ".join(", ".join(map(_spelled, inner)).rsplit(", ", 1))
    return _SPELLED.get(origin) or str(getattr(origin, "__name__", origin))


def parse(kind: str, reference: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Split ``reference`` into a name and its options.

    Raises:
        UsageError: it is neither a name nor a mapping with one key.
    """
    if isinstance(reference, str):
        return reference, {}
    if not isinstance(reference, Mapping) or len(reference) != 1:
        raise UsageError(
            f"{KINDS[kind]} {reference!r} does not name one plug-in",
            expected="a name, or one name with its options, as in {kd: {temperature: 4.0}}",
        )
    name, given = next(iter(reference.items()))
    if not isinstance(name, str) or not isinstance(given, Mapping | None):
        raise UsageError(
            f"{KINDS[kind]} {name!r} has the options {given!r}",
            expected="a mapping, as in {kd: {temperature: 4.0}}",
        )
    return name, dict(given or {})


def reference(text: str) -> str | dict[str, dict[str, Any]]:
    """Return the reference that ``text`` of a command line stands for.

    Args:
        text: A name, or one with options: ``kd:temperature=4,alpha=0.5``. Values are YAML.

    Raises:
        UsageError: an option has no value, or one that is no YAML.
    """
    found = _OPTIONS.search(text)
    if found is None:
        return text
    name, tail = text[: found.start()], text[found.end() :]
    options = {}
    for part in _COMMA.split(tail):
        key, equals, value = part.partition("=")
        with contextlib.suppress(yaml.YAMLError):
            if key and equals and value:
                options[key] = yaml.safe_load(value)
                continue
        raise UsageError(
            f"{part!r} in {text!r} is no option",
            expected="NAME:OPTION=VALUE,OPTION=VALUE",
        )
    return {name: options}


def _folder(kind: str) -> Path:
    return _ROOT.joinpath(*PACKAGES[kind].split("."))


def _own(kind: str, name: str) -> tuple[Path, str] | None:
    """Return file and class of ``path/file.py:Class``; None for the name of a plug-in here."""
    file, colon, wanted = name.rpartition(":")
    if not colon or not file.endswith(".py"):
        return None
    if not Path(file).is_file():
        raise UsageError(absence(file), where=file, expected=f"a {KINDS[kind]} as FILE.py:CLASS")
    return Path(file), wanted


def import_file(path: Path, expected: str) -> ModuleType:
    """Run a Python file of the user's and return its module.

    It can import the files beside it, then and in its functions. ``expected`` is what it
    should hold, for the message.

    Raises:
        UsageError: there is no such file, or running it fails.
    """
    if not path.is_file():
        raise UsageError(absence(path), where=str(path), expected=expected)
    check_code(str(path))
    name = f"compress_own_{path.stem}_{abs(hash(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError("cannot be imported", where=str(path), expected=expected)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # for the imports of neighbouring files
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"importing it fails: {error!r}", where=str(path)) from error
    finally:  # what it put there itself stays; a neighbour that a function imports is found later
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)
    return module


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
