"""The same network pruned to a MAC budget and to the latency that this gives, on CPU runtimes.

    python benchmarks/latency_pruning.py --network mobilenet_v2 --runtimes onnxruntime openvino
    python benchmarks/latency_pruning.py --network resnet20 --epochs 3

First half the MACs are cut and the latency is measured; then the same network is pruned to that
latency with a budget in milliseconds. Both answer to one question: who keeps more at equal time?
For resnet20 (needs COMPRESS_DATA and COMPRESS_CIFAR10) both are fine-tuned alike and their accuracy
is compared; other networks have random weights, and only their milliseconds and MACs are. Nothing
else should run on the machine meanwhile. Writes results/latency_pruning_NETWORK.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import compress
from compress import environment
from compress.data import load_data
from compress.evaluate import predict
from compress.export import export_onnx
from compress.measure import bench, count
from compress.models import load_model
from compress.networks import CifarResNet
from compress.prune import plan_pruning, refit
from compress.runtimes import open_session
from compress.settings import AugmentSettings, DataSettings, TrainSettings
from compress.train import train
from compress.weights import fit, read_weights

RESULTS = Path(__file__).parent / "results"


def measured(networks: dict[str, nn.Module], example: torch.Tensor, runtime: str) -> dict[str, Any]:
    """Return the latency of all networks on a runtime, measured in turns."""
    sessions = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, network in networks.items():
            path = export_onnx(network, example, Path(folder) / f"{name}.onnx")
            sessions[name] = open_session(path, runtime)
        found = bench(sessions, [example.numpy()])
        for session in sessions.values():
            session.close()
    return found.to_json()


def compare_on(
    runtime: str, model: nn.Module, example: torch.Tensor, keep_macs: float
) -> tuple[dict[str, Any], dict[str, tuple[nn.Module, Any]]]:
    """Return the figures of one runtime, and the two pruned networks with their plans."""
    by_macs = plan_pruning(model, example, keep_macs=keep_macs)
    first = compress.apply_pruning(model, by_macs)
    reached = measured({"original": model, "macs": first}, example, runtime)
    budget_ms = reached["results"]["macs"]["latency_ms_p50"]
    by_latency = plan_pruning(model, example, latency_ms=budget_ms, runtime=runtime)
    second = compress.apply_pruning(model, by_latency)
    networks = {"original": model, "macs": first, "latency": second}
    figures = measured(networks, example, runtime)
    figures["promised_ms"] = budget_ms
    figures["plan"] = by_latency.about["latency"]
    for name, network in networks.items():
        counted = count(network, example)
        figures["results"][name] |= {"macs": counted.macs, "params": counted.params}
    return figures, {"macs": (first, by_macs), "latency": (second, by_latency)}


def fine_tuned(
    pruned: nn.Module, plan: Any, original: nn.Module, dataset: Any, epochs: int
) -> float:
    """Refit, fine-tune and return top-1 on the test images, percent."""
    small = copy.deepcopy(pruned)
    refit(small, original, plan, dataset.batches("train", 128, 512))
    settings = TrainSettings(
        epochs=epochs, schedule="one-cycle", augment=AugmentSettings(crop_padding=4, flip=True)
    )
    train(small, dataset, settings, seed=0)
    return 100 * float(predict(small, dataset.batches("test")).correct.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--keep-macs", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=0)
    given = parser.parse_args()
    dataset = None
    if given.network == "resnet20":
        dataset = load_data(
            DataSettings(name="npz", root=os.environ["COMPRESS_CIFAR10"], validation=0.0)
        )
        model: nn.Module = CifarResNet(20, 10, 3, 16)
        file = Path(os.environ["COMPRESS_DATA"]) / "checkpoints" / "resnet20-12fca82f.th"
        fit(model, read_weights(file), where=str(file))
        example = dataset.example
    else:
        model = load_model(f"torchvision:{given.network}")
        example = torch.randn(1, 3, 224, 224)
    model.eval()
    result: dict[str, Any] = {"network": given.network, "provenance": environment.describe()}
    for runtime in given.runtimes:
        figures, pruned = compare_on(runtime, model, example, given.keep_macs)
        if dataset is not None and given.epochs:
            for name, (network, plan) in pruned.items():
                top1 = fine_tuned(network, plan, model, dataset, given.epochs)
                figures["results"][name]["top1_pct"] = top1
        result[runtime] = figures
        print(runtime, json.dumps(figures["results"], indent=1), flush=True)
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"latency_pruning_{given.network}.json"
        file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
