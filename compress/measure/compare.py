"""``compress compare``: where two artifacts answer differently, and from which tensor on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import evaluate
from compress.errors import DataError, EngineError, UsageError
from compress.evaluate import comparison
from compress.evaluate.comparison import Bisection, BreakdownStep, Comparison, NetworkForm
from compress.evaluate.comparison.bisection import PLAIN, precision_of
from compress.evaluate.feeding import arrays_for, leading_input
from compress.graph import files
from compress.measure.artifacts import (
    Candidate,
    candidates_of,
    names_classes,
    outputs_of,
    test_answers,
)
from compress.report.run_folder import one_artifact
from compress.runtimes import Session, open_session, runtime_class
from compress.tasks import Task, default_task, load_task

if TYPE_CHECKING:
    from rich.console import RenderableType

    from compress.data import Dataset

BISECT_IMAGES = 8  # enough to tell noise from an error; more only takes longer
WHY_NO_ANSWERS = "the images have no labels, or the networks do not name one class an image"
_CHANGES = {"int8": "quantization", "fp16": "half precision", "fp32": "conversion"}


@dataclass(frozen=True)
class JudgedForm:
    """One form of the network, judged by a task, and against the first."""

    name: str
    error: str  # what was done to get here; "" for the first
    evaluation: evaluate.Evaluation
    change: Mapping[str, Any]  # of predictions and metrics from the first; empty for the first

    def to_json(self) -> dict[str, Any]:
        """Return this form as JSON-able data."""
        told: dict[str, Any] = {"name": self.name}
        if self.error:
            told["error"] = self.error
        return told | self.evaluation.row() | dict(self.change)


@dataclass(frozen=True)
class Compared:
    """A candidate against its reference."""

    reference: str
    candidate: str
    classes: tuple[str, ...]
    answers: Comparison | None  # None where images have no classes, or the networks name none
    links: tuple[BreakdownStep, ...]  # the chain from the one to the other
    outputs: Mapping[str, Any]  # of other networks: drift of each output, agreement if there is one
    bisection: Bisection | None
    judged: tuple[JudgedForm, ...] = ()  # the chain, where another task than classification judges

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON-able data."""
        told: dict[str, Any] = {
            "reference": self.reference,
            "candidate": self.candidate,
            "classes": list(self.classes),
            **(self.answers.to_json() if self.answers is not None else {}),
            "chain": [link.to_json() for link in self.links or self.judged],
        }
        if self.judged:
            told |= {"images": self.judged[0].evaluation.images, **self.judged[-1].change}
        elif self.answers is None:
            told["skipped"] = {"accuracy": WHY_NO_ANSWERS}
        told |= self.outputs
        if self.bisection is not None:
            told["bisect"] = self.bisection.to_json()
        return told

    def table(self) -> RenderableType:
        """Return the comparison as tables for the terminal."""
        from compress.measure.tables import comparison_tables

        return comparison_tables(self)


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
            f"--bisect cannot read {reference.name} and {candidate.name}",
            expected="two ONNX files",
        )
    judge = _judge(task, dataset)
    old, new = candidates_of([one_artifact(reference), one_artifact(candidate)], threads=threads)
    is_named = _names_classes((old, new), dataset) and (judge is None or judge.tells_classes)
    steps = list(_steps(old, new, dataset, limit)) if is_named else []
    by_task = judge is not None and not is_named
    return Compared(
        reference=old.name,
        candidate=new.name,
        classes=dataset.classes,
        answers=comparison.compare_predictions(
            steps[0].predictions, steps[-1].predictions, dataset.classes
        )
        if is_named
        else None,
        links=comparison.chain(steps) if is_named else (),
        judged=tuple(_judged(old, new, dataset, limit, judge)) if judge and by_task else (),
        outputs={} if by_task else _outputs(old, new, dataset, limit, is_named=is_named),
        bisection=_bisection(old, new, dataset) if bisect else None,
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


def _names_classes(candidates: Iterable[Candidate], dataset: Dataset) -> bool:
    """Say whether all give scores of the data's classes.

    Each is opened and fed: a file that cannot be is told before the long work.
    """
    is_named = True
    for each in candidates:
        with _opened(each, each.reference) as session:
            is_named &= names_classes(session, dataset)
    return is_named


@contextlib.contextmanager
def _opened(candidate: Candidate, runtime: Any) -> Iterator[Session]:
    """Open a candidate; errors of its answers name its file."""
    with open_session(candidate.path, runtime, threads=candidate.threads) as session:
        try:
            yield session
        except (DataError, EngineError) as error:
            raise error.within(str(candidate.path)) from None


Form = tuple[str, str, Candidate, Any]  # name, what was done to get here, file, where it runs


def _forms(old: Candidate, new: Candidate) -> Iterator[Form]:
    """Yield the reference, the candidate's graph, and the candidate."""
    yield old.name, "", old, old.reference
    error = "engine"
    if new.path.suffix == ".onnx":
        change = _CHANGES[precision_of(files.load(new.path))]
        if change == "conversion" and runtime_class(old.runtime).opens == "network":
            change = "export"
        yield f"{new.name}, node by node", change, new, PLAIN
    else:
        error = "all of it"
    yield f"{new.name}, as it runs", error, new, new.reference


def _steps(
    old: Candidate, new: Candidate, dataset: Dataset, limit: int | None
) -> Iterator[NetworkForm]:
    """Yield the classes that each form names."""
    for name, error, candidate, runtime in _forms(old, new):
        with _opened(candidate, runtime) as session:
            answers = test_answers(session, dataset, candidate.name, limit)
        yield NetworkForm(name, error, answers)


def _judged(
    old: Candidate, new: Candidate, dataset: Dataset, limit: int | None, task: Task
) -> Iterator[JudgedForm]:
    """Yield what each form is worth at a task."""
    first: evaluate.Evaluation | None = None
    for name, error, candidate, runtime in _forms(old, new):
        with _opened(candidate, runtime) as session:
            found = evaluate.of_task(session, dataset, task, limit=limit)
        yield JudgedForm(name, error, found, _change(task, first, found))
        first = first or found


def _change(
    task: Task, first: evaluate.Evaluation | None, found: evaluate.Evaluation
) -> dict[str, Any]:
    """Return what changed from the first form; without labels that is in its outputs."""
    if first is None:
        return {}
    if task.kinds:
        return evaluate.change_row(task, first, found)
    drifts = comparison.outputs_row(first.predictions, found.predictions)
    return drifts | evaluate.agreement_row(task, first, found)


def _outputs(
    old: Candidate, new: Candidate, dataset: Dataset, limit: int | None, *, is_named: bool
) -> dict[str, Any]:
    """Return the drift of each output, and the share of equal answers where there are scores.

    A network that names classes is compared by its answers, and so only if it has more outputs.
    """
    answers = []
    for each in (old, new):
        with each.open() as session:
            if is_named and len(session.outputs) == 1:
                return {}
            answers.append(outputs_of(session, dataset, limit))
    found = comparison.outputs_row(*answers)
    return {"outputs": found["outputs"]} if is_named else {"images": len(answers[0]), **found}


def _bisection(old: Candidate, new: Candidate, dataset: Dataset) -> Bisection:
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
    return comparison.bisect(old.path, new.path, inputs)
