"""Trainings in processes of their own: several at once, and killed ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("worker.py")
pytestmark = pytest.mark.slow


def run(folder: Path, world: int = 1, **options: Any) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        if world > 1
        else []
    )
    return subprocess.run(
        [sys.executable, *launch, str(WORKER), str(folder), json.dumps(options)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        check=False,
    )


def outcome(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    rows = json.loads((folder / "history.json").read_text())
    return [row["loss"] for row in rows], torch.load(folder / "weights.pt", weights_only=True)


@pytest.mark.parametrize("options", [{"norm": False}, {"sync": True}], ids=["no-norm", "synced"])
def test_two_processes_give_the_curve_of_one_with_the_whole_batch(
    tmp_path: Path, options: dict[str, Any]
):
    for name, world in (("one", 1), ("two", 2)):
        done = run(tmp_path / name, world, **options)
        assert done.returncode == 0, done.stderr[-2000:]
    (losses, weights), (shared_losses, shared) = (outcome(tmp_path / n) for n in ("one", "two"))
    assert shared_losses == pytest.approx(losses, rel=1e-4)
    for name, value in weights.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-3, atol=1e-5, msg=name)
    files = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert files == [
        "best.pt", "history.json", "last.pt", "metrics.jsonl", "notes.json", "weights.pt"
    ]  # fmt: skip


def test_without_synced_statistics_the_curves_differ(tmp_path: Path):
    for name, world in (("one", 1), ("two", 2)):
        done = run(tmp_path / name, world)
        assert done.returncode == 0, done.stderr[-2000:]
    assert outcome(tmp_path / "one")[0] != pytest.approx(outcome(tmp_path / "two")[0], rel=1e-4)


@pytest.mark.parametrize(
    "options", [{"unused": True}, {"freeze": "conv2"}], ids=["unused", "frozen"]
)
def test_parameters_without_gradients_do_not_stop_several_processes(
    tmp_path: Path, options: dict[str, Any]
):
    for name, world in (("one", 1), ("two", 2)):
        done = run(tmp_path / name, world, norm=False, **options)
        assert done.returncode == 0, done.stderr[-2000:]
    assert outcome(tmp_path / "two")[0] == pytest.approx(outcome(tmp_path / "one")[0], rel=1e-4)


def test_processes_agree_to_compute_a_batch_in_more_parts(tmp_path: Path):
    """One of two runs out of memory at the fourth step; both go on, and nothing else changes."""
    assert run(tmp_path / "one", norm=False).returncode == 0
    done = run(tmp_path / "two", 2, norm=False, rank=1, step=3, how="memory", halve=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert outcome(tmp_path / "two")[0] == pytest.approx(outcome(tmp_path / "one")[0], rel=1e-4)
    notes = json.loads((tmp_path / "two" / "notes.json").read_text())
    assert [note.partition(": ")[0] for note in notes] == ["out of memory at step 4"] * 2
    assert notes[-1].endswith("of 32 images are now computed in 4 parts by each of 2 processes")


def test_without_leave_to_halve_all_processes_stop_when_one_runs_out_of_memory(tmp_path: Path):
    done = run(tmp_path, 2, rank=1, step=3, how="memory")
    assert done.returncode != 0
    assert "out of memory at step 4, 16 images in 1 part" in done.stderr


def test_statistics_of_all_processes_and_repeated_steps_exclude_each_other(tmp_path: Path):
    done = run(tmp_path, 2, sync=True, halve=True)
    assert done.returncode != 0
    assert "with sync_batchnorm, the processes synchronize within a step" in done.stderr


@pytest.mark.parametrize(
    ("how", "reason"), [("raise", "the cat sat on the keyboard"), ("kill", "SIGKILL")]
)
def test_a_process_that_dies_stops_the_others_with_its_reason(
    tmp_path: Path, how: str, reason: str
):
    start = time.monotonic()
    done = run(tmp_path, 2, rank=1, step=3, how=how)
    assert done.returncode != 0
    assert reason in done.stderr
    assert time.monotonic() - start < 120
    assert not (tmp_path / "history.json").exists()


def test_a_killed_training_goes_on_to_the_weights_of_an_uninterrupted_one(tmp_path: Path):
    options = {"dropout": 0.3}
    assert run(tmp_path / "whole", **options).returncode == 0
    killed = run(tmp_path / "killed", step=6, how="kill", **options)
    assert killed.returncode == -signal.SIGKILL
    assert run(tmp_path / "killed", **options).returncode == 0
    whole, resumed = outcome(tmp_path / "whole"), outcome(tmp_path / "killed")
    assert resumed[0] == whole[0]
    assert all(torch.equal(value, resumed[1][name]) for name, value in whole[1].items())
