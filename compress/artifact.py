"""Files that stages leave behind: written whole or not at all, hashed, with their lineage."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compress.errors import RunError

FULL_BYTES = 1 << 16  # a disk with less room than this is full


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


def describe(
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
class Finding:
    """One recorded file and what is wrong with it."""

    path: str
    problem: str  # "missing" | "changed" | "outside the run folder" | "parent unknown"
    expected: str
    found: str = ""

    def __str__(self) -> str:
        tail = f", found {self.found}" if self.found else ""
        return f"{self.path}: {self.problem}; expected {self.expected}{tail}"


def check(root: Path, path: str, digest: str) -> Finding | None:
    """Return what is wrong with a file that was recorded as ``path`` with SHA-256 ``digest``."""
    file = root / path
    if not file.resolve().is_relative_to(root.resolve()):
        return Finding(path, "outside the run folder", "a path inside it")
    if not file.is_file():
        return Finding(path, "missing", f"a file with SHA-256 {digest}")
    found = sha256(file)
    return None if found == digest else Finding(path, "changed", f"SHA-256 {digest}", found)


def sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` if the block succeeds.

    A reader sees the old file or the new one, never a part of one; if the block fails the temporary
    file is removed and the old file is as it was.

    Raises:
        RunError: the disk is full or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise _cannot_write(path, error) from None
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes it private
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    except Exception as error:  # writers in C++ tell a full disk in words of their own
        if shutil.disk_usage(path.parent).free < FULL_BYTES:
            raise _cannot_write(path, OSError(errno.ENOSPC, str(error))) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` in one step."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write ``content`` to ``path`` as UTF-8 in one step."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` to ``path`` as JSON in one step; the same content gives the same bytes."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        RunError: it is absent, cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunError(f"cannot be read as JSON: {error}", where=str(path)) from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _cannot_write(path: Path, error: OSError) -> RunError:
    full = error.errno in {errno.ENOSPC, errno.EDQUOT}
    return RunError(
        "the disk is full" if full else f"cannot be written: {error.strerror or error}",
        where=str(path),
        fix="Free some space and run the same command with --resume"
        if full
        else "Check the path and its permissions",
    )
