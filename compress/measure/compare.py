"""``compress compare``: where two artifacts answer differently, and from which tensor on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from compress import evaluate
from compress.data import Dataset
from compress.errors import DataError, EngineError, UsageError
from compress.evaluate import ClassEvaluation, Evaluation, comparison
from compress.evaluate.bisection import PLAIN, Bisection, precision_of
from compress.evaluate.bisection import bisect as first_difference
from compress.evaluate.comparison import Comparison
from compress.evaluate.feeding import arrays_for, leading_input
from compress.evaluate.predictions import Predictions
from compress.graph import files
from compress.measure.artifacts import Candidate, candidates_of, names_classes, outputs_of
from compress.report import numbers
from compress.report.run_folder import one_artifact
from compress.runtimes import Session, open_session, runtime_class
from compress.tasks import Kind, Primary, Task, default_task, load_task
from compress.terminal import table

BISECT_IMAGES = 8  # enough to tell noise from an error; more only takes longer
WHY_NO_ANSWERS = "the images have no labels, or the networks do not name one class an image"
SHOWN = 5  # flips, classes and tensors listed; --json holds all
_CHANGES = {"int8": "quantization", "fp16": "half precision", "fp32": "conversion"}


@dataclass(frozen=True)
class ChainStep:
    """One form of the network, what it is worth, and what changed on the way to it."""

    name: str  # "a.onnx", "b.onnx, node by node", "b.onnx, as it runs"
    error: str  # what was done to get here: "export", "quantization", "engine"; "" for the first
    worth: Mapping[str, Any]  # top-1, or the task's metrics
    added: Comparison | None = None  # of classes, against the step before; None for the first
    change: Mapping[str, Any] = field(default_factory=dict)  # against the first step

    def to_json(self) -> dict[str, Any]:
        """Return this step as JSON-able data."""
        told = {"name": self.name} | ({"error": self.error} if self.error else {}) | {**self.worth}
        if self.added is None:
            return told | {**self.change}
        return told | {"added": self.added.row(), "total": self.change}


@dataclass(frozen=True)
class Compared:
    """A candidate against its reference."""

    reference: str
    candidate: str
    classes: tuple[str, ...]
    images: int
    answers: Comparison | None  # None where images have no classes, or the networks name none
    steps: tuple[ChainStep, ...]  # the chain from the one to the other, by classes or by a task
    outputs: Mapping[str, Any]  # of other networks: drift of each output, agreement if there is one
    bisection: Bisection | None

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON-able data."""
        told: dict[str, Any] = {
            "reference": self.reference,
            "candidate": self.candidate,
            "classes": list(self.classes),
            **(self.answers.to_json() if self.answers is not None else {}),
            "chain": [step.to_json() for step in self.steps],
            "images": self.images,
        }
        if self.answers is None and self.steps:
            told |= self.steps[-1].change
        elif self.answers is None:
            told["skipped"] = {"accuracy": WHY_NO_ANSWERS}
        told |= self.outputs
        if self.bisection is not None:
            told["bisect"] = self.bisection.to_json()
        return told

    def table(self) -> RenderableType:
        """Return the facts, the chain, what lost most, and the first divergence, as tables."""
        title = f"{self.candidate} against {self.reference}, {self.images} images"
        parts: list[RenderableType] = []
        if self.answers is not None:
            parts += [_facts(self.answers, title), _chain(self.steps)]
            if self.answers.flips:
                parts += [_classes(self.answers), _flips(self.answers, self.classes)]
        elif self.steps:
            parts += [_metrics(self.steps[0].worth, self.steps[-1], title), _judged(self.steps)]
        if self.outputs:
            share = numbers.share(self.outputs, "agreement_pct")
            alike = f"same answer: {share} % of images" * ("agreement_pct" in self.outputs)
            heading = title if self.answers is None else "Outputs"
            parts.append(_drifts(self.outputs["outputs"], heading, alike))
        if self.bisection is not None:
            parts.append(_bisection(self.bisection))
        return Group(*parts)


