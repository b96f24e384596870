"""The same network pruned to a MAC budget and to a latency budget, on CPU runtimes.

    python benchmarks/latency_pruning.py --network resnet56
    python benchmarks/latency_pruning.py --network mobilenet_v2 --share 1.0

First half the MACs are cut and the latency of that is measured; then the same network is pruned to
a share of that latency, or of its own where half the MACs take longer. For resnet20 and resnet56
(need COMPRESS_DATA and COMPRESS_CIFAR10) both are scored by the same criterion, refitted,
fine-tuned alike with --epochs, and compared on the 10,000 test images: the question is whether the
faster one is as accurate. Other networks have random weights, and only their milliseconds and MACs
are compared. Nothing else should run on the machine meanwhile. Writes
results/latency_pruning_NETWORK.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
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
from compress.statistics import accuracy_change_interval
from compress.train import train
from compress.weights import fit, read_weights

RESULTS = Path(__file__).parent / "results"
CHECKPOINTS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}


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
    runtime: str,
    model: nn.Module,
    example: torch.Tensor,
    scored: dict[str, Any],
    keep_macs: float,
    share: float,
) -> tuple[dict[str, Any], dict[str, tuple[nn.Module, Any]]]:
    """Return the figures of one runtime, and the two pruned networks with their plans."""
    by_macs = plan_pruning(model, example, keep_macs=keep_macs, **scored)
    first = compress.apply_pruning(model, by_macs)
    reached = measured({"original": model, "macs": first}, example, runtime)
    budget_ms = share * min(
        reached["results"][name]["latency_ms_p50"] for name in ("original", "macs")
    )
    by_latency = plan_pruning(model, example, latency_ms=budget_ms, runtime=runtime, **scored)
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
    pruned: nn.Module, plan: Any, original: nn.Module, dataset: Any, epochs: int, lr: float
) -> np.ndarray:
    """Refit, fine-tune and return which test images are answered right."""
    small = copy.deepcopy(pruned)
    refit(small, original, plan, dataset.batches("train", 128, 1024))
    if epochs:
        settings = TrainSettings(
            epochs=epochs, lr=lr, schedule="one-cycle", precision="bf16", threads=1,
            augment=AugmentSettings(crop_padding=4, flip=True),
        )  # fmt: skip
        train(small, dataset, settings, seed=0)
    return predict(small, dataset.batches("test")).correct


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    lines = [
        f"# {result['network']}: pruned to a MAC budget, and to a latency",
        "",
        "Made by `python benchmarks/latency_pruning.py`, whose first lines say how. Criterion "
        f"{result['criterion']}; {result['epochs']} epochs of fine-tuning"
        + (f", one-cycle to {result['lr']}." if result["epochs"] else ", weights refitted."),
        "",
        "| runtime | pruned to | MACs | parameters | ms, median | x original (95 %) | top-1, % |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for runtime in result["runtimes"]:
        figures = result.get(runtime, {})
        for name, row in figures.get("results", {}).items():
            asked = {"macs": "half the MACs", "latency": f"{figures['promised_ms']:.3f} ms"}
            ratio = ""
            if row.get("speedup") and row.get("speedup_ci95"):
                low, high = row["speedup_ci95"]
                ratio = f"{row['speedup']:.2f} ({low:.2f}..{high:.2f})"
            top1 = f"{row['top1_pct']:.2f}" if "top1_pct" in row else ""
            cells = [runtime, asked.get(name, name), f"{row['macs']:,}", f"{row['params']:,}"]
            lines.append(
                f"| {' | '.join(cells)} | {row['latency_ms_p50']:.3f} | {ratio} | {top1} |"
            )
        if "top1_change_ci95" in figures:
            low, high = figures["top1_change_ci95"]
            lines += [
                "",
                f"{runtime}: top-1 of the network pruned to a latency minus that of the one pruned "
                f"to MACs: {low:+.2f} to {high:+.2f} points (95 %, paired images).",
                "",
            ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--keep-macs", type=float, default=0.5)
    parser.add_argument("--share", type=float, default=0.85, help="of the faster one's time")
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--lr", type=float, default=0.01, help="peak of the one-cycle schedule")
    given = parser.parse_args()
    dataset, scored = None, {"criterion": "l2"}
    if given.network in CHECKPOINTS:
        dataset = load_data(
            DataSettings(name="npz", root=os.environ["COMPRESS_CIFAR10"], validation=0.0)
        )
        model: nn.Module = CifarResNet(int(given.network.removeprefix("resnet")), 10, 3, 16)
        file = Path(os.environ["COMPRESS_DATA"]) / "checkpoints" / CHECKPOINTS[given.network]
        fit(model, read_weights(file), where=str(file))
        example = dataset.example
        seen = list(dataset.batches("train", 128, 1024))
        scored = {"criterion": "fisher", "batches": seen}
    else:
        model = load_model(f"torchvision:{given.network}")
        example = torch.randn(1, 3, 224, 224)
    model.eval()
    result: dict[str, Any] = {
        "network": given.network,
        "runtimes": given.runtimes,
        "criterion": scored["criterion"],
        "epochs": given.epochs,
        "lr": given.lr,
        "provenance": environment.describe(),
    }
    found = {}
    for runtime in given.runtimes:  # all timing before any training
        found[runtime] = compare_on(runtime, model, example, scored, given.keep_macs, given.share)
        print(runtime, json.dumps(found[runtime][0]["results"], indent=1), flush=True)
        result[runtime] = found[runtime][0]
        write(result)
    for figures, pruned in found.values():
        if dataset is not None:
            right = {
                name: fine_tuned(network, plan, model, dataset, given.epochs, given.lr)
                for name, (network, plan) in pruned.items()
            }
            right["original"] = predict(model, dataset.batches("test")).correct
            for name, correct in right.items():
                figures["results"][name]["top1_pct"] = 100 * float(correct.mean())
            low, high = accuracy_change_interval(right["macs"], right["latency"])
            figures["top1_change_ci95"] = [100 * low, 100 * high]
            write(result)


def write(result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"latency_pruning_{result['network']}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    file.with_suffix(".md").write_text(table(result))


if __name__ == "__main__":
    main()
