"""How accuracy falls before any training, over the MACs kept: ours, every criterion, Torch-Pruning.

    python benchmarks/pruning_curves.py [--networks resnet20 resnet56 resnet8 mobilenet]
        [--keep 0.8 0.6 0.5 0.4 0.3 0.2] [--arms obs torch-pruning l1 ...] [--tested 2000]

Needs COMPRESS_DATA (the folder with checkpoints/) and COMPRESS_CIFAR10 (cifar10.npz). Each arm cuts
the same trained network once for every share of its MACs; criteria score and refit on the same
images, without labels where the criterion needs none. "not refitted" leaves the weights that the
cut left, "blocks too" fits whole blocks after their layers (``refit_steps: 200`` of a recipe), and
the peer is shown as it cuts and with BatchNorm's statistics estimated anew. The depthwise network
and ResNet-8 have no published weights: they are trained here (8 and 30 epochs, or --epochs) and
kept in --cache. Written to benchmarks/results/pruning_curves.json after every cut; the same call
goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cifar10_pruning as cifar
import networks_for_int8
import torch
import torch_pruning_peer
from safetensors.torch import load_file, save_file
from torch import nn

import compress
from compress import environment, plugins
from compress.data import Dataset, load_data
from compress.models import cifar as networks
from compress.models.weights import fit, read_weights
from compress.modules import evaluating
from compress.prune import plan_pruning, recalibrate_batchnorm, refit, refit_blocks
from compress.recipe.settings import DataSettings
from compress.train import shown_batches

RESULTS = Path(__file__).parent / "results" / "pruning_curves.json"
PEERS = ("torch-pruning", "torch-pruning, BatchNorm again")
PLAIN = "obs, not refitted"
BLOCKS = "obs, blocks too"  # refitted layer by layer, then block by block
STEPS = 200  # for each block
TRAINED = {"mobilenet": (networks_for_int8.mobilenet_se, 8), "resnet8": (networks.resnet8, 30)}
BATCHES = 8  # of 128 training images: to score, and to refit


def arms() -> list[str]:
    """Return ours, the peer, and every criterion, in the order in which they are worth knowing."""
    rest = [name for name in plugins.names("criteria") if name != "obs"]
    return ["obs", BLOCKS, *PEERS, PLAIN, *rest]


def network(name: str, given: argparse.Namespace) -> nn.Module:
    """Return the trained network of that name."""
    if name not in TRAINED:
        depth = int(name.removeprefix("resnet"))
        model: nn.Module = networks.CifarResNet(depth, 10, 3, 16)
        file = Path(given.data) / "checkpoints" / cifar.CHECKPOINTS[depth]
        fit(model, read_weights(file), where=str(file))
        return model.eval()
    build, epochs = TRAINED[name]
    epochs = given.epochs or epochs
    torch.manual_seed(0)
    model = build()
    file = given.cache / f"{name}-{epochs}.safetensors"
    if file.is_file():
        model.load_state_dict(load_file(file))
        return model.eval()
    import numpy as np

    with np.load(given.npz) as arrays:
        networks_for_int8.train(model, arrays["x_train"], arrays["y_train"].reshape(-1), epochs, 0)
    model = model.to(memory_format=torch.contiguous_format)
    given.cache.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, file)
    return model.eval()


def ours(model: nn.Module, dataset: Dataset, arm: str, keep: float) -> nn.Module:
    """Cut by a criterion, then refit, unless the arm says not to."""
    criterion = "obs" if arm in (PLAIN, BLOCKS) else arm
    seen = dataset.batches("train", 128, 128 * BATCHES)
    plan = plan_pruning(model, dataset.example, criterion=criterion, keep_macs=keep, batches=seen)
    small = compress.apply_pruning(model, plan)
    if arm != PLAIN:
        images = dataset.batches("train", 128, 128 * BATCHES)
        shown = list(shown_batches(dataset, cifar.TRAINING, BATCHES))
        refit(small, model, plan, images, training_batches=shown)
        if arm == BLOCKS:
            images = dataset.batches("train", 128, 128 * BATCHES)
            refit_blocks(small, model, plan, images, steps=STEPS, training_batches=shown)
    return small


def peer(model: nn.Module, dataset: Dataset, keep: float, *, recalibrated: bool) -> nn.Module:
    """Cut with Torch-Pruning's global group L2 in small steps until the budget is met."""
    is_resnet = isinstance(model, networks.CifarResNet)
    twin = cifar.for_the_peer(model) if is_resnet else copy.deepcopy(model)
    torch_pruning_peer.cut(twin, dataset.example, keep, [twin.linear], cifar.macs_of, largest=0.98)
    if recalibrated:
        recalibrate_batchnorm(twin, shown_batches(dataset, cifar.TRAINING, BATCHES))
    return twin


def top1_pct(model: nn.Module, dataset: Dataset, tested: int) -> float:
    """Return the share of the first test images told apart rightly, percent."""
    hits = count = 0
    with torch.no_grad(), evaluating(model):
        for images, labels in dataset.batches("test", 250, tested):
            hits += int((model(images).argmax(1) == labels).sum())
            count += len(labels)
    return 100 * hits / count