def compare_artifacts(
    reference: Path,
    candidate: Path,
    dataset: Dataset,
    *,
    task: str | Mapping[str, Any] | None = None,
    bisect: bool = False,
    limit: int | None = None,
    threads: int | None = None,
) -> Compared:
    """Compare two artifacts of one network on the test images.

    **Method:** each runs where it belongs: ONNX files on ONNX Runtime, engines on their own
    runtime, stage folders in PyTorch. A candidate that is an ONNX file is also run node by node in
    plain float arithmetic, nothing fused: what it loses there is the graph's fault (export,
    quantization), what it loses beyond that is the runtime's.

    Args:
        reference: ONNX file, engine or stage folder.
        candidate: The same.
        dataset: Images; without labels the predictions are compared, or all outputs without a task.
        task: What the networks are for. If absent, that of the labels; outputs alone are compared
            where images have one class and a network gives no scores of them.
        bisect: Find the first tensor that differs; both must be ONNX files.
        limit: Compare on so many images only, from all over the set.
        threads: CPU threads; all cores if absent.

    Raises:
        UsageError: ``bisect`` and one of the two is no ONNX file, or there is no such task.
        EngineError: one of them cannot be opened or run, or answers with what the task cannot read.
        DataError: they do not answer the same images with the same classes, or the task needs
            other labels.
    """
    if bisect and not reference.suffix == candidate.suffix == ".onnx":
        raise UsageError(
            f"--bisect cannot read {reference.name} and {candidate.name}", expected="two ONNX files"
        )
    judge = _judge(task, dataset)
    old, new = candidates_of([one_artifact(reference), one_artifact(candidate)], threads=threads)
    is_named = judge is None or judge.tells_classes
    for each in (old, new):  # a file that cannot be opened or fed is told before the long work
        with _opened(each, each.reference) as session:
            is_named &= names_classes(session, dataset)
    answers, steps, images = None, list[ChainStep](), 0
    if is_named or judge is not None:
        forms = _forms(old, new, dataset, "classification" if is_named else judge, limit)
        images = forms[0][-1].images
        named = [
            (name, error, own.logits)
            for name, error, own in forms
            if isinstance(own, ClassEvaluation)
        ]
        steps = chain(named) if named else list(_by_task(forms))
        if named:
            answers = comparison.compare_predictions(named[0][-1], named[-1][-1], dataset.classes)
    outputs: dict[str, Any] = {}
    if is_named or judge is None:
        outputs, images = _drifts_of(old, new, dataset, limit, is_named=is_named, images=images)
    return Compared(
        reference=old.name,
        candidate=new.name,
        classes=dataset.classes,
        images=images,
        answers=answers,
        steps=tuple(steps),
        outputs=outputs,
        bisection=_bisected(old, new, dataset) if bisect else None,
    )


def _judge(reference: str | Mapping[str, Any] | None, dataset: Dataset) -> Task | None:
    """Return the task that predictions are judged by; None: by classes, if they are named."""
    if reference is None and dataset.target in ("class", "none"):
        return None
    reference = reference or default_task(dataset.target)
    task = load_task(reference, classes=dataset.classes)
    if dataset.target == "none" and task.kinds:  # its predictions are compared all the same
        return load_task({default_task("none"): {"of": reference}}, classes=dataset.classes)
    evaluate.check_labels(dataset, task)
    return task


@contextlib.contextmanager
def _opened(candidate: Candidate, runtime: Any) -> Iterator[Session]:
    """Open a candidate; errors of its answers name its file."""
    with open_session(candidate.path, runtime, threads=candidate.threads) as session:
        try:
            yield session
        except (DataError, EngineError) as error:
            raise error.within(str(candidate.path)) from None


def _forms(
    old: Candidate, new: Candidate, dataset: Dataset, task: Any, limit: int | None
) -> list[tuple[str, str, Evaluation]]:
    """Return how good the reference, the candidate's graph and the candidate are."""
    forms: list[tuple[str, str, Candidate, Any]] = [(old.name, "", old, old.reference)]
    error = "all of it"
    if new.path.suffix == ".onnx":
        change, error = _CHANGES[precision_of(files.load(new.path))], "engine"
        if change == "conversion" and runtime_class(old.runtime).opens == "network":
            change = "export"
        forms.append((f"{new.name}, node by node", change, new, PLAIN))
    forms.append((f"{new.name}, as it runs", error, new, new.reference))
    found = []
    for name, done, candidate, runtime in forms:
        with _opened(candidate, runtime) as session:
            own = evaluate.of_task(session, dataset, task, limit=limit, title=candidate.name)
            found.append((name, done, own))
    return found


