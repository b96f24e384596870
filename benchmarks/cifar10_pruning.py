"""Half the MACs of a CIFAR-10 ResNet, equally fine-tuned: Torch-Pruning's global group L2 and ours.

    python benchmarks/cifar10_pruning.py --depth 20 --epochs 3 --seeds 0 1 2 --lr 0.005 0.02

Needs COMPRESS_DATA (the folder with checkpoints/) and COMPRESS_CIFAR10 (cifar10.npz). Every arm is
cut once and fine-tuned with every seed at every learning rate; arms are compared each at the rate
that suits it best, because a network that starts at chance wants another one than a network that
starts near the original. With --teach the uncut network teaches all arms. Writes
results/cifar10_pruning_resnet20.json and .md beside this file after every run, so that a benchmark
that is stopped has left what it measured.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_pruning_peer
from torch import Tensor, nn

import compress
from compress.data import Dataset, load_data
from compress.evaluate import predict
from compress.evaluate.predictions import Predictions
from compress.models.cifar import BasicBlock, CifarResNet
from compress.models.weights import fit, read_weights
from compress.packages import version
from compress.prune import plan_pruning, recalibrate_batchnorm, refit
from compress.recipe.settings import AugmentSettings, DataSettings, DistillSettings
from compress.statistics import accuracy_change_interval, mcnemar
from compress.train import shown_batches, train
from compress.train.distill import build_objective
from compress.train.state import chosen_precision

RESULTS = Path(__file__).parent / "results"
CHECKPOINTS = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}
KEEP_MACS = 0.5
SCORING_BATCHES = 8  # of 128 images with labels, for criteria that need them
REFIT_BATCHES = 8  # of 128 images, without labels
RECALIBRATE_BATCHES = 16  # of 128 images, changed as in training
TRAINING = DistillSettings(
    schedule="one-cycle", weight_decay=5e-4, batch_size=128, threads=1, losses=("kd",),
    augment=AugmentSettings(crop_padding=4, flip=True),
)  # fmt: skip


@dataclass(frozen=True, order=True)
class Schedule:
    """How all arms of a comparison are fine-tuned, besides rate and seed."""

    taught: bool
    epochs: int
    epoch_images: int

    @classmethod
    def of(cls, row: dict[str, Any]) -> Schedule:
        """Return that of a row, or of a comparison."""
        return cls(row.get("taught", False), row["epochs"], row.get("epoch_images", 50_000))

    @property
    def length(self) -> str:
        """Epochs times images."""
        return f"{self.epochs} x {self.epoch_images:,}"


class Selection(nn.Module):
    """Option A's shortcut as a fixed 1x1 convolution: the form in which the peer can trace it."""

    def __init__(self, block: BasicBlock, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels + block.padding, 1, block.stride, bias=False)
        self.conv.weight.requires_grad_(False)
        self.conv.weight.zero_()
        before = block.padding // 2
        for channel in range(channels):
            self.conv.weight[before + channel, channel] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Return every other pixel with zero channels around, (B, C, H, W) -> (B, C', H', W')."""
        return self.conv(x)


class PeerForm(CifarResNet):
    """The same network in the form that the peer can trace: its own head and shortcuts fail there.

    With padding shortcuts, or with pooling and flatten before the head, Torch-Pruning 1.6.1 cuts
    layers to sizes that do not fit each other.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (B, C, H, W) -> (B, K)."""
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def for_the_peer(model: CifarResNet) -> CifarResNet:
    """Return an equal network that the peer can trace."""
    twin = copy.deepcopy(model)
    twin.__class__ = PeerForm
    with torch.no_grad():
        for block in twin.modules():
            if isinstance(block, BasicBlock) and block.padding:
                block._shortcut = Selection(block, block.conv1.in_channels)  # type: ignore[method-assign]
        x = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(twin.eval()(x), model.eval()(x))
    return twin


def macs_of(model: nn.Module) -> int:
    """Return the MACs of one image in convolutions and linear layers, shortcuts not counted."""
    total = 0

    def add(module: Any, _inputs: Any, output: Tensor) -> None:
        nonlocal total
        total += module.weight.numel() * int(np.prod(output.shape[2:]))

    hooks = [
        module.register_forward_hook(add)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "_shortcut" not in name
    ]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return total


def peer_cut(
    model: CifarResNet,
    dataset: Dataset,
    *,
    residual: bool,
    keep_macs: float = KEEP_MACS,
    round_to: int | None = None,
) -> nn.Module:
    """Cut with Torch-Pruning in small steps until the budget is met."""
    twin = for_the_peer(model)
    ignored: list[nn.Module] = [twin.linear]
    if not residual:
        ignored += [m for n, m in twin.named_modules() if n == "conv1" or n.endswith(".conv2")]
        ignored += [m.conv for m in twin.modules() if isinstance(m, Selection)]
    return torch_pruning_peer.cut(
        twin, dataset.example, keep_macs, ignored, macs_of, round_to=round_to
    )


def our_cut(
    model: CifarResNet, dataset: Dataset, *, criterion: str = "l2", fitted: bool = True
) -> nn.Module:
    """Cut by a criterion; then fit the weights that are left, if asked for."""
    seen = dataset.batches("train", 128, 128 * SCORING_BATCHES)
    plan = plan_pruning(
        model, dataset.example, criterion=criterion, keep_macs=KEEP_MACS, batches=seen
    )
    small = compress.apply_pruning(model, plan)
    if fitted:
        shown = shown_batches(dataset, TRAINING, RECALIBRATE_BATCHES)
        images = dataset.batches("train", 128, 128 * REFIT_BATCHES)
        refit(small, model, plan, images, training_batches=shown)
    return small


ARMS: dict[str, Callable[[CifarResNet, Dataset], nn.Module]] = {
    "torch-pruning": lambda model, data: peer_cut(model, data, residual=True),
    "torch-pruning, inner layers": lambda model, data: peer_cut(model, data, residual=False),
    "compress, l2, not refitted": lambda model, data: our_cut(model, data, fitted=False),
    "compress, l2": our_cut,
    "compress, taylor": lambda model, data: our_cut(model, data, criterion="taylor"),
    "compress, fisher": lambda model, data: our_cut(model, data, criterion="fisher"),
    "compress": lambda model, data: our_cut(model, data, criterion="obs"),
}


def cut(arm: str, model: CifarResNet, dataset: Dataset) -> tuple[nn.Module, dict[str, Any]]:
    """Cut and judge; return the network and what all its rows have in common."""
    start = time.perf_counter()
    small = ARMS[arm](model, dataset)
    cut_s = time.perf_counter() - start
    facts: dict[str, Any] = {
        "arm": arm, "cut_s": round(cut_s, 2),
        "macs": macs_of(small), "macs_before": macs_of(model),
        "params": sum(p.numel() for n, p in small.named_parameters() if "_shortcut" not in n),
    }  # fmt: skip
    facts["before_top1_pct"] = answers(small, dataset).correct.mean().item() * 100
    copied = copy.deepcopy(small)
    recalibrate_batchnorm(copied, shown_batches(dataset, TRAINING, RECALIBRATE_BATCHES))
    facts["recalibrated_top1_pct"] = answers(copied, dataset).correct.mean().item() * 100
    return small, facts


def fine_tuned(
    small: nn.Module, dataset: Dataset, schedule: Schedule, lr: float, seed: int, model: nn.Module
) -> dict[str, Any]:
    """Fine-tune a copy, perhaps taught by ``model``, and judge it; return the rest of a row."""
    small = copy.deepcopy(small)
    row: dict[str, Any] = {"seed": seed, "lr": lr, **dataclasses.asdict(schedule)}
    if schedule.epochs:
        settings = TRAINING.model_copy(
            update={"epochs": schedule.epochs, "epoch_images": schedule.epoch_images, "lr": lr}
        )
        objective = build_objective(small, model, dataset, settings) if schedule.taught else None
        start = time.perf_counter()
        train(small, dataset, settings, objective=objective, seed=seed, device="cpu")
        row["train_s"] = round(time.perf_counter() - start, 1)
    final = answers(small, dataset)
    row["top1_pct"] = final.correct.mean().item() * 100
    row["correct"] = np.packbits(final.correct).tobytes().hex()
    return row


def answers(model: nn.Module, dataset: Dataset) -> Predictions:
    return predict(model, dataset.batches("test"))


def unpacked(row: dict[str, Any]) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(row["correct"]), np.uint8)).astype(bool)


