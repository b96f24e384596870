"""Warnings about likely mistakes of a recipe, before the work that they would spoil."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from compress import evaluate, tasks
from compress.data import Dataset
from compress.errors import DataError, ModelError
from compress.evaluate.feeding import Fed
from compress.models.references import classifier_layers
from compress.modules.detectors import size_inside
from compress.pipeline.context import RunContext
from compress.pipeline.overlap import overlap
from compress.quantize.notes import by_reason
from compress.recipe.settings import Recipe, TrainSettings
from compress.report import numbers
from compress.report.schema import BUSY_RESOLUTION_PCT, Figure, Variant
from compress.report.verdict import speed_differs, title
from compress.train.batches import steps_in_epoch

FEW_STEPS = 8  # of an epoch: fewer leave images out
FEW_IN_ALL = 32  # steps of a whole training: fewer hardly move the weights
SMALLEST_BATCH = 8  # statistics of BatchNorm over fewer images undo more than steps give
LARGEST_OVERLAP = 0.1  # share of the test images that may be training images as well
IMAGES = 128  # that the original is judged on before anything is done with it
SHUFFLES = 19  # of the labels: one in twenty useless networks beats all of them
NEAR_CHANCE = 0.1  # of the way from guessing to no error at all, where guessing is easy
EASY_PCT = 5.0  # guessing that is right more often than this
POOR_DB = 10.0  # of an output: below it noise is a third as large as the answer, and more
LOST_DB = 1.0  # of SQNR: what another draw of images does not explain
CUT_DB = 3.0  # less than this in front of int8 is half of the noise and more: it is not int8's

KERNEL_STEP = 8  # channels that most kernels take at once; others are up to three times slower
ROUND = "prune with round_to: auto (--round-to)"


@dataclass(frozen=True)
class Trust:
    """Whether the original is a fair reference: are its weights trained, does it beat guessing."""

    random_pct: float = 0.0  # of the parameters, other values each time the network is built
    random_head: bool = False  # the classifier's are among them
    metric: str = ""
    value: float | None = None  # of the metric; None where the data has no labels for the task
    chance: float | None = None  # of the metric, with the labels of other images
    at_chance: bool = False
    images: int = 0
    unit: str = "pct"
    trained_here: bool = False  # by the first stage of the recipe

    @property
    def untrained(self) -> str | None:
        """Why no accuracy of this network means anything; None where nothing says so."""
        if self.random_pct > 50 or self.random_head:
            return (
                f"{self.random_pct:.3g} % of its parameters are random values, no weights were "
                "loaded into them"
            )
        if not self.at_chance or self.value is None or self.chance is None:
            return None
        unit = " %" if self.unit == "pct" else f" {self.unit}".rstrip()
        return (
            f"its {self.metric} of {self.value:.3g}{unit} on {self.images} images cannot be told "
            f"from guessing ({self.chance:.3g}{unit})"
        )

    def cautions(self) -> Iterator[str]:
        """Yield what to say of the original."""
        fix = "Give trained weights (model.weights, --weights), or begin with a stage train."
        if self.untrained is not None and self.trained_here:
            yield (
                f"the training taught the network nothing that shows: {self.untrained}. Train it "
                "for more epochs, with another learning rate, or on more images."
            )
        elif self.untrained is not None and self.random_pct:
            yield f"the original network is untrained: {self.untrained}. {fix}"
        elif self.untrained is not None:
            yield (
                f"the original network does not beat guessing: {self.untrained}. Train it for "
                "longer, or check that its images are prepared as in its training and that the "
                "weights are the right ones."
            )
        elif self.random_pct:
            yield (
                f"{self.random_pct:.3g} % of the original's parameters are random values that no "
                f"weights were loaded into. {fix}"
            )


def of_training(recipe: Recipe, dataset: Dataset) -> Iterator[str]:
    """Yield a warning for each training that takes too few steps, and what makes them enough."""
    for place, settings in recipe.parts():
        if not isinstance(settings, TrainSettings) or not settings.epochs:
            continue
        steps = steps_in_epoch(dataset, settings)
        if steps < FEW_STEPS and steps * settings.epochs < FEW_IN_ALL:
            images = min(len(dataset.splits["train"]), settings.epoch_images or 1 << 62)
            fitting = 1 << max(1, images // (2 * FEW_STEPS)).bit_length() - 1
            fix = f"a smaller batch_size (--batch-size): {fitting}"
            if fitting < SMALLEST_BATCH:
                fix = f"more epochs (--epochs): {-(-FEW_IN_ALL // max(1, steps))}"
            yield (
                f"{place}: {images} training images in batches of {settings.batch_size} are "
                f"{steps} step{'s' * (steps != 1)} an epoch, which trains next to nothing. Set "
                f"{fix}."
            )


def of_splits(dataset: Dataset) -> Iterator[str]:
    """Yield warnings about test images that are training images as well.

    Raises:
        DataError: they are so many that accuracy would be that on learnt images.
    """
    if dataset.target == "none":
        return
    splits = dataset.splits
    others = [splits[name] for name in ("train", "calibration", "validation") if len(splits[name])]
    found = overlap(others, splits["test"])
    if found is None:
        yield (
            "it was not checked whether test images are training images as well: they are made "
            "anew each time, and too many to be compared in memory."
        )
        return
    if found.share > LARGEST_OVERLAP:
        raise DataError(
            f"{found.equal} of {found.images} test images are training images as well",
            where=f"data {dataset.name}",
            expected="test images that the network has not learnt",
            fix="Remove them from one of the two",
        )
    if found.equal:
        yield f"{found.equal} of {found.images} test images are training images as well."
    if found.alike:
        yield (
            f"{found.alike} of {found.images} test images look nearly like a training image (the "
            "same thumbnail)."
        )


def of_original(
    context: RunContext, run: Any, rebuild: Callable[[], nn.Module] | None = None
) -> dict[str, Any]:
    """Return the facts "trust" and "size_inside" about the original, as a stage records them.

    ``run`` is the network, or a session of it. ``rebuild`` builds it again; None where its weights
    are known to be trained or to come with it.
    """
    size = size_inside(run, context.dataset.example)
    here = bool(context.recipe.stages) and context.recipe.stages[0].verb == "train"
    found = Trust(**_randomness(run, rebuild), **_judged(context, run), trained_here=here)
    return {"trust": asdict(found)} | ({} if size is None else {"size_inside": list(size)})


def trust_of(facts: Mapping[str, Any]) -> Trust:
    """Return what ``of_original`` recorded."""
    return Trust(**facts.get("trust", {}))


def of_size(dataset: Dataset, inside: Sequence[int] | None) -> Iterator[str]:
    """Yield a warning where the network resizes images inside, to height and width ``inside``."""
    if inside is not None:
        own, resized = (f"{h} x {w}" for h, w in (dataset.image_size, inside))
        yield (
            f"the network resizes images of {own} to {resized} inside, and takes as much time and "
            f"memory as they do. Set data.image_size (--image-size) to {resized}, or, where it has "
            f"them, model.options: {{min_size: {min(dataset.image_size)}, "
            f"max_size: {max(dataset.image_size)}}}."
        )


def of_stage(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield the warnings that follow from what a stage recorded."""
    yield from trust_of(facts).cautions()
    yield from facts.get("training", {}).get("notes", ())
    if why := facts.get("fixed_batch"):
        yield f"its files take one image at a time, another batch cannot be exported: {why}"
    if note := facts.get("calibration", {}).get("note"):
        yield f"int8 ranges come from {note}"
    for form, why in facts.get("refused", {}).items():
        yield f"no int8 file was written for {form}: {why}"
    for form, plan in facts.get("plans", {}).items():
        if not plan["activations"]:
            why = [note for note in by_reason(plan["notes"][1:]) if "float" in note]
            first = why[0] if why else "no layer of it can be int8"
            more = f"; and {len(why) - 1} more" if len(why) > 1 else ""
            yield f"int8-{form} is a file in float, no smaller and no faster: {first}{more}"