def chain(forms: Sequence[tuple[str, str, Predictions]]) -> list[ChainStep]:
    """Return what each form of a network adds to the error, and what it comes to.

    Differences to the step before tell who is to blame; they do not add up to the difference to
    the first, because errors can cancel or compound. ``forms`` are for each its name, what was done
    to get there, and its answers.

    Raises:
        DataError: two forms did not answer the same images.
    """
    steps = []
    for before, (name, error, own) in zip([None, *forms], forms, strict=False):
        worth = {"top1_pct": 100 * float(own.correct.mean())}
        if before is None:
            steps.append(ChainStep(name, error, worth))
        else:
            added, total = (
                comparison.compare_predictions(each[-1], own) for each in (before, forms[0])
            )
            steps.append(ChainStep(name, error, worth, added, total.row()))
    return steps


def _by_task(forms: Sequence[tuple[str, str, Evaluation]]) -> Iterator[ChainStep]:
    """Yield what each form is worth at a task; without labels the change is in its outputs."""
    first = forms[0][-1]
    for name, error, own in forms:
        change = {} if own is first else own.change_row(first)
        yield ChainStep(name, error, own.row(), change=change)


def _drifts_of(
    old: Candidate,
    new: Candidate,
    dataset: Dataset,
    limit: int | None,
    *,
    is_named: bool,
    images: int,
) -> tuple[dict[str, Any], int]:
    """Return the drift of each output, the share of equal answers, and how many images it is of.

    A network that names classes is compared by its answers, and so only if it has more outputs.
    """
    answers = []
    for each in (old, new):
        with each.open() as session:
            if is_named and len(session.outputs) == 1:
                return {}, images
            answers.append(outputs_of(session, dataset, limit))
    found = comparison.outputs_row(*answers)
    return ({"outputs": found["outputs"]}, images) if is_named else (found, len(answers[0]))


def _bisected(old: Candidate, new: Candidate, dataset: Dataset) -> Bisection:
    with old.open() as session:
        shape = leading_input(session.inputs, dataset).shape
        fixed = shape[0] if shape else None
        size = fixed if isinstance(fixed, int) else BISECT_IMAGES
        some = dataset.with_fewer("test", max(size, BISECT_IMAGES))
        inputs = [
            tuple(arrays_for(session.inputs, images, dataset))
            for images, _ in some.pictures("test", size)
            if len(images) == size or not isinstance(fixed, int)
        ]
    return first_difference(old.path, new.path, inputs)


def _facts(answers: Comparison, title: str) -> Table:
    row = answers.row()
    bounds = numbers.interval(answers.top1_change_ci95, "points")
    change = f"{numbers.points(answers.top1_change_pct)} points (95 % {bounds})"
    largest, mean = answers.logits.max_abs_diff, answers.logits.mean_abs_diff
    rows = [
        ("top-1", f"{change}: {answers.verdict}, p = {answers.top1_p_value:.3g}"),
        ("same answer", f"{numbers.share(row, 'agreement_pct')} %"),
        ("was right, now wrong", f"{answers.flip_pct:.2f} %"),
        ("was wrong, now right", f"{answers.won_pct:.2f} %"),
        ("logits, SQNR", f"{row['sqnr_db']:.1f} dB" if "sqnr_db" in row else "equal"),
        ("logits, difference", f"{largest:.3g} at most, {mean:.3g} on average"),
        ("calibration error", f"{numbers.points(answers.ece_change_pct)} points"),
    ]
    return table(("", "value"), rows, title=title)


def _chain(steps: Sequence[ChainStep]) -> Table:
    headers = ("top-1 %", "SQNR dB", "agreement %", "SQNR dB so far")
    rows = []
    for step in steps:
        added = {} if step.added is None else step.added.row()
        top1, same = f"{step.worth['top1_pct']:.2f}", numbers.number(added.get("agreement_pct"))
        ratios = map(numbers.ratio_db, (added, step.change))
        rows.append((step.name, step.error or "reference", top1, next(ratios), same, next(ratios)))
    return table(("step", "error", *headers), rows, title="What each step adds", numbers=headers)


