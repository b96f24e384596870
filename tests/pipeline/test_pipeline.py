"""The main job: its report holds what the runtimes gave, and a killed run ends like any other."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from compress import pipeline
from compress.artifact import sha256
from compress.data import load_data
from compress.errors import RunError
from compress.evaluate import predict
from compress.models import load_model
from compress.pipeline.reporting import gates
from compress.recipe.loading import load_recipe
from compress.recipe.settings import DataSettings, Gates
from compress.report.schema import Result, Variant
from compress.train import shown_batches

RECIPE = {
    "model": {"name": "compress.models.cifar:resnet8", "options": {"in_channels": 1, "width": 8}},
    "data": {"name": "digits", "calibration": 32},
    "stages": [
        {"train": {"epochs": 2, "batch_size": 64, "precision": "fp32"}},
        {"prune": {"criterion": "l1", "keep_macs": 0.5}},
        {
            "distill": {
                "epochs": 2,
                "batch_size": 64,
                "losses": ["kd"],
                "precision": "fp32",
                "augment": {"crop_padding": 2},
            }
        },
        {"quantize": {"samples": 32, "method": "plain"}},
    ],
    "targets": [{"runtime": "onnxruntime"}],
    "gates": {"size_ratio": 2.0, "top1_drop_pct": 100},
    "measure": {
        "rounds": 3,
        "round_ms": 5,
        "sensitivity": True,
        "explain_images": 3,
        "explain_methods": ["grad-cam", "integrated-gradients", "lime", "kernel-shap"],
    },
}
TIMINGS = ("latency", "throughput", "speedup", "memory", "peak", "load", "call", "energy", "stable")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "mine.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """One uninterrupted run: its folder and its report."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, pipeline.run(recipe, folder)


def read(folder):
    return json.loads((folder / "report.json").read_text())


def by_name(report):
    return {variant["name"]: variant for variant in report["variants"]}


def timeless(part):
    """Return a report without what differs from run to run."""
    if isinstance(part, dict):
        return {
            key: timeless(value)
            for key, value in part.items()
            if not any(word in key for word in (*TIMINGS, "provenance", "verdict", "reformat"))
        }
    return [timeless(each) for each in part] if isinstance(part, list) else part


def test_every_stage_is_a_variant_with_its_file(run):
    folder, _ = run
    variants = by_name(read(folder))
    assert list(variants) == ["original", "pruned", "distilled", "int8-onnxruntime"]
    for variant in variants.values():
        path = folder / variant["artifact"]
        assert sha256(path) == variant["sha256"]
        assert variant["size_mib"] == pytest.approx(path.stat().st_size / 2**20)


def test_statistics_of_the_pruned_network_are_those_of_the_training_that_follows(run, recipe):
    folder, _ = run
    chosen = load_recipe(recipe)
    pruned = load_model(folder / "01-prune")
    dataset = load_data(chosen.data)
    shown = shown_batches(dataset, chosen.stages[2].distill, 16, chosen.seed)
    with torch.no_grad():
        entering = pruned.conv1(torch.cat([images for images, _ in shown]))
    torch.testing.assert_close(pruned.bn1.running_mean, entering.mean((0, 2, 3)))


def test_pruning_kept_its_budget(run):
    variants = by_name(read(run[0]))
    share = variants["pruned"]["macs"] / variants["original"]["macs"]
    assert 0.45 <= share <= 0.5


def test_accuracy_in_the_report_is_that_of_the_file_that_ships(run):
    import onnxruntime

    folder, _ = run
    data = load_data(DataSettings(name="digits", calibration=32))
    images = torch.cat([x for x, _ in data.batches("test")]).numpy()
    labels = data.splits["test"].labels
    for variant in by_name(read(folder)).values():
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", "1")  # as the runtime does
        session = onnxruntime.InferenceSession(str(folder / variant["artifact"]), options)
        right = session.run(None, {"input": images})[0].argmax(1) == labels
        assert variant["results"][0]["top1_pct"] == pytest.approx(100 * right.mean())


def test_the_gates_are_the_arithmetic_of_the_report(run):
    report = read(run[0])
    variants = by_name(report)
    ratio = variants["original"]["size_mib"] / variants["int8-onnxruntime"]["size_mib"]
    gate = next(each for each in report["gates"] if each["name"] == "size_ratio")
    assert gate["measured"] == pytest.approx(ratio)
    assert gate["passed"] == (ratio >= 2.0)


def test_lineage_leads_from_the_int8_file_to_the_original(run):
    folder, _ = run
    listed = json.loads((folder / "run.json").read_text())["artifacts"]
    parents = {each["sha256"]: each["parent"] for each in listed}
    place = sha256(folder / "03-quantize" / "model.onnxruntime.onnx")
    steps = []
    while place is not None:
        steps.append(place)
        place = parents[place]
    assert steps[-1] == sha256(folder / "00-train" / "model.onnx")
    assert len(steps) == 4


