"""A stage once: what an earlier call finished is not done again, and what is done is recorded.

Here, and in no stage, are resuming, the seed, lineage of files, where an error happened, and the
processes of a torchrun.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from compress import artifact, progress
from compress.artifact import Artifact
from compress.errors import CompressError
from compress.pipeline.context import Job, Outcome, Variant
from compress.pipeline.measure import Measured
from compress.recipe.settings import Settings
from compress.train.distributed import Processes

Step = Callable[[Job, Any, Path, tuple[Variant, ...]], Outcome]


def once(
    job: Job,
    stage: Path,
    step: Step,
    settings: Settings | None,
    before: tuple[Variant, ...],
    processes: Processes | None = None,
) -> Outcome:
    """Return what a stage left behind, carried out unless an earlier call has.

    Args:
        job: The run.
        stage: Folder of the stage.
        step: What is done, with its own random state: a resumed run equals an uninterrupted one.
        settings: Of the stage.
        before: Variants of the stages before it.
        processes: Of a torchrun, where all of them go on after this stage.

    Raises:
        CompressError: the step's, with the name of the stage.
    """
    if job.run.result(stage) is None:
        try:
            with progress.task(stage.name), torch.random.fork_rng(devices=[]):
                torch.manual_seed(job.recipe.seed)
                outcome = step(job, settings, stage, before)
        except CompressError as error:
            raise error.within(f"stage {stage.name}") from None
        if job.is_main:
            files = _artifacts(job, stage, settings, before)
            job.run.finish(stage, outcome.to_json(), files)
    if processes is not None:
        processes.wait()  # until the main process has recorded it
    return Outcome.from_json(job.run.result(stage) or {"variants": [], "facts": {}})


def measured_once(job: Job, stage: Path, measure: Callable[[], Measured]) -> dict[str, Any]:
    """Return what a run's measurements recorded, taken unless an earlier call has."""
    if (recorded := job.run.result(stage)) is not None:
        return recorded
    with progress.task(stage.name):
        found = measure()
    recorded = found.to_json()
    job.run.finish(stage, recorded, _engine_artifacts(job, stage, found.engines))
    return recorded


def _artifacts(
    job: Job, stage: Path, settings: Settings | None, before: tuple[Variant, ...]
) -> Iterable[Artifact]:
    parent = artifact.sha256(job.path(before[-1])) if before else None
    told = {} if settings is None else settings.model_dump(mode="json")
    return [
        artifact.describe(path, root=job.run.root, stage=stage.name, parent=parent, settings=told)
        for path in sorted(stage.iterdir())
        if path.is_file() and not artifact.is_temporary(path)
    ]


def _engine_artifacts(job: Job, stage: Path, engines: Mapping[Path, Path]) -> Iterator[Artifact]:
    """Yield every engine with the files that lie beside it: weights, record, layers."""
    for engine, source in engines.items():
        parent = artifact.sha256(source)
        for path in sorted(engine.parent.glob(f"{engine.stem}.*")):
            yield artifact.describe(path, root=job.run.root, stage=stage.name, parent=parent)