def _classes(answers: Comparison) -> Table:
    rows = []
    for drop in answers.class_drops[:SHOWN]:
        bounds = numbers.interval(drop.drop_ci95, "percent")
        rows.append((drop.name, str(drop.images), f"{numbers.percent(drop.drop_pct)} ({bounds})"))
    headers = ("images", "recall lost, points (95 %)")
    return table(("class", *headers), rows, title="Classes that lost most", numbers=headers)


def _flips(answers: Comparison, names: Sequence[str]) -> Table:
    flips = answers.flips
    rows = [
        (
            str(flip.index),
            names[flip.label],
            f"{names[flip.before]} ({flip.before_confidence_pct:.0f} %)",
            f"{names[flip.after]} ({flip.after_confidence_pct:.0f} %)",
            flip.kind,
        )
        for flip in flips[:SHOWN]
    ]
    more = f"{SHOWN} of {len(flips)}; --json FILE holds all" if len(flips) > SHOWN else ""
    headers = ("image", "label", "before", "after", "outcome")
    return table(headers, rows, title="Images answered differently", caption=more)


def _metrics(first: Mapping[str, Any], last: ChainStep, title: str) -> Table:
    """Return each metric of both and its change, or outputs where the images have no labels."""
    if "metrics" not in first:
        return _drifts(
            last.change["outputs"], title, f"no accuracy: {first['skipped']['accuracy']}"
        )
    rows = []
    for name, before in first["metrics"].items():
        change, after = last.change["changes"][name], last.worth["metrics"][name]
        moved = f"{_value(change, '+')}: {change['verdict']}"
        rows.append((_title(name, before), _value(before), _value(after), moved))
    return table(("", "reference (95 %)", "candidate (95 %)", "change (95 %)"), rows, title=title)


def _judged(steps: Sequence[ChainStep]) -> Table:
    name = steps[0].worth.get("primary")
    headers = ["agreement"]
    if name is not None:
        headers.insert(0, _title(name, steps[0].worth["metrics"][name]))
    rows = []
    for step in steps:
        value = [] if name is None else [_value(step.worth["metrics"][name])]
        rows.append((step.name, step.error or "reference", *value, _alike(step.change)))
    title = "Each step against the reference"
    return table(("step", "error", *headers), rows, title=title, numbers=headers)


def _title(name: str, metric: Mapping[str, Any]) -> str:
    return Primary(name, Kind(metric["unit"], title=metric.get("title", ""))).title


def _alike(change: Mapping[str, Any]) -> str:
    if "agreement_pct" in change:
        return f"{numbers.share(change, 'agreement_pct')} %"
    if "agreement" in change:
        return f"{_value(change['agreement'])} {change['agreement']['unit']}".rstrip()
    return numbers.ABSENT


def _value(metric: Mapping[str, Any], sign: str = "") -> str:
    low, high = metric.get("ci95") or (None, None)
    bounds = "" if low is None else f" ({low:{sign}.2f}..{high:{sign}.2f})"
    return f"{metric['value']:{sign}.2f}{bounds}"


def _drifts(outputs: Mapping[str, Mapping[str, Any]], title: str, caption: str) -> Table:
    rows = [
        (name, numbers.ratio_db(drift), f"{drift['max_abs_diff']:.3g}")
        for name, drift in outputs.items()
    ]
    headers = ("SQNR dB", "largest difference")
    return table(("output", *headers), rows, title=title, caption=caption, numbers=headers)


def _bisection(found: Bisection) -> Table:
    first = found.first
    title = (
        f"No tensor falls below {found.threshold_db:g} dB"
        if first is None
        else f"First tensor below {found.threshold_db:g} dB: {first.name} ({first.op})"
    )
    rows = [
        (
            tensor.name,
            tensor.op,
            numbers.ratio_db(tensor.drift.to_json()),
            f"{tensor.drop_db:.1f}",
            f"{tensor.drift.max_abs_diff:.3g}",
        )
        for tensor in sorted(found.tensors, key=lambda tensor: -tensor.drop_db)[:SHOWN]
    ]
    headers = ("SQNR dB", "lost here, dB", "largest difference")
    return table(("tensor", "operator", *headers), rows, title=title, numbers=headers)
