"""Pruned and int8 together: top-1 against latency of whole chains, ours and the peers'.

    python benchmarks/accuracy_latency_front.py --depth 20 --keep 0.5 0.35 --epochs 1

Chains: int8 alone (ours, ONNX Runtime's quantizer, NNCF), pruning alone, and both: our pruning
(layers fitted, then blocks: ``refit_steps: 200`` of a recipe) then our int8 graphs, before and
after fine-tuning; Torch-Pruning, fine-tuned alike, then ONNX Runtime's quantizer or NNCF. Widths
are multiples of 8 everywhere. Every graph is judged on the 10,000 test images in the runtime that
it is timed in; all graphs of a runtime are timed in turns. Needs COMPRESS_DATA (the folder with
checkpoints/) and COMPRESS_CIFAR10 (cifar10.npz). Writes results/accuracy_latency_front_resnetN.json
and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cifar10_pruning as cifar
import int8_peers
import numpy as np
import torch
from torch import nn

import compress
from compress import environment
from compress.data import Dataset, load_data
from compress.evaluate import predict
from compress.export import export_onnx
from compress.measure import bench
from compress.models.cifar import CifarResNet
from compress.models.weights import fit, read_weights
from compress.prune import plan_pruning, refit, refit_blocks
from compress.quantize import quantize_targets
from compress.recipe.settings import DataSettings
from compress.runtimes import open_session
from compress.statistics import wilson_interval
from compress.train import shown_batches, train

RUNTIMES = ("onnxruntime", "openvino")
WIDTHS = 8  # channels are kept in multiples of this
BLOCK_STEPS = 200
CALIBRATION = 512  # training images, the same for all
OURS, PEER, ALONE = "compress", "torch-pruning", "not pruned"


def networks(
    model: CifarResNet, dataset: Dataset, keep: list[float], epochs: int, lr: float
) -> Iterator[tuple[dict[str, Any], nn.Module]]:
    """Yield every network whose graphs are measured, with what it is."""
    yield {"pruned_by": ALONE, "keep_macs": 1.0, "epochs": 0}, model
    seen = list(dataset.batches("train", 128, 128 * cifar.SCORING_BATCHES))
    for share in keep:
        plan = plan_pruning(
            model, dataset.example, criterion="obs", keep_macs=share, round_to=WIDTHS, batches=seen
        )
        small = compress.apply_pruning(model, plan)
        shown = list(shown_batches(dataset, cifar.TRAINING, cifar.RECALIBRATE_BATCHES))
        refit(small, model, plan, seen, training_batches=shown)
        refit_blocks(small, model, plan, seen, steps=BLOCK_STEPS, training_batches=shown)
        yield {"pruned_by": OURS, "keep_macs": share, "epochs": 0}, small
        peer = cifar.peer_cut(model, dataset, residual=True, keep_macs=share, round_to=WIDTHS)
        for name, network in ((OURS, small), (PEER, peer)):
            settings = cifar.TRAINING.model_copy(
                update={"epochs": epochs, "lr": lr, "threads": None}
            )
            train(network, dataset, settings, seed=0, device="cpu")
            yield {"pruned_by": name, "keep_macs": share, "epochs": epochs}, network


def graphs(
    about: dict[str, Any], network: nn.Module, images: np.ndarray, folder: Path
) -> Iterator[tuple[dict[str, Any], str, Path]]:
    """Yield the fp32 graph and the int8 graphs of a network, each for the runtimes it is for."""
    network.eval()
    fp32 = export_onnx(network, torch.from_numpy(images[:1]), folder / "fp32.onnx")
    for runtime in RUNTIMES:
        yield about | {"quantizer": "fp32"}, runtime, fp32
    if about["pruned_by"] != PEER:
        outs = {runtime: folder / f"{runtime}.onnx" for runtime in RUNTIMES}
        quantize_targets(fp32, list(np.split(images, len(images) // 32)), outs)
        for runtime, path in outs.items():
            yield about | {"quantizer": OURS}, runtime, path
    if about["pruned_by"] != OURS:
        for peer, runtimes in {"ort tuned": RUNTIMES[:1], "nncf": RUNTIMES}.items():
            path = folder / f"{peer.replace(' ', '_')}.onnx"
            int8_peers.quantize_by(peer, fp32, images, path)
            for runtime in runtimes:
                yield about | {"quantizer": peer}, runtime, path


def is_ours(row: dict[str, Any]) -> bool:
    """Return whether a row is of our chain, from the first step to the last; or the original."""
    return row["pruned_by"] != PEER and row["quantizer"] in ("fp32", OURS)


def is_beaten(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Return whether a row of ours on the same runtime is as accurate and as fast, or better."""
    return any(
        is_ours(other)
        and OURS in (other["pruned_by"], other["quantizer"])
        and other["runtime"] == row["runtime"]
        and other["top1_pct"] >= row["top1_pct"]
        and other["latency_ms_p50"] <= row["latency_ms_p50"]
        for other in rows
        if other is not row
    )


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    rows = result["rows"]
    peers = [row for row in rows if not is_ours(row)]
    beaten = sum(is_beaten(row, rows) for row in peers)
    lines = [
        f"# {result['network']} on CIFAR-10: chains of pruning and int8",
        "",
        f"Fine-tuned alike on labels, one-cycle to {result['lr']:g}, epochs of 50,000 images; "
        "0: not trained at all. Ours are fitted block by block before, without labels. Batch 1, "
        "all graphs of a runtime in turns. The peer's padding "
        "shortcuts are 1x1 convolutions, without which it cannot trace the network. "
        f"Of {len(peers)} graphs that end in another's tool, {beaten} are at most as accurate and "
        "at most as fast as one of ours on the same runtime (last column).",
        "",
        "| runtime | pruned by | MACs kept | epochs | int8 by | top-1 % (95 %) | ms, median | "
        "x fp32 original (95 %) | one of ours is as good in both |",
        "|---|---|--:|--:|---|--:|--:|--:|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["runtime"], -row["top1_pct"])):
        low, high = row["top1_ci95_pct"]
        speedup = ""
        if row["speedup_ci95"]:
            first, last = row["speedup_ci95"]
            speedup = f"{row['speedup']:.2f} ({first:.2f} to {last:.2f})"
        cells = [
            row["runtime"], row["pruned_by"], f"{row['keep_macs']:g}", str(row["epochs"]),
            row["quantizer"], f"{row['top1_pct']:.2f} ({low:.2f} to {high:.2f})",
            f"{row['latency_ms_p50']:.3f}", speedup,
            "" if is_ours(row) else ("yes" if is_beaten(row, rows) else "no"),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def timed(files: dict[str, Path], example: np.ndarray, runtime: str) -> dict[str, Any]:
    """Return the latencies of all graphs of a runtime, in turns; ratios are to the first."""
    sessions = {name: open_session(path, runtime) for name, path in files.items()}
    found = bench(sessions, [example]).to_json()["results"]
    for session in sessions.values():
        session.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=20, choices=sorted(cifar.CHECKPOINTS))
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.35])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.02, help="peak of the one-cycle schedule")
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument("--out", type=Path, default=cifar.RESULTS, help="folder of the results")
    given = parser.parse_args()
    root = os.environ["COMPRESS_CIFAR10"]
    dataset = load_data(DataSettings(name="npz", root=root, validation=0.0))
    model = CifarResNet(given.depth, 10, 3, 16)
    weights = Path(os.environ["COMPRESS_DATA"]) / "checkpoints" / cifar.CHECKPOINTS[given.depth]
    fit(model, read_weights(weights), where=str(weights))
    images = np.concatenate([x.numpy() for x, _ in dataset.batches("train", 128, CALIBRATION)])
    rows: list[dict[str, Any]] = []
    files: dict[str, dict[str, Path]] = {runtime: {} for runtime in RUNTIMES}
    with tempfile.TemporaryDirectory() as scratch:
        made = networks(model, dataset, given.keep, given.epochs, given.lr)
        for number, (about, network) in enumerate(made):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            for told, runtime, path in graphs(about, network, images, folder):
                with open_session(path, runtime) as session:
                    found = predict(session, dataset.batches("test", 64, given.images))
                low, high = wilson_interval(int(found.correct.sum()), len(found.correct))
                row = told | {
                    "runtime": runtime,
                    "top1_pct": 100 * float(found.correct.mean()),
                    "top1_ci95_pct": [100 * low, 100 * high],
                }
                files[runtime][str(len(rows))] = path
                rows.append(row)
                print(row, flush=True)
        for runtime, paths in files.items():
            for name, latency in timed(paths, images[:1], runtime).items():
                keys = ("latency_ms_p50", "speedup", "speedup_ci95")
                rows[int(name)] |= {key: latency.get(key) for key in keys}
    result = {
        "network": f"ResNet-{given.depth}", "epochs": given.epochs, "lr": given.lr, "rows": rows,
        "provenance": environment.describe_machine(),
    }  # fmt: skip
    given.out.mkdir(exist_ok=True)
    file = given.out / f"accuracy_latency_front_resnet{given.depth}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    file.with_suffix(".md").write_text(table(result))


if __name__ == "__main__":
    main()
