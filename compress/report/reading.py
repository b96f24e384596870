"""Read run folders: finished, half-finished, damaged, or of a newer version."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress.artifact import check_file, read_json
from compress.errors import RunError, absence, boundary, first_problem, listed
from compress.packages import DISTRIBUTION
from compress.report.charts import learning_curves
from compress.report.run_folder import (
    DONE_FILE,
    RUN_FILE,
    RunFolder,
    recorded_variants,
    stage_folders,
)
from compress.report.schema import (
    SCHEMA,
    ArtifactRecord,
    Curve,
    Details,
    Provenance,
    Report,
    Variant,
)
from compress.report.verdict import verdict

LISTED = 6  # names in one line
UNFINISHED = "the run was stopped before it was measured"


def read_run(folder: Path | str) -> Report:
    """Return the report of a run folder; ``incomplete`` names what is missing or was changed.

    A folder without report.json, or with one about a run that was stopped, is a run that was
    stopped: what its finished stages left is reported, without figures.

    Raises:
        RunError: the folder is no run, or was written by a newer version, or its report is broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(absence(folder, "folder"), where=str(folder), expected="a run folder")
    is_run = (folder / RUN_FILE).is_file()
    if is_run:
        check_schema(read_json(folder / RUN_FILE), folder / RUN_FILE)
    if (folder / "report.json").is_file():
        report = read_report(folder / "report.json")
        if is_run and UNFINISHED in report.skipped.values():  # more may be there by now
            report = _half_finished(folder)
    elif is_run:
        report = _half_finished(folder)
    else:
        raise RunError(
            "this folder is no run",
            where=str(folder),
            expected="a folder with run.json or report.json, as compress run leaves it",
        )
    found = [*report.incomplete, *_damage(report, folder)]
    return report.model_copy(update={"incomplete": tuple(dict.fromkeys(found))})


def read_report(path: Path) -> Report:
    """Return the content of a report.json.

    Raises:
        RunError: it cannot be read, is of a newer schema, or does not fit the schema.
    """
    content = read_json(path)
    check_schema(content, path)
    try:
        return Report.model_validate(content)
    except ValidationError as error:
        raise RunError(
            first_problem(error),
            where=str(path),
            fix="The file was changed or damaged: run the recipe again",
        ) from None


def _damage(report: Report, folder: Path) -> list[str]:
    """Return one line for each recorded file that is missing or no longer what was measured."""
    recorded = {part.path: part.sha256 for part in report.details.artifacts}
    for variant in report.variants:
        if variant.artifact and variant.sha256:
            recorded.setdefault(variant.artifact, variant.sha256)
    checked = (check_file(folder, path, digest) for path, digest in recorded.items())
    findings = [finding for finding in checked if finding]
    absent = [finding.path for finding in findings if finding.problem == "missing"]
    wrong = [
        f"{finding}; the figures are not about this file"
        for finding in findings
        if finding.problem != "missing"
    ]
    return [f"files are missing: {listed(absent, LISTED)}", *wrong] if absent else wrong


def check_schema(content: Any, path: Path) -> None:
    """Raise RunError if ``content`` of the JSON file ``path`` is of a newer version, or of none."""
    if not isinstance(content, dict) or not isinstance(content.get("schema"), int):
        raise RunError("has no schema number", where=str(path), expected=f"schema: 1 to {SCHEMA}")
    if content["schema"] > SCHEMA:
        raise RunError(
            f"was written in schema {content['schema']}, by a newer version",
            where=str(path),
            expected=f"schema {SCHEMA} at most",
            fix=f"Update compress: pip install --upgrade {DISTRIBUTION}",
        )


def _half_finished(folder: Path) -> Report:
    description = RunFolder(folder).description()
    recipe = description.get("recipe") or {}
    with boundary(RunError, "does not describe a run", where=str(folder / RUN_FILE)):
        report = Report(
            name=str(recipe.get("name") or folder.name),
            recipe=recipe,
            provenance=Provenance(seed=recipe.get("seed"), settings=recipe),
            variants=tuple(_variants(folder)),
            details=Details(
                artifacts=tuple(
                    ArtifactRecord.model_validate(part) for part in description["artifacts"]
                ),
                learning=tuple(_learning(folder)),
            ),
            skipped={"everything": UNFINISHED},
            incomplete=tuple(_unfinished(folder)),
        )

    return report.model_copy(update={"verdict": f"Not finished: {UNFINISHED}. {verdict(report)}"})


def _variants(folder: Path) -> Iterator[Variant]:
    for entry in recorded_variants(folder):
        known = {key: entry.get(key) for key in ("name", "stage", "parent", "params", "macs")}
        path = folder / str(entry.get("path"))
        yield Variant(
            **known,
            artifact=entry.get("path"),
            size_mib=path.stat().st_size / 2**20 if path.is_file() else None,
            skipped={"results": UNFINISHED},
        )


def _learning(folder: Path) -> Iterator[Curve]:
    """Yield the learning curves of every stage that trains, also of one that was stopped."""
    for journal in (stage / "training" / "metrics.jsonl" for stage in stage_folders(folder)):
        rows: list[dict[str, Any]] = []
        for line in journal.read_text("utf-8").splitlines() if journal.is_file() else ():
            with contextlib.suppress(ValueError):  # the last line was cut off with the run
                rows.append(json.loads(line))
        yield from learning_curves(journal.parts[-3], rows)


def _unfinished(folder: Path) -> Iterator[str]:
    stages = stage_folders(folder)
    finished = [stage.name for stage in stages if (stage / DONE_FILE).is_file()]
    begun = [stage.name for stage in stages if stage.name not in finished]
    yield f"the run is not finished; finished stages: {listed(finished, LISTED) or 'nothing'}"
    if begun:
        yield f"begun and not finished: {listed(begun, LISTED)}; the same command goes on there"
