"""Check the files of a run against what was recorded when they were written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress import artifact
from compress.artifact import FileProblem
from compress.errors import RunError
from compress.progress import track
from compress.report.reading import check_schema
from compress.report.run_folder import LOCK_FILE, RUN_FILE


@dataclass(frozen=True)
class Verification:
    """The outcome of checking one run folder."""

    run: str
    files: tuple[str, ...]  # checked, in the order they were made
    findings: tuple[FileProblem, ...]
    unrecorded: tuple[str, ...]  # files that lie there and that no stage recorded; no fault

    @property
    def intact(self) -> bool:
        """Whether every recorded file is as it was."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """Return this outcome as JSON-able data."""
        return {**asdict(self), "intact": self.intact}


def verify_files(run: Path) -> Verification:
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
    findings: list[FileProblem] = []
    for entry in track(entries, f"verify {run.name}"):
        finding = artifact.check_file(run, entry["path"], entry["sha256"])
        findings += [finding] if finding else []
        parent = entry.get("parent")
        if parent and parent not in hashes:
            findings.append(FileProblem(entry["path"], "parent unknown", "a recorded file", parent))
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
    check_schema(record, path)
    if not isinstance(record.get("artifacts"), list):
        raise RunError("lists no artifacts", where=str(path), fix="Run the recipe again")
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


def _unrecorded(run: Path, listed: set[str]) -> Iterator[str]:
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.is_file() and name not in {*listed, RUN_FILE, LOCK_FILE}:
            yield name
