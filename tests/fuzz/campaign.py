"""Run a reader on many mutated files, each within a time and memory limit, in child processes.

A child dies with a file that crashes the interpreter; the next one goes on behind it.
"""

from __future__ import annotations

import collections
import json
import os
import random
import resource
import signal
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from readers import Reader

from compress.errors import CompressError

SECONDS = 10.0  # each file
GRACE = 20.0  # after which the process is ended from outside
MEMORY = 6 * 2**30  # bytes more than the process has when it begins


class TooLong(BaseException):
    """A file took longer than its limit."""


@dataclass
class Outcome:
    """What became of many files."""

    reader: str
    cases: int = 0
    results: int = 0
    refused: int = 0
    faults: list[dict[str, Any]] = field(default_factory=list)
    slowest: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return this outcome as JSON-able data, its faults counted by kind."""
        kinds = collections.Counter(fault["kind"] for fault in self.faults)
        return {
            "reader": self.reader,
            "cases": self.cases,
            "results": self.results,
            "refused": self.refused,
            "faults": len(self.faults),
            "kinds": dict(kinds.most_common()),
            "slowest_s": round(self.slowest, 2),
        }


def run(reader: Reader, cases: int, seed: int = 0, keep: Path | None = None) -> Outcome:
    """Return what became of ``cases`` mutated files.

    Args:
        reader: What is mutated and who reads it.
        cases: How many files.
        seed: File number i depends on the seed and i alone.
        keep: Folder in which files that led to a fault are kept.
    """
    outcome = Outcome(reader.name, cases)
    with tempfile.TemporaryDirectory() as folder:
        seeds = reader.seeds(Path(folder))
        done = 0
        while done < cases:
            done = _child(reader, seeds, (done, cases, seed), outcome, Path(folder), keep)
    return outcome


def _child(
    reader: Reader,
    seeds: list[Any],
    span: tuple[int, int, int],
    outcome: Outcome,
    folder: Path,
    keep: Path | None,
) -> int:
    """Run files from ``span`` on in a child; return the number of the first that is left."""
    start, end, _ = span
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        try:
            _work(reader, seeds, span, writing, folder, keep)
        finally:
            os._exit(0)
    os.close(writing)
    next_case, last = start, time.monotonic()
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        os.set_blocking(pipe.fileno(), False)
        rest = b""
        while True:
            chunk = pipe.read(1 << 16)
            if chunk:
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    _note(outcome, json.loads(line))
                    next_case, last = next_case + 1, time.monotonic()
            elif chunk == b"":
                break
            elif time.monotonic() - last > SECONDS + GRACE:
                os.kill(process, signal.SIGKILL)
                _note(outcome, {"fault": f"hang: case {next_case}", "kind": "hang", "seconds": 30})
                next_case += 1
                break
            else:
                time.sleep(0.02)
    _, status = os.waitpid(process, 0)
    if next_case < end and os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
        kind = f"crash: signal {os.WTERMSIG(status)}"
        _note(outcome, {"fault": f"{kind}, case {next_case}", "kind": kind, "seconds": 0})
        next_case += 1
    elif next_case == start and end > start and not os.WIFSIGNALED(status):
        raise RuntimeError(f"the worker of {reader.name} ended without a word")
    return next_case


def _note(outcome: Outcome, row: dict[str, Any]) -> None:
    outcome.slowest = max(outcome.slowest, row["seconds"])
    if "fault" in row:
        outcome.faults.append(row)
    elif row["refused"]:
        outcome.refused += 1
    else:
        outcome.results += 1


def _work(
    reader: Reader,
    seeds: list[Any],
    span: tuple[int, int, int],
    pipe: int,
    folder: Path,
    keep: Path | None,
) -> None:
    start, end, seed = span
    warnings.simplefilter("ignore")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, in_use + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, _ring)
    for number in range(start, end):
        content = reader.mutate(random.Random(f"{seed}/{number}"), seeds)
        row = one(reader, content, folder)
        if keep is not None and "fault" in row:
            keep.mkdir(parents=True, exist_ok=True)
            suffix = content if isinstance(content, bytes) else repr(content).encode()
            (keep / f"{reader.name}-{seed}-{number}").write_bytes(suffix)
        os.write(pipe, json.dumps(row | {"case": number}).encode() + b"\n")


def one(reader: Reader, content: Any, folder: Path) -> dict[str, Any]:
    """Return what became of one file: refused or not, or a fault with its place."""
    begun = time.monotonic()
    row: dict[str, Any]
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        reader.read(folder, content)
        row = {"refused": False}
    except CompressError:
        row = {"refused": True}
    except (Exception, TooLong) as error:  # noqa: BLE001 - these are what is looked for
        row = {"fault": f"{type(error).__name__}: {error}"[:300], "kind": _kind(error)}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.monotonic() - begun
    if seconds > SECONDS and "fault" not in row:
        row = {"fault": f"took {seconds:.1f} s", "kind": "slow"}
    return row | {"seconds": seconds}


def _ring(number: int, frame: Any) -> None:
    raise TooLong


def _kind(error: BaseException) -> str:
    """Return the kind of an error and the last line of the project it came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/compress/" in f.filename]
    place = f" {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"
