"""The command line in a process of its own under a fault, and what became of it.

Processes are forked from one that has imported everything and started no threads, which saves the
seconds of an import for each.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from compress.artifact import TEMPORARY, read_json

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = (
    *("torch", "torchvision", "onnxruntime", "onnxscript"),
    *("compress.cli.app", "compress.cli.stages", "compress.pipeline"),
)
CONTEXT.set_forkserver_preload(list(PRELOADED))
SECONDS = 240.0  # after which an attempt is ended from outside
RECIPE = {
    "name": "small",
    "model": {"name": "compress.models.cifar:resnet8", "options": {"in_channels": 1, "width": 4}},
    "data": {"name": "digits", "calibration": 16},
    "stages": [
        {"train": {"epochs": 1, "batch_size": 64, "epoch_images": 256, "precision": "fp32"}},
        {"prune": {"criterion": "l1", "keep_macs": 0.5}},
        {"quantize": {"samples": 16, "method": "plain"}},
    ],
    "targets": [{"runtime": "onnxruntime"}, {"runtime": "openvino"}],
    "measure": {"rounds": 3, "round_ms": 1, "explain_images": 0, "test_images": 64},
}
Fault = Callable[[], None]


@dataclass(frozen=True)
class Attempt:
    """How one call of the command line ended."""

    code: int | None  # exit code, the negative of a signal, or None: ended from outside
    told: str  # both its outputs

    @property
    def sentence(self) -> str:
        """The last line it printed."""
        return (self.told.strip().splitlines() or [""])[-1]

    @property
    def fault(self) -> str | None:
        """What is wrong with this ending; None for a result or one sentence and its exit code."""
        if self.code == 0 or (self.code == 1 and "Traceback" not in self.told):
            return None
        if self.code == 2 and "compress: " in self.told and "Traceback" not in self.told:
            return None
        return f"code {self.code}: {self.told[-600:]}"


def attempt(*arguments: object, log: Path, fault: Fault | None = None) -> Attempt:
    """Call ``compress`` in a process of its own, in which ``fault`` is called first.

    Args:
        arguments: As they would be typed.
        log: File for what it prints.
        fault: Limits its resources, changes its environment, breaks what it calls.
    """
    typed = [os.fspath(a) if isinstance(a, os.PathLike) else str(a) for a in arguments]
    process = CONTEXT.Process(target=called, args=(typed, log, fault))
    process.start()
    process.join(SECONDS)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    return Attempt(code, log.read_text("utf-8", "replace") if log.exists() else "")


def called(typed: list[str], log: Path, fault: Fault | None) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(out), "w", encoding="utf-8") for _ in range(2))
    from compress.cli import app

    if fault is not None:
        fault()
    sys.argv = ["compress", *typed]
    code: object = 70
    try:
        app.main()
    except SystemExit as ended:
        code = ended.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 70)


def both(*faults: Fault) -> Fault:
    """Return a fault that is all of ``faults``."""
    return partial(_each, faults)


def _each(faults: tuple[Fault, ...]) -> None:
    for fault in faults:
        fault()


def write_recipe(folder: Path, **changes: object) -> Path:
    """Write the small recipe into ``folder`` and return its path."""
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes))
    return path


def recorded(folder: Path) -> dict[str, str]:
    """Return every recorded file with its hash.

    Of the measuring only the names: its files hold times, and OpenVINO numbers the nodes of all
    graphs that a process has read.
    """
    entries = read_json(folder / "run.json")["artifacts"]
    return {e["path"]: "" if "measure" in e["stage"] else e["sha256"] for e in entries}


def files(folder: Path) -> set[str]:
    """Return every file below ``folder``."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def wreck(folder: Path) -> list[str]:
    """Return files that a run which ended in order may not leave: half-written ones."""
    return [name for name in files(folder) if TEMPORARY in name]