def of_data(dataset: Dataset) -> Iterator[str]:
    """Yield a warning where images are not, or may not be, what the network will see."""
    if dataset.assumed:
        yield (
            "neither you nor the file says how the network wants its images, and the usual way is "
            f"taken: {dataset.assumed}. If it was trained otherwise, int8 ranges and comparisons "
            "are of images that it never sees, and no figure shows it"
        )
    if dataset.note:
        yield f"what is measured on images is measured on {dataset.note}: real ones may differ"


def _randomness(model: Any, rebuild: Callable[[], nn.Module] | None) -> dict[str, Any]:
    """Return which share of the parameters differs from those of the network built once more."""
    if rebuild is None:
        return {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() + 1)
        twin = dict(rebuild().named_parameters())
    own = dict(model.named_parameters())
    random = {name for name, value in own.items() if not torch.equal(value, twin[name])}
    total = sum(value.numel() for value in own.values())
    heads: set[str] = set()
    with contextlib.suppress(ModelError):  # it has no layer that could be a classifier
        heads = {f"{layer}.weight" for layer in classifier_layers(model)}
    return {
        "random_pct": 100 * sum(own[name].numel() for name in random) / max(1, total),
        "random_head": bool(heads & random),
    }


def _judged(context: RunContext, run: Any) -> dict[str, Any]:
    """Return the primary metric on a few images, against that with the labels of others."""
    task = context.task
    if context.dataset.target != task.target or not task.kinds:
        return {}
    read = context.dataset.pictures if isinstance(run, Fed) else context.dataset.batches
    pairs = list(read("calibration", 32, IMAGES))
    missing = IMAGES - sum(len(images) for images, _ in pairs)
    pairs += read("validation", 32, missing) if missing > 0 else ()
    predictions, scores = evaluate.predictions_of(run, task, context.dataset, pairs)
    labels = [target for _, targets in pairs for target in targets]
    name = task.primary
    kind = task.kinds[name]
    sign = 1 if kind.higher_is_better else -1
    value = tasks.values_of(task, scores)[name]
    random = np.random.default_rng(context.recipe.seed)
    chances = []
    for _ in range(SHUFFLES):
        order = random.permutation(len(labels))
        shuffled = tasks.contributions(task, predictions, [labels[i] for i in order])
        chances.append(tasks.values_of(task, shuffled)[name])
    chance = float(np.mean(chances))
    near = (
        kind.unit == "pct"
        and chance > EASY_PCT
        and sign * (value - chance) < NEAR_CHANCE * (100 - chance)
    )
    at_chance = near or sign * value <= max(sign * each for each in chances)
    return {
        "metric": tasks.primary_of(task).called,
        "value": value,
        "chance": chance,
        "at_chance": bool(at_chance),
        "images": len(labels),
        "unit": kind.unit,
    }


