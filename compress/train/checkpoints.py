"""Checkpoints of a training: tensors and plain data, written whole or not at all."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from compress import artifact
from compress.errors import TrainingError

VERSION = 1
LAST = "last.pt"
BEST = "best.pt"


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path`` in one step.

    Raises:
        RunError: the disk is full or the folder cannot be written.
    """
    with artifact.replacing(path) as temporary:
        torch.save({"version": VERSION, **state}, temporary)


def load_state(path: Path) -> dict[str, Any]:
    """Return what :func:`save` wrote, on the CPU; no code in the file is run.

    Raises:
        TrainingError: the file is damaged, holds something else or is of another version.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise TrainingError(
            f"cannot be read as a checkpoint ({_first_sentence(error)})",
            where=str(path),
            fix="Remove it to start this training afresh",
        ) from None
    version = state.get("version") if isinstance(state, dict) else None
    if version != VERSION:
        raise TrainingError(
            f"is a checkpoint of version {version}",
            where=str(path),
            expected=f"version {VERSION}",
            fix="Train in another folder, or start afresh with --fresh",
        )
    return dict(state)


def check_same(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Compare what a checkpoint was made with to what this training is about.

    Raises:
        TrainingError: they differ; the message names the differences.
    """
    differences = [
        f"{key}: {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key)
    ]
    if differences:
        raise TrainingError(
            f"belongs to another training ({'; '.join(differences[:4])})",
            where=str(path),
            fix="Train in another folder, or start afresh with --fresh",
        )


def _first_sentence(error: Exception) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.split(". ")[0].rstrip(".")
