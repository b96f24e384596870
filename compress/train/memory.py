"""Out of memory: what to advise."""

from __future__ import annotations

from compress.errors import TrainingError
from compress.recipe.settings import TrainSettings


def too_large(images: int, parts: int, step: int, settings: TrainSettings) -> TrainingError:
    """Return the error for a batch that does not fit into memory."""
    return TrainingError(
        f"out of memory at step {step}, {images} images in {parts} part{'s' if parts > 1 else ''}",
        where="train",
        fix=f"Set accumulate: {2 * parts} to compute a batch in more parts"
        + ("" if settings.halve_batch else ", or halve_batch: true to do so when needed"),
    )


def more_parts(images: int, parts: int, step: int, world: int) -> str:
    """Return what to tell of a batch that is computed in more parts from now on."""
    by = f" by each of {world} processes" if world > 1 else ""
    return (
        f"out of memory at step {step}: batches of {images} images are now computed in {parts} "
        f"parts{by}"
    )
