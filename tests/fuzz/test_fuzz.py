"""Whatever a file holds, its reader returns a result or says in one sentence what is wrong."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from campaign import one, run
from readers import READERS, Reader

FAST, SLOW = 25, 500  # files of each reader
BY_NAME = pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)


@BY_NAME
def test_valid_files_are_read(reader: Reader, tmp_path: Path) -> None:
    """What the fuzzers begin from is no error, so their refusals mean something."""
    if reader.name == "cifar":
        pytest.skip("its checksums are those of the real data set, which these files are not")
    outcomes = [one(reader, content, tmp_path) for content in valid(reader, tmp_path)]
    assert [row for row in outcomes if row.get("refused") is not False] == []


def valid(reader: Reader, folder: Path) -> list[object]:
    seeds = reader.seeds(folder)
    if reader.name in {"quant-plan", "prune-plan"}:
        return [json.dumps(seed).encode() for seed in seeds]
    if reader.name == "recipe":
        return [seed.encode() for seed in seeds]
    if reader.name == "npz":
        return [reader.mutate(Unchanged(), [seed]) for seed in seeds]
    if reader.name == "run-folder":
        return [tuple(p and json.dumps(p).encode() for p in seed) for seed in seeds]
    return seeds


class Unchanged(random.Random):
    """Draws that change nothing of an archive of arrays."""

    def random(self) -> float:
        return 0.99

    def randrange(self, *args: int) -> int:
        return 3

    def choice(self, seq):
        return seq[0]


@pytest.mark.parametrize(
    "reader",
    # Runtimes that other tests have started in this process hold locks in the fork of it.
    [pytest.param(r, marks=[pytest.mark.slow] * (r.name == "onnx-quantize")) for r in READERS],
    ids=lambda reader: reader.name,
)
def test_changed_files_are_read_or_refused(reader: Reader) -> None:
    outcome = run(reader, FAST)
    assert outcome.faults == []
    assert outcome.results + outcome.refused == FAST


@pytest.mark.slow
@BY_NAME
def test_many_changed_files_are_read_or_refused(reader: Reader) -> None:
    outcome = run(reader, SLOW, seed=1)
    assert outcome.faults == []
    assert outcome.results + outcome.refused == SLOW
