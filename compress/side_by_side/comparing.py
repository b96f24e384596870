"""``compress compare``: where two artifacts answer differently, and from which tensor on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from compress import compare, evaluate, onnx_file
from compress.compare import Bisection, Comparison, Drift, Link, Step
from compress.compare.bisection import PLAIN, precision_of
from compress.errors import DataError, UsageError
from compress.runtimes import open_session
from compress.side_by_side.artifacts import Rival, answers_of, batches_of, rivals_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from compress.data import Dataset

BISECT_IMAGES = 8  # enough to tell noise from an error; more only takes longer
OUTPUT_BATCHES = 4  # of images, for networks of several outputs
_CHANGES = {"int8": "quantization", "fp16": "half precision", "fp32": "conversion"}


@dataclass(frozen=True)
class Compared:
    """A candidate against its reference."""

    reference: str
    candidate: str
    classes: tuple[str, ...]
    answers: Comparison
    links: tuple[Link, ...]  # the chain from the one to the other
    outputs: dict[str, Drift]  # of networks with several outputs, by name
    bisection: Bisection | None

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON-able data."""
        told: dict[str, Any] = {
            "reference": self.reference,
            "candidate": self.candidate,
            "classes": list(self.classes),
            **self.answers.to_json(),
            "chain": [link.to_json() for link in self.links],
        }
        if self.outputs:
            told["outputs"] = {name: drift.to_json() for name, drift in self.outputs.items()}
        if self.bisection is not None:
            told["bisect"] = self.bisection.to_json()
        return told

    def table(self) -> RenderableType:
        """Return the comparison as tables for the terminal."""
        from compress.side_by_side.tables import comparison_tables

        return comparison_tables(self)


def compare_artifacts(
    reference: Path,
    candidate: Path,
    dataset: Dataset,
    *,
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
        dataset: Labelled images that both know the classes of.
        bisect: Find the first tensor that differs; both must be ONNX files.
        limit: Compare on so many images only.
        threads: CPU threads; all cores if absent.

    Raises:
        UsageError: ``bisect`` and one of the two is no ONNX file.
        EngineError: one of them cannot be opened or run.
        DataError: they do not answer the same images with the same classes.
    """
    if bisect and not reference.suffix == candidate.suffix == ".onnx":
        raise UsageError(
            f"cannot look inside {reference.name} and {candidate.name}",
            expected="two ONNX files for --bisect",
        )
    old, new = rivals_of([reference, candidate])
    for rival in (old, new):  # a file that cannot be opened is told before the long work
        rival.open(threads=threads).close()
    steps = list(_steps(old, new, dataset, limit, threads))
    answers = compare.compare(steps[0].predictions, steps[-1].predictions, dataset.classes)
    return Compared(
        reference=old.name,
        candidate=new.name,
        classes=dataset.classes,
        answers=answers,
        links=compare.chain(steps),
        outputs=_outputs(old, new, dataset, threads),
        bisection=_bisection(old, new, dataset) if bisect else None,
    )


def _steps(
    old: Rival, new: Rival, dataset: Dataset, limit: int | None, threads: int | None
) -> Iterator[Step]:
    """Yield the answers of the reference, of the candidate's graph, and of the candidate."""
    yield Step(old.name, "", _answers(old, old.runtime, dataset, limit, threads))
    error = "engine"
    if new.path.suffix == ".onnx":
        change = _CHANGES[precision_of(onnx_file.load(new.path))]
        change = "export" if old.runtime == "pytorch" and change == "conversion" else change
        plain = _answers(new, PLAIN, dataset, limit, threads)
        yield Step(f"{new.name}, node by node", change, plain)
    else:
        error = "all of it"
    yield Step(
        f"{new.name}, as it runs", error, _answers(new, new.runtime, dataset, limit, threads)
    )


def _answers(
    rival: Rival, runtime: Any, dataset: Dataset, limit: int | None, threads: int | None
) -> evaluate.Predictions:
    with open_session(rival.path, runtime, threads=threads) as session:
        try:
            return answers_of(session, dataset, rival.name, limit)
        except DataError as error:
            raise error.within(str(rival.path)) from None


def _outputs(old: Rival, new: Rival, dataset: Dataset, threads: int | None) -> dict[str, Drift]:
    """Return the drift of each output of a network that has several."""
    with old.open(threads=threads) as reference, new.open(threads=threads) as candidate:
        if len(reference.outputs) == len(candidate.outputs) == 1:
            return {}
        return compare.compare_outputs(
            reference, candidate, _images(reference, dataset, OUTPUT_BATCHES * evaluate.BATCH)
        )


def _images(session: Any, dataset: Dataset, count: int) -> Iterator[tuple[NDArray[Any], ...]]:
    for images, _ in batches_of(session, dataset, count):
        yield (images.numpy(),)


def _bisection(old: Rival, new: Rival, dataset: Dataset) -> Bisection:
    with old.open() as session:
        inputs: Sequence[tuple[NDArray[Any], ...]] = list(_images(session, dataset, BISECT_IMAGES))
    return compare.bisect(old.path, new.path, inputs)
