"""The same network pruned to a MAC budget and to a latency budget, on CPU runtimes.

    python benchmarks/latency_pruning.py --network resnet56
    python benchmarks/latency_pruning.py --network mobilenet_v2 --shares 0.7

Half the MACs are cut, and the same network is pruned to shares of its latency; all are timed in
turns. For resnet20 and resnet56 (need COMPRESS_DATA and COMPRESS_CIFAR10) all are scored by the
same criterion, refitted, fine-tuned alike with --epochs, and compared on the 10,000 test images:
the question is whether a faster one is as accurate. Other networks have random weights, and only
their milliseconds and MACs are compared. Nothing else should run on the machine meanwhile. Writes
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
from compress.data import Dataset, load_data
from compress.evaluate import predict
from compress.export import export_onnx
from compress.groups.plan import PrunePlan
from compress.measure import bench, count_module
from compress.models import load_model
from compress.models.cifar import CifarResNet
from compress.models.weights import fit, read_weights
from compress.prune import plan_pruning, refit
from compress.recipe.settings import AugmentSettings, DataSettings, TrainSettings
from compress.runtimes import open_session
from compress.statistics import accuracy_change_interval
from compress.train import train

MACS, ORIGINAL = "MACs", "original"
RESULTS = Path(__file__).parent / "results"
CHECKPOINTS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}

Pruned = tuple[nn.Module, PrunePlan]


def measured(networks: dict[str, nn.Module], example: torch.Tensor, runtime: str) -> dict[str, Any]:
    """Return the latency of all networks on a runtime, in turns; ratios are to the first."""
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
    shares: list[float],
) -> tuple[dict[str, Any], dict[str, Pruned]]:
    """Return the figures of one runtime, and the pruned networks with their plans, by budget."""
    plans = {MACS: plan_pruning(model, example, keep_macs=keep_macs, **scored)}
    networks = {MACS: compress.apply_pruning(model, plans[MACS]), ORIGINAL: model}
    for share in shares:
        plan = plan_pruning(model, example, keep_latency=share, runtime=runtime, **scored)
        name = f"{share:.0%} of the latency"
        plans[name], networks[name] = plan, compress.apply_pruning(model, plan)
    figures = measured(networks, example, runtime)
    for name, network in networks.items():
        counted = count_module(network, example)
        row = figures["results"][name]
        row |= {"macs": counted.macs, "params": counted.params}
        if name in plans and "latency" in plans[name].about:
            row["plan"] = plans[name].about["latency"]
    return figures, {name: (networks[name], plan) for name, plan in plans.items()}


def fine_tuned(
    pruned: nn.Module,
    plan: PrunePlan,
    original: nn.Module,
    dataset: Dataset,
    epochs: int,
    lr: float,
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
        f"# {result['network']}: pruned to a MAC budget, and to latencies",
        "",
        "Made by `python benchmarks/latency_pruning.py`, whose first lines say how. Criterion "
        f"{result['criterion']}; weights refitted; {result['epochs']} epochs of fine-tuning"
        + (f", one-cycle to {result['lr']}." if result["epochs"] else "."),
        "",
        "| runtime | pruned to | MACs | parameters | ms, median | x pruned to MACs (95 %) | "
        "top-1, % | against pruned to MACs, points (95 %, paired images) |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for runtime in result["runtimes"]:
        for name, row in result.get(runtime, {}).get("results", {}).items():
            pruned_to = f"{result['keep_macs']:.0%} of the MACs" if name == MACS else name
            cells = [runtime, pruned_to, f"{row['macs']:,}", f"{row['params']:,}"]
            cells.append(f"{row['latency_ms_p50']:.3f}")
            ratio = top1 = change = ""
            if row.get("speedup") and row.get("speedup_ci95"):
                low, high = row["speedup_ci95"]
                ratio = f"{row['speedup']:.2f} ({low:.2f}..{high:.2f})"
            if "top1_pct" in row:
                top1 = f"{row['top1_pct']:.2f}"
            if "top1_change_ci95" in row:
                low, high = row["top1_change_ci95"]
                change = f"{low:+.2f}..{high:+.2f}"
            lines.append(f"| {' | '.join([*cells, ratio, top1, change])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--keep-macs", type=float, default=0.5)
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=[0.9, 0.8, 0.7],
        help="of the latency that are kept",
    )
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--lr", type=float, default=0.01, help="peak of the one-cycle schedule")
    given = parser.parse_args()
    dataset, scored = None, dict[str, Any](criterion="l2")
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
        "keep_macs": given.keep_macs,
        "criterion": scored["criterion"],
        "epochs": given.epochs,
        "lr": given.lr,
        "provenance": environment.describe_machine(),
    }
    found = {}
    for runtime in given.runtimes:  # all timing before any training
        found[runtime] = compare_on(runtime, model, example, scored, given.keep_macs, given.shares)
        print(runtime, json.dumps(found[runtime][0]["results"], indent=1), flush=True)
        result[runtime] = found[runtime][0]
        write(result)
    if dataset is None:
        return
    common = {ORIGINAL: predict(model, dataset.batches("test")).correct}
    for figures, pruned in found.values():
        right = dict(common)
        for name, (network, plan) in pruned.items():
            if name not in right:
                right[name] = fine_tuned(network, plan, model, dataset, given.epochs, given.lr)
        common[MACS] = right[MACS]  # the same network for every runtime
        for name, row in figures["results"].items():
            row["top1_pct"] = 100 * float(right[name].mean())
            if name != MACS:
                low, high = accuracy_change_interval(right[MACS], right[name])
                row["top1_change_ci95"] = [100 * low, 100 * high]
        write(result)


def write(result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"latency_pruning_{result['network']}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    file.with_suffix(".md").write_text(table(result))


if __name__ == "__main__":
    main()