def test_each_method_explains_the_network_it_can_ask(run):
    folder, _ = run
    details = read(folder)["details"]
    asked = {part["method"]: part["variant"] for part in details["similarities"]}
    assert asked == {
        "grad-cam": "distilled",
        "integrated-gradients": "distilled",
        "lime": "int8-onnxruntime",
        "kernel-shap": "int8-onnxruntime",
    }
    answers = {
        path.name.split(".")[0]: np.load(path)["logits"].argmax(1)
        for path in (folder / "04-measure").glob("*.npz")
    }
    assert len(details["attributions"]) == 4 * 3
    for part in details["attributions"]:
        assert part["before"] == answers["original"][part["index"]]
        assert part["after"] == answers[part["variant"]][part["index"]]


def test_the_report_charts_what_each_group_bears(run):
    folder, _ = run
    report = read(folder)
    (chart,) = report["details"]["sensitivity"]
    assert "sensitivity" not in report["details"]["skipped"]
    groups = json.loads((folder / "01-prune/plan.json").read_text())["groups"]
    assert {line["name"] for line in chart["lines"]} == set(groups)
    whole = load_model(folder / "00-train").eval()
    data = load_data(DataSettings(**RECIPE["data"]))
    right = predict(whole, data.batches("validation")).correct
    for line in chart["lines"]:
        assert line["x"] == [0.25, 0.5, 0.75, 1.0]
        assert line["y"][-1] == pytest.approx(100 * right.mean())
        assert all(0 <= y <= 100 for y in line["y"])
    assert "Each group of channels cut alone" in (folder / "report.html").read_text()


def test_a_finished_run_is_reported_again_without_working(run, recipe):
    folder, _ = run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.onnx")}
    report = read(folder)
    pipeline.run(recipe, folder)
    assert read(folder) == report
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.onnx")} == before


def test_a_folder_of_another_recipe_is_refused_and_left_alone(run, recipe):
    folder, _ = run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(RunError, match="belongs to another recipe; these keys differ: seed"):
        pipeline.run(recipe, folder, overrides=["seed=3"])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_the_callers_random_state_is_left_alone(run, recipe):
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    pipeline.run(recipe, run[0])
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(3) == expected[1]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", ["00-train/training/last.pt", "01-prune/model.onnx", "02-distill/training/last.pt"]
)
def test_a_run_killed_anywhere_ends_with_the_same_report(run, recipe, tmp_path, moment):
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "compress", "run", str(recipe), "--out", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (folder / moment).exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "report.json").exists()
    subprocess.run([*command, "--resume"], check=True, capture_output=True)
    assert timeless(read(folder)) == timeless(read(run[0]))


@pytest.mark.slow
def test_two_processes_of_a_torchrun_make_one_run(recipe, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "29611", "-m", "compress", "run", str(recipe)]
    folder = tmp_path / "both"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(by_name(read(folder))) == ["original", "pruned", "distilled", "int8-onnxruntime"]


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_more_room_lets_it_end(run, recipe, tmp_path):
    """On a file system of 400 KiB; needs the right to mount one."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        folder = small / "run"
        command = [sys.executable, "-m", "compress", "run", str(recipe), "--out", str(folder)]
        full = subprocess.run(command, capture_output=True, text=True)
        assert full.returncode == 2, full.stderr[-2000:]
        assert "the disk is full" in full.stderr
        assert not [path for path in folder.rglob(".*") if path.is_file()]  # half-written files
        subprocess.run(["mount", "-o", "remount,size=50m", str(small)], check=True)
        subprocess.run(command, check=True, capture_output=True)
        assert timeless(read(folder)) == timeless(read(run[0]))
    finally:
        subprocess.run(["umount", str(small)], check=False)


@pytest.mark.parametrize(
    ("runtime", "has_gpu", "device"),
    [
        ("onnxruntime", True, "cpu"),
        ("openvino", True, "cpu"),
        ("tensorrt", True, "cuda"),
        ("tensorrt-rtx", True, "cuda"),
        ("pytorch", True, "cuda"),
        ("pytorch", False, "cpu"),
    ],
)
def test_results_name_the_device_that_the_runtime_takes(monkeypatch, runtime, has_gpu, device):
    from compress import plugins

    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert plugins.create("runtimes", runtime).device_kind() == device


def test_published_recipes_name_files_that_exist_or_are_set():
    for path in sorted(Path("recipes").glob("*.yaml")):
        loaded = load_recipe(path)
        assert loaded.targets, path
        gates = loaded.gates
        gated = gates.top1_drop_pct or gates.metric_drop or gates.agreement_pct
        assert bool(gated) == (path.stem != "bccd-multilabel"), path  # told from no guess: it says


def test_accuracy_and_size_are_gated_once_for_all_batches_and_speed_for_each():
    place = {"runtime": "onnxruntime", "precision": "fp32", "device": "cpu"}

    def variant(name, **values):
        results = tuple(Result(**place, batch=batch, **values) for batch in (1, 8))
        return Variant(name=name, stage=name, size_mib=1.0, results=results)

    rows = (variant("original"), variant("small", top1_change_pct=-0.5, speedup=2.0))
    limits = Gates(top1_drop_pct=1.0, speedup=1.5, size_ratio=1.0)
    found = sorted((gate.name, gate.batch) for gate in gates(limits, rows))
    assert found == [("size_ratio", 1), ("speedup", 1), ("speedup", 8), ("top1_drop_pct", 1)]
