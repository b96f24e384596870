"""Files that stages leave behind: written whole or not at all, hashed, with their lineage."""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compress import progress
from compress.errors import RunError, boundary, printable

FULL_BYTES = 1 << 16  # what is written to find out whether there is room
_FREE = "Free some space and give the same command again"
FULL = {  # by the error's number: what it means, and what to do
    errno.ENOSPC: ("the disk is full", _FREE),
    errno.EDQUOT: ("your quota of the disk is used up", _FREE),
    errno.EFBIG: ("is larger than a file may be here", "Raise the limit (ulimit -f)"),
}
_STREAM = "iostream error"  # of C++, which says no more and may have removed what it began
TEMPORARY = ".compress-writing-"  # begins the name of a file that is not yet whole
TICK_NS = 10_000_000  # of the clock by which changes of files are dated, at most
LARGEST_TEXT = 1 << 28  # bytes of JSON or YAML: a report with all its images has some MiB


@dataclass(frozen=True)
class Artifact:
    """One file of a run: what it is, what it was made from, and by which stage and settings."""

    path: str  # relative to the run folder
    sha256: str
    stage: str
    parent: str | None = None  # sha256 of the artifact it was made from
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return this artifact as JSON-able data."""
        return asdict(self)


def describe_file(
    path: Path,
    *,
    root: Path,
    stage: str,
    parent: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Artifact:
    """Return the Artifact of an existing file below ``root``."""
    return Artifact(
        path=path.relative_to(root).as_posix(),
        sha256=sha256(path),
        stage=stage,
        parent=parent,
        settings=dict(settings or {}),
    )


@dataclass(frozen=True)
class FileProblem:
    """One recorded file and what is wrong with it."""

    path: str
    problem: str  # "missing" | "changed" | "outside the run folder" | "parent unknown"
    expected: str
    found: str = ""

    def __str__(self) -> str:
        tail = f", found {self.found}" if self.found else ""
        name = printable(self.path).replace("\n", "\\n")
        return f"{name}: {self.problem}; expected {self.expected}{tail}"


def inside(root: Path, path: str) -> Path:
    """Return the file that a run recorded as ``path``.

    Raises:
        RunError: it leads out of ``root``, as no run records it.
    """
    try:
        place = (root / path).resolve()
        place.is_file()  # fails for a name that no file can have: too long, or with a NUL byte
        lies_inside = place.is_relative_to(root.resolve())
    except (OSError, ValueError):
        lies_inside = False
    if not lies_inside:
        raise RunError(
            f"its file {path!r} lies outside the run folder",
            where=str(root),
            fix="Do not use this folder unless you trust who wrote it",
        )
    return root / path


def check_file(root: Path, path: str, digest: str) -> FileProblem | None:
    """Return what is wrong with a file that was recorded as ``path`` with SHA-256 ``digest``."""
    try:
        file = inside(root, path)
    except RunError:
        return FileProblem(path, "outside the run folder", "a path inside it")
    if not file.is_file():
        return FileProblem(path, "missing", f"a file with SHA-256 {digest}")
    found = sha256(file)
    return None if found == digest else FileProblem(path, "changed", f"SHA-256 {digest}", found)


def sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file, which is read again only when it has changed."""
    return _digest(path, state_of(path))


