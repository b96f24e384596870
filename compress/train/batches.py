"""Which images make up each step, for every process: a pure function of seed, epoch and step."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.data import Dataset, targets_of
from compress.data._augment import CHANCES, augment, augment_with_labels, mixed
from compress.data._images import LabelledImages, shuffled
from compress.errors import CompressError, TrainingError
from compress.recipe.settings import TrainSettings

PREFETCHED = 4  # batches that each decoding process works ahead


@dataclass(frozen=True)
class Batch:
    """The share of one process in a step."""

    images: Tensor  # (B, C, H, W) uint8, as stored
    target: Any  # (B,) int64, or what else the task's targets are
    index: Tensor  # (B,) int64, positions in the train split
    chances: Tensor  # (B, CHANCES) uniform numbers in [0, 1) that augmentation reads
    total: int  # images in this step over all processes


def steps_in_epoch(dataset: Dataset, settings: TrainSettings) -> int:
    """Return the steps of an epoch; the incomplete last batch is dropped."""
    there = len(dataset.splits["train"])
    return max(1, min(there, settings.epoch_images or there) // settings.batch_size)


def train_batches(
    dataset: Dataset,
    settings: TrainSettings,
    epoch: int,
    seed: int,
    *,
    rank: int = 0,
    world: int = 1,
    skip: int = 0,
) -> Iterator[Batch]:
    """Yield the batches of one epoch that fall to process ``rank`` of ``world``.

    A step takes the same images, changed in the same way, however many processes share it. The
    epoch, counted from 0, and the seed of the training decide the order; ``skip`` steps are done
    already.

    Raises:
        TrainingError: there are fewer images in a step than processes.
    """
    images = dataset.splits["train"]
    steps = steps_in_epoch(dataset, settings)
    order = permutation(images, seed, epoch)
    size = min(settings.batch_size, len(order))
    if size < world:
        raise TrainingError(
            f"{size} images in a step cannot be shared by {world} processes",
            where="batch_size",
            expected=f"at least {world}",
        )
    fixed = _chances(len(images), seed) if settings.augment.fixed else None
    wholes = [order[step * size : (step + 1) * size] for step in range(skip, steps)]
    parts = [np.array_split(whole, world)[rank] for whole in wholes]
    for step, (part, pixels) in enumerate(zip(parts, _taken(images, parts), strict=True), skip):
        if fixed is None:
            chances = _chances(size, seed, epoch, step)
            chances = torch.tensor_split(chances, world)[rank]
        else:
            chances = fixed[torch.from_numpy(part)]
        target = targets_of(images, part)
        yield Batch(pixels, target, torch.from_numpy(part), chances, size)


def training_view(
    images: Tensor, target: Any, chances: Tensor, dataset: Dataset, settings: TrainSettings
) -> tuple[Tensor, Any]:
    """Return stored images, (B, C, H, W) uint8, as training shows them: augmented, normalized.

    Targets are (B,) int64, (B, K) several classes, (B, H, W) masks, or boxes of each image; classes
    become (B, K) where images are mixed. ``chances`` are (B, CHANCES) uniform numbers in [0, 1).
    """
    if dataset.target in {"mask", "boxes", "image"}:
        images, target = augment_with_labels(
            images, target, chances, settings.augment, dataset.normalize
        )
    else:
        images = augment(images, chances, settings.augment, dataset.normalize)
        images, target = mixed(images, target, chances, settings.augment, len(dataset.classes))
    return images, target


def on_device(target: Any, device: torch.device) -> Any:
    """Return targets on ``device``: a tensor, or a dictionary of tensors for each image."""
    if isinstance(target, Tensor):
        return target.to(device, non_blocking=True)
    return [{key: value.to(device) for key, value in each.items()} for each in target]


def shown_batches(
    dataset: Dataset, settings: TrainSettings, count: int, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``count`` batches as training with ``settings`` shows them, or fewer if it is short."""
    batches = train_batches(dataset, settings, 0, seed)
    for batch in itertools.islice(batches, count):
        yield training_view(batch.images, batch.target, batch.chances, dataset, settings)


def permutation(images: LabelledImages, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of images in an epoch, (N,)."""
    return shuffled(images, np.random.default_rng([seed, epoch, 0]))


def seed_of(*numbers: int) -> int:
    """Return one seed for a position such as (seed, epoch, step, rank)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def _chances(count: int, *position: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed_of(*position))
    return torch.rand((count, CHANCES), generator=generator)


def _taken(images: LabelledImages, parts: list[NDArray[np.int64]]) -> Iterable[Tensor]:
    """Return the images of every part in turn, decoded ahead by processes where asked for."""
    workers = getattr(images, "workers", 0) or getattr(
        getattr(images, "images", None), "workers", 0
    )
    if not workers:
        return (images.take(part) for part in parts)
    from torch.utils.data import DataLoader

    loader: DataLoader[Any] = DataLoader(
        _Taking(images, parts),  # type: ignore[arg-type]  # a map from position to batch
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCHED,
        pin_memory=torch.cuda.is_available(),
    )
    return _received(loader)


def _received(batches: Iterable[Any]) -> Iterator[Tensor]:
    """Yield what the decoding processes send."""
    try:
        for batch in batches:
            if isinstance(batch, CompressError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TrainingError(
            f"a process that decodes images has ended: {str(error).splitlines()[0]}",
            where="data.workers",
            fix="Where memory ran out, set fewer workers or a smaller batch_size; a run goes on "
            "from its last checkpoint",
        ) from None


@dataclass(frozen=True)
class _Taking:
    images: LabelledImages
    parts: list[NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, position: int) -> Tensor | CompressError:
        try:
            return self.images.take(self.parts[position])
        except CompressError as error:  # raised here it would come as a traceback in a text
            return error
