"""Ctrl-C and SIGTERM end a run within seconds; a folder belongs to one run at a time."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from compress import interruption
from compress.artifact import sha256
from compress.errors import RunError
from compress.pipeline import run
from compress.recipe.loading import validate_recipe
from compress.report.run_folder import LOCK_FILE, held

HOLDER = """
import os, sys, time
from pathlib import Path
from compress.report.run_folder import held
with held(Path(sys.argv[1])):
    worker = os.fork()
    if worker:
        print(worker, flush=True)
    time.sleep(600)
"""
STUCK = """
import time
from compress import interruption
with interruption.ending_on_signals(), interruption.deferred():
    print("ready", flush=True)
    time.sleep(600)
"""
IMPORTING = """
import sys, time, importlib.abc, importlib.machinery
from compress import interruption

class Slow(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "slow" else None

    def exec_module(self, module):
        print("begun", flush=True)
        until = time.monotonic() + 1
        while time.monotonic() < until:
            pass
        print("imported whole", end=", ", flush=True)

sys.meta_path.insert(0, Slow())
try:
    with interruption.ending_on_signals():
        import slow
        time.sleep(600)
except KeyboardInterrupt as ended:
    print("then ended by", *ended.args)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that works in ``tmp_path / "run"``, with a forked worker."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    worker = int(process.stdout.readline())
    yield process
    os.kill(worker, signal.SIGKILL)
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_run_is_refused_with_the_pid_of_the_first(holder, tmp_path):
    refused = pytest.raises(RunError, match=rf"another run works in this folder: pid {holder.pid} ")
    with refused, held(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / LOCK_FILE).exists()


def test_what_the_folder_tells_comes_before_images_are_read(holder, tmp_path):
    data = {"name": "imagefolder", "root": str(tmp_path / "absent")}
    recipe = validate_recipe({"model": {"name": "torchvision:resnet18"}, "data": data}, where="it")

    def refused(out):
        with pytest.raises(RunError) as error:
            run(recipe, out)
        return str(error.value)

    assert "another run works in this folder" in refused(tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert "the folder is not empty and holds no run" in refused(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_folder_reached_by_a_symlink_is_the_same_folder(holder, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(RunError, match=f"pid {holder.pid}"), held(tmp_path / "link"):
        pass


def test_the_lock_of_a_killed_run_locks_nothing_though_its_workers_live_on(holder, tmp_path):
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / LOCK_FILE).exists()
    with held(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK_FILE).read_text().startswith(f"{os.getpid()} on ")
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_a_copy_of_a_folder_that_is_worked_in_is_free(holder, tmp_path):
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with held(tmp_path / "copy"):
        pass


def test_a_folder_that_cannot_be_made_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="cannot be written"), held(tmp_path / "file" / "run"):
        pass


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_work_that_never_looks_is_ended_by_force(number, code):
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    start = time.monotonic()
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == code, told
    assert told == interruption.MESSAGE
    assert time.monotonic() - start >= interruption.PATIENCE_S - 0.1


def test_a_second_signal_does_not_wait():
    waits = interruption.deferred()
    with pytest.raises(KeyboardInterrupt), interruption.ending_on_signals() as signals, waits:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.is_asked()
        os.kill(os.getpid(), signal.SIGTERM)
    assert signals.exit_code == 143


def test_a_module_that_is_being_imported_is_not_torn():
    """Libraries in C++ import as they go, and abort the process on an exception there."""
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "begun\n"
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=60)
    assert told == "imported whole, then ended by 2\n"
    assert time.monotonic() - start < interruption.PATIENCE_S


def test_handlers_are_as_they_were_afterwards():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with interruption.ending_on_signals():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert not interruption.is_asked()


LONG = {
    "model": {"name": "compress.models.cifar:resnet8", "options": {"in_channels": 1, "width": 4}},
    "data": {"name": "digits", "calibration": 16},
    "stages": [{"train": {"epochs": 2, "batch_size": 8, "precision": "fp32"}}],
    "targets": [{"runtime": "onnxruntime", "precision": "fp32"}],
    "measure": {"rounds": 3, "round_ms": 1, "explain_images": 0},
}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_ends_within_seconds_and_goes_on_to_the_same_weights(tmp_path, number, code):
    recipe = tmp_path / "long.yaml"
    recipe.write_text(yaml.safe_dump(LONG))

    def start(folder):
        command = [sys.executable, "-m", "compress", "run", str(recipe), "--out", str(folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    stopped, journal = tmp_path / "stopped", tmp_path / "stopped/00-train/training/metrics.jsonl"
    process = start(stopped)
    while not journal.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    asked = time.monotonic()
    process.send_signal(number)
    _, told = process.communicate()
    assert time.monotonic() - asked < 5
    assert (process.returncode, told.splitlines()[-1:]) == (code, [interruption.MESSAGE.strip()])
    assert (stopped / "00-train/training/last.pt").exists()  # saved where it stood
    for folder in (stopped, tmp_path / "whole"):
        process = start(folder)
        assert process.communicate() and process.returncode == 0
    first, second = (
        json.loads((each / "00-train/training/metrics.jsonl").read_text().splitlines()[-1])["loss"]
        for each in (stopped, tmp_path / "whole")
    )
    assert first == second
    weights = "00-train/model.safetensors"
    assert sha256(stopped / weights) == sha256(tmp_path / "whole" / weights)
