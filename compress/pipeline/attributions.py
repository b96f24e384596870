"""Attribution maps of the variants of a run, beside those of the original."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.evaluate.predictions import Predictions
from compress.pipeline import records
from compress.pipeline.context import JudgedPredictions, RunContext, RunVariant
from compress.report.schema import Attribution, Similarity
from compress.runtimes import open_session, runtime_class

if TYPE_CHECKING:
    from compress.evaluate.attribution import Samples


@dataclass(frozen=True)
class _Explained:
    """A variant that is explained beside the original, on a runtime on which both were judged."""

    variant: RunVariant
    runtime: str
    answers: tuple[Path, Path]  # of the original and of the variant to the test images


def explain_variants(
    context: RunContext, variants: Sequence[RunVariant], judged: JudgedPredictions
) -> tuple[tuple[Attribution, ...], tuple[Similarity, ...]]:
    """Return attribution maps of what the run made and how alike they are, if a recipe asks for it.

    Methods that need gradients explain the last float network. Methods that need answers only
    explain the file that ships, on its runtime: the int8 graph, or the last float network if there
    is none. A method is left out where its network ran on no runtime of the recipe: nobody knows
    which images flipped.

    Args:
        context: The run.
        variants: All variants, the original first.
        judged: Predictions of each variant on the test images.

    Raises:
        MissingPackageError: captum is not installed.
    """
    if not context.recipe.measure.explain_images:
        return (), ()
    from compress.evaluate.attribution import ANSWERS, compare_maps

    attributions, similarities = list[Attribution](), list[Similarity]()
    pairs = list(_pairs(context, variants, judged))
    for method in context.recipe.measure.explain_methods:
        pair = _explained(pairs, needs_gradients=method not in ANSWERS)
        if pair is None:
            continue
        in_torch = method not in ANSWERS or runtime_class(pair.runtime).opens != "onnx"
        opened = _networks if in_torch else _sessions
        with opened(context, variants[0], pair) as (original, compressed):
            maps, similarity = compare_maps(
                original,
                compressed,
                _samples(context, pair),
                variant=pair.variant.name,
                method=method,
            )
        attributions += maps
        similarities.append(similarity)
    return tuple(attributions), tuple(similarities)


def _pairs(
    context: RunContext, variants: Sequence[RunVariant], judged: JudgedPredictions
) -> Iterator[_Explained]:
    """Yield the variants whose answers to the test images are known, beside the original's."""
    runtimes = dict.fromkeys(target.runtime for target in context.recipe.targets)
    for variant in variants[1:]:
        for runtime in runtimes:
            before, after = (
                judged.path(each.name, runtime, each.precision) for each in (variants[0], variant)
            )
            if before.is_file() and after.is_file():
                yield _Explained(variant, runtime, (before, after))


def _explained(pairs: Sequence[_Explained], *, needs_gradients: bool) -> _Explained | None:
    """Return the first runtime's int8 graph, or the last float network."""
    int8 = [
        each
        for each in pairs
        if each.variant.target and runtime_class(each.runtime).opens == "onnx"
    ]
    if int8 and not needs_gradients:
        return int8[0]
    floats = [pair for pair in pairs if pair.variant.target is None]
    return floats[-1] if floats else None


@contextlib.contextmanager
def _networks(
    context: RunContext, original: RunVariant, pair: _Explained
) -> Iterator[tuple[Any, Any]]:
    yield context.network(original), context.network(pair.variant)


@contextlib.contextmanager
def _sessions(
    context: RunContext, original: RunVariant, pair: _Explained
) -> Iterator[tuple[Any, Any]]:
    with (
        open_session(context.path(original), pair.runtime) as before,
        open_session(context.path(pair.variant), pair.runtime) as after,
    ):
        yield before, after


def _samples(context: RunContext, pair: _Explained) -> Samples:
    before, after = map(Predictions.load, pair.answers)
    return records.samples(context.dataset, before, after, context.recipe.measure.explain_images)
