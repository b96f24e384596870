"""Run a stage once: one that an earlier call finished is skipped, a new one is recorded.

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
from compress.errors import CompressError, RunError, boundary
from compress.pipeline.context import RunContext, RunVariant, StageResult
from compress.pipeline.measure import Measured
from compress.recipe.settings import Settings
from compress.report.run_folder import DONE_FILE
from compress.train.distributed import Processes

Step = Callable[[RunContext, Any, Path, tuple[RunVariant, ...]], StageResult]


def once(
    context: RunContext,
    stage: Path,
    step: Step,
    settings: Settings | None,
    before: tuple[RunVariant, ...],
    processes: Processes | None = None,
) -> StageResult:
    """Return the result of a stage, run now unless an earlier call has.

    Args:
        context: The run.
        stage: Folder of the stage.
        step: What is done, with its own random state: a resumed run equals an uninterrupted one.
        settings: Of the stage.
        before: Variants of the stages before it.
        processes: Of a torchrun, where all of them go on after this stage.

    Raises:
        CompressError: the step's, with the name of the stage.
    """
    if context.run.result(stage) is None:
        try:
            with progress.task(stage.name), torch.random.fork_rng(devices=[]):
                torch.manual_seed(context.recipe.seed)
                outcome = step(context, settings, stage, before)
        except CompressError as error:
            raise error.within(f"stage {stage.name}") from None
        if context.is_main:
            files = _artifacts(context, stage, settings, before)
            context.run.finish(stage, outcome.to_json(), files)
    if processes is not None:
        processes.wait()  # until the main process has recorded it
    return StageResult.from_json(context.run.result(stage) or {"variants": [], "facts": {}})


def measured_once(context: RunContext, stage: Path, measure: Callable[[], Measured]) -> Measured:
    """Return what was measured of a run, now unless an earlier call has."""
    if (recorded := context.run.result(stage)) is not None:
        with boundary(RunError, "is no record of measurements", where=DONE_FILE):
            return Measured.model_validate(recorded)
    with progress.task(stage.name):
        found = measure()
    content = found.model_dump(mode="json", exclude_none=True)
    context.run.finish(stage, content, _engine_artifacts(context, stage, found.engines))
    return found


def _artifacts(
    context: RunContext, stage: Path, settings: Settings | None, before: tuple[RunVariant, ...]
) -> Iterable[Artifact]:
    parent = artifact.sha256(context.path(before[-1])) if before else None
    told = {} if settings is None else settings.model_dump(mode="json")
    return [
        artifact.describe_file(
            path, root=context.run.root, stage=stage.name, parent=parent, settings=told
        )
        for path in sorted(stage.iterdir())
        if path.is_file() and not artifact.is_temporary(path)
    ]


def _engine_artifacts(
    context: RunContext, stage: Path, engines: Mapping[Path, Path]
) -> Iterator[Artifact]:
    """Yield every engine with the files that lie beside it: weights, record, layers."""
    for engine, source in engines.items():
        parent = artifact.sha256(source)
        for path in sorted(engine.parent.glob(f"{engine.stem}.*")):
            yield artifact.describe_file(
                path, root=context.run.root, stage=stage.name, parent=parent
            )
