"""Every error raised on purpose, one tree.

CompressError
├── UsageError            an argument or option that cannot be right
│   └── UnknownNameError  a name that is not among the known ones
├── MissingPackageError   an optional package was asked for and is not installed
├── RecipeError           a recipe cannot be read or does not validate
├── ModelError            a network or its weights cannot be loaded or run
├── DataError             images or labels are missing, damaged or do not fit
├── PlanError             a pruning plan cannot be made, read or applied
├── TrainingError         training cannot go on
├── ExportError           a network cannot be written as ONNX
├── QuantizationError     a graph cannot be quantized
├── EngineError           an engine cannot be built, loaded or run
└── RunError              a run folder is not what it should be
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

LONGEST_REASON = 300  # characters of another error's message
UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # categories of Unicode
MOST_NEIGHBOURS = 1000  # names in a folder that a wrong one is compared with
OUT_OF_MEMORY = (  # as allocators, then the interpreter, the linker and C++ say it
    *("out of memory", "can't allocate memory", "not enough memory", "annot allocate memory"),
    *("can't start new thread", "failed to map segment", "error return without exception set"),
    "bad_alloc",
)
_IN_CPP = re.compile(  # a code; file and line, function, assertion
    r"^\[ONNXRuntimeError\] : \d+ : \w+ : |"
    r"(?:Exception during initialization: )?[^\s:]*\.(?:h|hpp|cc|cpp):\d+:? "
    r"(?:\w[\w: ,<>&*]*::~?\w+\(.*?\)(?: const)? )?"
    r"(?:.*? was false\. ?(?=.)|\w+: Assertion `.*?` failed: ?(?=.))?"
)
KEPT = "\n\t\u00ad\u200c\u200d"  # the last three belong to the spelling of some languages


class CompressError(Exception):
    """An error that the user can fix; the command line prints it and exits with code 2.

    Args:
        what: What is wrong, with the offending value.
        where: File, key path, layer or stage it is about.
        expected: The choices or the range that would have been right.
        fix: What to do about it.
    """

    def __init__(self, what: str, *, where: str = "", expected: str = "", fix: str = "") -> None:
        self.what = what
        self.where = where
        self.expected = expected
        self.fix = fix
        super().__init__(what)

    def __str__(self) -> str:
        """Return the parts as one message: where, what, expected, fix."""
        parts = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.expected:
            parts.append(f"Expected {self.expected}")
        if self.fix:
            parts.append(self.fix)
        return printable(
            " ".join(part if part.endswith((".", "?")) else f"{part}." for part in parts)
        )

    def within(self, place: str) -> CompressError:
        """Return this error with ``place`` put before its location; raise it ``from None``."""
        self.where = f"{place}: {self.where}" if self.where else place
        return self


class UsageError(CompressError):
    """An argument or option that cannot be right."""


class UnknownNameError(UsageError):
    """A name that is not among the known ones; the message says which one was probably meant."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, where: str = "") -> None:
        choices = sorted(known)
        super().__init__(
            f"no such {kind} {name!r}{did_you_mean(name, choices)}",
            where=where,
            fix=f"Known: {', '.join(choices) or 'none'}",
        )


class MissingPackageError(CompressError):
    """An optional package was asked for and is not installed."""


class RecipeError(CompressError):
    """A recipe cannot be read or does not validate."""


class ModelError(CompressError):
    """A network or its weights cannot be loaded or run."""


class DataError(CompressError):
    """Images or labels are missing, damaged or do not fit."""


class PlanError(CompressError):
    """A pruning plan cannot be made, read or applied."""


class TrainingError(CompressError):
    """Training cannot go on."""


class ExportError(CompressError):
    """A network cannot be written as ONNX."""


class QuantizationError(CompressError):
    """A graph cannot be quantized."""


class EngineError(CompressError):
    """An engine cannot be built, loaded or run."""


class RunError(CompressError):
    """A run folder is not what it should be."""


