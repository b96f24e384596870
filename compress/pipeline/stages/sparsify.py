"""The stage sparsify: set single weights to zero, and what runtimes gain from zeros."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from compress import measure
from compress.pipeline.context import RunContext, RunVariant, StageResult, save_stage
from compress.prune import sparsity
from compress.recipe.settings import SparsifySettings
from compress.report import schema
from compress.runtimes import runtime_class


def zero_weights(
    context: RunContext, settings: SparsifySettings, stage: Path, before: tuple[RunVariant, ...]
) -> StageResult:
    """Zero single weights; every later training keeps them at zero."""
    parent = before[-1]
    model = context.network(parent)
    plan = sparsity.plan_sparsity(
        model,
        context.dataset.example,
        keep_weights=settings.keep_weights,
        pattern=settings.pattern,
        criterion=settings.criterion,
        ranking=settings.ranking,
        batches=list(context.dataset.batches("calibration")),
        seed=context.recipe.seed,
    )
    sparse = sparsity.apply_sparsity(model, plan)
    told = {"sparsity": plan.to_json()}
    return save_stage(context, sparse, stage, "sparse", parent=parent, facts=told)


def sparsities(
    context: RunContext, variants: Sequence[RunVariant], rows: Sequence[schema.Variant]
) -> Iterator[schema.Sparsity]:
    """Yield, for each variant with zeroed weights, the share of zeros and what they gain where."""
    named = {variant.name: (variant, row) for variant, row in zip(variants, rows, strict=True)}
    for variant, row in named.values():
        if variant.sparsity is None:
            continue
        yield schema.Sparsity(
            variant=variant.name,
            pattern=variant.sparsity,
            zero_weights_pct=measure.zero_weights_pct(context.path(variant)),
            runtimes={
                result.runtime: _gain(result, _dense_results(variant, named))
                for result in row.results
            },
        )


def _dense_results(
    variant: RunVariant, named: Mapping[str, tuple[RunVariant, schema.Variant]]
) -> tuple[str, tuple[schema.Result, ...]]:
    """Return the nearest ancestor without zeroed weights, by name, and its results."""
    while variant.sparsity is not None and variant.parent is not None:
        variant = named[variant.parent][0]
    return variant.name, named[variant.name][1].results


def _gain(result: schema.Result, dense: tuple[str, tuple[schema.Result, ...]]) -> str:
    """Return what a runtime does with zeros, and what was measured of it here."""
    word = runtime_class(result.runtime).zero_weights
    name, rows = dense
    key = (result.runtime, result.precision, result.batch, result.threads)
    other = next((r for r in rows if (r.runtime, r.precision, r.batch, r.threads) == key), None)
    if other is None or not result.latency_ms_p50_ci95 or not other.latency_ms_p50_ci95:
        return f"{word} (not measured here against the same precision with dense weights)"
    (low, high), (other_low, other_high) = result.latency_ms_p50_ci95, other.latency_ms_p50_ci95
    verdict = "faster" if high < other_low else "slower" if low > other_high else "as fast"
    return (
        f"{word}; measured here: {verdict} ({low:.3g} to {high:.3g} ms; {name}: {other_low:.3g} to "
        f"{other_high:.3g})"
    )
