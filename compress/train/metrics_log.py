"""The learning curve while it is made: metrics.jsonl, and a tracker where asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from compress import artifact, packages

FILE = "metrics.jsonl"

Row = dict[str, Any]


class Tracker(Protocol):
    """Somewhere else that rows are logged to."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Log the numbers of one row."""

    def close(self) -> None:
        """Write what is left."""


class MetricsLog:
    """Rows of a learning curve, one line of JSON each, as they come.

    Args:
        folder: Where metrics.jsonl is written; None keeps rows in memory only.
        track: "tensorboard" or "mlflow", to log there too.
        rows: Rows of an interrupted training, which grow; what the file holds beyond them is
            dropped.
    """

    def __init__(self, folder: Path | None, track: str | None, rows: list[Row]) -> None:
        self.rows = rows
        self._path = folder / FILE if folder is not None else None
        if self._path is not None:
            artifact.write_text(self._path, "".join(_line(row) for row in rows))
        self._tracker = _tracker(track, folder) if track else None

    def add(self, row: Row) -> None:
        """Append ``row``."""
        self.rows.append(row)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(row))
        if self._tracker is not None:
            self._tracker.log(row)

    def __enter__(self) -> Self:
        """Return the log."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the tracker."""
        if self._tracker is not None:
            self._tracker.close()


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _tracker(name: str, folder: Path | None) -> Tracker:
    return Tensorboard(folder or Path()) if name == "tensorboard" else Mlflow(folder or Path())


class Tensorboard:
    """Logs to event files below a folder."""

    def __init__(self, folder: Path) -> None:
        packages.require("tensorboard", extra="tracking", purpose="track: tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, row: Mapping[str, Any]) -> None:
        """Log the numbers of one row."""
        for key, value in _numbers(row).items():
            self._writer.add_scalar(key, value, row["step"])

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class Mlflow:
    """Logs a run to the tracking server that MLflow is configured for, one experiment for all."""

    def __init__(self, folder: Path) -> None:
        packages.require("mlflow", extra="tracking", purpose="track: mlflow")
        from compress.report.tracking import mlflow_run

        self._client, self._run = mlflow_run(folder.name)

    def log(self, row: Mapping[str, Any]) -> None:
        """Log the numbers of one row."""
        for key, value in _numbers(row).items():
            self._client.log_metric(self._run, key, value, step=row["step"])

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run)


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key != "step" and value is not None}