def measured(
    model: nn.Module, dataset: Dataset, arm: str, keep: float, tested: int
) -> dict[str, Any]:
    """Cut, judge, and return what a point of a curve needs."""
    start = time.perf_counter()
    if arm in PEERS:
        small = peer(model, dataset, keep, recalibrated=arm == PEERS[1])
    else:
        small = ours(model, dataset, arm, keep)
    return {
        "cut_s": round(time.perf_counter() - start, 1),
        "macs": cifar.macs_of(small),
        "macs_kept": round(cifar.macs_of(small) / cifar.macs_of(model), 4),
        "params": sum(p.numel() for n, p in small.named_parameters() if "_shortcut" not in n),
        "top1_pct": round(top1_pct(small, dataset, tested), 2),
    }


def table(content: dict[str, Any]) -> str:
    """Return the points as Markdown, one row for an arm, one column for a share of the MACs."""
    points = content["points"]
    shares = sorted({p["asked"] for p in points if p["arm"] != "original"}, reverse=True)
    lines = [
        f"# Top-1 before any training, %, on {content['tested']:,} test images, by MACs kept",
        "",
        f"Scored and refitted on {content['images']:,} training images.",
        "",
        "| network | arm | 1.0 | " + " | ".join(map(str, shares)) + " |",
        "|---|---|--:|" + "--:|" * len(shares),
    ]
    found = {(p["network"], p["arm"], p["asked"]): p.get("top1_pct", "fails") for p in points}
    networks = sorted({p["network"] for p in points})
    for name, arm in itertools.product(networks, arms()):
        if any((name, arm, share) in found for share in shares):
            row = [found[name, "original", 1.0], *(found.get((name, arm, s), "") for s in shares)]
            lines.append(f"| {name} | {arm} | " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines) + "\n"


def begun(parser: argparse.ArgumentParser, out: Path) -> tuple[Any, Dataset, dict[str, Any]]:
    """Return the options, with those that all curves have, the data, and what is measured already.

    Raises:
        SystemExit: data is missing, or the file at hand is of another number of test images.
    """
    parser.add_argument("--tested", type=int, default=2000, help="test images")
    parser.add_argument("--epochs", type=int, help="of networks that are trained here")
    parser.add_argument("--npz", default=os.environ.get("COMPRESS_CIFAR10"))
    parser.add_argument("--data", default=os.environ.get("COMPRESS_DATA"))
    parser.add_argument("--cache", type=Path, default=Path("runs") / "benchmarks")
    parser.add_argument("--out", type=Path, default=out)
    given = parser.parse_args()
    if not given.npz or not given.data:
        raise SystemExit("set COMPRESS_DATA and COMPRESS_CIFAR10, or give --data and --npz")
    dataset = load_data(DataSettings(name="npz", root=given.npz, validation=0.0))
    content: dict[str, Any] = json.loads(given.out.read_text()) if given.out.is_file() else {}
    if content.get("tested", given.tested) != given.tested:
        raise SystemExit(f"{given.out} was measured on {content['tested']} images: give --tested")
    return given, dataset, content


def write(
    out: Path, tested: int, points: list[Any], text: Callable[[Any], str], **more: Any
) -> None:
    """Write the points measured so far, with date and machine, and their table."""
    content = {
        "tested": tested,
        **more,
        "points": points,
        "date": time.strftime("%Y-%m-%d"),
        **environment.describe_machine(Path(__file__).parent),
    }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")
    out.with_suffix(".md").write_text(text(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["resnet20", *TRAINED, "resnet56"])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.3, 0.8, 0.6, 0.4, 0.2])
    parser.add_argument("--arms", nargs="+", default=arms(), choices=arms())
    given, dataset, content = begun(parser, RESULTS)
    points = content.get("points", [])
    done = {(p["network"], p["arm"], p["asked"]) for p in points}
    for name in given.networks:
        jobs = [
            job for job in itertools.product(given.arms, given.keep) if (name, *job) not in done
        ]
        if not jobs and (name, "original", 1.0) in done:
            continue
        model = network(name, given)
        if (name, "original", 1.0) not in done:
            whole = {"macs_kept": 1.0, "macs": cifar.macs_of(model)}
            whole["top1_pct"] = round(top1_pct(model, dataset, given.tested), 2)
            points.append({"network": name, "arm": "original", "asked": 1.0} | whole)
        for arm, keep in jobs:
            found = {"network": name, "arm": arm, "asked": keep}
            try:
                found |= measured(copy.deepcopy(model), dataset, arm, keep, given.tested)
            except Exception as error:  # a peer's failure is a finding
                if arm not in PEERS:
                    raise
                found["failed"] = f"{type(error).__name__}: {error}"[:200]
            points.append(found)
            print(found, flush=True)
            write(given.out, given.tested, points, table, images=128 * BATCHES)


if __name__ == "__main__":
    main()