def best_rate(rows: list[dict[str, Any]], arm: str) -> list[dict[str, Any]]:
    """Return the rows of one arm at the learning rate with the highest mean accuracy."""
    by_rate: dict[float, list[dict[str, Any]]] = {}
    for row in rows:
        if row["arm"] == arm:
            by_rate.setdefault(row["lr"], []).append(row)
    return max(by_rate.values(), key=lambda own: np.mean([r["top1_pct"] for r in own]), default=[])


def compare(
    rows: list[dict[str, Any]], reference: str, candidate: str, schedule: Schedule
) -> dict[str, Any] | None:
    """Compare two arms, each at its best rate, over the seeds that both have, images paired."""
    alike = [row for row in rows if Schedule.of(row) == schedule]
    found = best_rate(alike, reference), best_rate(alike, candidate)
    first, second = ({row["seed"]: unpacked(row) for row in own} for own in found)
    seeds = sorted(set(first) & set(second))
    if not seeds:
        return None
    a = np.concatenate([first[seed] for seed in seeds])
    b = np.concatenate([second[seed] for seed in seeds])
    low, high = accuracy_change_interval(a, b)
    return {
        "reference": reference,
        "candidate": candidate,
        **dataclasses.asdict(schedule),
        "lr": [own[0]["lr"] for own in found],
        "seeds": seeds,
        "gain_pct": round(100 * float(b.mean() - a.mean()), 3),
        "gain_ci95_pct": [round(100 * low, 3), round(100 * high, 3)],
        "gain_by_seed_pct": [
            round(100 * float(second[s].mean() - first[s].mean()), 2) for s in seeds
        ],
        "mcnemar_p_by_seed": [mcnemar(*lost_and_won(first[s], second[s])) for s in seeds],
    }


