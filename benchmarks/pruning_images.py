"""How many images pruning needs: top-1 before any training, over the images that it is shown.

    python benchmarks/pruning_images.py [--networks resnet20 resnet56 mobilenet] [--keep 0.5]
        [--images 4 16 64 256 1024] [--tested 2000]

Needs COMPRESS_DATA (the folder with checkpoints/) and COMPRESS_CIFAR10 (cifar10.npz). Ours scores
by obs, without labels, and refits on the same images; Torch-Pruning's global group L2 scores
without images and has BatchNorm's statistics estimated anew on them. The images are the first ones
of the training set. Networks are those of pruning_curves.py, which trains the depthwise one.
Written to benchmarks/results/pruning_images.json after every cut; the same call goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from pathlib import Path
from typing import Any

import cifar10_pruning as cifar
import pruning_curves as curves
from torch import nn

import compress
from compress.data import Dataset
from compress.prune import plan_pruning, recalibrate_batchnorm, refit

RESULTS = Path(__file__).parent / "results" / "pruning_images.json"
ARMS = ("compress", "torch-pruning, BatchNorm again")


def cut(model: nn.Module, dataset: Dataset, arm: str, keep: float, images: int) -> nn.Module:
    """Return the network cut to a share of its MACs with so many images."""
    seen = list(dataset.batches("train", min(images, 128), images))
    if arm == ARMS[0]:
        plan = plan_pruning(model, dataset.example, criterion="obs", keep_macs=keep, batches=seen)
        return refit(compress.apply_pruning(model, plan), model, plan, seen)
    small = curves.peer(model, dataset, keep, recalibrated=False)
    recalibrate_batchnorm(small, seen)
    return small


def table(content: dict[str, Any]) -> str:
    """Return the points as Markdown, one row for a network and arm, one column for a count."""
    points = content["points"]
    counts = sorted({p["images"] for p in points})
    lines = [
        f"# Top-1 before any training, %, on {content['tested']:,} test images, by images shown",
        "",
        "| network | MACs kept | arm | uncut | " + " | ".join(f"{n:,}" for n in counts) + " |",
        "|---|--:|---|--:|" + "--:|" * len(counts),
    ]
    found = {(p["network"], p["keep"], p["arm"], p["images"]): p["top1_pct"] for p in points}
    whole = {p["network"]: p["uncut_pct"] for p in points}
    for name, keep, arm in dict.fromkeys((p["network"], p["keep"], p["arm"]) for p in points):
        row = [name, keep, arm, whole[name], *(found.get((name, keep, arm, n), "") for n in counts)]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet56", "mobilenet"])
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--images", type=int, nargs="+", default=[4, 16, 64, 256, 1024])
    given, dataset, content = curves.begun(parser, RESULTS)
    points = content.get("points", [])
    done = {(p["network"], p["keep"], p["arm"], p["images"]) for p in points}
    for name in given.networks:
        model = curves.network(name, given)
        uncut = round(curves.top1_pct(model, dataset, given.tested), 2)
        for arm, images in itertools.product(ARMS, given.images):
            if (name, given.keep, arm, images) in done:
                continue
            start = time.perf_counter()
            small = cut(copy.deepcopy(model), dataset, arm, given.keep, images)
            point = {"network": name, "keep": given.keep, "arm": arm, "images": images}
            point |= {"cut_s": round(time.perf_counter() - start, 1), "uncut_pct": uncut}
            point["macs_kept"] = round(cifar.macs_of(small) / cifar.macs_of(model), 4)
            point["top1_pct"] = round(curves.top1_pct(small, dataset, given.tested), 2)
            points.append(point)
            print(point, flush=True)
            curves.write(given.out, given.tested, points, table)


if __name__ == "__main__":
    main()
