"""Out of memory: how to tell, and what to advise."""

from __future__ import annotations

import torch

from compress.errors import TrainingError
from compress.recipe.settings import TrainSettings

MESSAGES = ("out of memory", "can't allocate memory", "not enough memory")  # of the allocators


def is_out_of_memory(error: Exception) -> bool:
    """Return whether ``error`` says that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MESSAGES)


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
