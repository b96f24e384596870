"""Pairs of codes and pictures, to train generators on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress.data import Source
from compress.data._images import LabelledImages, MemoryImages
from compress.data._targets import PictureTargets
from compress.data.degraded import Derived
from compress.errors import UsageError

FITTED = 10_000  # pictures that components are taken from
AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class Codes(Derived):
    """Codes of pictures, with the pictures as targets: pairs that a generator learns from.

    A code is ``size`` principal components of a picture of the kind ``of`` (any folder of pictures
    unless told otherwise), each with a variance of 1 over the training pictures, so that Gaussian
    seeds are alike; the network takes it as (size, 1, 1). ``image_size`` is that of the pictures.
    Targets are (C, H, W) in [0, 1].

    Args:
        size: Numbers in a code.
    """

    size: int = 32

    def load(self) -> Source:
        """Return the codes.

        Raises:
            UsageError: there are fewer pictures or pixels than components.
            DataError: the pictures cannot be read.
        """
        found = self.source(self.image_size)
        mean, to_code = self._components(found.train)

        def coded(pictures: LabelledImages) -> LabelledImages:
            parts = [
                (_flat(pictures, start) - mean) @ to_code
                for start in range(0, len(pictures), AT_ONCE)
            ]
            return MemoryImages(torch.cat(parts)[:, :, None, None], PictureTargets(pictures))

        return found.changed(
            coded,
            classes=(),
            mean=(0.0,),
            std=(1 / 255,),  # as they are: ``normalize`` divides by 255
            target="image",
            prepared=True,
        )

    def _components(self, pictures: LabelledImages) -> tuple[Tensor, Tensor]:
        """Return the mean (P,) of all pixels and the matrix (P, size) that makes codes of them."""
        count, pixels = min(FITTED, len(pictures)), int(np.prod(pictures.shape))
        if not 1 <= self.size <= min(count - 1, pixels):
            raise UsageError(
                f"size {self.size}",
                where="codes",
                expected=f"1 to {min(count - 1, pixels)}: {count} pictures of {pixels} numbers",
            )
        chosen = np.linspace(0, len(pictures) - 1, count).astype(np.int64)
        values = pictures.take(chosen).flatten(1).float() / 255
        mean = values.mean(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            _, spread, axes = torch.pca_lowrank(values - mean, self.size, center=False, niter=4)
        return mean, axes / (spread / (count - 1) ** 0.5).clamp_min(1e-6)


def _flat(pictures: LabelledImages, start: int) -> Tensor:
    indices = range(start, min(start + AT_ONCE, len(pictures)))
    return pictures.take(indices).flatten(1).float() / 255
