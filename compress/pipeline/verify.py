"""Check a finished run: its files against their hashes, its figures measured again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from compress import artifact, environment
from compress.artifact import FileProblem
from compress.errors import RunError
from compress.measure import Timing
from compress.pipeline.context import JudgedPredictions, RunContext, StageResult
from compress.pipeline.measure import entries_on, measure_entries, places
from compress.pipeline.task import prepared
from compress.progress import track
from compress.recipe import loading
from compress.report.numbers import factor_within, interval, percent
from compress.report.reading import check_schema, read_report
from compress.report.run_folder import LOCK_FILE, RUN_FILE, RunFolder, recorded_variants
from compress.report.schema import Interval, Report, Result
from compress.runtimes import unavailable
from compress.terminal import table

EQUAL, DIFFERS = "equal", "differs"
FIGURES = {"top1_pct": "top-1, %", "agreement_pct": "same answers, %", "speedup": "speed-up"}


@dataclass(frozen=True)
class Check:
    """One figure of the report and the same figure taken again."""

    variant: str
    runtime: str
    batch: int
    figure: str  # "top1_pct" | "agreement_pct" | "speedup"
    reported: float
    reported_ci95: Interval | None
    measured: float
    measured_ci95: Interval | None
    outcome: str  # "equal" | "differs" | "not compared: ..."


@dataclass(frozen=True)
class Remeasured:
    """All figures of a run that could be taken again, and why others were not."""

    checks: tuple[Check, ...]
    skipped: dict[str, str]
    elsewhere: str  # how this machine differs from the one of the report; empty: it does not

    @property
    def holds(self) -> bool:
        """Whether no figure differs."""
        return all(check.outcome != DIFFERS for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able data."""
        checks = [
            {key: value for key, value in vars(check).items() if value is not None}
            for check in self.checks
        ]
        return {"holds": self.holds} | vars(self) | {"checks": checks}

    def table(self) -> RenderableType:
        """Return the figures side by side, for the terminal."""
        rows = [
            (
                check.variant,
                check.runtime,
                str(check.batch),
                FIGURES[check.figure],
                _figure(check.figure, check.reported, check.reported_ci95),
                _figure(check.figure, check.measured, check.measured_ci95),
                check.outcome,
            )
            for check in self.checks
        ]
        headers = ("variant", "runtime", "batch", "figure", "reported", "now", "outcome")
        lines = [f"not measured: {what}: {why}" for what, why in self.skipped.items()]
        if self.elsewhere:
            lines.insert(0, f"not where the report was made: {self.elsewhere}")
        differing = sum(check.outcome == DIFFERS for check in self.checks)
        lines.append(f"{len(self.checks)} figures taken again, {differing} differ")
        return Group(table(headers, rows, numbers={"reported", "now"}), *map(Text, lines))


def measure_again(root: Path) -> Remeasured:
    """Take accuracy and latency of every variant of a finished, intact run again; change nothing.

    **Method:** as in the run: all test images through the runtime, then all variants of a target
    timed in the same rounds. On the device and versions of the report, accuracy must be equal to
    the last digit: the same file on the same images gives the same answers. Elsewhere, rounding
    may turn single answers: there the new figure must lie in the reported 95 % interval. Speed-ups
    are compared on the same device only; they differ when their 95 % intervals, each widened by
    what the bench calls no difference, do not touch.



    Raises:
        RunError: the run is not finished, or its data are not those it was measured on.
    """
    report = read_report(root / "report.json")
    settings = loading.validate_recipe(report.recipe, where=str(root / "report.json"))
    dataset, task = prepared(settings)
    context = RunContext(settings, RunFolder(root), dataset, task)
    _check_data(context, report)
    recorded = {"variants": recorded_variants(root), "facts": {}}
    variants, checks = StageResult.from_json(recorded).variants, list[Check]()
    skipped: dict[str, str] = {}
    elsewhere = _elsewhere(report)
    for targets in places(settings.targets):
        target = targets[0]
        results = (result for variant in report.variants for result in variant.results)
        reason = unavailable(target.runtime)
        if all((r.runtime, r.batch) != (target.runtime, target.batch) for r in results):
            reason = "the report has no results of it"
        if reason is not None:
            skipped[f"{target.runtime}, batch {target.batch}"] = reason
            continue
        entries = entries_on(context, variants, targets)
        with artifact.scratch() as folder:
            rows, _, _ = measure_entries(context, entries, JudgedPredictions(folder, dataset, task))
        for entry, row in zip(entries, rows, strict=True):
            place = f"{entry.variant.name} on {target.runtime}, batch {target.batch}"
            skipped |= {f"{place}: {what}": why for what, why in row.skipped.items()}
            reported = report.variant(entry.variant.name)
            before = reported.result_like(row) if reported else None
            if before is None:
                skipped[place] = "the report has no such result"
            else:
                checks += _checks(entry.variant.name, before, row, elsewhere)
    return Remeasured(tuple(checks), skipped, elsewhere)