@functools.lru_cache(maxsize=4096)
def _digest(path: Path, state: tuple[int, ...]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_of(path: Path) -> tuple[int, ...]:
    """Return size, times and identity of a file, which differ after any change: a key for caches.

    A change within the same tick of the clock would not show, so this waits until the next one is
    past: two ticks, as the clock that dates changes is behind by up to one. A file dated in the
    future, as by the clock of a file server, has a new state at every call.
    """
    found = path.stat()
    while 0 <= (age := time.time_ns() - found.st_ctime_ns) < 2 * TICK_NS:
        time.sleep((2 * TICK_NS - age) / 1e9)
        found = path.stat()
    now = time.time_ns() if age < 0 else 0
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, now


def check_no_folder(out: str | Path) -> None:
    """Raise RunError where ``out``, a file that is going to be written, is a folder."""
    if Path(out).is_dir():
        raise RunError("is a folder", where=str(out), expected="the name of a file to write")


def make_folder(path: Path) -> None:
    """Make a folder, unless it is there.

    Raises:
        RunError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from None


def check_other_file(path: str | Path, out: str | Path) -> None:
    """Raise RunError where ``out`` is the file ``path``, which would be lost, or a folder."""
    check_no_folder(out)
    if Path(out).resolve() == Path(path).resolve():
        raise RunError(
            "is the file that is read, and would be lost",
            where=str(out),
            fix="Give the result a name of its own",
        )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` if the block succeeds.

    A reader sees the old file or the new one, never a part of one; if the block fails the temporary
    file is removed and the old file is as it was.

    Raises:
        RunError: the disk is full, the folder cannot be written, or ``path`` is one.
    """
    check_no_folder(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, suffix=path.suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise _cannot_write(path, error) from None
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.umask(mask := os.umask(0))
        temporary.chmod(0o666 & ~mask)  # mkstemp makes it private
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    except Exception as error:  # writers in C++ tell a full disk in words of their own
        try:
            _try_room(temporary)
        except OSError as full:
            raise _cannot_write(path, full) from error
        if _STREAM in str(error):
            raise RunError(
                "cannot be written whole: the disk is full, or a file may not be so large",
                where=str(path),
                fix=f"{_FREE}; or raise the limit of a file (ulimit -f)",
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _try_room(path: Path) -> None:
    """Write a little more to a file that could not be written; OSError says why that fails."""
    with path.open("ab") as file:
        file.write(bytes(FULL_BYTES))
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Yield a temporary folder, which is removed after the block.

    Raises:
        RunError: there is no place for it, or no room in it.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="compress-", ignore_cleanup_errors=True)
    except OSError as error:
        raise RunError(
            f"no temporary folder can be written: {error.strerror or error}",
            fix="Set TMPDIR to a folder with some free space",
        ) from None
    with folder as name:
        try:
            yield Path(name)
        except OSError as error:
            if error.errno in FULL:
                raise _cannot_write(Path(name), error) from error
            raise


def is_utf8(path: Path) -> bool:
    """Return whether runtimes can be told ``path``: a file system takes any bytes, they do not."""
    return not any("\ud800" <= letter <= "\udfff" for letter in str(path.absolute()))


def cache_folder() -> Path:
    """Return the folder for what outlives a run: measurements, and which code was agreed to.

    Without a home it is one that ends with the process.
    """
    chosen = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(chosen) if chosen else Path.home() / ".cache") / "compress"
    except RuntimeError:  # neither HOME nor an entry for this user
        return _homeless()


@functools.cache
def _homeless() -> Path:
    progress.warn("there is no home folder: what is measured is not kept. Set XDG_CACHE_HOME")
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(scratch())


def is_temporary(path: Path) -> bool:
    """Return whether a file is one that :func:`replacing` had not finished when it was killed."""
    return path.name.startswith(TEMPORARY)


def remove_temporaries(folder: Path) -> None:
    """Remove every temporary file below ``folder``; nobody else may be writing there.

    Raises:
        RunError: one cannot be removed.
    """
    for path in folder.rglob(f"{TEMPORARY}*"):
        try:
            path.unlink()
        except OSError as error:
            raise _cannot_write(path, error) from None


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` in one step."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write ``content`` to ``path`` as UTF-8 in one step."""
    write_bytes(path, content.encode("utf-8", "backslashreplace"))  # halves of characters


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` to ``path`` as JSON in one step; the same content gives the same bytes."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_text(path: Path, *, failed: str = "cannot be read") -> str:
    """Return the content of a file as UTF-8; ``failed`` is what to say if it cannot be read.

    A pipe or a device, which may never end, is refused.

    Raises:
        RunError: it is absent, no regular file, too large, or no text.
    """
    with boundary(RunError, failed, where=str(path)):
        if path.exists() and not path.is_file():
            raise RunError("is no file", where=str(path), expected="a file of text")
        if path.stat().st_size > LARGEST_TEXT:
            raise RunError(
                f"has {path.stat().st_size} bytes",
                where=str(path),
                expected=f"at most {LARGEST_TEXT >> 20} MiB of text",
            )
        return path.read_text(encoding="utf-8")


def check_room(path: Path, claimed: int) -> None:
    """Refuse a file that claims so many bytes, once unpacked, as there is no memory for.

    Raises:
        RunError: there is less memory; none was taken.
    """
    import psutil

    free = psutil.virtual_memory().available
    if not 0 <= claimed <= free:
        raise RunError(
            f"claims to hold {claimed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of memory are "
            "free",
            where=str(path),
            fix="Check where the file comes from; copy it again and compare its SHA-256",
        )


def check_zip(path: Path) -> None:
    """Refuse a zip archive whose members claim more memory than there is; others pass.

    Raises:
        RunError: it claims more.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            check_room(path, sum(member.file_size for member in archive.infolist()))


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; its numbers are finite.

    Raises:
        RunError: it is absent, cannot be read, or is no JSON.
    """
    failed = "cannot be read as JSON"
    text = read_text(path, failed=failed)
    with boundary(RunError, failed, where=str(path)):
        return json.loads(text, parse_float=_finite, parse_constant=_finite)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


def _cannot_write(path: Path, error: OSError) -> RunError:
    told, fix = FULL.get(error.errno or 0, ("", "Check the path and its permissions"))
    return RunError(
        told or f"cannot be written: {error.strerror or error}", where=str(path), fix=fix
    )
