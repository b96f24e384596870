"""Which code may run: what the command line names, what was agreed to before, or all with --trust.

The command line limits itself to these; a Python program, which is code already, is not limited.
The limit is an environment variable, so that processes that are started obey it as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from compress.artifact import cache_folder, sha256
from compress.errors import UsageError

VARIABLE = "COMPRESS_CODE_ALLOWED"  # what was typed, a JSON list; everything may run if absent
EVERYTHING = "null"  # its value after --trust
# Networks of this package, which recipes name as code; the last three as they once were named.
OWN = frozenset(
    f"compress.{name}"
    for name in ("models.cifar", "models.detector", "models.restoration", "networks", "detector")
)
BUILDERS = ("torchvision", "timm")  # not code of the file's: a name of theirs
FREE = {"weights", "teacher_weights"}  # keys whose text is never run
FIX = "Read that code; if you trust whoever wrote it, give the same command with --trust"
_CODE = re.compile(r"(.+\.py|[A-Za-z_]\w*(?:\.\w+)*):[A-Za-z_]\w*")


@contextlib.contextmanager
def limited(arguments: Sequence[str]) -> Iterator[None]:
    """Let only code run that ``arguments`` name, as they were typed, until the block ends."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = json.dumps(list(arguments))
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


def allow_all() -> None:
    """Let everything run, and remember it: what --trust does. Outside a limit nothing changes."""
    if VARIABLE in os.environ:
        os.environ[VARIABLE] = EVERYTHING


def is_limited() -> bool:
    """Return whether some code may not run: on the command line, without --trust."""
    return os.environ.get(VARIABLE, EVERYTHING) != EVERYTHING


def allow(typed: str) -> None:
    """Let run what is named in an answer that was typed."""
    if is_limited():
        os.environ[VARIABLE] = json.dumps([*json.loads(os.environ[VARIABLE]), typed])


def check_code(source: str) -> None:
    """Refuse to import ``path/file.py`` or ``package.module``, as named, that nobody agreed to.

    Raises:
        UsageError: a file named it, not the command line, and it did not run here before.
    """
    if source in OWN:
        return
    if not is_allowed(source):
        raise UsageError(
            "is code that the command line does not name; nothing of it was run",
            where=source,
            expected="your agreement",
            fix=FIX,
        )
    if VARIABLE in os.environ:
        _remember(_identity(source))


def agree(content: Any) -> None:
    """Note that the user agreed to the code that ``content`` names, as it is now."""
    for reference in code_in(content).values():
        _remember(_identity(reference.rpartition(":")[0]))


def check_engine(path: Path) -> None:
    """Refuse an engine that was not built by this user: loading one runs what is in it.

    Raises:
        UsageError: nobody agreed to it.
    """
    if is_limited() and not _is_remembered(sha256(path)):
        raise UsageError(
            "is an engine that was not built by you on this machine, and loading it runs code",
            where=str(path),
            fix="Build it here from its ONNX file (compress build), or give --trust if you know "
            "where it comes from",
        )


def remember_engine(path: Path) -> None:
    """Note that this user built an engine."""
    _remember(sha256(path))


def is_allowed(source: str) -> bool:
    """Return whether a Python file or module may be imported."""
    typed = os.environ.get(VARIABLE)
    if typed in (None, EVERYTHING) or source in OWN:
        return True
    named = any(
        f"{source}:" in each or Path(each.rpartition(":")[0]) == Path(source)
        for each in json.loads(typed)
    )
    return named or _is_remembered(_identity(source))


def code_in(content: Any, place: str = "") -> dict[str, str]:
    """Return every reference to code in a recipe, also of saved networks: place -> reference."""
    found: dict[str, str] = {}
    if isinstance(content, dict):
        for key, value in content.items():
            if key not in FREE:
                found |= code_in(key, f"{place}.{key}") | code_in(value, f"{place}.{key}")
    elif isinstance(content, list | tuple):
        for number, value in enumerate(content):
            found |= code_in(value, f"{place}[{number}]")
    elif isinstance(content, str):
        name = place.removeprefix(".")
        match = _CODE.fullmatch(content)
        if match and match[1] not in (*BUILDERS, *OWN):
            found[name] = content
        elif (inside := _saved_reference(content)) is not None:
            found |= code_in(inside, f"{name}: {content}/model.json: reference")
    return found


def check_recipe(content: Any) -> str | None:
    """Return what a recipe will run of other people's code, to be told first; None for nothing.

    Raises:
        UsageError: nobody agreed to some of it; all of it is listed.
    """
    found = {}
    for place, reference in code_in(content).items():
        source = reference.rpartition(":")[0]
        if not source.endswith(".py") or Path(source).is_file():  # others tell of absent files
            found[place] = reference
    listed = "; ".join(f"{reference} ({place})" for place, reference in found.items())
    if not all(is_allowed(reference.rpartition(":")[0]) for reference in found.values()):
        raise UsageError(f"this would run code: {listed}", expected="your agreement", fix=FIX)
    return f"runs the code of {listed}" if found and not is_limited() else None


def _saved_reference(text: str) -> str | None:
    """Return the reference in the model.json of a folder of that name, or of its last stage."""
    folder = Path(text)
    with contextlib.suppress(OSError, ValueError):
        if len(text) < 4096 and folder.is_dir():
            stages = sorted(folder.glob("[0-9][0-9]-*/model.json"))
            for file in (folder / "model.json", *reversed(stages)):
                if file.is_file():
                    content = json.loads(file.read_text("utf-8"))
                    return str(content.get("reference")) if isinstance(content, dict) else None
    return None


def _identity(source: str) -> str:
    """Return what a source is remembered by: a file by its place and content, a module by name."""
    path = Path(source)
    if source.endswith(".py") and path.is_file():
        return f"{path.resolve()}\n{sha256(path)}"
    return f"module {source}"


def _remember(identity: str) -> None:
    with contextlib.suppress(OSError):  # without a cache it is asked again
        note = _note(identity)
        note.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        note.touch()


def _is_remembered(identity: str) -> bool:
    with contextlib.suppress(OSError):
        return _note(identity).is_file()
    return False


def _note(identity: str) -> Path:
    name = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()
    return cache_folder() / "agreed" / name