def _check_data(context: RunContext, report: Report) -> None:
    before = report.provenance.data
    if before is None or before.fingerprint != context.dataset.fingerprint:
        raise RunError(
            f"the images of {context.dataset.name} are not those that the run was measured on",
            where=str(context.run.root),
            expected=f"images with the fingerprint {before.fingerprint[:16] if before else '?'}",
            fix="Restore them, or run the recipe again in another folder",
        )


def _elsewhere(report: Report) -> str:
    """Return how this machine and its versions differ from those of the report."""
    here, then = environment.describe_machine(), report.provenance
    pairs = [(then.device, here.get("device", {})), (then.versions, here.get("versions", {}))]
    return ", ".join(
        f"{key}: {before[key]} then, {now.get(key)} now"
        for before, now in pairs
        for key in sorted(before)
        if before[key] != now.get(key)
    )


def _checks(variant: str, before: Result, row: Result, elsewhere: str) -> Iterator[Check]:
    for figure in FIGURES:
        old, new = getattr(before, figure), getattr(row, figure)
        if old is None or new is None or (figure, row.verdict) == ("speedup", "reference"):
            continue
        name = f"{figure.removesuffix('_pct')}_ci95"
        old_ci, new_ci = getattr(before, name), getattr(row, name)
        if figure == "speedup":
            outcome = "not compared: elsewhere" if elsewhere else _touch(old_ci, new_ci)
        elif elsewhere and old_ci is not None:
            outcome = EQUAL if old_ci[0] <= new <= old_ci[1] else DIFFERS
        else:
            outcome = EQUAL if old == new else DIFFERS
        place = (variant, before.runtime, before.batch, figure)
        yield Check(*place, old, old_ci, new, new_ci, outcome)


def _touch(one: Interval | None, other: Interval | None) -> str:
    if one is None or other is None:
        return "not compared: no interval"
    margin = (1 + Timing().resolution_pct / 100) ** 2
    apart = one[1] * margin < other[0] or other[1] * margin < one[0]
    return DIFFERS if apart else EQUAL


def _figure(name: str, value: float, bounds: Interval | None) -> str:
    if name == "speedup":
        return factor_within(value, bounds)
    within = f" ({interval(bounds, 'percent')})" if bounds else ""
    return f"{percent(value)}{within}"


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
    listed = {*(entry["path"] for entry in entries), RUN_FILE, LOCK_FILE}
    there = (path.relative_to(run).as_posix() for path in sorted(run.rglob("*")) if path.is_file())
    return Verification(
        run=run.name,
        files=tuple(entry["path"] for entry in entries),
        findings=tuple(findings),
        unrecorded=tuple(name for name in there if name not in listed),
    )


def _record(run: Path) -> dict[str, Any]:
    """Return run.json, with every artifact entry complete."""
    path, record = run / RUN_FILE, RunFolder(run).description()
    check_schema(record, path)
    if not isinstance(record.get("artifacts"), list):
        raise RunError("lists no artifacts", where=str(path), fix="Run the recipe again")
    for number, entry in enumerate(record["artifacts"]):
        complete = isinstance(entry, Mapping) and all(
            isinstance(entry.get(key), kinds)
            for key, kinds in (("path", str), ("sha256", str), ("parent", str | None))
        )
        if not complete:
            raise RunError(
                "does not say which file it is about and what its hash was",
                where=f"{path}: artifacts[{number}]",
                expected="path and sha256, and the hash of its parent or none",
            )
    return dict(record)
