"""Check the files of a run against what was recorded when they were written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress import artifact
from compress.errors import RunError
from compress.progress import track
from compress.run_folder import RUN_FILE, SCHEMA


@dataclass(frozen=True)
class Finding:
    """One file of a run and what is wrong with it."""

    path: str
    problem: str  # "missing" | "changed" | "outside the run folder" | "parent unknown"
    expected: str
    found: str = ""

    def __str__(self) -> str:
        tail = f", found {self.found}" if self.found else ""
        return f"{self.path}: {self.problem}; expected {self.expected}{tail}"


@dataclass(frozen=True)
class Verification:
    """The outcome of checking one run folder."""

    run: str
    files: tuple[str, ...]  # checked, in the order they were made
    findings: tuple[Finding, ...]
    unrecorded: tuple[str, ...]  # files that lie there and that no stage recorded; no fault

    @property
    def intact(self) -> bool:
        """Whether every recorded file is as it was."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """Return this outcome as JSON-able data."""
        return {**asdict(self), "intact": self.intact}


def verify(run: Path) -> Verification:
    """Return whether the files of ``run`` are those that its stages wrote.

    **Method:** each file that run.json lists is read whole and its SHA-256 compared with the
    recorded one; each recorded parent must be the hash of another recorded file. The record itself
    is not signed: whoever changes a file and its record alike is not noticed.

    Args:
        run: Run folder. Not modified.

    Raises:
        RunError: the folder holds no run, a damaged record, or one from a newer version.
    """
    record = _record(run)
    entries = record["artifacts"]
    hashes = {entry["sha256"] for entry in entries}
    findings: list[Finding] = []
    for entry in track(entries, f"verify {run.name}"):
        findings += _check_file(run, entry)
        parent = entry.get("parent")
        if parent and parent not in hashes:
            findings.append(Finding(entry["path"], "parent unknown", "a recorded file", parent))
    listed = {entry["path"] for entry in entries}
    return Verification(
        run=run.name,
        files=tuple(entry["path"] for entry in entries),
        findings=tuple(findings),
        unrecorded=tuple(_unrecorded(run, listed)),
    )


def _record(run: Path) -> dict[str, Any]:
    """Return run.json, with every artifact entry complete."""
    path = run / RUN_FILE
    if not path.is_file():
        raise RunError("holds no run", where=str(run), expected=f"a folder with {RUN_FILE}")
    record = artifact.read_json(path)
    if not isinstance(record, Mapping) or not isinstance(record.get("artifacts"), list):
        raise RunError("lists no artifacts", where=str(path), fix="Run the recipe again")
    schema = record.get("schema", SCHEMA)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise RunError(
            f"was written by a newer version: schema {schema}",
            where=str(path),
            expected=f"schema {SCHEMA} or older",
            fix="Install a newer version of compress",
        )
    for number, entry in enumerate(record["artifacts"]):
        complete = isinstance(entry, Mapping) and all(
            isinstance(entry.get(key), str) for key in ("path", "sha256")
        )
        if not complete:
            raise RunError(
                "does not say which file it is about and what its hash was",
                where=f"{path}: artifacts[{number}]",
                expected="path and sha256",
            )
    return dict(record)


def _check_file(run: Path, entry: Mapping[str, Any]) -> Iterator[Finding]:
    path, expected = run / entry["path"], entry["sha256"]
    if not path.resolve().is_relative_to(run.resolve()):
        yield Finding(entry["path"], "outside the run folder", "a path inside it")
    elif not path.is_file():
        yield Finding(entry["path"], "missing", f"a file with SHA-256 {expected}")
    else:
        found = artifact.sha256(path)
        if found != expected:
            yield Finding(entry["path"], "changed", f"SHA-256 {expected}", found)


def _unrecorded(run: Path, listed: set[str]) -> Iterator[str]:
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.is_file() and name not in listed and name != RUN_FILE:
            yield name
