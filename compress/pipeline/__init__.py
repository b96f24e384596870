"""The whole story: one recipe through its stages to engines and a report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from compress import artifact, progress, report
from compress.artifact import Artifact
from compress.errors import CompressError
from compress.pipeline import cautions, measure
from compress.pipeline.check import preflight, try_network
from compress.pipeline.context import Job, Outcome, Step, Variant, seeded
from compress.pipeline.report_rows import assemble
from compress.pipeline.stages import prune, quantize, sparsify, train
from compress.pipeline.task import prepared
from compress.recipe import loading
from compress.recipe.settings import QuantizeSettings, Recipe, Settings
from compress.report import Report
from compress.report.run_folder import DONE_FILE, RunFolder, default_folder
from compress.report.run_lock import held
from compress.train.distributed import Processes, join_processes

STEPS: dict[str, Step] = {
    "original": train.original,
    "train": train.train_original,
    "prune": prune.prune_channels,
    "sparsify": sparsify.zero_weights,
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
) -> Report | None:
    """Carry out a recipe and write its report.

    Stages that an earlier, interrupted call has finished are not run again, and a training goes on
    from its last checkpoint; the report is the same as that of an uninterrupted run.

    Args:
        source: A recipe, or the YAML file of one.
        out: Folder of the run; ``runs/NAME`` if absent, with a number where another run has it.
        overrides: ``key.path=value`` each, over what the file says.
        fresh: Start over, removing what an earlier run left in ``out``.

    Returns:
        The report; None in the processes of a torchrun that only help to train.

    Raises:
        CompressError: something that the user can mend; what was finished stays on disk. Another
            process runs in the folder.
    """
    chosen = source if isinstance(source, Recipe) else loading.load_recipe(source, overrides)
    processes = join_processes()
    preflight(chosen, where=chosen.name, read_data=False)
    dataset, task = prepared(chosen)
    root = Path(out or default_folder(chosen))
    with held(root) if processes.is_main else contextlib.nullcontext():
        if not any(root.glob(f"00-*/{DONE_FILE}")):
            try_network(chosen, dataset, task, where=chosen.name)
            for line in cautions.of_splits(dataset):
                progress.warn(line)
        chosen = loading.from_anywhere(chosen)
        if processes.is_main:
            RunFolder.open(root, chosen, fresh=fresh)
        processes.wait()
        progress.say(dataset.summary())
        for line in cautions.of_training(chosen, dataset):
            progress.warn(line)
        job = Job(chosen, RunFolder(root), dataset, task, processes.is_main)
        return _carry_out(job, processes)


def _carry_out(job: Job, processes: Processes) -> Report | None:
    """Carry out every stage that is not finished, measure, and write the report."""
    variants: tuple[Variant, ...] = ()
    outcomes: list[Outcome] = []
    for number, (verb, settings) in enumerate(_stages(job.recipe)):
        stage = job.run.stage(number, verb)
        if isinstance(settings, QuantizeSettings) and not processes.is_main:
            quantize.train_along(job, settings, stage, variants)
            return None
        outcome = _once(job, stage, STEPS[verb], settings, variants)
        if verb != "quantize":  # after which one process works, the others of a torchrun leave
            processes.wait()
        outcomes.append(outcome or _recorded(job, stage))
        for line in cautions.of_stage(outcomes[-1].facts):
            progress.warn(line)
        variants += outcomes[-1].variants
    if not processes.is_main:
        return None
    stage = job.run.stage(len(outcomes), MEASURE)
    measured = job.run.result(stage)
    if measured is None:
        with progress.task(stage.name):
            found = measure.measure_targets(job, variants, stage)
        measured = found.to_json()
        job.run.finish(stage, measured, _engine_artifacts(job, stage, found.engines))
    return report.write(assemble(job, variants, outcomes, measured, stage), job.run.root)


def _stages(chosen: Recipe) -> list[tuple[str, Settings | None]]:
    """Return the verbs of a recipe; one that does not begin with training loads its original."""
    stages: list[tuple[str, Settings | None]] = [
        (each.verb, each.settings) for each in chosen.stages
    ]
    return stages if stages and stages[0][0] == "train" else [("original", None), *stages]


def _once(
    job: Job, stage: Path, step: Step, settings: Settings | None, before: tuple[Variant, ...]
) -> Outcome | None:
    """Carry out a step unless an earlier call has; None in processes that only help."""
    if job.run.result(stage) is not None:
        return _recorded(job, stage)
    try:
        with progress.task(stage.name):
            outcome = seeded(step, job.recipe.seed)(job, settings, stage, before)
    except CompressError as error:
        raise error.within(f"stage {stage.name}") from None
    if not job.is_main:
        return None
    files = sorted(
        path for path in stage.iterdir() if path.is_file() and not artifact.is_temporary(path)
    )
    job.run.finish(stage, outcome.to_json(), _artifacts(job, stage, files, settings, before))
    return outcome


def _recorded(job: Job, stage: Path) -> Outcome:
    return Outcome.from_json(job.run.result(stage) or {"variants": [], "facts": {}})


def _artifacts(
    job: Job,
    stage: Path,
    files: Iterable[Path],
    settings: Settings | None = None,
    before: tuple[Variant, ...] = (),
) -> list[Artifact]:
    parent = artifact.sha256(job.path(before[-1])) if before else None
    facts = {} if settings is None else settings.model_dump(mode="json")
    return [
        artifact.describe(path, root=job.run.root, stage=stage.name, parent=parent, settings=facts)
        for path in files
    ]


def _engine_artifacts(job: Job, stage: Path, engines: Mapping[Path, Path]) -> Iterator[Artifact]:
    """Yield every engine with the files that lie beside it: weights, record, layers."""
    for engine, source in engines.items():
        parent = artifact.sha256(source)
        for path in sorted(engine.parent.glob(f"{engine.stem}.*")):
            yield artifact.describe(path, root=job.run.root, stage=stage.name, parent=parent)
