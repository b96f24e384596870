"""What a training leaves in its folder: checkpoints, written whole or not at all, and its curve."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from compress import artifact, packages
from compress.errors import TrainingError

VERSION = 1
LAST = "last.pt"
BEST = "best.pt"
CURVE = "metrics.jsonl"

Row = dict[str, Any]  # of the learning curve


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
        line = (str(error).splitlines() or [type(error).__name__])[0]
        reason = line.split(". ")[0].rstrip(".")
        raise TrainingError(
            f"cannot be read as a checkpoint ({reason})",
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


class MetricsLog:
    """Rows of a learning curve, one line of JSON each, as they come; also to a tracker.

    ``rows`` of an interrupted training grow: what the file holds beyond them is dropped. Without a
    folder they are kept in memory only. ``track`` is "tensorboard" or "mlflow".
    """

    def __init__(self, folder: Path | None, track: str | None, rows: list[Row]) -> None:
        self.rows = rows
        self._path = folder / CURVE if folder is not None else None
        if self._path is not None:
            artifact.write_text(self._path, "".join(_line(row) for row in rows))
        self._tracker = _tracker(track, folder or Path()) if track else None

    def add(self, row: Row) -> None:
        """Append ``row``."""
        self.rows.append(row)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(row))
        if self._tracker is not None:
            for key, value in row.items():
                if key != "step" and value is not None:
                    self._tracker[0](key, value, step=row["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracker is not None:
            self._tracker[1]()


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _tracker(name: str, folder: Path) -> tuple[Callable[..., object], Callable[[], object]]:
    """Return what logs a value (its name, value and step), and what ends the log."""
    packages.require(name, extra="tracking", purpose=f"track: {name}")
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))
        return lambda key, value, step: writer.add_scalar(key, value, step), writer.close
    from compress.report.tracking import mlflow_run

    client, run = mlflow_run(folder.name)
    return partial(client.log_metric, run), partial(client.set_terminated, run)
