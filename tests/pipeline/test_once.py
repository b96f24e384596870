"""A run hashes and judges each of its files once, and reads its graphs no oftener than needed."""

import hashlib
import importlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from compress import artifact, evaluate
from compress.graph import files

RECIPE = {
    "model": {"name": "compress.models.cifar:resnet8", "options": {"in_channels": 1, "width": 4}},
    "data": {"name": "digits", "calibration": 32},
    "stages": [
        {"prune": {"criterion": "l1", "keep_macs": 0.5, "refit": False}},
        {"quantize": {"samples": 32, "method": "plain"}},
    ],
    "targets": [
        {"runtime": "onnxruntime", "precision": "int8"},
        {"runtime": "openvino", "precision": "int8"},
    ],
    "measure": {"rounds": 3, "round_ms": 5, "test_images": 32},
}


@pytest.fixture
def counted(monkeypatch):
    """Count calls: of a function by what its first argument is called."""

    def count(module, function, name):
        calls, whole = Counter(), getattr(module, function)

        def counting(*arguments, **options):
            calls[name(arguments[0])] += 1
            return whole(*arguments, **options)

        monkeypatch.setattr(module, function, counting)
        return calls

    return count


def test_a_run_does_each_thing_once(compress, counted, monkeypatch, tmp_path):
    """Also the engines, whose hash is asked for each time they are opened."""
    numbers = ("peak_rss_mib", "baseline_rss_mib", "load_ms", "first_call_ms")
    probed = dict.fromkeys(numbers, 1.0) | {"peak_device_mib": None}
    memory = importlib.import_module("compress.measure.memory")
    monkeypatch.setattr(memory, "_probe", lambda *_: probed)  # a process for each is slow
    hashed = counted(hashlib, "file_digest", lambda file: file.name)
    parsed = counted(files, "_parse", str)
    judged = counted(evaluate, "accuracy", lambda _: "accuracy")
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(RECIPE))
    code, _, err = compress("run", recipe, "--out", out)
    assert code == 0, err
    results = len(list((out / "03-measure").glob("*.npz")))
    assert judged["accuracy"] == results == 6  # three variants on two runtimes
    in_run = {name: calls for name, calls in hashed.items() if name.startswith(str(out))}
    assert len(in_run) > 10
    assert set(in_run.values()) == {1}, in_run
    graphs = {name: calls for name, calls in parsed.items() if name.startswith(str(out))}
    assert len(graphs) == 4  # original, pruned, two int8
    assert sum(graphs.values()) <= 15, graphs  # checked, measured, quantized, built for a runtime


def test_a_file_that_changes_is_read_again(monkeypatch, tmp_path):
    """At the same size, where changes are dated by a clock of the coarsest tick, and late."""
    whole, late = Path.stat, artifact.TICK_NS * 4 // 10

    def coarse(path, **options):
        found = whole(path, **options)
        exact = {name: getattr(found, name) for name in ("st_dev", "st_ino", "st_size")}
        times = {name: getattr(found, name) for name in ("st_mtime_ns", "st_ctime_ns")}
        return SimpleNamespace(
            **exact, **{k: t - late - (t - late) % artifact.TICK_NS for k, t in times.items()}
        )

    monkeypatch.setattr(Path, "stat", coarse)
    path = tmp_path / "file"
    for number in range(20):
        content = bytes([number]) * 100
        path.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        assert artifact.sha256(path) == digest == artifact.sha256(path)


def test_a_file_dated_in_the_future_is_read_each_time(monkeypatch, tmp_path):
    """The clock of a file server is ahead, so that waiting for its tick says nothing."""
    monkeypatch.setattr(artifact.time, "time_ns", iter(range(100)).__next__)
    path = tmp_path / "file"
    path.write_bytes(b"0")
    assert artifact.state_of(path) != artifact.state_of(path)
