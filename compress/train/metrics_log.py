"""The learning curve while it is made: metrics.jsonl, and a tracker where asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self

from compress import artifact, packages

FILE = "metrics.jsonl"

Row = dict[str, Any]


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
        """Return the log."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the tracker."""
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