@contextlib.contextmanager
def boundary(
    kind: type[CompressError], what: str, *, where: str = "", expected: str = "", fix: str = ""
) -> Iterator[None]:
    """Turn whatever is raised while a file of somebody else is read into one error of ours.

    Parsers, and code that walks what they return, raise errors of many kinds over a damaged file.
    A CompressError passes as it is, with ``where`` if it says no place; the cause of another is
    kept for whoever looks for a bug here, and its first line is added to ``what``.
    """
    try:
        yield
    except CompressError as error:
        error.where = error.where or where
        raise
    except PermissionError as error:
        raise unreadable(kind, error, where) from error
    except Exception as error:
        reason = reason_of(str(error))[:LONGEST_REASON]
        cause = reason if " " in reason else f"{type(error).__name__} {reason}".strip()
        raise kind(f"{what}: {cause}", where=where, expected=expected, fix=fix) from error


def unreadable(kind: type[CompressError], error: OSError, where: str = "") -> CompressError:
    """Return what the system says of a file or folder that it does not let us read."""
    return kind(
        f"cannot be read: {error.strerror or error}",
        where=str(error.filename or where),
        fix="Check its permissions",
    )


def reason_of(told: str) -> str:
    """Return the first line of a library's message, without codes and places in its C++."""
    return _IN_CPP.sub("", (told.strip().splitlines() or [""])[0])


def first_problem(error: Any) -> str:
    """Return the first thing that a ValidationError of pydantic says: "key.path: what"."""
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def is_out_of_memory(error: Exception) -> bool:
    """Return whether ``error`` says that memory ran out."""
    said = not isinstance(error, CompressError) and any(s in str(error) for s in OUT_OF_MEMORY)
    return said or isinstance(error, MemoryError)


def printable(text: str) -> str:
    """Return ``text`` without what a terminal or a browser would obey instead of showing.

    Control characters but newline and tab, marks that turn the direction of writing, and halves of
    characters are written as escapes.
    """
    if text.isprintable():
        return text
    return "".join(
        f"\\u{ord(letter):04x}"
        if unicodedata.category(letter) in UNPRINTABLE and letter not in KEPT
        else letter
        for letter in text
    )


def listed(names: Iterable[str], most: int = 5) -> str:
    """Return "a, b and 3 more": the first ``most`` names, and how many are left out."""
    given = list(names)
    return ", ".join(given[:most]) + f" and {len(given) - most} more" * (len(given) > most)


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return up to ``count`` of ``known`` that look most like ``name``, best first."""
    return difflib.get_close_matches(str(name), list(known), n=count, cutoff=0.5)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ". Did you mean 'x'?" for the likeliest of ``known``, or an empty string."""
    close = nearest(name, known, count=1)
    return f". Did you mean {close[0]!r}?" if close else ""


def absence(path: str | Path, wanted: str = "file") -> str:
    """Return why ``path`` is no such file: what it is, or that it is absent and what lies there.

    ``wanted`` is "file", "folder" or "file or folder".
    """
    path = Path(path)
    if os.path.isdir(path) or os.path.isfile(path):  # which take names of any length
        return f"is a {'folder' if os.path.isdir(path) else 'file'}, not a {wanted}"
    beside: list[Path] = []
    with contextlib.suppress(OSError, ValueError):
        beside = [
            each
            for each in itertools.islice(path.parent.iterdir(), MOST_NEIGHBOURS)
            if wanted != "folder" or each.is_dir()
        ]
    kind = path.suffix  # a network's program is not meant by the name of its weights
    alike = [each for each in beside if not kind or _likeness(each.suffix, kind) > 0.5]
    stems = {each.stem: each for each in alike}  # endings make all names alike
    close = difflib.get_close_matches(path.stem, stems, n=1, cutoff=0.7)
    return f"no such {wanted}" + (f". Did you mean {str(stems[close[0]])!r}?" if close else "")


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