def lost_and_won(a: np.ndarray, b: np.ndarray) -> tuple[int, int]:
    return int((a & ~b).sum()), int((b & ~a).sum())


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    rows = result["rows"]
    lines = [
        f"# {result['network']} on CIFAR-10, cut to {KEEP_MACS:.0%} of its MACs",
        "",
        f"Uncut: {result['original_top1_pct']:.2f} %. Fine-tuning of all arms: SGD with Nesterov "
        "momentum 0.9, one-cycle to the rate given, batch 128, weight decay 5e-4, crop + flip, "
        f"{result.get('precision', 'bf16')}; where taught, the uncut network's softened answers "
        "are matched as well (kd, temperature 4, weight 1). "
        f"'compress' scores by obs on {128 * SCORING_BATCHES} training images "
        f"and fits the cut network to the uncut one on {128 * REFIT_BATCHES}, both without labels, "
        "before fine-tuning; BatchNorm's statistics are estimated from images with the same crops "
        "and flips. The peer scores by group L2 and gets the same "
        "network with padding shortcuts written as fixed 1x1 convolutions and pooling as a mean, "
        "without which it breaks it; these are not counted. 10,000 test images.",
        "",
        "| arm | taught | rate | seed | epochs x images | MACs | params | cut, s | "
        "top-1 before, % | after BatchNorm recalibration, % | after fine-tuning, % |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        share = row["macs"] / row["macs_before"]
        top1 = (row[key] for key in ("before_top1_pct", "recalibrated_top1_pct", "top1_pct"))
        cells = [
            row["arm"],
            "yes" if row.get("taught") else "no",
            row["lr"],
            row["seed"],
            Schedule.of(row).length,
            f"{share:.4f}",
            f"{row['params']:,}",
        ]
        timed = "not timed" if row["cut_s"] is None else row["cut_s"]
        cells += [timed, *(f"{value:.2f}" for value in top1)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for one in result["comparisons"]:
        low, high = one["gain_ci95_pct"]
        taught = ", taught" if one["taught"] else ""
        length = Schedule.of(one).length
        lines += [
            "",
            f"{one['candidate']} (rate {one['lr'][1]}) against {one['reference']} (rate "
            f"{one['lr'][0]}), {length} images{taught}, seeds {one['seeds']}: "
            f"{one['gain_pct']:+.2f} points of top-1, 95 % interval over paired images "
            f"{low:+.2f} to {high:+.2f}; by seed {one['gain_by_seed_pct']}.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=20, choices=sorted(CHECKPOINTS))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--epoch-images", type=int, default=50_000, help="images of an epoch")
    parser.add_argument(
        "--lr", type=float, nargs="+", default=[0.005, 0.02], help="peaks of the one-cycle schedule"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=["torch-pruning", "compress"], choices=ARMS)
    parser.add_argument("--npz", default=os.environ.get("COMPRESS_CIFAR10"))
    parser.add_argument("--data", default=os.environ.get("COMPRESS_DATA"))
    parser.add_argument("--teach", action="store_true", help="the uncut network teaches all arms")
    parser.add_argument("--add", action="store_true", help="keep the rows of earlier runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args()
    if not given.npz or not given.data:
        raise SystemExit("set COMPRESS_DATA and COMPRESS_CIFAR10, or give --data and --npz")
    dataset = load_data(DataSettings(name="npz", root=given.npz, validation=0.0))
    model = CifarResNet(given.depth, 10, 3, 16)
    file = Path(given.data) / "checkpoints" / CHECKPOINTS[given.depth]
    fit(model, read_weights(file), where=str(file))
    name = f"cifar10_pruning_resnet{given.depth}"
    file = given.out / f"{name}.json"
    rows = json.loads(file.read_text())["rows"] if given.add and file.exists() else []
    result: dict[str, Any] = {
        "network": f"ResNet-{given.depth}",
        "original_top1_pct": answers(model, dataset).correct.mean().item() * 100,
        "versions": {p: version(p) for p in ("torch", "torch-pruning", "compress")},
        "precision": chosen_precision(TRAINING.precision, torch.device("cpu")),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    }
    schedule = Schedule(given.teach, given.epochs, given.epoch_images)
    networks = {arm: cut(arm, model, dataset) for arm in given.arms}
    for seed, lr, arm in itertools.product(given.seeds, given.lr, given.arms):
        small, facts = networks[arm]
        rows.append(facts | fine_tuned(small, dataset, schedule, lr, seed, model))
        print({k: v for k, v in rows[-1].items() if k != "correct"}, flush=True)
        references = [a for a in ARMS if a != "compress"]
        found = (
            compare(rows, reference, "compress", each)
            for each in sorted({Schedule.of(row) for row in rows})
            for reference in references
        )
        result |= {"rows": rows, "comparisons": [c for c in found if c]}
        given.out.mkdir(exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")
        file.with_suffix(".md").write_text(table(result))


if __name__ == "__main__":
    main()
