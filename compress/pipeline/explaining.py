"""What the variants of a run look at, beside what the original looks at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import insights
from compress.pipeline.job import Job, Variant, answers_path
from compress.predictions import Predictions
from compress.runtimes import open_session

if TYPE_CHECKING:
    from compress.explain import Samples


def explain_variants(
    job: Job, variants: Sequence[Variant], answers: Path
) -> dict[str, list[dict[str, Any]]]:
    """Return attribution maps of the last float and the first int8 variant, if the recipe asks.

    The float network is explained by Grad-CAM, which needs its gradients; the int8 graph by
    KernelSHAP, which needs answers only, so that it explains the file that ships.

    Args:
        job: The run.
        variants: All variants, the original first.
        answers: Folder with the answers of each variant to the test images.

    Raises:
        MissingPackageError: captum is not installed.
    """
    found: dict[str, list[dict[str, Any]]] = {"attributions": [], "similarities": []}
    if not job.recipe.measure.explain_images:
        return found
    from compress.explain import compare_maps

    for variant, method in _explained(variants):
        samples = _samples(job, variants[0], variant, answers)
        if samples is None:  # neither ran on ONNX Runtime: nobody knows which images flipped
            continue
        with _both(job, variants[0], variant) as (original, compressed):
            pairs, similarity = compare_maps(
                original, compressed, samples, variant=variant.name, method=method
            )
        found["attributions"] += [pair.model_dump(mode="json") for pair in pairs]
        found["similarities"].append(similarity.model_dump(mode="json"))
    return found


def _explained(variants: Sequence[Variant]) -> Iterator[tuple[Variant, str]]:
    floats = [variant for variant in variants[1:] if variant.target is None]
    int8 = [variant for variant in variants if variant.target == "onnxruntime"]
    yield from ((variant, "grad-cam") for variant in floats[-1:])
    yield from ((variant, "kernel-shap") for variant in int8[:1])


@contextlib.contextmanager
def _both(job: Job, original: Variant, variant: Variant) -> Iterator[tuple[Any, Any]]:
    if variant.target is None:
        yield job.network(original), job.network(variant)
        return
    with open_session(job.path(original)) as before, open_session(job.path(variant)) as after:
        yield before, after


def _samples(job: Job, original: Variant, variant: Variant, answers: Path) -> Samples | None:
    paths = [
        answers_path(answers, each.name, "onnxruntime", each.precision)
        for each in (original, variant)
    ]
    if not all(path.is_file() for path in paths):
        return None
    before, after = map(Predictions.load, paths)
    return insights.samples(job.dataset, before, after, job.recipe.measure.explain_images)
