"""What the training loop costs: ours, a usual script, and the bare computation, side by side.

    python benchmarks/loop_cost.py [--rounds 5] [--steps 40] [--threads N] [--teacher]

ResNet-20 on CIFAR-10, batch 128, random crop and flip, one precision for all. Needs
COMPRESS_CIFAR10 (cifar10.npz). Contenders alternate and the ratio is taken within each round, so
that a machine that is slower for a while is so for all of them; processor time does not depend on
what else runs. Written to benchmarks/results/loop_cost.json and .md.

- bare: forward, cross-entropy and backward of one batch that is ready in memory; nothing else.
- ours: ``compress.train.train``, from the call to the return.
- usual: a script in the manner of torchvision's references: a DataLoader that transforms images one
  by one, SGD, a schedule.
- distilled (--teacher): ours with a ResNet-56 as the teacher and the dkd loss; compared to bare
  plus that teacher's bare forward pass.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress import environment
from compress.data import Dataset
from compress.data._images import MemoryImages
from compress.models.cifar import resnet20, resnet56
from compress.recipe.settings import AugmentSettings, DistillSettings, TrainSettings
from compress.train import train
from compress.train.distill import build_objective
from compress.train.state import autocast, chosen_precision

RESULTS = Path(__file__).parent / "results"
BATCH = 128
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LIMIT = 1.15  # of bare, for ours

Work = Callable[[], Any]


def cifar(images: int) -> Dataset:
    with np.load(os.environ["COMPRESS_CIFAR10"]) as arrays:
        pixels = torch.from_numpy(arrays["x_train"][:images].transpose(0, 3, 1, 2).copy())
        labels = arrays["y_train"][:images].reshape(-1).astype(np.int64)
    found = MemoryImages(pixels, labels)
    few = MemoryImages(pixels[:1], labels[:1])
    return Dataset(
        "cifar10", tuple(map(str, range(10))), MEAN, STD, {"train": found, "test": few}, BATCH
    )


def settings(kind: type[TrainSettings], **more: Any) -> Any:
    augment = AugmentSettings(crop_padding=4, flip=True)
    return kind(epochs=1, batch_size=BATCH, lr=0.1, augment=augment, **more)


def network() -> nn.Module:
    torch.manual_seed(0)
    return resnet20().to(memory_format=torch.channels_last).train()


def bare(steps: int, precision: str) -> Work:
    """Forward and backward alone."""
    model = network()
    images = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    target = torch.arange(BATCH) % 10

    def work() -> None:
        for _ in range(steps):
            with autocast(precision, torch.device("cpu")):
                loss = F.cross_entropy(model(images).float(), target)
            model.zero_grad()
            loss.backward()

    return work


def bare_teacher(steps: int, precision: str) -> Work:
    """A ResNet-56's forward pass alone."""
    model = resnet56().to(memory_format=torch.channels_last).eval()
    images = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)

    def work() -> None:
        for _ in range(steps):  # leaving autocast forgets converted weights, as each step does
            with torch.no_grad(), autocast(precision, torch.device("cpu")):
                model(images)

    return work


def ours(dataset: Dataset, precision: str) -> Work:
    """One epoch of our loop, from the call to the return."""
    chosen, model = settings(TrainSettings, precision=precision), network()
    return lambda: train(model, dataset, chosen, device="cpu")


def distilled(dataset: Dataset, precision: str) -> Work:
    """One epoch of our loop with a teacher."""
    chosen, student = settings(DistillSettings, precision=precision, losses=("dkd",)), network()
    objective = build_objective(student, resnet56(), dataset, chosen)
    return lambda: train(student, dataset, chosen, objective=objective, device="cpu")


class PerImage(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images one by one, transformed as torchvision's references do."""

    def __init__(self, dataset: Dataset) -> None:
        from torchvision.transforms import v2

        images = dataset.splits["train"]
        self.pixels, self.labels = images.take(range(len(images))), images.labels
        self.transform = v2.Compose(
            [
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.pixels[index]), int(self.labels[index])


def usual(dataset: Dataset, precision: str) -> Work:
    """A script in the manner of torchvision's references, one epoch."""
    loader = torch.utils.data.DataLoader(PerImage(dataset), BATCH, shuffle=True, drop_last=True)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(loader))

    def work() -> None:
        for images, target in loader:
            images = images.contiguous(memory_format=torch.channels_last)
            with autocast(precision, torch.device("cpu")):
                loss = F.cross_entropy(model(images).float(), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    return work


def seconds(work: Work) -> tuple[float, float]:
    """Return the time ``work`` takes on the wall's clock and on the processor's."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(rounds: int, steps: int, precision: str, with_teacher: bool) -> dict[str, Any]:
    dataset = cifar(steps * BATCH)
    contenders: dict[str, Callable[[], Work]] = {
        "bare": lambda: bare(steps, precision),
        "ours": lambda: ours(dataset, precision),
        "usual": lambda: usual(dataset, precision),
    }
    if with_teacher:
        contenders["teacher's forward"] = lambda: bare_teacher(steps, precision)
        contenders["distilled"] = lambda: distilled(dataset, precision)
    for make in contenders.values():
        make()()  # warm-up
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            times[name].append(seconds(contenders[name]()))
            print(f"round {number + 1}: {name} {times[name][-1]}", flush=True)
    rows = [row(name, times, steps * BATCH) for name in contenders]
    return {"rows": rows, "seconds_wall_and_processor": times}


def row(name: str, times: dict[str, list[tuple[float, float]]], images: int) -> dict[str, Any]:
    """Return the median rate of one contender, and its cost over what it should cost."""
    against = ["bare", "teacher's forward"] if name == "distilled" else ["bare"]
    found: dict[str, Any] = {"loop": name, "against": " + ".join(against)}
    for kind, clock in enumerate(("wall", "processor")):
        mine = [pair[kind] for pair in times[name]]
        floor = [sum(times[other][i][kind] for other in against) for i in range(len(mine))]
        ratios = [a / b for a, b in zip(mine, floor, strict=True)]
        found[f"images_per_second_{clock}"] = images / statistics.median(mine)
        found[f"cost_{clock}"] = statistics.median(ratios)
    return found


def markdown(found: dict[str, Any]) -> str:
    rounds = len(found["seconds_wall_and_processor"]["bare"])
    lines = [
        f"ResNet-20, CIFAR-10, batch {BATCH}, crop and flip, {found['precision']}, "
        f"{found['threads']} thread(s), {found['steps']} steps, median of {rounds} rounds.",
        "",
        "| loop | images/s | time | processor time | against |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['loop']} | {r['images_per_second_wall']:.0f} | {r['cost_wall']:.3f} "
        f"| {r['cost_processor']:.3f} | {r['against']} |"
        for r in found["rows"]
    ]
    cost = next(r for r in found["rows"] if r["loop"] == "ours")
    held = [k for k in ("wall", "processor") if cost[f"cost_{k}"] <= LIMIT]
    verdict = f"holds for {' and '.join(held)} time" if held else "does not hold"
    return "\n".join([*lines, "", f"Ours at most {LIMIT} times bare: {verdict}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--teacher", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    precision = chosen_precision(given.precision, torch.device("cpu"))
    found = measure(given.rounds, given.steps, precision, given.teacher)
    found |= {"precision": precision, "threads": given.threads, "steps": given.steps}
    found["environment"] = environment.describe_machine()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "loop_cost.json").write_text(json.dumps(found, indent=2) + "\n")
    (RESULTS / "loop_cost.md").write_text(markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
