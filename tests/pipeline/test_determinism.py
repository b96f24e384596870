"""The same seed gives the same bytes; threads and the order of images change nothing."""

import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
import yaml

import compress
from compress.artifact import read_json, sha256
from compress.models.cifar import resnet8
from compress.quantize import calibrate, make_quant_plan, write_qdq

TARGETS = ("onnxruntime", "openvino", "tensorrt")


@pytest.fixture
def threads():
    """Set the number of torch's threads; put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return resnet8(in_channels=1, width=8).eval()


def images(count=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 16, 16, generator=generator)


def plan_bytes(criterion):
    plan = compress.plan_pruning(network(), images(8), criterion=criterion, keep_macs=0.5)
    return json.dumps(plan.to_json()).encode(), compress.apply_pruning(network(), plan)


@pytest.mark.parametrize("criterion", ["l1", "lamp", "geometric_median", "random"])
def test_plans_and_weights_are_the_same_bytes(criterion, threads, tried):
    tried("the same seed again, with one or two threads: pruning plan and weights, same bytes", 3)
    threads(1)
    first, weights = plan_bytes(criterion)
    for count in (1, 2, 2):
        threads(count)
        again, other = plan_bytes(criterion)
        assert again == first
        for name, value in weights.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name


def test_exported_graphs_are_the_same_bytes(tmp_path, threads, tried):
    tried("the same network exported again, with one or two threads: ONNX, same bytes", 2)
    hashes = set()
    for count in (1, 1, 2):
        threads(count)
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.onnx"
        compress.export_onnx(network(), images(1), path)
        hashes.add(sha256(path))
    assert len(hashes) == 1


def order(count, seed):
    return np.random.default_rng(seed).permutation(count)


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    path = tmp_path_factory.mktemp("graph") / "x.onnx"
    compress.export_onnx(network(), images(1), path)
    return path


@pytest.mark.parametrize("observer", ["minmax", "mse", "percentile", "entropy"])
def test_ranges_do_not_depend_on_threads_nor_order(graph, observer, tried, monkeypatch):
    """Batches in another order, of another size, images in another order; one thread or two."""
    tried("calibration with threads and order of images changed: the same QuantPlan", 6)
    model, every = onnx.load(graph), images().numpy()
    ways = [
        ([every[i : i + 8] for i in range(0, 32, 8)], 1),
        ([every[i : i + 8] for i in range(0, 32, 8)], 2),
        ([every[i : i + 8] for i in range(24, -8, -8)], 1),
        ([every[order(32, 1)][i : i + 8] for i in range(0, 32, 8)], 1),
        ([every[i : i + 5] for i in range(0, 32, 5)], 1),
        ([every[order(32, 2)][i : i + 1] for i in range(32)], 2),
    ]
    import onnxruntime as ort

    counts: list[int] = []
    session = ort.InferenceSession

    def on_threads(model, options, **given):
        options.intra_op_num_threads = counts[-1]
        return session(model, options, **given)

    monkeypatch.setattr(ort, "InferenceSession", on_threads)
    plans = []
    for batches, count in ways:
        counts.append(count)
        plans.append(
            make_quant_plan(calibrate(model, batches), target="tensorrt", observer=observer)
        )
    assert all(plan.to_json() == plans[0].to_json() for plan in plans[1:])


@pytest.mark.parametrize("target", TARGETS)
def test_quantized_graphs_are_the_same_bytes(graph, target, tmp_path, tried):
    """With the method that searches: bias correction, weight scales, what helps is kept."""
    tried("the same graph quantized again: QuantPlan and Q/DQ graph, same bytes", 2)
    found = set()
    for name in ("a", "b"):
        out = tmp_path / f"{name}.onnx"
        plan = compress.quantize_onnx(graph, [images().numpy()], out, target=target)
        found.add((json.dumps(plan.to_json()), sha256(out)))
    assert len(found) == 1
    statistics = calibrate(onnx.load(graph), [images().numpy()])
    written = {
        write_qdq(onnx.load(graph), make_quant_plan(statistics, target=target)).SerializeToString()
        for _ in range(2)
    }
    assert len(written) == 1


WHOLE = {
    "model": {"name": "compress.models.cifar:resnet8", "options": {"in_channels": 1, "width": 8}},
    "data": {"name": "digits", "calibration": 64},
    "stages": [
        {"train": {"epochs": 1, "batch_size": 64, "epoch_images": 512, "precision": "fp32"}},
        {"prune": {"keep_macs": 0.5}},
        {"distill": {"epochs": 1, "batch_size": 64, "losses": ["kd"], "precision": "fp32"}},
        {"quantize": {"samples": 32}},
    ],
    "targets": [{"runtime": "onnxruntime"}, {"runtime": "openvino"}],
    "measure": {"rounds": 3, "round_ms": 1, "explain_images": 0, "test_images": 64},
}


@pytest.mark.slow
def test_a_whole_run_again_in_another_process_is_the_same_bytes(tmp_path, tried):
    """Sets and dictionaries of texts are ordered otherwise in each process: by PYTHONHASHSEED."""
    recipe, found = tmp_path / "x.yaml", []
    recipe.write_text(yaml.safe_dump(WHOLE | {"name": "x"}))
    for seed in "12":
        command = [sys.executable, "-m", "compress", "run", recipe, "--out", tmp_path / seed]
        env = os.environ | {"PYTHONHASHSEED": seed}
        ended = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-2000:]
        entries = read_json(tmp_path / seed / "run.json")["artifacts"]
        found.append({e["path"]: e["sha256"] for e in entries if "measure" not in e["stage"]})
    names = [name for name in found[0] if name.endswith((".onnx", ".json", ".safetensors"))]
    assert len(names) > 12
    tried("a whole run again in a process of its own: plans, weights, ONNX, same bytes", len(names))
    assert {name: found[0][name] for name in names} == {name: found[1][name] for name in names}
