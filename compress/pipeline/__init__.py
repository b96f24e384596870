"""Run a recipe: open the run, its stages, measurements, report.

Here, and in no stage, are resuming, the seed, lineage of files, where an error happened, and the
processes of a torchrun.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compress import artifact, plugins, progress, report
from compress.errors import CompressError, RunError, boundary
from compress.pipeline import cautions
from compress.pipeline.check import preflight, prepared_data, try_network
from compress.pipeline.context import JudgedPredictions, RunContext, RunVariant, StageResult
from compress.pipeline.measure import Measured, measure_targets
from compress.pipeline.reporting import assemble
from compress.pipeline.stages import prune, quantize, train
from compress.recipe import loading
from compress.recipe.settings import Recipe, Settings
from compress.report import Report
from compress.report.run_folder import DONE_FILE, RunFolder, default_folder, held
from compress.train.distributed import Processes, join_processes

Step = Callable[[RunContext, Any, Path, tuple[RunVariant, ...]], StageResult]
STEPS: dict[str, Step] = {
    "original": train.original,
    "train": train.train_original,
    "prune": prune.prune_channels,
    "sparsify": prune.zero_weights,
    "distill": train.distill_student,
    "finetune": train.finetune,
    "quantize": quantize.quantize_graphs,
}
MEASURE = "measure"


def run(
    source: Recipe | str | Path,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    fresh: bool = False,
    where: str = "",
) -> Report | None:
    """Carry out a recipe and write its report.

    Stages that an earlier, interrupted call has finished are not run again, and a training goes on
    from its last checkpoint; the report is the same as that of an uninterrupted run.

    Args:
        source: A recipe, or the YAML file of one.
        out: Folder of the run; ``runs/NAME`` if absent, with a number where another run has it.
        overrides: ``key.path=value`` each, over what the file says.
        fresh: Start over, removing what an earlier run left in ``out``.
        where: What messages call the recipe; its file or its name if absent.

    Returns:
        The report; None in the processes of a torchrun that only help to train.

    Raises:
        CompressError: something that the user can fix; what was finished stays on disk. Another
            process runs in the folder.
    """
    chosen = source if isinstance(source, Recipe) else loading.load_recipe(source, overrides)
    processes = join_processes()
    where = where or (chosen.name if isinstance(source, Recipe) else str(source))
    with opened_run(chosen, out, processes, where=where, fresh=fresh) as context:
        outcomes, variants = [], tuple[RunVariant, ...]()
        stages = list(stages_of(context.recipe))
        for number, (verb, settings) in enumerate(stages):
            folder = context.run.stage(number, verb)
            together = None if verb == "quantize" else processes  # after which one process works
            outcome = once(context, folder, STEPS[verb], settings, variants, together)
            for line in cautions.of_stage(outcome.facts):
                progress.warn(line)
            outcomes.append(outcome)
            variants += outcome.variants
        if not processes.is_main:
            return None
        folder = context.run.stage(len(stages), MEASURE)
        judged = JudgedPredictions(folder, context.dataset, context.task)
        measured = measured_once(
            context, folder, partial(measure_targets, context, variants, judged)
        )
        return report.write(
            assemble(context, variants, outcomes, measured, judged), context.run.root
        )


@contextlib.contextmanager
def opened_run(
    chosen: Recipe, out: str | Path | None, processes: Processes, *, where: str, fresh: bool = False
) -> Iterator[RunContext]:
    """Yield a run whose recipe, which came from ``where``, was checked and whose folder is held.

    Raises:
        CompressError: the recipe cannot be run, or the folder is another run's.
    """
    root = Path(out or default_folder(chosen))
    with artifact.scratch():
        pass  # exporters and runtimes need one, and tell its absence badly
    with held(root) if processes.is_main else contextlib.nullcontext():
        placed = loading.from_anywhere(chosen)
        if processes.is_main:  # what the folder alone tells comes before images are read
            RunFolder(root).check(placed, fresh=fresh)
        preflight(chosen, where=where, read_data=False)
        dataset, task = prepared_data(chosen, where=where)
        if not any(root.glob(f"00-*/{DONE_FILE}")):
            try_network(chosen, dataset, task, where=where)
            for line in cautions.of_splits(dataset):
                progress.warn(line)
        chosen = placed
        if processes.is_main:
            kind = plugins.plugin_class("data", chosen.data.name)
            images = "" if hasattr(kind, "of_network") else dataset.fingerprint
            RunFolder.open(root, chosen, fresh=fresh, images=images)
        processes.wait()
        progress.say(dataset.summary())
        for line in (*cautions.of_training(chosen, dataset), *cautions.of_data(dataset)):
            progress.warn(line)
        yield RunContext(chosen, RunFolder(root), dataset, task, processes.is_main)


def stages_of(chosen: Recipe) -> Iterator[tuple[str, Settings | None]]:
    """Yield the verbs of a recipe; one that does not begin with training loads its original."""
    if not chosen.stages or chosen.stages[0].verb != "train":
        yield "original", None
    yield from ((each.verb, each.settings) for each in chosen.stages)


def once(
    context: RunContext,
    stage: Path,
    step: Step,
    settings: Settings | None,
    before: tuple[RunVariant, ...],
    processes: Processes | None = None,
) -> StageResult:
    """Return the result of a stage, run now unless an earlier call has.

    ``step`` has its own random state: a resumed run equals an uninterrupted one. ``before`` are the
    variants of the stages before it; ``processes`` those of a torchrun that all go on after it.

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
            parent = artifact.sha256(context.path(before[-1])) if before else None
            told = {} if settings is None else settings.model_dump(mode="json")
            files = (
                artifact.describe_file(
                    path, root=context.run.root, stage=stage.name, parent=parent, settings=told
                )
                for path in sorted(stage.iterdir())
                if path.is_file() and not artifact.is_temporary(path)
            )
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
    files = (
        artifact.describe_file(
            path, root=context.run.root, stage=stage.name, parent=artifact.sha256(source)
        )
        for engine, source in found.engines.items()
        for path in sorted(engine.parent.glob(f"{engine.stem}.*"))  # its weights, record, layers
    )
    context.run.finish(stage, found.to_json(), files)
    return found