def of_trained(variants: Sequence[Variant]) -> Iterator[str]:
    """Yield which networks a training after a cut left worse than it found them.

    Worse is a confidence interval wholly below the one before, or ``LOST_DB`` of SQNR, which has
    none.
    """
    known = {variant.name: variant for variant in variants}
    for variant in variants:
        verb = variant.stage.rpartition("-")[2]
        before = known.get(variant.parent or "")
        if before is None or verb not in ("distill", "finetune"):
            continue
        for result in variant.results:
            same = before.result_like(result)
            figure, old = result.figure, same.figure if same else None
            if figure is None or old is None or figure.name != old.name:
                continue
            if _is_worse(figure, old):
                yield (
                    f"{variant.name} answers worse than {before.name}, which it was trained from: "
                    f"{figure.name} {numbers.number(figure.value)} {figure.unit} against "
                    f"{numbers.number(old.value)} on {result.runtime}. Train for more epochs or at "
                    f"a lower rate, with keep: best, or leave {verb} out"
                )
                break


def _is_worse(figure: Figure, old: Figure) -> bool:
    """Return whether ``figure`` is surely below ``old``, or above it where less is better."""
    sign = 1 if figure.higher_is_better else -1
    if figure.ci95 is None or old.ci95 is None:
        return sign * (old.value - figure.value) > LOST_DB
    return max(sign * bound for bound in figure.ci95) < min(sign * bound for bound in old.ci95)


def of_noise(variants: Sequence[Variant]) -> Iterator[str]:
    """Yield which int8 networks answer far from the original, where no label tells more.

    Where the float network that one was made of is as far, it was the cut.
    """
    in_float: dict[str, tuple[float, str]] = {}  # by runtime: that of the last float network
    for variant in variants:
        told = [each for each in variant.results if each.worst_sqnr_db is not None]
        noisy = [
            (db, result.runtime)
            for result in told
            if result.precision == "int8" and (db := result.worst_sqnr_db) is not None
        ]
        in_float |= {
            each.runtime: (each.worst_sqnr_db or 0.0, variant.name)
            for each in told
            if each.precision == "fp32"
        }
        if not noisy or (worst := min(noisy))[0] >= POOR_DB:
            continue
        before, name = in_float.get(worst[1], (math.inf, ""))
        fix = (
            f"{name} has {before:.1f} dB in float: keep more, or train after the cut (distill)"
            if before < worst[0] + CUT_DB
            else "leave layers in float: quantize.exclude (--exclude)"
        )
        yield (
            f"{variant.name} answers far from the original: its worst output has {worst[0]:.1f} dB "
            f"on {worst[1]}. If these images show what the network is for, prepared as it wants "
            f"them, {fix}"
        )


def of_slower(variants: Sequence[Variant], round_to: int | str = "auto") -> Iterator[str]:
    """Yield what takes longer than the original, the first variant, and what is fastest there.

    ``round_to`` is the multiple that the widths of what was pruned were kept in.
    """
    for variant in variants:
        for result in variant.results:
            if (result.speedup or 1.0) >= 1:
                continue
            same = [
                (each.latency_ms_p50, title(other, each), each.runtime)
                for other in variants
                for each in other.results
                if (each.batch, each.device) == (result.batch, result.device)
                and each.latency_ms_p50 is not None
            ]
            if not same or not speed_differs(result):
                continue
            milliseconds, name, runtime = min(same)
            cut = (variant.macs or 0) < (variants[0].macs or 0)
            narrow = cut and isinstance(round_to, int) and round_to % KERNEL_STEP
            yield (
                f"{variant.name} is {numbers.slowdown(result.speedup or 1.0, result.speedup_ci95)} "
                f"slower than the original on {result.runtime}, batch {result.batch}; of all "
                f"measured {name} on {runtime} is fastest ({numbers.number(milliseconds)} ms)"
                + (
                    f". Most kernels are made for widths in multiples of {KERNEL_STEP}: {ROUND}"
                    if narrow
                    else ""
                )
            )


def of_timing(conditions: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield where the machine, by place as ``measure.bench`` tells, did other things meanwhile."""
    for place, state in conditions.items():
        if "busy" in state:
            yield (
                f"busy machine while {place} was timed: {state['busy']}. Speeds that differ by "
                f"less than {BUSY_RESOLUTION_PCT:g} % are not told apart there; measure again on "
                "an idle machine"
            )
